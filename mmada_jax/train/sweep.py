"""Sweeps: what is varied, the trials that follow, running them, and tables of their results.

Each trial is a run of `mmada train`, or of another program with its flags, in a folder and a process of its
own; FOLDER/trial.json remembers how far it came.
"""

import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from mmada_jax.config import load_module, set_key, to_dict, unknown_key
from mmada_jax.files import read_json
from mmada_jax.storage import write_whole
from mmada_jax.train import metrics
from mmada_jax.train.runs import parse
from mmada_jax.weights.workdir import locked

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# What trains, as words for the Python interpreter.
TRAIN = ("-m", "mmada_jax.programs.command", "train")

Overrides = dict[str, Any]


# ---- What is varied ------------------------------------------------------------------------------


class Hyper:
    """What get_hyper(h) builds a sweep with: a list of trials, each a dict of overrides."""

    @staticmethod
    def sweep(key: str, values: Sequence[Any]) -> list[Overrides]:
        """A trial for each value."""
        return [{key: value} for value in values]

    @staticmethod
    def fixed(key: str, value: Any) -> list[Overrides]:
        """One trial: the value that all trials of a product or a zipit get."""
        return [{key: value}]

    @staticmethod
    def product(sweeps: Sequence[list[Overrides]]) -> list[Overrides]:
        """Every combination; the last sweep varies fastest."""
        return [_merge(parts) for parts in itertools.product(*sweeps)]

    @staticmethod
    def zipit(sweeps: Sequence[list[Overrides]]) -> list[Overrides]:
        """Joins the first trials of all sweeps, then the second ones. A sweep of one trial repeats it."""
        lengths = sorted({len(sweep) for sweep in sweeps} - {1})
        if len(lengths) > 1:
            raise ValueError(f"zipit got sweeps of {lengths} trials; they need as many, or one")
        repeated = [sweep * (lengths[0] if lengths and len(sweep) == 1 else 1) for sweep in sweeps]
        return [_merge(parts) for parts in zip(*repeated, strict=True)]

    @staticmethod
    def chainit(sweeps: Sequence[list[Overrides]]) -> list[Overrides]:
        """The trials of all sweeps, one sweep after the other."""
        return list(itertools.chain(*sweeps))


