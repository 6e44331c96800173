"""What a model of one's own pictures is worth, on pictures that it hasn't seen.

    mmada bench own --model runs/fashion --train fashion/train --test fashion/test
    mmada bench own --model runs/four --test four/test/questions.jsonl

TEST is what configs/own.py reads. Where it holds conversations, their questions are asked, and answers are
counted that are letter by letter the ones that are there. Where pictures have names, they are named, drawn
and redrawn. The judge of the drawings is scikit-learn's support vector machine on the pixels of 10,000
pictures in TRAIN; how well it names the same pictures is told beside the model. `half_grey` is what it
reads before the half is redrawn.
"""

import argparse
import dataclasses
import time

from mmada_jax.data import sources
from mmada_jax.measure import own
from mmada_jax.measure.digits import Count
from mmada_jax.serve.api import MMaDA
from mmada_jax.train.own import look, resize_of, source_of


def measure(args: argparse.Namespace) -> dict:
    """The counts by metric; writes the sheet of drawings. Raises ValueError where the judge needs TRAIN."""
    began = time.perf_counter()
    test = sources.open_source(sources.SourceConfig(**source_of(args.test)))
    model, how = MMaDA.load(args.model), resize_of(look(test).sides)
    if test[0].turns:
        counts = own.answer_questions(model, test, args.n, args.seed, how)
    elif not args.train:
        raise ValueError("drawings are judged by what a judge has learned: --train names its pictures")
    else:
        train = sources.open_source(sources.SourceConfig(**source_of(args.train)))
        counts, sheet = own.measure(model, train, test, args.n, args.each, args.seed, how)
        if args.sheet:
            sheet.resize((2 * sheet.width, 2 * sheet.height), 0).save(args.sheet)
    return {
        "counts": {name: dataclasses.asdict(count) for name, count in counts.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }


def as_text(report: dict) -> str:
    """A line for each metric."""
    width = max(map(len, (*report["counts"], "seconds"))) + 2
    lines = [f"{name:{width}}{Count(**count)}" for name, count in report["counts"].items()]
    return "\n".join([*lines, f"{'seconds':{width}}{report['seconds']}"])
