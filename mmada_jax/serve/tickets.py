"""What waits in an engine: the rows of jobs, and a ticket for each that says what has become of it."""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from mmada_jax.diffusion import decode, slots

Outcome = Literal["waiting", "running", "done", "cancelled", "late", "failed"]
Every = Literal["block", "step"]


class FullError(RuntimeError):
    """The queue has no room for more rows."""


class LaneKey(NamedTuple):
    """What rows of a lane share. Equal keys of an engine are one object."""

    shape: slots.Shape
    places: int
    other: bool
    adapter: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class LaneRow:
    """A row of a job by itself: arrays [1, ...] as `Placed`, and its lane."""

    placed: decode.Placed
    key: LaneKey
    reach: int | None


@dataclasses.dataclass(eq=False)
class Ticket:
    """A row that was submitted, and what has become of it so far.

    `ids` are the tokens of its span, those that are still hidden as the mask; `steps` its forward passes.
    `begun`, `first` and `ended` are seconds after it was submitted: of the first pass, of the first report
    of its tokens, of the end, at which `at_end` is called. `row` and `number` place it in its job.
    """

    row: LaneRow
    number: int
    submitted: float
    deadline: float | None = None
    progress: Callable[["Ticket"], None] | None = None
    every: Every = "block"
    at_end: Callable[["Ticket"], None] | None = None
    state: Outcome = "waiting"
    ids: np.ndarray | None = None
    steps: int = 0
    begun: float | None = None
    first: float | None = None
    ended: float | None = None
    error: Exception | None = None
    _engine: Any = dataclasses.field(default=None, repr=False)
    _over: threading.Event = dataclasses.field(default_factory=threading.Event, repr=False)

    @property
    def over(self) -> bool:
        """Whether nothing more will become of it."""
        return self._over.is_set()

    def cancel(self) -> None:
        """Gives up; its slot is free at the engine's next turn."""
        self._engine._end(self, "cancelled", concurrent.futures.CancelledError("the request was cancelled"))

    def result(self) -> np.ndarray:
        """The ids of the span, when it is done. Without a thread of its own (see Engine.start) the engine
        works here. Raises CancelledError, TimeoutError, or what went wrong."""
        while not self.over and not self._engine.threaded:
            self._engine.turn()
        self._over.wait()
        if self.error is not None:
            raise self.error
        return self.ids