def _merge(parts: Sequence[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        if twice := merged.keys() & part.keys():
            raise ValueError(f"{min(twice)} is varied twice in one trial; each key belongs to one sweep")
        merged |= part
    return merged


def get_sweep(path: str) -> list[Overrides]:
    """The trials that the get_hyper of a config file lists."""
    module = load_module(path)
    if not hasattr(module, "get_hyper"):
        raise ValueError(f"{path} has no get_hyper(h); see mmada sweep --help")
    trials = module.get_hyper(Hyper)
    if not isinstance(trials, list) or not trials or not all(isinstance(trial, dict) for trial in trials):
        raise ValueError(f"get_hyper of {path} returns {trials!r}; it must be a list of dicts, not empty")
    return trials


# ---- Trials --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run. `config` is its whole configuration, with dots between groups and keys; `command` has the
    words for the Python interpreter. FOLDER/trial.json keeps the status between runs of the sweep."""

    folder: pathlib.Path
    overrides: Overrides
    config: Overrides
    command: list[str]

    @property
    def record(self) -> dict[str, Any]:
        """The content of trial.json: status, seconds of all attempts together, configuration."""
        path = self.folder / "trial.json"
        new = {"status": "waiting", "seconds": 0.0, "config": self.config}
        return read_json(path, dict, keys=tuple(new)) if path.is_file() else new

    def note(self, status: str, more_seconds: float = 0.0) -> None:
        """Changes trial.json."""
        seconds = self.record["seconds"] + more_seconds
        text = json.dumps({"status": status, "seconds": seconds, "config": self.config}, indent=1)
        write_whole(self.folder / "trial.json", text)

    @property
    def values(self) -> dict[str, float]:
        """The last row of the metrics."""
        rows = metrics.read(self.folder / "metrics.jsonl")
        return rows[-1] if rows else {"step": 0}

    @property
    def share(self) -> float:
        """The share of its steps that is done, from 0 to 1."""
        return min(1.0, self.values["step"] / self.config["steps"])


def plan(
    config: dict[str, Any],
    sweep: list[Overrides],
    workdir: pathlib.Path,
    program: Sequence[str],
    for_all: Overrides,
) -> list[Trial]:
    """The trials of a sweep over `config`, which has the overrides `for_all` already. `program` has the
    words that train, for the Python interpreter, as far as --config.

    Raises ValueError for a key that the configuration lacks, a value that it doesn't take, a key that
    is in `for_all` too, and for two trials that are the same. Nothing is written.
    """
    known, trials = _flat(to_dict(parse(config))), []
    for number, overrides in enumerate(sweep):
        named = ", ".join(f"{key}={value}" for key, value in overrides.items())
        changed = copy.deepcopy(config)
        for key, value in overrides.items():
            if isinstance(value, dict):
                raise ValueError(unknown_key(key, list(known)))
            if key in for_all:
                raise ValueError(f"{key} is varied by the sweep; leave out --config.{key}")
            set_key(changed, key, value)
        try:
            flat = json.loads(json.dumps(_flat(to_dict(parse(changed)))))
        except (ValueError, TypeError) as error:
            if unknown := set(overrides) - set(known):
                raise ValueError(unknown_key(min(unknown), list(known))) from error
            raise ValueError(f"trial {number} ({named}): {error}") from error
        for other in trials:
            if other.config == flat:
                raise ValueError(f"trial {number} ({named}) is the same as {other.folder.name}; drop one")
        slug = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in overrides.items())
        folder = workdir / f"trial-{number:03}-{re.sub(r'[^A-Za-z0-9._+-]+', '-', slug)[:80]}"
        options = [f"--config.{key}={value}" for key, value in (for_all | overrides).items()]
        trials.append(Trial(folder, overrides, flat, [*program, "--workdir", str(folder), *options]))
    return trials


def check_unchanged(workdir: pathlib.Path, trials: list[Trial]) -> None:
    """Raises ValueError if `workdir` holds trials of another sweep or of another configuration."""
    remedy = "choose an empty workdir, or delete that folder"
    folders = [trial.folder for trial in trials]
    for folder in sorted(workdir.glob("trial-*")):
        if folder not in folders:
            raise ValueError(f"{folder} is no trial of this sweep; {remedy}")
    for trial in trials:
        before, now = trial.record["config"], trial.config
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{trial.folder} holds another trial ({key} is {before.get(key)!r} there and "
                    f"{now.get(key)!r} now); {remedy}"
                )


def _flat(config: dict[str, Any], path: str = "") -> Overrides:
    """Nested dicts -> one, with dots between the keys."""
    flat: Overrides = {}
    for key, value in config.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat


# ---- Running -------------------------------------------------------------------------------------


def run(trials: list[Trial], workdir: pathlib.Path, parallel: int, metric: str, held: TextIO) -> int:
    """Runs the trials that aren't done, `parallel` of them at a time, and returns the exit status.

    The processes of the trials keep the file `held` open, and with it the lock of the workdir.
    """
    waiting = [trial for trial in trials if trial.record["status"] != "done"]
    running: list[tuple[Trial, subprocess.Popen, float]] = []
    begun, share_before = time.monotonic(), sum(trial.share for trial in trials)

    def tell(trial, what):
        gained = sum(trial.share for trial in trials) - share_before
        left = sum(1 - trial.share for trial in (*waiting, *(trial for trial, *_ in running)))
        eta = metrics.duration((time.monotonic() - begun) * left / gained) if gained > 0 else "unknown"
        ended = len(trials) - len(waiting) - len(running)
        print(f"[{ended}/{len(trials)}] {trial.folder.name} {what}; ETA {eta}", flush=True)

    if len(waiting) < len(trials):
        print(f"{len(trials) - len(waiting)} of {len(trials)} trials are done already", flush=True)
    write_tables(workdir, trials, metric)
    with _signals() as received:
        passed_on = 0
        try:
            while running or (waiting and not received):
                while waiting and len(running) < parallel and not received:
                    trial = waiting.pop(0)
                    running.append((trial, _start(trial, held), time.monotonic()))
                    at = trial.values["step"]
                    tell(trial, f"continues at step {at}" if at else "starts")
                time.sleep(0.1)
                if len(received) > passed_on:
                    passed_on = len(received)
                    for _, process, _ in running:
                        process.terminate()
                for ended in [entry for entry in running if entry[1].poll() is not None]:
                    running.remove(ended)
                    trial, process, since = ended
                    tell(trial, _end(trial, process.returncode, time.monotonic() - since, metric))
                    write_tables(workdir, trials, metric)
        finally:  # after an error of our own; otherwise nothing runs any more
            for _, process, _ in running:
                process.terminate()
            for _, process, _ in running:
                process.wait()
    not_done = sum(trial.record["status"] != "done" for trial in trials)
    print(f"{len(trials) - not_done} of {len(trials)} trials are done: {workdir / 'results.md'}")
    if received:
        print("run again to resume")
        return 128 + received[0]
    return 1 if not_done else 0


def _start(trial: Trial, held: TextIO) -> subprocess.Popen:
    trial.folder.mkdir(parents=True, exist_ok=True)
    trial.note("running")
    # The package may lie in a folder that isn't installed.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with (trial.folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, *trial.command],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[held.fileno()],
            start_new_session=True,  # a terminal's Ctrl-C would end it without a checkpoint
        )


def _end(trial: Trial, code: int, seconds: float, metric: str) -> str:
    """Records how a trial ended, and says it."""
    values, steps, name = trial.values, trial.config["steps"], metric.removeprefix("-")
    if code == 0 and values["step"] >= steps:
        trial.note("done", seconds)
        result = f"{name} {values[name]:.4g}" if name in values else (
            f"but its metrics have no {name!r}, only {', '.join(values)}")  # fmt: skip
        return f"is done in {metrics.duration(trial.record['seconds'])}, {result}"
    if code in (0, -signal.SIGTERM):
        trial.note("stopped", seconds)
        return f"stopped at step {values['step']}/{steps}"
    trial.note("failed", seconds)
    log = trial.folder / "log.txt"
    lines = log.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    how = f"exit status {code}" if code > 0 else signal.Signals(-code).name
    return f"failed ({how}): {last} (all in {log})"


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that grows by each signal that asks to stop."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: received.append(n))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lock(workdir: pathlib.Path) -> contextlib.AbstractContextManager[TextIO]:
    """Makes the workdir and locks it; raises ValueError if a sweep is running there, or a trial that a
    killed sweep has left."""
    return locked(workdir / "lock", f"a sweep or a trial is running in {workdir}")


# ---- Tables --------------------------------------------------------------------------------------


def write_tables(workdir: pathlib.Path, trials: list[Trial], metric: str) -> None:
    """results.csv and results.md: what is done first, by the metric."""
    name, sign = metric.removeprefix("-"), -1 if metric.startswith("-") else 1
    rows = []
    for trial in trials:
        record = trial.record
        facts = {"status": record["status"], "minutes": round(record["seconds"] / 60, 2)}
        rows.append({"trial": trial.folder.name, **trial.overrides, **facts, **trial.values})

    def order(row):
        value = row.get(name, math.nan)
        return row["status"] != "done", math.isnan(value), sign * value

    rows.sort(key=order)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(workdir / "results.csv", text.getvalue())
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    write_whole(workdir / "results.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
