"""The stages of the quickstart: each is trained and measured, and all together have a report."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import cot, pretrain, unigrpo, vq
from launch.benchmarks import rl as benchmark_rl
from mmada_jax.data.images import png_of
from mmada_jax.files import read_json
from mmada_jax.measure import digits as measured
from mmada_jax.measure.report import curves, denoising, page, results
from mmada_jax.serve.api import MMaDA
from mmada_jax.storage import write_whole
from mmada_jax.train import metrics
from mmada_jax.train.rl import loop as rl
from mmada_jax.train.supervised import train


class Cases(NamedTuple):
    """Held-out cases of a metric, `sampled` where answers are drawn as in a rollout of stage 3."""

    each: int
    sampled: int


class Form(NamedTuple):
    """How the quickstart is run: the configuration of each stage by the name of its folder, what is
    measured, and the least share of right cases by stage and metric."""

    stages: Mapping[str, ConfigDict]
    cases: Cases
    floors: Mapping[str, Mapping[str, float]]


def form(preset: str, cases: Cases, floors: Mapping[str, Mapping[str, float]]) -> Form:
    """The stages of a preset of the digits, each of which begins with the one before."""
    stages = {
        "image_tokenizer": vq.get_config(preset),
        "pretrain": pretrain.get_config(preset),
        "cot": cot.get_config(preset),
        "unigrpo": unigrpo.get_config(preset),
    }
    stages["pretrain"].image_tokenizer = stages["cot"].image_tokenizer = "../image_tokenizer"
    stages["cot"].update(init="../pretrain", text_vocab=0)
    stages["unigrpo"].init = "../cot"
    return Form(stages, cases, floors)


# What is printed when a stage begins.
STAGES = {
    "image_tokenizer": "image tokenizer: scans -> 32 codes of 6 bits",
    "pretrain": "stage 1: one model for reading, drawing, inpainting and arithmetic",
    "cot": "stage 2: it learns to think before it answers or draws",
    "unigrpo": "stage 3: UniGRPO, sums and drawing without guidance, by reward alone",
}
# Shares that one run exceeded.
FULL_FLOORS = {
    "tokenizer": {"reconstructed_digit": 0.97},
    "pretrain": {"vqa_one": 0.85, "vqa_two": 0.6, "t2i_one": 0.95, "t2i_two": 0.7, "inpaint": 0.75},
    "cot": {"vqa_sum": 0.5, "text_cot": 0.8, "r2i_image": 0.75, "t2i_one": 0.95},
    "unigrpo": {"text_cot_sampled": 0.7, "t2i_one_unguided": 0.9},
}
# The least of five seeds less three standard errors (`mmada bench seeds`; docs/results.md has the means).
DEFAULT_FLOORS = {
    "tokenizer": {"reconstructed_digit": 0.93},
    "pretrain": {"vqa_one": 0.64, "vqa_two": 0.39, "t2i_one": 0.67, "t2i_two": 0.29, "inpaint": 0.54},
    "cot": {
        "vqa_sum": 0.44, "text_cot": 0.4, "r2i_thought": 0.52, "r2i_image": 0.38, "t2i_one": 0.62,
        "vqa_two": 0.36,
    },
    "unigrpo": {
        "text_cot_sampled": 0.27, "text_cot": 0.38, "vqa_sum": 0.4, "t2i_one_unguided": 0.65,
        "t2i_one": 0.78,
    },
}  # fmt: skip
FAST_FLOORS = {"tokenizer": {"reconstructed_digit": 0.86}, "pretrain": {"vqa_one": 0.17}}
FORMS = {
    "default": form("digits", Cases(100, 200), DEFAULT_FLOORS),
    "full": form("digits,full", Cases(300, 400), FULL_FLOORS),
    "fast": form("digits,fast", Cases(40, 40), FAST_FLOORS),
}


def complete(workdir: pathlib.Path, name: str, seed: int, forms: Mapping[str, Form] = FORMS) -> None:
    """Trains and measures what isn't yet, by the form of that name, and ends as `finish` does."""
    form = forms[name]
    claim(workdir, {"form": name, "seed": seed})
    finish(workdir, run(workdir, form, seed), form.floors)


