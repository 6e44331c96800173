"""What UniGRPO does to a model of the digits: trained with several seeds and maskings, measured before and
after on held-out cases.

    mmada bench rl --init runs/quickstart/cot --workdir runs/benchmark_rl

Trains configs/unigrpo.py:digits,full as it is, but for the masking and the seed, and writes the table
(report.md), all counts (report.json) and the rewards over the iterations (rewards.png). What is done
already isn't done again, so that several of these, each with seeds of its own, can share a workdir; the
report is of the seeds and maskings that were asked for, so ask for all of them in the end.
"""

import argparse
import dataclasses
import io
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping

import numpy as np

from configs import unigrpo as config_file
from mmada_jax.data import digits
from mmada_jax.diffusion.rules import ImageRule
from mmada_jax.files import read_json
from mmada_jax.measure import digits as measured
from mmada_jax.serve.api import MMaDA
from mmada_jax.storage import write_whole
from mmada_jax.train import metrics
from mmada_jax.train.rl.loop import train
from mmada_jax.train.rl.rewards.functions import Combined
from mmada_jax.weights.manifest import fingerprint
from mmada_jax.weights.workdir import check_workdir, claim_workdir, has_step, newest_step

# Cases of a metric that isn't sampled as in a rollout.
MOST = 400
TASKS = ("arithmetic", "drawing")
CAVEAT = (
    "p is two-sided, of the pooled test for two proportions, as if all cases were independent: the seeds "
    "share their questions, and the greedy answers of the model before are counted once for each of them."
)
COUNTS = ("text_cot_sampled", "text_cot", "vqa_sum", "t2i_one_unguided", "t2i_one")


def measure(args: argparse.Namespace) -> dict[str, dict[int, tuple[dict, dict]]]:
    """Trains and measures what isn't yet, and writes the report. Counts and rewards by masking and seed,
    before and after."""
    workdir, start = pathlib.Path(args.workdir), MMaDA.load(args.init)
    made_of = {
        "model": fingerprint(newest_step(args.init) if has_step(args.init) else args.init),
        "config": config_file.get_config("digits,full").to_dict(),
    }
    check_workdir(workdir, made_of, ("model", "config"))
    claim_workdir(workdir, made_of)
    name = f"{args.split}-{args.n}.json"
    for masking, seed in itertools.product(args.maskings, args.seeds):
        config = config_file.get_config("digits,full")
        config.init = str(pathlib.Path(args.init).absolute())
        config.objective.masking, config.seed = masking, seed
        folder = workdir / f"{masking}-{seed}"
        before = workdir / f"before-{seed}-{name}"
        print(f"{masking}, seed {seed}", flush=True)
        if not before.is_file():
            result, _ = measure_model(start, config, args.n, args.split, seed)
            write_whole(before, json.dumps(result, indent=1))
        if not (folder / name).is_file():
            began = time.perf_counter()
            train_to_the_end(config, folder)
            seconds = time.perf_counter() - began
            result, _ = measure_model(MMaDA.load(folder), config, args.n, args.split, seed)
            write_whole(folder / name, json.dumps(result | {"seconds": round(seconds, 1)}, indent=1))

    # ---- Report -------------------------------------------------------------------------------------
    results = {
        masking: {
            seed: (
                read_json(workdir / f"before-{seed}-{name}", dict),
                read_json(workdir / f"{masking}-{seed}" / name, dict),
            )
            for seed in args.seeds
        }
        for masking in args.maskings
    }
    write_whole(workdir / "report.json", json.dumps(results, indent=1))
    write_whole(workdir / "report.md", as_text(results) + "\n")
    rewards = {
        masking: [metrics.read(workdir / f"{masking}-{seed}" / "metrics.jsonl") for seed in args.seeds]
        for masking in args.maskings
    }
    write_curves(workdir / "rewards.png", rewards)
    print(f"{workdir.absolute()}: report.md, report.json, rewards.png", flush=True)
    return results


def train_to_the_end(config, workdir) -> None:
    """Trains; a SIGTERM on the way ends the program when that is saved."""
    if int(train(config, workdir).step) < config.iterations * config.objective.mu:
        sys.exit(143)  # as a shell has it for SIGTERM


