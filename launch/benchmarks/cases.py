"""Held-out cases of text that a program can judge: what a model is asked, whether its answers are right,
and the model that is trained for them."""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from mmada_jax.data import totals
from mmada_jax.weights.workdir import has_step

# The workdir of the model that is measured if no other is named.
TRAINED = pathlib.Path("runs/totals")


class Task(NamedTuple):
    """Cases of one kind. `questions` gives the first n held-out ones whose answers have up to so many new
    tokens, `is_right` judges the answer to a question."""

    questions: Callable[[int, int], list[str]]
    is_right: Callable[[str, str], bool]


def _sums(n: int, new: int) -> list[str]:
    """Sums of as many rounds as so many new tokens can answer, of those that a model is trained on."""
    records = totals.open_records(str(max(1, min(4, (new - 3) // 108))), "test")
    return [records.chain(i).question for i in range(n)]


# Format of a source of conversations (a data.lm_chat of a configuration) -> the task that it trains.
TASKS = {"totals": Task(_sums, lambda question, text: totals.check(question, text).chain)}


def task_of(folder: pathlib.Path) -> tuple[str, Task] | None:
    """The task that the model of a workdir was trained on, by name. None if no program judges it."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    sources = ((values.get("data") or {}).get("lm_chat") or {}).values()
    found = [source["format"] for source in sources if source.get("format") in TASKS]
    return (found[0], TASKS[found[0]]) if found else None


def trained(train: bool) -> pathlib.Path | None:
    """The workdir of a model of long sums, with `train` trained in both stages unless they are done. None
    if there is none. A SIGTERM on the way ends the program when what is trained is saved."""
    if train:
        from configs.totals import get_config
        from mmada_jax.train.supervised import train as train_stage

        first = TRAINED.with_name(f"{TRAINED.name}_short")
        for stage, workdir in (("short", first), ("long", TRAINED)):
            config = get_config(stage).to_dict()
            if stage == "long":
                config |= {
                    "init": f"../{first.name}",
                    "image_tokenizer": f"../{first.name}/image_tokenizer",
                }
            if int(train_stage(config, workdir).step) < config["steps"]:
                sys.exit(143)  # as a shell has it for SIGTERM
    return TRAINED if has_step(TRAINED) else None
