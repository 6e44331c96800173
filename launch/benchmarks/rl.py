"""What UniGRPO does to a model: trained with several seeds and maskings, measured before and after on
held-out cases. A masking may change fields of the objective too: `unigrpo:hidden=(0.6,1)`.

    mmada bench rl --init runs/quickstart/cot --workdir runs/benchmark_rl
    mmada bench rl --preset totals --init runs/totals_short --workdir runs/benchmark_totals

Trains a configuration of configs/unigrpo.py as it is, but for the masking, the seed and what --set says.
Writes the tables (report.md), all counts (report.json), the gains with their intervals (gains.png) and the
rewards over the iterations (rewards.png). What is done already isn't done again, so that several of these,
each with seeds of its own, can share a workdir; the report is of the seeds and maskings that were asked
for, so ask for all of them in the end.
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
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from configs import unigrpo as config_file
from mmada_jax.config import from_dict, override, to_dict
from mmada_jax.data import digits
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.files import read_json
from mmada_jax.measure import digits as measured
from mmada_jax.measure import totals
from mmada_jax.serve.api import MMaDA
from mmada_jax.storage import write_whole
from mmada_jax.train import metrics
from mmada_jax.train.rl.loop import train
from mmada_jax.train.rl.prompts import PromptsConfig, open_prompts
from mmada_jax.train.rl.rewards.functions import Combined
from mmada_jax.train.rl.run import RLRun
from mmada_jax.weights.manifest import fingerprint
from mmada_jax.weights.workdir import check_workdir, claim_workdir, has_step, newest_step

# Cases of a metric that isn't sampled as in a rollout.
MOST = 400
CAVEAT = (
    "Gains are in points of a hundred, with the 95 % interval of the mean over the seeds by Student's t. A "
    "seed is what varies, not a case: the cases of one trained model rise and fall together. p is that of "
    "the paired t test with Holm's correction for all maskings of a column."
)
# Masking -> seed -> counts and rewards, before and after.
Results = Mapping[str, Mapping[int, tuple[dict, dict]]]
COUNTS = ("text_cot_sampled", "text_cot", "vqa_sum", "t2i_one_unguided", "t2i_one")


def measure(args: argparse.Namespace) -> Results:
    """Trains and measures what isn't yet, and writes the report. Counts and rewards by masking and seed,
    before and after."""
    preset = config_file.get_config(args.preset)
    override(preset, dict(args.set))
    preset = complete(preset)
    seeds, maskings = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.maskings))
    configs = {masking: changed(preset, masking) for masking in maskings}
    workdir, start = pathlib.Path(args.workdir), MMaDA.load(args.init)
    made_of = {
        "model": fingerprint(newest_step(args.init) if has_step(args.init) else args.init),
        "config": preset.to_dict(),
    }
    measured_by = measure_totals if args.preset == "totals" else measure_model
    check_workdir(workdir, made_of, ("model", "config"))
    claim_workdir(workdir, made_of)
    n, few = args.n, min(args.n, args.few)
    name = f"{args.split}-{n}-{few}.json"
    # All maskings of a seed before the next one, since what is compared are the runs of one seed.
    for seed, masking in itertools.product(seeds, maskings):
        config = configs[masking].copy_and_resolve_references()
        config.init, config.seed = str(pathlib.Path(args.init).absolute()), seed
        folder = workdir / f"{masking}-{seed}"
        before = workdir / f"before-{seed}-{name}"
        print(f"{masking}, seed {seed}", flush=True)
        if not before.is_file():
            result, _ = measured_by(start, config, n, args.split, seed, few=few)
            write_whole(before, json.dumps(result, indent=1))
        if not (folder / name).is_file():
            began = time.perf_counter()
            train_to_the_end(config, folder)
            seconds = time.perf_counter() - began
            result, _ = measured_by(MMaDA.load(folder), config, n, args.split, seed, few=few)
            write_whole(folder / name, json.dumps(result | {"seconds": round(seconds, 1)}, indent=1))

    # ---- Report -------------------------------------------------------------------------------------
    results = {
        masking: {
            seed: (
                read_json(workdir / f"before-{seed}-{name}", dict),
                read_json(workdir / f"{masking}-{seed}" / name, dict),
            )
            for seed in seeds
        }
        for masking in maskings
    }
    write_whole(workdir / "report.json", json.dumps(results, indent=1))
    write_whole(workdir / "report.md", as_text(results) + "\n")
    rewards = {
        masking: [metrics.read(workdir / f"{masking}-{seed}" / "metrics.jsonl") for seed in seeds]
        for masking in maskings
    }
    write_figure(workdir / "rewards.png", curves(rewards))
    write_figure(workdir / "gains.png", intervals(results))
    print(f"{workdir.absolute()}: report.md, report.json, rewards.png, gains.png", flush=True)
    return results


def changed(preset: ConfigDict, variant: str) -> ConfigDict:
    """The configuration with the masking of `MASKING[:FIELD=VALUE...]` and these values of fields of the
    objective, or of `ahead`. Raises ValueError for what can't be."""
    masking, *changes = variant.split(":")
    config = preset.copy_and_resolve_references()
    config.objective.masking = masking
    fields = (one.partition("=") for one in changes)
    try:
        override(
            config, {name if name == "ahead" else f"objective.{name}": text for name, _, text in fields}
        )
        return complete(config)
    except ValueError as error:
        raise ValueError(f"{variant}: {error}") from None