def measure_model(
    model: MMaDA,
    config,
    n: int,
    split: str = "test",
    seed: int = 0,
    label: str = "",
    few: int = MOST,
    known: Mapping[str, dict] | None = None,
) -> tuple[dict, dict]:
    """Counts of `n` held-out cases by metric, at most `few` where nothing is sampled as in a rollout, and
    the mean reward of each task; then what there is to look at: sampled (question, text, answer), pixels
    of unguided drawings with the digits asked for. Of the latter metrics those in `known` are taken from
    there: they were measured already.

    text_cot           sums of four digits, greedy; text_cot_sampled at temperature 1, as in a rollout
    vqa_sum            the sum of two scans, thought first, which the training doesn't ask for
    t2i_one            a digit drawn with guidance, in as many steps as elsewhere
    t2i_one_unguided   without guidance, in as few steps as in a rollout
    rewards            of the sampled sums and of the unguided drawings, as the training gives them
    """
    judge, few = measured.Judge(), min(n, few)
    counts = {name: measured.Count(**count) for name, count in (known or {}).items()}
    if not known:
        counts["text_cot"] = measured.text_cot(model, min(few, len(digits.chains(split))), split, seed)[0]
        counts["vqa_sum"] = measured.vqa_sum(model, few, split, seed)[0]
        counts["t2i_one"] = measured.draw_digits(model, judge, 1, few, seed)[0]
    counts["text_cot_sampled"], rows = measured.text_cot(model, n, split, seed, temperature=1.0)
    rule = ImageRule(**config.tasks.drawing.image)
    counts["t2i_one_unguided"], pixels, wanted = measured.draw_digits(model, judge, 1, n, seed, rule)
    prompts, texts, answers = zip(*rows, strict=True)
    captions = [digits.caption(*row) for row in wanted]
    rewards = {}
    for task, cases in (
        ("arithmetic", (prompts, texts, None, answers)),
        ("drawing", (captions, [""] * n, pixels)),
    ):
        with Combined(config.tasks[task].rewards.to_dict()) as combined:
            rewards[task] = float(np.mean(combined(*cases)[0]))
    for name in COUNTS:
        print(f"  {label}{name}: {counts[name]}", flush=True)
    result = {name: dataclasses.asdict(counts[name]) for name in COUNTS} | {"rewards": rewards}
    return result, {"sums": rows, "drawn": (pixels, wanted)}


def two_proportions(before: tuple[int, int], after: tuple[int, int]) -> tuple[float, float]:
    """(z, two-sided p) of the pooled test for two proportions, each (correct, total)."""
    (x, n), (y, m) = before, after
    share = (x + y) / (n + m)
    deviation = math.sqrt(share * (1 - share) * (1 / n + 1 / m))
    z = (y / m - x / n) / deviation if deviation else 0.0
    return z, math.erfc(abs(z) / math.sqrt(2))


def as_text(results: dict[str, dict[int, tuple[dict, dict]]]) -> str:
    """The table, and what its p means."""
    return "\n".join([*table(results), "", CAVEAT])


def table(results: dict[str, dict[int, tuple[dict, dict]]]) -> list[str]:
    """Markdown: a row for each run, before -> after, and for each masking one with all its seeds."""
    heads = [*(f"reward, {task}" for task in TASKS), *COUNTS]
    lines = ["| masking | seed | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for masking, runs in results.items():
        for seed, (before, after) in runs.items():
            cells = [f"{before['rewards'][task]:.3f} -> {after['rewards'][task]:.3f}" for task in TASKS]
            cells += [
                f"{before[name]['correct']} -> {after[name]['correct']} of {after[name]['total']}"
                for name in COUNTS
            ]
            lines.append(f"| {masking} | {seed} | " + " | ".join(cells) + " |")
        means = np.mean([[[x["rewards"][t] for t in TASKS] for x in run] for run in runs.values()], axis=0)
        cells = [f"{before:.3f} -> {after:.3f}" for before, after in means.T]
        for name in COUNTS:
            pairs = [
                tuple(sum(run[i][name][key] for run in runs.values()) for key in ("correct", "total"))
                for i in (0, 1)
            ]
            z, p = two_proportions(*pairs)
            shares = [f"{100 * x / n:.1f}" for x, n in pairs]
            cells.append(f"{shares[0]} -> {shares[1]} % (z {z:+.1f}, p {p:.1g})")
        lines.append(f"| **{masking}** | all | " + " | ".join(cells) + " |")
    return lines


def write_curves(path: pathlib.Path, rewards: dict[str, list[list[dict]]]) -> None:
    """Writes the figure of `curves` as a PNG, whole or not at all."""
    buffer = io.BytesIO()
    curves(rewards).savefig(buffer, dpi=90, bbox_inches="tight")
    write_whole(path, buffer.getvalue())


def curves(rewards: dict[str, list[list[dict]]]):
    """A figure: the reward of each task over the iterations, a thin line for each run, a thick one for the
    mean of a masking over its seeds and over five of the task's iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(TASKS), 4))
    for axis, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for i, (masking, runs) in enumerate(rewards.items()):
            points = [
                [(r["step"], r[f"{task}/reward"]) for r in run if f"{task}/reward" in r] for run in runs
            ]
            for of_run in points:
                axis.plot(*zip(*of_run, strict=True), color=f"C{i}", lw=0.4, alpha=0.5)
            if not all(points):
                continue
            shortest = min(map(len, points))
            mean = np.mean([[reward for _, reward in of_run[:shortest]] for of_run in points], axis=0)
            width = min(5, len(mean))
            smooth = np.convolve(mean, np.ones(width) / width, "valid")
            steps = [step for step, _ in points[0]][width // 2 :][: len(smooth)]
            axis.plot(steps, smooth, color=f"C{i}", lw=2, label=masking)
        axis.set(title=f"{task}: mean reward of the rollouts", xlabel="iteration")
        axis.legend(fontsize=8)
    return figure
