"""Runs the trials of a sweep on this machine, and holds what all engines share: which trial is next, how
one starts and ends, what is told."""

import contextlib
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from mmada_jax import storage
from mmada_jax.train import metrics, tables
from mmada_jax.train.sweep import ENDED, Trial

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
_PLOT_EVERY = 60  # seconds; a plot takes a second


class Sweep:
    """The trials of a workdir while they run. `propose` gives the trial that follows those that are known,
    until there are `total`; both are for a search that learns from its trials. `running` are taken and
    haven't ended yet; `ended` had ended before."""

    def __init__(
        self,
        trials: Sequence[Trial],
        workdir: storage.Path,
        metric: str,
        total: int = 0,
        propose: Callable[[list[Trial]], Trial] | None = None,
    ):
        self.trials, self.workdir, self.metric = list(trials), workdir, metric
        self.total, self._propose = max(total, len(trials)), propose
        self._waiting = [trial for trial in trials if trial.record["status"] not in ENDED]
        self.running: list[Trial] = []
        self._begun, self._share = time.monotonic(), sum(trial.share for trial in trials)
        self._plotted = time.monotonic()
        self.ended = [trial for trial in trials if trial not in self._waiting]
        if ended := len(self.ended):
            print(f"{ended} of {self.total} trials are done already", flush=True)
        tables.write(workdir, self.trials, metric)

    @property
    def left(self) -> int:
        """How many trials wait or will be proposed."""
        return len(self._waiting) + self.total - len(self.trials)

    def take(self) -> Trial | None:
        """The next trial that is to run, or None if there is none."""
        if self._waiting:
            trial = self._waiting.pop(0)
        elif self._propose and len(self.trials) < self.total:
            trial = self._propose(self.trials)
            self.trials.append(trial)
        else:
            return None
        self.running.append(trial)
        trial.note("waiting")  # its settings are kept from now on
        at = trial.values["step"]
        self._tell(trial, f"continues at step {at}" if at else "starts")
        return trial

    def end(self, trial: Trial, what: str) -> None:
        """Tells how a trial ended, and writes the tables."""
        self.running.remove(trial)
        self._tell(trial, what)
        tables.write(self.workdir, self.trials, self.metric)
        if time.monotonic() - self._plotted > _PLOT_EVERY:
            tables.plot(self.workdir, self.trials, self.metric)
            self._plotted = time.monotonic()

    def finish(self, received: Sequence[int]) -> int:
        """Writes what came of all, and returns the exit status. `received` are the signals to stop."""
        tables.write(self.workdir, self.trials, self.metric)
        if problem := tables.plot(self.workdir, self.trials, self.metric):
            print(problem)
        statuses = [trial.record["status"] for trial in self.trials]
        early = f", {n} were stopped early" if (n := statuses.count("stopped early")) else ""
        done = f"{statuses.count('done')} of {self.total} trials are done"
        print(f"{done}{early}: {self.workdir / 'results.md'}")
        if received:
            print("run again to resume")
            return 128 + received[0]
        return int(sum(status in ENDED for status in statuses) < self.total)

    def _tell(self, trial: Trial, what: str) -> None:
        gained = sum(trial.share for trial in self.trials) - self._share
        left = self.left - len(self._waiting)
        left += sum(1 - trial.share for trial in (*self._waiting, *self.running))
        eta = (
            metrics.duration((time.monotonic() - self._begun) * left / gained) if gained > 0 else "unknown"
        )
        ended = len(self.trials) - len(self._waiting) - len(self.running)
        print(f"[{ended}/{self.total}] {trial.folder.name} {what}; ETA {eta}", flush=True)


