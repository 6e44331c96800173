"""The whole method on real scans of handwritten digits, on a CPU: train, measure, report.

Called by quickstart.sh, which makes the environment first. Running it again resumes, or says what is
already done.
"""

import argparse
import base64
import contextlib
import dataclasses
import html
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import cot, pretrain, unigrpo, vq
from launch import benchmark_rl, fail, keep_memory, keep_programs
from mmada_jax.data import digits
from mmada_jax.disk import write_whole
from mmada_jax.files import read_json
from mmada_jax.measure import evaluate
from mmada_jax.nets.vq import to_uint8
from mmada_jax.serve.api import MMaDA
from mmada_jax.tokens.tokenizer import split_thought
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
FULL_FLOORS = {
    "tokenizer": {"reconstructed_digit": 0.97},
    "pretrain": {"vqa_one": 0.85, "vqa_two": 0.6, "t2i_one": 0.95, "t2i_two": 0.7, "inpaint": 0.75},
    "cot": {"vqa_sum": 0.5, "text_cot": 0.8, "r2i_image": 0.75, "t2i_one": 0.95},
    "unigrpo": {"text_cot_sampled": 0.7, "t2i_one_unguided": 0.9},
}
HELP = {"full": "more steps and cases: what docs/results.md quotes", "fast": "fewer steps and cases"}
FORMS = {
    "default": form("digits", Cases(100, 200), {}),
    "full": form("digits,full", Cases(300, 400), FULL_FLOORS),
    "fast": form("digits,fast", Cases(50, 50), {"pretrain": {"vqa_one": 0.3, "t2i_one": 0.4}}),
}


def main(argv: Sequence[str] | None = None, forms: Mapping[str, Form] = FORMS) -> None:
    """Train the image tokenizer and the three stages, measure on what was held out, write the report.

    `argv` are the words after the program's name; `forms` have one called "default"."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/quickstart", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of every stage (%(default)s)")
    group = parser.add_mutually_exclusive_group()
    for name in sorted(forms.keys() - {"default"}):
        group.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=HELP[name])
    parser.set_defaults(form="default")
    args = parser.parse_args(argv)
    workdir, form = pathlib.Path(args.workdir), forms[args.form]
    claim(workdir, {"form": args.form, "seed": args.seed})
    finish(workdir, run(workdir, form, args.seed), form.floors)


def run(workdir: pathlib.Path, form: Form, seed: int) -> dict:
    """Trains and measures what isn't yet, and writes the report; what was measured."""
    report = workdir / "report.json"
    if report.is_file():
        print(f"{workdir}: everything is done already")
        return read_json(report, dict, keys=("stages",))
    # At this size programs that LLVM optimises less are as fast, and compile in three quarters of the time.
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {os.environ.get('XLA_FLAGS', '')}"
    keep_memory()
    keep_programs()

    # ---- Train: nothing that is done is done again -------------------------------------------------
    for number, (name, what) in enumerate(STAGES.items(), 1):
        print(f"\n[{number}/5] {what}", flush=True)
        config = form.stages[name].copy_and_resolve_references()
        config.seed = seed
        with clock(workdir, name):
            train_to_the_end(config, workdir / name)

    # ---- Measure and report ------------------------------------------------------------------------
    print("\n[5/5] held-out scans (359 that no model has seen) and sums", flush=True)
    with clock(workdir, "evaluate"):
        n, n_sampled = form.cases
        model = MMaDA.load(workdir / "pretrain")
        result, pictures = measure(model, n)
        of_stages, config = result["stages"], form.stages["unigrpo"]
        of_stages["cot_before"], pictures["before"] = before_thoughts(model, n, of_stages["pretrain"])
        model = MMaDA.load(workdir / "cot")
        of_stages["cot"], pictures["after"] = measure_thoughts(model, n)
        known = {
            name: evaluate.Count(**of_stages["cot"][name]) for name in ("text_cot", "vqa_sum", "t2i_one")
        }
        of_stages["unigrpo_before"], pictures["rl_before"] = benchmark_rl.measure(
            model, config, n_sampled, label="before: ", known=known
        )
        model = MMaDA.load(workdir / "unigrpo")
        of_stages["unigrpo"], pictures["rl_after"] = benchmark_rl.measure(model, config, n_sampled, few=n)
        rows = metrics.read(workdir / "unigrpo" / "metrics.jsonl")
        benchmark_rl.curves({config.objective.masking: [rows]}).savefig(
            workdir / "rewards.png", dpi=90, bbox_inches="tight"
        )
    result["seconds"] = read_json(workdir / "seconds.json", dict)
    result["data_wait"] = max(map(data_wait, (workdir / run for run in ("pretrain", "cot"))))
    results(pictures).save(workdir / "results.png")
    write_whole(workdir / "report.html", page(workdir, result, pictures))
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


