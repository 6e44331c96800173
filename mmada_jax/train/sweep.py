"""Sweeps: what is varied, and the trials that follow.

Each trial is a run of `mmada train`, or of another program with its flags, in a folder and a process of its
own; FOLDER/trial.json remembers how far it came. running.py runs them on this machine, tune.py by Ray Tune.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from mmada_jax import storage
from mmada_jax.config import load_module, set_key, to_dict, unknown_key
from mmada_jax.files import read_json
from mmada_jax.storage import write_whole
from mmada_jax.train import metrics
from mmada_jax.train.runs import parse
from mmada_jax.weights.workdir import LOCK

# What trains, as words for the Python interpreter.
TRAIN = ("-m", "mmada_jax.programs.command", "train")
# Statuses of trials that aren't run again.
ENDED = ("done", "stopped early")

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


# ---- What is searched ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included: by `log` as many below as above their geometric mean;
    integers if they are `whole`; otherwise of four digits, since folders are named after them."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @property
    def ends(self) -> list[Any]:
        """The values to check a configuration with."""
        return [self.low, self.high]

    def draw(self, rng: np.random.Generator) -> float:
        """A random value."""
        if self.whole:
            return int(rng.integers(self.low, self.high, endpoint=True))
        if self.log:
            return self.fit(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self.fit(rng.uniform(self.low, self.high))

    def fit(self, value: float) -> float:
        """The nearest value of the range. Raises ValueError if `value` lies outside."""
        if not self.low <= value <= self.high:
            raise ValueError(f"{value} isn't from {self.low} to {self.high}")
        if self.whole:
            return int(value)
        return min(max(float(f"{value:.4g}"), self.low), self.high)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> list[Any]:
        """The values to check a configuration with: all of them."""
        return list(self.values)

    def draw(self, rng: np.random.Generator) -> Any:
        """A random value."""
        return self.values[rng.integers(len(self.values))]

    def fit(self, value: Any) -> Any:
        """The value of the choice that a configuration holds as `value`. Raises ValueError if none is."""
        for known in self.values:
            if json.dumps(known) == json.dumps(value) or known == value:
                return known
        raise ValueError(f"{value!r} is none of {', '.join(map(repr, self.values))}")


Domains = Mapping[str, Range | Choice]


class Space:
    """What get_space(s) describes a search with: a dict from keys to what their values are drawn from."""

    @staticmethod
    def uniform(low: float, high: float) -> Range:
        """Numbers from `low` to `high`."""
        return _range("uniform", low, high)

    @staticmethod
    def log_uniform(low: float, high: float) -> Range:
        """Numbers from `low`, which is above 0, to `high`: as many below as above their geometric mean."""
        return _range("log_uniform", low, high, log=True)

    @staticmethod
    def integer(low: int, high: int) -> Range:
        """Integers from `low` to `high`, both included."""
        return _range("integer", low, high, whole=True)

    @staticmethod
    def choice(values: Sequence[Any]) -> Choice:
        """One of `values`."""
        values = tuple(values)
        if not values or any(values.index(value) != i for i, value in enumerate(values)):
            raise ValueError(f"choice({list(values)}): it needs values, each of them once")
        return Choice(values)


def _range(name: str, low: float, high: float, log: bool = False, whole: bool = False) -> Range:
    kinds = (int,) if whole else (int, float)
    right = all(type(end) in kinds and math.isfinite(end) for end in (low, high))
    if not right or low >= high or (log and low <= 0):
        must = ["", "integers, "][whole] + ["", "above 0, "][log]
        raise ValueError(
            f"{name}({low!r}, {high!r}): the ends must be {must}finite, and the first the lower"
        )
    return Range(low, high, log, whole)


def get_space(path: str) -> dict[str, Range | Choice]:
    """The domains that the get_space of a config file describes."""
    module = load_module(path)
    if not hasattr(module, "get_space"):
        raise ValueError(f"{path} has no get_space(s); see mmada sweep --help")
    space = module.get_space(Space)
    right = isinstance(space, dict) and all(isinstance(domain, Range | Choice) for domain in space.values())
    if not right or not space:
        raise ValueError(
            f"get_space of {path} returns {space!r}; it must be a dict from config keys to what "
            "uniform, log_uniform, integer and choice give, not empty"
        )
    return space


def check_space(config: dict[str, Any], space: Domains, for_all: Overrides, trials: int) -> None:
    """Raises ValueError if a configuration doesn't take an end or a choice of the space, or if the space
    has fewer than `trials` different settings. Each key is tried alone: the others are as in `config`."""
    known = _flat(to_dict(parse(config)))
    for key, domain in space.items():
        for value in domain.ends:
            _configured(config, {key: value}, known, for_all, f"get_space ({key}={value})")
    sizes = [
        len(domain.ends)
        if isinstance(domain, Choice)
        else domain.high - domain.low + 1
        if domain.whole
        else math.inf
        for domain in space.values()
    ]
    if math.prod(sizes) < trials:
        raise ValueError(f"--trials is {trials}; get_space has only {math.prod(sizes)} different settings")


def draw(space: Domains, number: int, seed: int, attempt: int = 0) -> Overrides:
    """Random settings, which depend on nothing but what is given."""
    rng = np.random.default_rng((seed, number, attempt))
    return {key: domain.draw(rng) for key, domain in space.items()}


def fresh(known: Sequence[Overrides], make: Callable[[int], Overrides]) -> Overrides:
    """The first of make(0), make(1), ... that isn't known. Raises ValueError if there seems to be none."""
    for attempt in range(1000):
        if (settings := make(attempt)) not in known:
            return settings
    raise ValueError(f"no new settings were found beside {len(known)}; lower --trials or widen get_space")


