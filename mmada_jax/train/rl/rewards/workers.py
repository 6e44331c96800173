"""Processes that run verifier.py, from whose libraries' hangs and crashes a call recovers."""

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

_EXTRA = {"math_verify": "rl", "reasoning_gym": "gym"}  # the extra of this project that brings a library
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
    """Up to `workers` processes that run verifier.py, started when first needed and again after one
    has been ended for taking longer than `limit` seconds. Calls may come from any thread."""

    def __init__(self, library: str, limit: float, workers: int):
        self._library, self._limit, self._workers = library, limit, workers
        self._children: list[subprocess.Popen] = []
        self._free: queue.LifoQueue = queue.LifoQueue()
        for _ in range(workers):
            self._free.put(None)
        self._stopped = threading.Event()
        self.close = weakref.finalize(self, _end, self._children)

    def stop(self) -> None:
        """Lets `scores` that runs now return soon, with what it has."""
        self._stopped.set()

    def scores(self, rows: Sequence[float | tuple]) -> np.ndarray:
        """float32 [N]: a number as it is, a request's value. Raises Unscored if any request fails."""
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
        """One call. Raises TimeoutError, RuntimeError with the text of an error there, ImportError."""
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
            # By its path and without this folder in sys.path: it needs nothing of ours.
            [sys.executable, "-P", verifier.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # an interrupt from the keyboard is for the program alone
            text=True,
        )
        self._children.append(child)
        try:
            _call(child, _START, "load", self._library)
        except (RuntimeError, TimeoutError) as error:
            self._forget(child)
            if "ModuleNotFoundError" in str(error):
                package, extra = self._library.replace("_", "-"), _EXTRA[self._library]
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
        raise RuntimeError(f"the verifier's process ended with status {child.returncode}")
    reply = json.loads(line)
    if "error" in reply:
        raise RuntimeError(reply["error"])
    return reply["value"]


def _end(children: list[subprocess.Popen]) -> None:
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()
        with contextlib.suppress(OSError):  # what it didn't read
            child.stdin.close()