def run(workdir: pathlib.Path, form: Form, seed: int) -> dict:
    """Trains and measures what isn't yet, and writes the report; what was measured."""
    report = workdir / "report.json"
    if report.is_file():
        print(f"{workdir}: everything is done already")
        return read_json(report, dict, keys=("stages",))

    # ---- Train: nothing that is done is done again -------------------------------------------------
    for number, (name, what) in enumerate(STAGES.items(), 1):
        print(f"\n[{number}/5] {what}", flush=True)
        config = form.stages[name].copy_and_resolve_references()
        config.seed = seed
        train_to_the_end(config, workdir / name)

    # ---- Measure and report ------------------------------------------------------------------------
    print("\n[5/5] held-out scans (359 that no model has seen) and sums", flush=True)
    histories, start = read_histories(workdir), time.perf_counter()
    result, pictures = measure_stages(workdir, form)
    result["seconds"] = {name: round(rows[-1]["wall_seconds"], 1) for name, rows in histories.items()}
    result["seconds"]["evaluate"] = round(time.perf_counter() - start, 1)
    result["data_wait"] = max(data_wait(histories[name]) for name in ("pretrain", "cot"))
    write_whole(workdir / "results.png", png_of(results(pictures)))
    write_whole(workdir / "report.html", page(result, pictures, curves(histories)))
    write_whole(report, json.dumps(result, indent=1))
    return result


