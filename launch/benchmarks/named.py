"""What a model of one's own pictures is worth, where these have names: naming, drawing, redrawing a half.

    mmada bench named --model runs/fashion --train fashion/train --test fashion/test

TRAIN and TEST are folders with a folder for each name, or whatever configs/own.py reads. The judge of the
drawings is scikit-learn's support vector machine on the pixels of 10,000 training pictures; how well it
names the same pictures is told beside the model. `half_grey` is what it reads before the half is redrawn.
"""

import argparse
import dataclasses
import json
import time

from mmada_jax.data import sources
from mmada_jax.measure import named
from mmada_jax.measure.digits import Count
from mmada_jax.serve.api import MMaDA
from mmada_jax.train.own import source_of


def measure(args: argparse.Namespace) -> dict:
    """The counts by metric; writes the sheet of drawings."""
    began = time.perf_counter()
    model = MMaDA.load(args.model)
    opened = [
        sources.open_source(sources.SourceConfig(**source_of(path))) for path in (args.train, args.test)
    ]
    counts, sheet = named.measure(model, *opened, args.n, args.each, args.seed)
    if args.sheet:
        sheet.resize((2 * sheet.width, 2 * sheet.height), 0).save(args.sheet)
    return {
        "counts": {name: dataclasses.asdict(count) for name, count in counts.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }


def as_text(report: dict) -> str:
    """A line for each metric."""
    lines = [f"{name:16}{Count(**count)}" for name, count in report["counts"].items()]
    return "\n".join([*lines, f"seconds         {json.dumps(report['seconds'])}"])
