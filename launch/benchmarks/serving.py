"""Times the engine against one request after the other, and guided drawing against guidance now and then.

Parts of `mmada bench decode`.
"""

import dataclasses
import time
from typing import Any

import numpy as np

from launch.benchmarks import timing
from mmada_jax.diffusion.decode import Job
from mmada_jax.diffusion.rules import PRESETS, ImageRule
from mmada_jax.progress import progress
from mmada_jax.serve.api import MMaDA
from mmada_jax.serve.engine import Engine
from mmada_jax.tokens import layout

# Drawings of a model with random weights: tokens of text and of the picture, steps, guidance.
MAX_TEXT, N_IMAGE = 32, 256
ROWS = 4


def through_engine(model: MMaDA, job: Job, repeats: int, technique: str) -> dict[str, Any]:
    """The rows of a job in as many slots, and one after the other in one slot.

    Seconds of both in turns, their ratio, whether all tokens are the same, and the share of the slots that
    were idle while rows waited."""
    n, tokens = len(job.start_B), {}
    engines = {"together": Engine(model, slots=n), "one by one": Engine(model, slots=1)}

    def run(name):
        tokens[name] = engines[name].run(job)

    runs = {name: lambda name=name: run(name) for name in engines}
    with progress(f"{n} requests by {technique}", len(engines) * repeats, "calls") as bar:
        times = timing.take_turns(runs, repeats, 1, called=lambda _: bar.update(1))
    equal = all(np.array_equal(*pair) for pair in zip(*tokens.values(), strict=True))
    counters = engines["together"].counters
    return {
        "rows": n,
        "seconds": times,
        "ratio": times["one by one"]["median"] / times["together"]["median"],
        "equal": equal,
        "idle": counters["idle"] / max(1, counters["steps"] * n),
    }


def first_token(model: MMaDA, job: Job, plain: Job, repeats: int) -> dict[str, float]:
    """The seconds from a request of one row to its first token on a warm engine, and the seconds of a step
    of plain decoding, which computes the whole row: medians, and how many such steps the former takes."""

    def moments(of, n):
        """When the request was made, and when its first n steps were shown."""
        engine, seen = Engine(model, slots=1), [time.perf_counter()]
        told = lambda ticket: seen.append(time.perf_counter())  # noqa: E731
        [ticket] = engine.submit(of, progress=told, every="step")
        while len(seen) <= n and not ticket.over:
            engine.turn()
        return np.diff(seen)

    times = [(moments(job, 1)[0], moments(plain, 4)[1:].min()) for _ in range(repeats + 1)]
    first, step = np.median(times[1:], axis=0)
    return {"seconds": float(first), "step": float(step), "steps": float(first / step)}


def drawing(model: MMaDA, repeats: int) -> dict[str, Any] | None:
    """Guided drawings, their unconditional row in every step, and as often as the preset "fast" has it:
    seconds of both in turns, and their ratio. None for a model of text alone."""
    if not model.vocab.codebook_size:
        return None
    plain = model.defaults.image
    plain = dataclasses.replace(plain, guidance=plain.guidance or ImageRule().guidance)
    rules = {"plain": plain, "fast": dataclasses.replace(plain, **PRESETS["image"]["fast"])}

    def job(rule):
        if model.vq_config:
            return model.draw_job(["a picture"] * ROWS, rule)
        rng = np.random.default_rng(0)
        texts = rng.integers(model.vocab.image_offset // 2, model.vocab.image_offset, (ROWS, MAX_TEXT // 2))
        rows = [layout.t2i_generation(model.vocab, text.tolist(), N_IMAGE, MAX_TEXT) for text in texts]
        other = layout.stack([layout.drop_condition(model.vocab, row, MAX_TEXT) for row in rows])
        start_B, length_B = np.full((2, ROWS), [[MAX_TEXT + 2], [N_IMAGE]])
        return Job(layout.stack(rows), start_B, length_B, N_IMAGE, rule, other)

    jobs = {name: job(rule) for name, rule in rules.items()}
    runs = {name: lambda of=of: model.run(of) for name, of in jobs.items()}
    times = timing.take_turns(runs, repeats, 1)
    return {
        "rows": ROWS,
        "tokens": jobs["plain"].length,
        "steps": rules["plain"].steps,
        "guide_every": rules["fast"].guide_every,
        "seconds": times,
        "ratio": times["plain"]["median"] / times["fast"]["median"],
    }