def draw_sweep(space: Domains, trials: int, seed: int) -> list[Overrides]:
    """Random settings of so many trials. More trials begin with the same ones."""
    sweep: list[Overrides] = []
    for number in range(trials):
        sweep.append(fresh(sweep, lambda attempt, n=number: draw(space, n, seed, attempt)))
    return sweep


def begun(workdir: storage.Path, space: Domains) -> list[Overrides]:
    """The settings of the trials that a workdir holds, by their trial.json.

    Folders without one are what a sweep leaves that is killed before it begins a trial; they are removed if
    nothing was written there. Raises ValueError if a trial is missing, or lies outside the space."""
    sweep: list[Overrides] = []
    folders = [folder for folder in workdir.glob("trial-*") if re.match(r"trial-\d+-", folder.name)]
    for folder in sorted(folders, key=lambda folder: int(folder.name.split("-")[1])):
        number = len(sweep)
        if not (folder / "trial.json").is_file():
            for path in folder.glob("trial.json.*.tmp"):
                path.unlink()
            with contextlib.suppress(OSError):  # it isn't empty; check_unchanged says so
                if not storage.in_bucket(folder):
                    folder.rmdir()
            continue
        if not folder.name.startswith(f"trial-{number:03}-"):
            raise ValueError(f"{workdir} lacks trial-{number:03}; put it back, or choose an empty workdir")
        config = read_json(folder / "trial.json", dict, keys=("config",))["config"]
        try:
            sweep.append({key: domain.fit(config[key]) for key, domain in space.items()})
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{folder} holds a trial outside of get_space ({error}); choose an empty workdir"
            ) from error
    return sweep


# ---- Trials --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run. `config` is its whole configuration, with dots between groups and keys; `command` has the
    words for the Python interpreter. FOLDER/trial.json keeps the status between runs of the sweep."""

    folder: storage.Path
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
    def rows(self) -> list[dict[str, float]]:
        """The rows of the metrics."""
        return metrics.read(self.folder / "metrics.jsonl")

    @property
    def values(self) -> dict[str, float]:
        """The last step and the last value of each metric."""
        return {"step": 0} | {name: value for row in self.rows for name, value in row.items()}

    @property
    def share(self) -> float:
        """The share of its steps that is done, from 0 to 1."""
        return min(1.0, self.values["step"] / self.config["steps"])


def plan(
    config: dict[str, Any],
    sweep: list[Overrides],
    workdir: storage.Path,
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
        flat = _configured(config, overrides, known, for_all, f"trial {number} ({named})")
        for other in trials:
            if other.config == flat:
                raise ValueError(f"trial {number} ({named}) is the same as {other.folder.name}; drop one")
        slug = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in overrides.items())
        folder = workdir / f"trial-{number:03}-{re.sub(r'[^A-Za-z0-9._+-]+', '-', slug)[:80]}"
        options = [f"--config.{key}={value}" for key, value in (for_all | overrides).items()]
        trials.append(Trial(folder, overrides, flat, [*program, "--workdir", str(folder), *options]))
    return trials


def _configured(
    config: dict[str, Any], overrides: Overrides, known: Overrides, for_all: Overrides, what: str
) -> Overrides:
    """The whole configuration with some overrides. Raises ValueError, with `what`, if they don't fit."""
    changed = copy.deepcopy(config)
    for key, value in overrides.items():
        if isinstance(value, dict):
            raise ValueError(unknown_key(key, list(known)))
        if key in for_all:
            raise ValueError(f"{key} is varied by the sweep; leave out --config.{key}")
        set_key(changed, key, value)
    try:
        return json.loads(json.dumps(_flat(to_dict(parse(changed)))))
    except (ValueError, TypeError) as error:
        if unknown := set(overrides) - set(known):
            raise ValueError(unknown_key(min(unknown), list(known))) from error
        raise ValueError(f"{what}: {error}") from error


def check_unchanged(workdir: storage.Path, trials: list[Trial]) -> None:
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


# ---- The workdir ---------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(workdir: storage.Path, patience: float = 60) -> Iterator[TextIO]:
    """Makes the workdir and locks it. Raises ValueError if a sweep is running there, or a trial that a
    killed sweep has left. Those of Ray get a signal then to save and end; they have `patience` seconds."""
    with storage.locked(workdir / "lock", f"a sweep or a trial is running in {workdir}") as held:
        until = time.monotonic() + patience
        for folder in sorted(workdir.glob("trial-*")):
            if (folder / _lock_name(folder)).exists():
                with lock_trial(folder, until - time.monotonic()):
                    pass
        yield held


def _lock_name(folder: storage.Path) -> str:
    """What a trial holds while it runs: a file that its process keeps open; in a bucket, where no process
    can inherit it, the lease of its workdir."""
    return LOCK if storage.in_bucket(folder) else "trial.lock"


@contextlib.contextmanager
def lock_trial(folder: storage.Path, patience: float) -> Iterator[TextIO | None]:
    """Locks the folder of a trial, and says so if it has to wait for it; in a bucket the trial does it
    itself. Raises ValueError if it stays busy for `patience` seconds."""
    until, told, held = time.monotonic() + patience, False, None
    where, busy = folder / _lock_name(folder), f"the trial in {folder} still runs"
    with contextlib.ExitStack() as stack:
        while True:
            try:
                if storage.in_bucket(folder):
                    storage.refuse_locked(where, busy)
                else:
                    held = stack.enter_context(storage.locked(where, busy))
                break
            except ValueError:
                if time.monotonic() > until:
                    raise
            if not told:
                print(
                    f"waiting for {folder.name}, which a killed sweep has left, to save and end", flush=True
                )
                told = True
            time.sleep(0.2)
        yield held
