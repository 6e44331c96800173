"""Held-out cases of text that a program can judge: what a model is asked, whether its answers are right,
and whether two ways of decoding differ on the same cases."""

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Task(NamedTuple):
    """Cases of one kind. `questions` gives the first n held-out ones whose answers have up to so many new
    tokens, `is_right` judges the answer to a question."""

    questions: Callable[[int, int], list[str]]
    is_right: Callable[[str, str], bool]


# Format of a source of conversations (a data.lm_chat of a configuration) -> the task that it trains.
TASKS: dict[str, Task] = {}


def task_of(folder: pathlib.Path) -> tuple[str, Task] | None:
    """The task that the model of a workdir was trained on, by name. None if no program judges it."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    sources = ((values.get("data") or {}).get("lm_chat") or {}).values()
    found = [source["format"] for source in sources if source.get("format") in TASKS]
    return (found[0], TASKS[found[0]]) if found else None


class Comparison(NamedTuple):
    """Cases that only the first of two ways has right, those that only the second has, and the two-sided p
    of McNemar's exact test: how likely counts as unequal are if a case is as likely of either kind."""

    only_first: int
    only_second: int
    p: float


def compare(first_B: Sequence[bool], second_B: Sequence[bool]) -> Comparison:
    """McNemar's exact test. The arguments say which cases are right, in the same order."""
    first_B, second_B = np.asarray(first_B, bool), np.asarray(second_B, bool)
    a, b = int(np.sum(first_B & ~second_B)), int(np.sum(second_B & ~first_B))
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b)
    return Comparison(a, b, min(1.0, 2 * tail))
