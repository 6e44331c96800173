"""Masking schedules: time t in [0, 1] -> share of tokens that are hidden, 1 at t=0 and 0 at t=1.

Training draws t and hides the share schedule(t) of an image. Decoding goes from t=0 to t=1 and keeps the
share schedule(t) hidden. A schedule is a frozen dataclass, called with a float32 array of numpy or jax.
"""

import dataclasses
import math
from typing import Annotated, Protocol

import numpy as np

from mmada_jax.ranges import Range, Ranged


class Schedule(Protocol):
    """t (float32 array, any shape) -> ratio (same shape)."""

    def __call__(self, t):
        """Evaluates the schedule."""
        ...


@dataclasses.dataclass(frozen=True)
class Cosine:
    """cos(pi t / 2), the schedule of MaskGIT (arXiv 2202.04200) and MMaDA. At t=1 float32 gives -4.4e-8,
    which isn't clipped."""

    def __call__(self, t):
        """t -> ratio."""
        angle = t * np.float32(math.pi) * np.float32(0.5)
        if isinstance(t, np.ndarray):
            # Correct rounding makes the numbers of hidden tokens the same on every machine: at t=2/3 of
            # 1024 tokens the last bit of float32 decides between 511 and 512.
            return np.cos(angle.astype(np.float64)).astype(np.float32)
        return t.__array_namespace__().cos(angle)


@dataclasses.dataclass(frozen=True)
class Arccos:
    """arccos(t) / (pi / 2), the schedule of Halton-MaskGIT (arXiv 2503.17076): few tokens at first."""

    def __call__(self, t):
        """t -> ratio."""
        if isinstance(t, np.ndarray):  # correctly rounded, as in Cosine
            return (np.arccos(t.astype(np.float64)) / (math.pi / 2)).astype(np.float32)
        return t.__array_namespace__().acos(t) / np.float32(math.pi / 2)


@dataclasses.dataclass(frozen=True)
class Power(Ranged):
    """1 - t^exponent, clipped to [1e-6, 1]. Exponent 1 is the linear schedule."""

    exponent: Annotated[float, Range(0, 1000, above=True)] = 1.0

    def __call__(self, t):
        """t -> ratio."""
        ratio = 1 - t ** np.float32(self.exponent)
        return t.__array_namespace__().clip(ratio, np.float32(1e-6), np.float32(1))


@dataclasses.dataclass(frozen=True)
class Sigmoid(Ranged):
    """(s(end) - s(start + t (end - start))) / (s(end) - s(start)) with s(x) = sigmoid(x / tau), clipped to
    [1e-6, 1]: a sigmoid between `start` and `end`, rescaled so that it falls from 1 to 0."""

    start: Annotated[float, Range(-20, 20)] = -3.0
    end: Annotated[float, Range(-20, 20)] = 3.0
    tau: Annotated[float, Range(0.1, 1000)] = 1.0

    def __call__(self, t):
        """t -> ratio."""
        xp = t.__array_namespace__()

        def sigmoid(x):
            return 1 / (1 + xp.exp(-x))

        low = np.float32(1 / (1 + math.exp(-self.start / self.tau)))
        high = np.float32(1 / (1 + math.exp(-self.end / self.tau)))
        span, tau = np.float32(self.end - self.start), np.float32(self.tau)
        ratio = (high - sigmoid((t * span + np.float32(self.start)) / tau)) / (high - low)
        return xp.clip(ratio, np.float32(1e-6), np.float32(1))


def named(name: str) -> Schedule:
    """`cosine`, `linear`, `powK` (K a number, as in pow2 or pow0.5), `sigmoid` or `arccos`."""
    if name.startswith("pow"):
        try:
            exponent = float(name[3:])
        except ValueError:
            pass
        else:
            return Power(exponent)
    known = {"cosine": Cosine(), "linear": Power(1.0), "sigmoid": Sigmoid(), "arccos": Arccos()}
    if name not in known:
        raise ValueError(f"unknown schedule {name!r}; known: cosine, linear, powK, sigmoid, arccos")
    return known[name]


def hidden_counts(schedule: Schedule, total: int, steps: int) -> np.ndarray:
    """The number of tokens, of `total`, that are still hidden after each of `steps` decoding steps, int32
    [steps]: floor(total * schedule((k + 1) / steps)) in float32. The decoding rule clamps these numbers."""
    t = (np.arange(1, steps + 1) / steps).astype(np.float32)
    return np.floor(np.float32(total) * schedule(t)).astype(np.int32)