def complete(config: ConfigDict) -> ConfigDict:
    """The configuration with the values of all fields, each of its own type. Raises ValueError for what
    can't be."""
    return ConfigDict(to_dict(from_dict(RLRun, config.to_dict())))


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

    text_cot           sums of four digits, greedy; text_cot_sampled as in a rollout
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
    sums = config.tasks.arithmetic
    rule = TextRule(**sums.text)
    counts["text_cot_sampled"], rows = measured.text_cot(model, n, split, seed, rule, sums.max_new)
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


def measure_totals(
    model: MMaDA, config, n: int, split: str = "test", seed: int = 0, few: int = MOST
) -> tuple[dict, list[str]]:
    """Counts of `n` held-out long sums of one round, and the mean reward; then the sampled answers.

    totals_sampled   the last total, as in a rollout
    chains_sampled   the answer as a whole, all totals, of the same answers
    totals, chains   greedy, of at most `few`
    """
    counts, answers = {}, []
    task = config.tasks.totals
    for suffix, of_rule, cases in (("_sampled", {}, n), ("", {"temperature": 0.0}, min(n, few))):
        rule = TextRule(**task.text.to_dict() | of_rule)
        outcome = totals.chains(model, cases, int(task.data.path), rule, task.max_new, split, seed)
        for name, right_B in (("totals", outcome.total_B), ("chains", outcome.chain_B)):
            counts[name + suffix] = measured.Count(int(right_B.sum()), cases)
        answers = answers or outcome.answers
    asked = open_prompts(PromptsConfig(task.data.path, "totals", split, count=n))
    questions, wanted = [prompt.text for prompt in asked], [prompt.answer for prompt in asked]
    with Combined(task.rewards.to_dict()) as combined:
        reward = float(np.mean(combined(questions, answers, None, wanted)[0]))
    for name, count in counts.items():
        print(f"  {name}: {count}", flush=True)
    result = {name: dataclasses.asdict(count) for name, count in counts.items()}
    return result | {"rewards": {"totals": reward}}, answers


@dataclasses.dataclass(frozen=True)
class Gain:
    """A mean over seeds with its 95 % interval by Student's t and p, two-sided, that it is 0: NaN for one
    seed, and for seeds that all brought the same. `p_holm` is p with Holm's correction for all gains
    that it was looked at with."""

    of_seeds: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float
    p_holm: float = math.nan

    def __str__(self):
        if math.isnan(self.low):
            return f"{100 * self.mean:+.1f}"
        p = f", p {self.p_holm:.2g}" if self.p_holm == self.p_holm else ""
        return f"{100 * self.mean:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f}{p})"


def gain(of_seeds: Sequence[float]) -> Gain:
    """The mean of what seeds brought. Of one seed, and of seeds that all brought the same, a t test says
    nothing."""
    from scipy import stats

    x, n = np.asarray(of_seeds, float), len(of_seeds)
    mean = float(x.mean())
    if n < 2 or np.ptp(x) < 1e-12:  # shares are divided, and rounded
        return Gain(tuple(x.tolist()), mean, math.nan, math.nan, math.nan)
    error = float(x.std(ddof=1) / math.sqrt(n))
    half = error * float(stats.t.ppf(0.975, n - 1))
    p = 2 * stats.t.sf(abs(mean) / error, n - 1)
    return Gain(tuple(x.tolist()), mean, mean - half, mean + half, float(p))


def holm(gains: Mapping[str, Gain]) -> dict[str, Gain]:
    """The same gains with p corrected for their number (Holm 1979). One without p counts, as the least
    likely of all."""
    known = {name: of.p for name, of in gains.items() if not math.isnan(of.p)}
    least, found = 0.0, dict(gains)
    for i, name in enumerate(sorted(known, key=known.get)):
        least = max(least, min(1.0, (len(gains) - i) * known[name]))
        found[name] = dataclasses.replace(gains[name], p_holm=least)
    return found