@contextlib.contextmanager
def clock(workdir: pathlib.Path, name: str):
    """Adds the seconds of the block to WORKDIR/seconds.json: a resumed run counts all of its parts."""
    start, path = time.perf_counter(), workdir / "seconds.json"
    seconds = read_json(path, dict) if path.is_file() else {}
    try:
        yield
    finally:
        seconds[name] = round(seconds.get(name, 0) + time.perf_counter() - start, 1)
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(seconds))


def measure(model: MMaDA, n: int) -> tuple[dict, dict]:
    """All metrics, and what there is to look at."""
    judge = evaluate.Judge()
    rebuilt, psnr, canvases = evaluate.reconstruction(model, judge, n)
    pictures = {"rebuilt": canvases}
    stage = {}

    def note(name, count):
        stage[name] = dataclasses.asdict(count)
        print(f"  {name}: {count}", flush=True)

    print(f"  judge: {judge.held_out()}\n  reconstructed_digit: {rebuilt}, PSNR {psnr:.1f} dB", flush=True)
    for name, k in (("one", 1), ("two", 2)):
        count, pictures[f"read_{name}"] = evaluate.read_digits(model, k, n)
        note(f"vqa_{name}", count)
    for name, k in (("one", 1), ("two", 2)):
        count, *pictures[f"drawn_{name}"] = evaluate.draw_digits(model, judge, k, n)
        note(f"t2i_{name}", count)
    count, pictures["inpaint"] = evaluate.inpaint_half(model, judge, n)
    note("inpaint", count)
    count, pictures["arithmetic"] = evaluate.arithmetic(model, n)
    note("text_arithmetic", count)
    pictures["image_steps"], pictures["text_steps"] = strips(model, canvases)
    tokenizer = {"reconstructed_digit": dataclasses.asdict(rebuilt), "psnr_db": round(psnr, 2)}
    judged = dataclasses.asdict(judge.held_out())
    return {"judge": judged, "stages": {"tokenizer": tokenizer, "pretrain": stage}}, pictures


def before_thoughts(model: MMaDA, n: int, stage: dict) -> tuple[dict, dict]:
    """What stage 1 already knows of the metrics of stage 2: those of its own are taken from `stage`."""
    count, texts = evaluate.text_cot(model, n)
    print(f"  before: text_cot: {count}", flush=True)
    known = {name: stage[name] for name in ("t2i_one", "vqa_two")}
    return known | {"text_cot": dataclasses.asdict(count)}, {"text_cot": texts}


def measure_thoughts(model: MMaDA, n: int) -> tuple[dict, dict]:
    """The metrics of stage 2, and what there is to look at."""
    judge, stage, pictures = evaluate.Judge(), {}, {}
    counts = {}
    counts["vqa_sum"], pictures["vqa_sum"] = evaluate.vqa_sum(model, n)
    counts["text_cot"], pictures["text_cot"] = evaluate.text_cot(model, n)
    drawn, *pictures["r2i"] = evaluate.draw_sums(model, judge, n)
    counts |= drawn
    counts["t2i_one"], *_ = evaluate.draw_digits(model, judge, 1, n)
    counts["vqa_two"], _ = evaluate.read_digits(model, 2, n)
    for name, count in counts.items():
        stage[name] = dataclasses.asdict(count)
        print(f"  {name}: {count}", flush=True)
    return stage, pictures


def data_wait(workdir: pathlib.Path) -> float:
    """The share of a run's time that was spent waiting for data."""
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if "data_wait" in row]
    return sum(row["data_wait"] for row in rows) / len(rows)