def claim(workdir: pathlib.Path, what: dict[str, Any]) -> None:
    """Notes in the workdir by which form and seed it is made. Raises ValueError if it has other runs."""
    path = workdir / "quickstart.json"
    held = read_json(path, dict) if path.is_file() else None
    if held is None and any((workdir / name).exists() for name in STAGES):
        held = "an older version's"
    if held not in (None, what):
        raise ValueError(f"{workdir} holds the runs of {held}, not of {what}; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(what))


def train_to_the_end(config, workdir):
    """Trains one stage; a SIGTERM on the way ends the program when that is saved."""
    if config.program == "rl":
        done = int(rl.train(config, workdir).step) >= config.iterations * config.objective.mu
    else:
        done = int(train(config, workdir).step) >= config.steps
    if not done:
        sys.exit(143)  # as a shell has it for SIGTERM


def read_histories(workdir: pathlib.Path) -> dict[str, list[dict[str, float]]]:
    """The metrics of each stage, which count the seconds of all of its parts, however these ended. Raises
    ValueError where a stage has lost them."""
    histories = {}
    for name in STAGES:
        path = workdir / name / "metrics.jsonl"
        histories[name] = metrics.read(path)
        if not histories[name]:
            raise ValueError(
                f"{path} has no rows to report; put it back, or remove its folder to train again"
            )
    return histories


def measure_stages(workdir: pathlib.Path, form: Form) -> tuple[dict, dict]:
    """What is measured of the trained stages, and what there is to look at."""
    n, n_sampled = form.cases
    model = MMaDA.load(workdir / "pretrain")
    result, pictures = measure(model, n)
    of_stages, config = result["stages"], form.stages["unigrpo"]
    of_stages["cot_before"], pictures["before"] = before_thoughts(model, n, of_stages["pretrain"])
    model = MMaDA.load(workdir / "cot")
    of_stages["cot"], pictures["after"] = measure_thoughts(model, n)
    known = {name: of_stages["cot"][name] for name in ("text_cot", "vqa_sum", "t2i_one")}
    of_stages["unigrpo_before"], pictures["rl_before"] = benchmark_rl.measure_model(
        model, config, n_sampled, label="before: ", known=known
    )
    model = MMaDA.load(workdir / "unigrpo")
    of_stages["unigrpo"], pictures["rl_after"] = benchmark_rl.measure_model(model, config, n_sampled, few=n)
    return result, pictures


def measure(model: MMaDA, n: int) -> tuple[dict, dict]:
    """All metrics, and what there is to look at."""
    judge = measured.Judge()
    rebuilt, psnr, canvases = measured.reconstruction(model, judge, n)
    pictures = {"rebuilt": canvases}
    stage = {}

    def note(name, count):
        stage[name] = dataclasses.asdict(count)
        print(f"  {name}: {count}", flush=True)

    print(f"  judge: {judge.held_out()}\n  reconstructed_digit: {rebuilt}, PSNR {psnr:.1f} dB", flush=True)
    for name, k in (("one", 1), ("two", 2)):
        count, pictures[f"read_{name}"] = measured.read_digits(model, k, n)
        note(f"vqa_{name}", count)
    for name, k in (("one", 1), ("two", 2)):
        count, *pictures[f"drawn_{name}"] = measured.draw_digits(model, judge, k, n)
        note(f"t2i_{name}", count)
    count, pictures["inpaint"] = measured.inpaint_half(model, judge, n)
    note("inpaint", count)
    count, pictures["arithmetic"] = measured.arithmetic(model, n)
    note("text_arithmetic", count)
    pictures["image_steps"], pictures["text_steps"] = denoising(model)
    tokenizer = {"reconstructed_digit": dataclasses.asdict(rebuilt), "psnr_db": round(psnr, 2)}
    judged = dataclasses.asdict(judge.held_out())
    return {"judge": judged, "stages": {"tokenizer": tokenizer, "pretrain": stage}}, pictures


def before_thoughts(model: MMaDA, n: int, stage: dict) -> tuple[dict, dict]:
    """What stage 1 already knows of the metrics of stage 2: those of its own are taken from `stage`."""
    count, texts = measured.text_cot(model, n)
    print(f"  before: text_cot: {count}", flush=True)
    known = {name: stage[name] for name in ("t2i_one", "vqa_two")}
    return known | {"text_cot": dataclasses.asdict(count)}, {"text_cot": texts}


def measure_thoughts(model: MMaDA, n: int) -> tuple[dict, dict]:
    """The metrics of stage 2, and what there is to look at."""
    judge, stage, pictures = measured.Judge(), {}, {}
    counts = {}
    counts["vqa_sum"], pictures["vqa_sum"] = measured.vqa_sum(model, n)
    counts["text_cot"], pictures["text_cot"] = measured.text_cot(model, n)
    drawn, *pictures["r2i"] = measured.draw_sums(model, judge, n)
    counts |= drawn
    counts["t2i_one"], *_ = measured.draw_digits(model, judge, 1, n)
    counts["vqa_two"], _ = measured.read_digits(model, 2, n)
    for name, count in counts.items():
        stage[name] = dataclasses.asdict(count)
        print(f"  {name}: {count}", flush=True)
    return stage, pictures


def data_wait(history: Sequence[Mapping[str, float]]) -> float:
    """The share of a run's time that was spent waiting for data, of its metrics."""
    shares = [row["data_wait"] for row in history if "data_wait" in row]
    return sum(shares) / len(shares)


# ---- The end ----------------------------------------------------------------------------------------


def finish(workdir: pathlib.Path, result: dict, floors: Mapping[str, Mapping[str, float]]) -> None:
    """Prints the table, where the report is, and which floors were missed. Exits with 1 if most were: one
    or two say less of this run than of the machine, whose rounding makes every run another one."""
    print("\n" + "\n".join(f"{name:32}{value}" for name, value in table(result)))
    print(f"\nreport: {(workdir / 'report.html').absolute()}")
    print(f'see it draw: pip install -e ".[page]" && mmada page --model {workdir / "unigrpo"}')
    held = [(stage, name, floor) for stage, of in floors.items() for name, floor in of.items()]
    missed = [
        f"  {stage} {name}: {measured.Count(**count)}, the floor is {floor:.0%}"
        for stage, name, floor in held
        if (count := result["stages"][stage][name])["correct"] < floor * count["total"]
    ]
    if missed:
        print(f"\n{len(missed)} of {len(held)} floors were missed:", *missed, sep="\n")
    if 2 * len(missed) > len(held):
        sys.exit("error: most of what this run should reach was missed: something is wrong")


def table(result: dict) -> list[tuple[str, str]]:
    """Rows (metric, value)."""
    tokenizer, model = result["stages"]["tokenizer"], result["stages"]["pretrain"]
    counts = {"judge": result["judge"], "reconstructed_digit": tokenizer["reconstructed_digit"], **model}
    rows = [(name, str(measured.Count(**count))) for name, count in counts.items()]
    rows.insert(2, ("psnr_db", str(tokenizer["psnr_db"])))
    before, after = result["stages"]["cot_before"], result["stages"]["cot"]
    rows += [(f"stage 2, {name}", change(before, after, name)) for name in after]
    before, after = result["stages"]["unigrpo_before"], result["stages"]["unigrpo"]
    rows += [(f"stage 3, {name}", change(before, after, name)) for name in benchmark_rl.COUNTS]
    rows += [
        (f"stage 3, reward of {task}", f"{before['rewards'][task]:.3f} -> {reward:.3f}")
        for task, reward in after["rewards"].items()
    ]
    rows.append(("waiting for data", f"{result['data_wait']:.2%} of the time of stages 1 and 2"))
    return rows + [(f"seconds, {name}", str(s)) for name, s in result["seconds"].items()]


def change(before: dict, after: dict, name: str) -> str:
    """The count of a metric, behind the one before where that is known."""
    return " -> ".join(str(measured.Count(**stage[name])) for stage in (before, after) if name in stage)
