"""What a model is worth on handwritten digits, with intervals: no GPU and no download needed.

    mmada bench digits --model runs/quickstart/unigrpo
    mmada bench digits --model runs/quickstart/pretrain --cases 100

Reading, drawing, inpainting and arithmetic on held-out scans, and what stage 2 teaches: sums of scans,
sums with a thought, drawings with a thought. Any model folder is taken; one that has learned nothing of
it answers nothing right.
"""

import argparse
import dataclasses
from typing import Any

from mmada_jax.measure import digits as measured
from mmada_jax.progress import progress
from mmada_jax.serve.api import MMaDA
from mmada_jax.weights import lazy
from mmada_jax.weights.folder import open_folder


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Counts of each task, with 95 % intervals of the shares."""
    model, judge, n = MMaDA.load(args.model), measured.Judge(), args.cases
    tasks = {
        "read one digit": lambda: measured.read_digits(model, 1, n)[0],
        "read two digits": lambda: measured.read_digits(model, 2, n)[0],
        "draw one digit": lambda: measured.draw_digits(model, judge, 1, n)[0],
        "draw two digits": lambda: measured.draw_digits(model, judge, 2, n)[0],
        "redraw a half": lambda: measured.inpaint_half(model, judge, n)[0],
        "arithmetic in words": lambda: measured.arithmetic(model, n)[0],
        "sums of two scans": lambda: measured.vqa_sum(model, n)[0],
        "sums with a thought": lambda: measured.text_cot(model, n)[0],
    }
    counts = {}
    with progress("measuring", len(tasks), "tasks") as bar:
        for name, count in tasks.items():
            counts[name] = count()
            bar.update(1)
    source = open_folder(args.model)
    return {
        "model": str(source.path), "sha256": lazy.sha256(source.tensors()), "step": source.step,
        "counts": {
            name: dataclasses.asdict(count) | {"interval": count.interval} for name, count in counts.items()
        },
    }  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['model']}, sha256 {report['sha256'][:16]}, shares in per cent, 95 % intervals"]
    for name, of in report["counts"].items():
        share, (low, high) = of["correct"] / of["total"], of["interval"]
        within = f"({100 * low:.1f} to {100 * high:.1f})"
        lines.append(f"{name:22}{of['correct']:5} of {of['total']:5}{100 * share:8.1f}  {within}")
    return "\n".join(lines)