def strips(model: MMaDA, canvases: np.ndarray) -> tuple[list, list]:
    """Denoising step by step: one image (hidden tokens grey), one text (hidden tokens as blanks)."""
    drawings = model.watch(model.draw_job(digits.caption(3, 5), evaluate.DRAW))
    images = [model.pixels(drawing.image) for drawing in drawings]
    scans = digits.load("test")
    texts = model.watch(model.answer_job(digits.canvas(*scans.pixels[:2]), digits.ASK_TWO))
    return images, [text.text for text in texts]


# ---- The report ------------------------------------------------------------------------------------


def finish(workdir: pathlib.Path, result: dict, floors: Mapping[str, Mapping[str, float]]) -> None:
    """Prints the table, where the report is, and which floors were missed. Exits with 1 if most were: one
    or two say less of this run than of the machine, whose rounding makes every run another one."""
    print("\n" + "\n".join(f"{name:32}{value}" for name, value in table(result)))
    print(f"\nreport: {(workdir / 'report.html').absolute()}")
    held = [(stage, name, floor) for stage, of in floors.items() for name, floor in of.items()]
    missed = [
        f"  {stage} {name}: {evaluate.Count(**count)}, the floor is {floor:.0%}"
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
    rows = [(name, str(evaluate.Count(**count))) for name, count in counts.items()]
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
    return " -> ".join(str(evaluate.Count(**stage[name])) for stage in (before, after) if name in stage)


def page(workdir: pathlib.Path, result: dict, pictures: dict) -> str:
    """report.html, self-contained."""
    scans = digits.load("test")
    cells = "".join(f"<tr><td>{name}<td>{html.escape(value)}" for name, value in table(result))
    real = [digits.canvas(scan) for scan in scans.pixels[:12]]
    one, wanted_one = pictures["drawn_one"]
    two, wanted_two = pictures["drawn_two"]
    hole = pictures["inpaint"]
    holes = [np.where(m[..., None], 0, c) for m, c in zip(hole["masks"], hole["canvases"], strict=True)]
    columns = [
        figure(holes[i], "") + figure(hole["pixels"][i], "")
        + figure(hole["canvases"][i], digits.caption(*hole["labels"][i]))
        for i in range(8)
    ]  # fmt: skip
    read = pictures["read_one"][:6] + pictures["read_two"][:10]
    sums = "".join(
        f"<li>{html.escape(q)}: {html.escape(a)}" + ("" if a == w else f" <i>(is {w})</i>")
        for q, a, w in pictures["arithmetic"][:12]
    )
    after = pictures["after"]
    thoughts = "".join(
        f"<li>{html.escape(q)}: {html.escape(said)}"
        + ("" if split_thought(said)[1] == want else f" <i>(is {want})</i>")
        for q, said, want in after["text_cot"][:12]
    )
    before_thoughts = "".join(
        f"<li>{html.escape(q)}: {html.escape(said)}" for q, said, _ in pictures["before"]["text_cot"][:3]
    )
    looked = [
        figure(canvas, said + ("" if split_thought(said)[1] == want else f" (is {want})"))
        for canvas, said, want in after["vqa_sum"][:16]
    ]
    thought_drawn, asked = after["r2i"]
    beside = zip(real, pictures["rebuilt"][:12], strict=True)
    drawn_one = zip(one[:20], wanted_one[:20], strict=True)
    drawn_two = zip(two[3:100:5], wanted_two[3:100:5], strict=True)
    rewarded = [
        f"<li>{html.escape(question)}: {html.escape(before)} before, {html.escape(after)} after"
        + ("" if split_thought(after)[1] == want else f" <i>(is {want})</i>")
        for (question, before, want), (_, after, _) in zip(
            pictures["rl_before"]["sums"], pictures["rl_after"]["sums"], strict=True
        )
        if before != after
    ][:20]
    undrawn = [
        "".join(
            figure(p, digits.caption(*d))
            for p, d in zip(*(x[:20] for x in pictures[when]["drawn"]), strict=True)
        )
        for when in ("rl_before", "rl_after")
    ]
    sections = [
        ("Results on held-out scans", f"<table>{cells}</table>"),
        ("Loss", curves(workdir)),
        ("Reconstructions: scan, decoded", row(figure(a, "") + figure(b, "") for a, b in beside)),
        ("Drawn, one digit", row(figure(p, digits.caption(*d)) for p, d in drawn_one)),
        ("Drawn, two digits", row(figure(p, digits.caption(*d)) for p, d in drawn_two)),
        ("Inpainted: what is given, what was redrawn, the scan", row(columns)),
        ("Read", row(figure(c, a + ("" if a == w else f" (is {w})")) for c, a, w in read)),
        ("Arithmetic", f"<ul>{sums}</ul>"),
        ("Stage 2: sums in steps", f"<ul>{thoughts}</ul>Before it: <ul>{before_thoughts}</ul>"),
        ("Stage 2: the sum of two digits", row(looked)),
        (
            "Stage 2: thought, then drawn",
            row(figure(p, f"{q}: {t}") for p, (q, t) in zip(thought_drawn[:20], asked[:20], strict=True)),
        ),
        ("Stage 3: rewards", inline(Image.open(workdir / "rewards.png"))),
        ("Stage 3: sums at temperature 1 that changed", f"<ul>{''.join(rewarded)}</ul>"),
        ("Stage 3: drawn without guidance, before and after", "<br>".join(undrawn)),
        (f"Drawing {digits.caption(3, 5)!r}", row(figure(p, "") for p in pictures["image_steps"])),
        ("Reading, step by step", f"<pre>{html.escape(chr(10).join(pictures['text_steps']))}</pre>"),
    ]
    body = "".join(f"<h2>{html.escape(title)}</h2>{content}" for title, content in sections)
    style = (
        "body{font:15px sans-serif;max-width:1000px;margin:2em auto}figure{display:inline-block;margin:4px;"
        "vertical-align:top}img{display:block}figcaption{font-size:11px;max-width:128px}"
        "td{padding:2px 12px;border-bottom:1px solid #ddd}"
    )
    title = "mmada_jax: handwritten digits"
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style>"
    return f"{head}<h1>{title}</h1>{body}"


def results(pictures: dict) -> Image.Image:
    """The report in one picture: drawn ones, drawn twos, inpaintings (given above redrawn), steps."""
    hole = pictures["inpaint"]
    given = [np.where(m[..., None], 0, c) for m, c in zip(hole["masks"], hole["canvases"], strict=True)]
    steps = pictures["image_steps"]
    rows = [
        pictures["drawn_one"][0][:10],
        [
            pictures["drawn_two"][0][i]
            for i in np.linspace(3, len(pictures["drawn_two"][0]) - 1, 10).astype(int)
        ],
        given[:10],
        hole["pixels"][:10],
        [steps[i * (len(steps) - 1) // 9] for i in range(10)],
    ]
    tiles = [np.concatenate([np.pad(p[..., 0], 1, constant_values=-0.5) for p in r], axis=1) for r in rows]
    image = Image.fromarray(to_uint8(np.concatenate(tiles)))
    return image.resize((5 * image.width, 5 * image.height), Image.Resampling.NEAREST)


def row(figures) -> str:
    """Figures side by side."""
    return "<div>" + "".join(f"<span style='display:inline-block'>{f}</span>" for f in figures) + "</div>"


def figure(pixels: np.ndarray, label: str) -> str:
    """A canvas as an inline PNG, eight times enlarged."""
    image = Image.fromarray(to_uint8(pixels)[..., 0])
    image = image.resize((8 * image.width, 8 * image.height), Image.Resampling.NEAREST)
    return f"<figure>{inline(image)}<figcaption>{html.escape(label)}</figcaption></figure>"


def curves(workdir: pathlib.Path) -> str:
    """The losses of the runs over the steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3))
    for axis, run in zip(axes, ("image_tokenizer", "pretrain", "cot"), strict=True):
        rows = metrics.read(workdir / run / "metrics.jsonl")
        names = [n for n in rows[0] if n == "reconstruction" or n.startswith("loss_")]
        for name in names:
            axis.plot([r["step"] for r in rows], [r[name] for r in rows], label=name)
        axis.set(title=run, xlabel="step", yscale="log")
        axis.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90, bbox_inches="tight")
    pyplot.close(figure)
    return inline(Image.open(buffer))


def inline(image: Image.Image) -> str:
    """An <img> that holds its own bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"<img src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        fail(error)
