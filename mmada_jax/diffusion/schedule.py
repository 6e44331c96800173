"""Masking schedules: time t in [0, 1] -> share of tokens that are hidden, 1 at t=0 and 0 at t=1.

Training draws t and hides that share of an image; decoding walks t from 0 to 1 and keeps that share
hidden. Each schedule is a frozen dataclass called with a float32 array of numpy or jax.
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
    """cos(pi t / 2), the schedule of MaskGIT and of MMaDA. Not clipped at t=1 (-4.4e-8)."""

    def __call__(self, t):
        """t -> ratio."""
        angle = t * np.float32(math.pi) * np.float32(0.5)
        if isinstance(t, np.ndarray):
            # Correctly rounded, so that the decoding quotas are the same on every machine: at
            # t=2/3 of 1024 tokens one ulp decides between 511 and 512.
            return np.cos(angle.astype(np.float64)).astype(np.float32)
        return t.__array_namespace__().cos(angle)


@dataclasses.dataclass(frozen=True)
class Power(Ranged):
    """1 - t^exponent, clipped to [1e-6, 1]; exponent 1 is the linear schedule."""

    exponent: Annotated[float, Range(0, 1000, above=True)] = 1.0

    def __call__(self, t):
        """t -> ratio."""
        ratio = 1 - t ** np.float32(self.exponent)
        return t.__array_namespace__().clip(ratio, np.float32(1e-6), np.float32(1))


@dataclasses.dataclass(frozen=True)
class Sigmoid(Ranged):
    """A sigmoid read from `start` to `end`, rescaled to run from 1 to 0, clipped to [1e-6, 1]."""

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
    """`cosine`, `linear`, `powK` (K a number, as in pow2 or pow0.5) or `sigmoid`."""
    if name.startswith("pow"):
        try:
            exponent = float(name[3:])
        except ValueError:
            pass
        else:
            return Power(exponent)
    known = {"cosine": Cosine(), "linear": Power(1.0), "sigmoid": Sigmoid()}
    if name not in known:
        raise ValueError(f"unknown schedule {name!r}; known: cosine, linear, powK, sigmoid")
    return known[name]


def hidden_counts(schedule: Schedule, total: int, steps: int) -> np.ndarray:
    """How many of `total` tokens stay hidden after each of `steps` decoding steps, int32 [steps].

    floor(total * schedule((k+1)/steps)) in float32, before the clamps of the decoding rule.
    """
    t = (np.arange(1, steps + 1) / steps).astype(np.float32)
    return np.floor(np.float32(total) * schedule(t)).astype(np.int32)
