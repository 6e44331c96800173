"""Processes that run verifier.py: a call recovers from hangs and crashes of the libraries there.

A process pool of a library (multiprocessing, pebble) isn't used. Its workers import the program's main
module and JAX with it, so a worker takes 220 MB instead of 68 and twice the time to start. And it unpickles
what a worker sends, which could run code here if an answer had taken that worker over; JSON can't.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mmada_jax.train.rl.rewards import verifier

# Library -> the extra of this project that installs it.
_EXTRA = {"math_verify": "rl", "reasoning_gym": "gym"}
# Seconds that a process may take to start.
_START = 120.0


class Unscored(Exception):
    """Some rows couldn't be scored: `scores` float32 [N] with 0 for them, `errors` row -> text."""

    def __init__(self, scores: np.ndarray, errors: dict[int, str]):
        super().__init__(
            f"{len(errors)} of {len(scores)} rows failed, the first: {next(iter(errors.values()))}"
        )
        self.scores, self.errors = scores, errors


class Workers:
    """Up to `workers` processes that run `program`, and there load what `loads` names, at first: a library.
    A process starts when it is first needed, and another one takes its place once a call has taken longer
    than `limit` seconds and ended it. Calls may come from any thread."""

    def __init__(
        self,
        loads: str | tuple[str, ...],
        limit: float,
        workers: int,
        program: str = verifier.__file__,
    ):
        self.loads = (loads,) if isinstance(loads, str) else loads
        self._limit, self._workers, self._program = limit, workers, program
        self._children: list[subprocess.Popen] = []
        self._free: queue.LifoQueue = queue.LifoQueue()
        for _ in range(workers):
            self._free.put(None)
        self._stopped = threading.Event()
        self.close = weakref.finalize(self, _end, self._children)

    def stop(self) -> None:
        """Makes a running call of `scores` return soon, with the scores that it has by then."""
        self._stopped.set()

    def scores(self, rows: Sequence[float | tuple]) -> np.ndarray:
        """The scores float32 [N] of N rows. A number is its own score; a tuple is the name and the
        arguments of a call whose value is the score. Raises Unscored if a call fails."""
        requests = list(dict.fromkeys(json.dumps(row) for row in rows if isinstance(row, tuple)))
        stopped = self._stopped = threading.Event()

        def attempt(request):
            if stopped.is_set():
                return TimeoutError("no time was left for it")
            try:
                return self.ask(*json.loads(request))
            except (RuntimeError, TimeoutError) as error:
                return error

        with ThreadPoolExecutor(self._workers) as pool:
            outcomes = dict(zip(requests, pool.map(attempt, requests), strict=True))
        scores, errors = np.zeros(len(rows), np.float32), {}
        for i, row in enumerate(rows):
            value = outcomes[json.dumps(row)] if isinstance(row, tuple) else row
            if isinstance(value, Exception):
                errors[i] = f"{type(value).__name__}: {value}"
            else:
                scores[i] = value
        if errors:
            raise Unscored(scores, errors)
        return scores

    def ask(self, name: str, *arguments: Any) -> Any:
        """The value of one call. Raises TimeoutError beyond the limit, RuntimeError with the text of an
        error in the process, and ImportError if the library isn't installed."""
        child = self._free.get()
        try:
            if child is not None and child.poll() is not None:
                self._forget(child)
                child = None
            if child is None:
                child = self._start()
            return _call(child, self._limit, name, *arguments)
        finally:
            self._free.put(child)

    def _start(self) -> subprocess.Popen:
        child = subprocess.Popen(
            # By its path, and without its folder in sys.path, so that nothing of this project is imported.
            [sys.executable, "-P", self._program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C interrupts the program alone
            text=True,
        )
        self._children.append(child)
        try:
            _call(child, _START, "load", *self.loads)
        except (RuntimeError, TimeoutError) as error:
            self._forget(child)
            if "ModuleNotFoundError" in str(error) and self.loads[0] in _EXTRA:
                package, extra = self.loads[0].replace("_", "-"), _EXTRA[self.loads[0]]
                raise ImportError(
                    f"this reward needs {package}: pip install 'mmada_jax[{extra}]'"
                ) from None
            raise
        return child

    def _forget(self, child: subprocess.Popen) -> None:
        _end([child])
        self._children.remove(child)


def _call(child: subprocess.Popen, limit: float, *request: Any) -> Any:
    try:
        child.stdin.write(json.dumps([limit, *request]) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
    except (BrokenPipeError, ValueError):  # ended, or closed by us
        line = ""
    if not line:
        if child.wait() == -signal.SIGALRM:
            raise TimeoutError(f"{request[0]} took longer than {limit:g} s")
        raise RuntimeError(f"the process that scores ended with status {child.returncode}")
    reply = json.loads(line)
    if "error" in reply:
        raise RuntimeError(reply["error"])
    return reply["value"]


def _end(children: list[subprocess.Popen]) -> None:
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()
        with contextlib.suppress(OSError):  # closing flushes a request that it hasn't read
            child.stdin.close()