class Attempt:
    """A process that runs a trial, from its start to its end.

    The process keeps the file `held` open, and with it its lock. `before` are words in front of its
    command, and None in `environment` removes a variable that it would inherit."""

    def __init__(
        self,
        trial: Trial,
        held: Any,
        before: Sequence[str] = (),
        environment: Mapping[str, str | None] | None = None,
    ):
        self.trial, self._since = trial, time.monotonic()
        trial.folder.mkdir(parents=True, exist_ok=True)
        trial.note("running")
        # The package may lie in a folder that isn't installed.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with_all = os.environ | {"PYTHONPATH": path} | dict(environment or {})
        with _log(trial) as log:
            self.process = subprocess.Popen(
                [*before, sys.executable, *trial.command],
                env={name: value for name, value in with_all.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[held.fileno()] if hasattr(held, "fileno") else [],
                start_new_session=True,  # a terminal's Ctrl-C would end it without a checkpoint
            )

    def end(self, metric: str, early: bool = False) -> str:
        """Records how the process, which has ended, left the trial, and says it. `early`: it was told to
        end, and isn't to go on."""
        trial, code, seconds = self.trial, self.process.returncode, time.monotonic() - self._since
        log = _keep_log(trial)
        values, steps, name = trial.values, trial.config["steps"], metric.removeprefix("-")
        if code == 0 and values["step"] >= steps:
            trial.note("done", seconds)
            result = f"{name} {values[name]:.4g}" if name in values else (
                f"but its metrics have no {name!r}, only {', '.join(values)}")  # fmt: skip
            return f"is done in {metrics.duration(trial.record['seconds'])}, {result}"
        if early or code in (0, -signal.SIGTERM):
            trial.note("stopped early" if early else "stopped", seconds)
            return f"stopped {'early ' * early}at step {values['step']}/{steps}"
        trial.note("failed", seconds)
        lines = log.read_bytes().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        how = f"exit status {code}" if code > 0 else signal.Signals(-code).name
        return f"failed ({how}): {last} (all in {log})"


def _log(trial: Trial) -> BinaryIO:
    """The file that takes what a trial prints. In a bucket nothing can be added to a file, so that it lies
    on this machine until the attempt has ended."""
    if storage.in_bucket(trial.folder):
        return _log_here(trial).open("wb")
    return (trial.folder / "log.txt").open("ab")


def _log_here(trial: Trial) -> pathlib.Path:
    return stand_in(trial.folder).with_suffix(f".{os.getpid()}.log")


def stand_in(folder: storage.Path) -> pathlib.Path:
    """A temporary place on this machine for what can't lie in a folder of a bucket."""
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return pathlib.Path(tempfile.gettempdir()) / f"mmada_jax-{name}"


def _keep_log(trial: Trial) -> storage.Path:
    """Puts what an attempt has printed where the trial's log is."""
    log, here = trial.folder / "log.txt", _log_here(trial)
    if storage.in_bucket(trial.folder) and here.is_file():
        before = log.read_bytes() if log.is_file() else b""
        storage.write_whole(log, before + here.read_bytes())
        here.unlink()
    return log


def run(sweep: Sweep, parallel: int, held: Any) -> int:
    """Runs the trials that are to run, `parallel` of them at a time, and returns the exit status.

    The processes of the trials keep the file `held` open, and with it the lock of the workdir.
    """
    running: list[Attempt] = []
    trial = None
    with signals() as received:
        passed_on = 0
        try:
            while True:
                while len(running) < parallel and not received and (trial := sweep.take()):
                    running.append(Attempt(trial, held))
                if not running:
                    break
                time.sleep(0.1)
                if len(received) > passed_on:
                    passed_on = len(received)
                    for attempt in running:
                        attempt.process.terminate()
                for attempt in [attempt for attempt in running if attempt.process.poll() is not None]:
                    running.remove(attempt)
                    sweep.end(attempt.trial, attempt.end(sweep.metric))
        finally:  # after an error of our own; otherwise nothing runs any more
            for attempt in running:
                attempt.process.terminate()
            for attempt in running:
                attempt.process.wait()
    return sweep.finish(received)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
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