def gains(results: Results, against: str = "") -> dict[str, dict[str, Gain]]:
    """Metric -> masking -> what the training brought, as shares of right cases, paired by seeds: after less
    before, or where a masking is named after less what that one has after. A seed has the same prompts in
    the same order under all maskings, and is measured on the same cases with the same draws."""

    def share(masking, seed, metric, i):
        count = results[masking][seed][i][metric]
        return count["correct"] / count["total"]

    found = {}
    for metric in metrics_of(results):
        of_maskings = {
            masking: gain(
                [
                    share(masking, seed, metric, 1)
                    - (share(against, seed, metric, 1) if against else share(masking, seed, metric, 0))
                    for seed in runs
                ]
            )
            for masking, runs in results.items()
            if masking != against
        }
        found[metric] = holm(of_maskings)
    return found


def metrics_of(results: Results) -> list[str]:
    """The names of what was counted."""
    before, _ = next(iter(next(iter(results.values())).values()))
    return [name for name in before if name not in ("rewards", "seconds")]


def as_text(results: Results) -> str:
    """The tables, and what they mean."""
    baseline = "exact" if "exact" in results else next(iter(results))
    lines = [*table(results), "", f"After, less what `{baseline}` has after:", ""]
    lines += ["| masking | " + " | ".join(metrics_of(results)) + " |"]
    lines += ["|---" * (len(metrics_of(results)) + 1) + "|"]
    differences = gains(results, baseline)
    for masking in results:
        if masking != baseline:
            cells = [str(of_maskings[masking]) for of_maskings in differences.values()]
            lines.append(f"| {masking} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", CAVEAT])


def table(results: Results) -> list[str]:
    """Markdown: a row for each run, before -> after, and for each masking one with all its seeds."""
    names, of_all = metrics_of(results), gains(results)
    tasks = list(next(iter(next(iter(results.values())).values()))[0]["rewards"])
    heads = [*(f"reward, {task}" for task in tasks), *names]
    lines = ["| masking | seed | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for masking, runs in results.items():
        for seed, (before, after) in runs.items():
            cells = [f"{before['rewards'][task]:.3f} -> {after['rewards'][task]:.3f}" for task in tasks]
            cells += [
                f"{before[name]['correct']} -> {after[name]['correct']} of {after[name]['total']}"
                for name in names
            ]
            lines.append(f"| {masking} | {seed} | " + " | ".join(cells) + " |")
        means = np.mean([[[x["rewards"][t] for t in tasks] for x in run] for run in runs.values()], axis=0)
        cells = [f"{before:.3f} -> {after:.3f}" for before, after in means.T]
        cells += [str(of_all[name][masking]) for name in names]
        lines.append(f"| **{masking}** | all | " + " | ".join(cells) + " |")
    return lines


def write_figure(path: pathlib.Path, figure) -> None:
    """Writes a figure as a PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90, bbox_inches="tight")
    write_whole(path, buffer.getvalue())


def intervals(results: Results):
    """A figure: what each masking brought of each metric that has all cases, in points of a hundred: the
    mean over seeds with its 95 % interval, and the seeds as dots."""
    from matplotlib.figure import Figure

    before, _ = next(iter(next(iter(results.values())).values()))
    most = max(before[metric]["total"] for metric in metrics_of(results))
    found = {metric: of for metric, of in gains(results).items() if before[metric]["total"] == most}
    figure = Figure(figsize=(3.4 * len(found) + 1, 0.42 * len(results) + 1.4))
    axes = np.atleast_1d(figure.subplots(1, len(found), sharey=True))
    for axis, (metric, of_maskings) in zip(axes, found.items(), strict=True):
        for i, (masking, of) in enumerate(of_maskings.items()):
            axis.plot([100 * x for x in of.of_seeds], [i] * len(of.of_seeds), ".", color=f"C{i}", alpha=0.4)
            axis.plot([100 * of.low, 100 * of.high], [i, i], color=f"C{i}", lw=2)
            axis.plot(100 * of.mean, i, "o", color=f"C{i}", label=masking)
        axis.axvline(0, color="grey", lw=0.8)
        axis.set(title=metric, xlabel="points gained")
        axis.set_yticks(range(len(of_maskings)), of_maskings)
    axes[0].invert_yaxis()
    return figure


def curves(rewards: dict[str, list[list[dict]]]):
    """A figure: the reward of each task over the iterations, a thin line for each run, a thick one for the
    mean of a masking over its seeds and over five of the task's iterations."""
    from matplotlib.figure import Figure

    tasks = sorted({name[:-7] for runs in rewards.values() for run in runs for row in run for name in row
                    if name.endswith("/reward")})  # fmt: skip
    figure = Figure(figsize=(6.5 * len(tasks), 4))
    for axis, task in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks, strict=True):
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
