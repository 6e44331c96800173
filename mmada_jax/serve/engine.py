"""Many requests at once on one model: continuous batching.

Each row of a job gets a slot, is decoded beside others, and gives its slot away when it is done.

    engine = Engine(model)                                # a model with its params: serve.api.MMaDA
    tickets = engine.submit(model.text_job(["what is 3 plus 4?"]), seed=0)
    tickets[0].result()                                   # the ids of the answer

Rows of the same rule and of nearby lengths share a lane: an array of slots with its own compilation. What a
row becomes depends on its job and its seed alone, never on its company, its slot or the length of its lane.
"""

import collections
import dataclasses
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mmada_jax.devices import sharding
from mmada_jax.diffusion import decode, slots
from mmada_jax.diffusion.decode import Job
from mmada_jax.nets import cache
from mmada_jax.serve.tickets import Every, FullError, LaneKey, LaneRow, Ticket
from mmada_jax.tokens import layout

# Steps that a lane takes before the other lanes, new requests and cancellations get their turn.
STRIDE = 16


@dataclasses.dataclass(eq=False)
class _Lane:
    """Rows side by side: who has which slot, and the slots on the devices. `size` is the number of
    slots that it is to have."""

    key: LaneKey
    size: int = 0
    tickets: list[Ticket | None] = dataclasses.field(default_factory=list)
    rows: slots.Slots | None = None

    @property
    def live(self) -> int:
        return sum(ticket is not None for ticket in self.tickets)


class Engine:
    """Decodes what is submitted, at most `slots` rows at a time.

    `memory` bounds the bytes of all caches on a device; by default it is nine tenths of what the device has
    left, and on devices that don't say (CPUs) there is no bound. `queue` bounds the rows that wait.
    Counters say what has been done: `steps` of lanes, `rows` that ended, `tokens` of spans that are done,
    `idle`, slots times steps that were empty while a row of the lane waited.
    """

    def __init__(self, model: Any, slots: int = 16, memory: int | None = None, queue: int = 10_000):
        parts = sharding.row_parts(model.mesh)
        if slots < 1 or slots % parts:
            raise ValueError(
                f"slots is {slots}; it must be a positive multiple of {parts}, the number of devices that "
                "share the rows"
            )
        if queue < 1:
            raise ValueError(f"queue is {queue}; it must be at least 1")
        # Some fields alone: a model that keeps its engine is freed as soon as nobody holds it.
        self.model = types.SimpleNamespace(config=model.config, vocab=model.vocab, mesh=model.mesh)
        self._params = {"": model.params} | {
            name: {**model.params, "lora": of} for name, of in getattr(model, "adapters", {}).items()
        }
        self.slots, self.queue, self._parts = slots, queue, parts
        left = sharding.memory_left(model.mesh)
        self.memory = int(0.9 * left) if memory is None and left is not None else memory
        self.counters = collections.Counter()
        self.threaded = False
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._lanes: dict[LaneKey, _Lane] = {}
        self._keys: dict[LaneKey, LaneKey] = {}
        self._compiled: dict[LaneKey, set[int]] = {}  # numbers of slots
        self._lock, self._turn = threading.RLock(), threading.Lock()
        self._wake = threading.Condition(self._lock)

    @property
    def waiting(self) -> list[Ticket]:
        """The rows that wait for a slot."""
        with self._lock:
            return [ticket for ticket in self._waiting if not ticket.over]

    @property
    def live(self) -> int:
        """The number of rows that have a slot."""
        return sum(lane.live for lane in list(self._lanes.values()))

    def plan(self, places: int) -> str:
        """What rows of so many places take, in a line for a program's start."""
        size = self._bytes(places)
        bound = "no bound is known" if self.memory is None else f"{self.memory / 1e9:.2f} GB are there"
        return (
            f"{self.slots} slots; with a cache a row of {places} tokens takes {size / 1e6:.1f} MB of a "
            f"device, all {size * self.slots / self._parts / 1e9:.2f} GB; {bound}"
        )

    def submit(
        self,
        job: Job,
        seed: int | Sequence[int] = 0,
        *,
        time_limit: float | None = None,
        progress: Callable[[Ticket], None] | None = None,
        every: Every = "block",
        at_end: Callable[[Ticket], None] | None = None,
        adapter: str = "",
    ) -> list[Ticket]:
        """A ticket for each row of a job, which wait for their slots. `time_limit` is in seconds from now;
        `progress` is called with a ticket after its first step and then after each block, or after `every`
        "step", and `at_end` when nothing more will become of it, in whatever thread. `adapter` is the name
        of one of the model's, "" for none.

        Raises ValueError for a job that can't fit, FullError if the queue has no room for it.
        """
        rows, now = self._rows(job, seed, adapter), time.monotonic()
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"time_limit is {time_limit}; it must be a positive number of seconds")
        until = None if time_limit is None else now + time_limit
        with self._lock:
            if len(self._waiting) + len(rows) > self.queue:
                self._waiting = collections.deque(ticket for ticket in self._waiting if not ticket.over)
            if len(self._waiting) + len(rows) > self.queue:
                raise FullError(
                    f"{len(self._waiting)} rows wait, the queue takes {self.queue}; {len(rows)} more must "
                    "come later"
                )
            about = now, until, progress, every, at_end
            made = [Ticket(row, i, *about, _engine=self) for i, row in enumerate(rows)]
            self._waiting.extend(made)
            self._wake.notify()
        return made

    def run(self, job: Job, seed: int | Sequence[int] = 0, **named: Any) -> list[np.ndarray]:
        """Fills the spans of a job; the ids of each. Rows that don't come to their end, as at Ctrl-C, give
        their slots back. `named` are those of `submit`."""
        tickets = self.submit(job, seed, **named)
        try:
            return [ticket.result() for ticket in tickets]
        finally:
            self._give_up(tickets)

    def steps(self, job: Job, seed: int | Sequence[int] = 0, adapter: str = "") -> Iterator[Any]:
        """The same step by step: yields the ids of all spans after every step. Who stops asking gives the
        slots back."""
        tickets = self.submit(job, seed, progress=lambda ticket: None, every="step", adapter=adapter)
        first = job.spans(job.rows.tokens)
        try:
            while not all(ticket.over for ticket in tickets):
                self.turn()
                yield [x if t.ids is None else t.ids for x, t in zip(first, tickets, strict=True)]
            for ticket in tickets:
                ticket.result()
        finally:
            self._give_up(tickets)

    def turn(self) -> bool:
        """Lets rows join, and each lane take some steps. False if there is nothing to do."""
        with self._turn:
            self._end_late()
            joining = self._seat()
            try:
                for key, lane in list(self._lanes.items()):
                    self._work_on(lane, joining.get(key, []))
            except BaseException:
                self._begin_anew(joining)
                raise
            return bool(self._lanes or self._waiting)

    def _work_on(self, lane, joining):
        try:
            self._clear(lane)
            self._join(lane, joining)
            if lane.live:
                self._advance(lane)
        except Exception as error:  # whatever it is, those who wait hear of it
            for ticket in (*lane.tickets, *joining):
                if ticket is not None:
                    self._end(ticket, "failed", error)
            lane.tickets = []
        if not lane.live:
            del self._lanes[lane.key]

    def _begin_anew(self, joining):
        """After Ctrl-C nobody knows what the slots hold. All rows wait again, and will become what they
        would have."""
        held = [ticket for lane in self._lanes.values() for ticket in lane.tickets if ticket is not None]
        tickets = {id(ticket): ticket for ticket in (*held, *(x for of in joining.values() for x in of))}
        with self._lock:
            for ticket in reversed(tickets.values()):
                ticket.state, ticket.ids, ticket.steps = "waiting", None, 0
                self._waiting.appendleft(ticket)
            self._lanes.clear()

    def _give_up(self, tickets):
        """Ends those that aren't over, and frees lanes in which nobody is left."""
        for ticket in tickets:
            ticket.cancel()
        if self._turn.acquire(blocking=False):
            try:
                for key, lane in list(self._lanes.items()):
                    if all(ticket is None or ticket.over for ticket in lane.tickets):
                        del self._lanes[key]
            finally:
                self._turn.release()

    def start(self) -> None:
        """Works in a thread of its own until `close`."""
        self.threaded = True
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finishes what was submitted, then ends the thread."""
        with self._lock:
            self.threaded = False
            self._wake.notify()
        self._thread.join()

    def _work(self):
        while True:
            try:
                busy = self.turn()
            except Exception as error:  # whatever it is, nobody may wait for ever
                busy = False
                for ticket in self._all():
                    self._end(ticket, "failed", error)
                self._lanes.clear()
            with self._lock:
                if not busy and not self._waiting:
                    if not self.threaded:
                        return
                    self._wake.wait()

    # ---- Who gets a slot ------------------------------------------------------------------------

    def _rows(self, job, seed, adapter):
        """The rows of a job by themselves. Raises ValueError where one can't fit."""
        model, rule = self.model, job.rule
        if adapter not in self._params:
            known = ", ".join(repr(name) for name in self._params if name) or "none"
            raise ValueError(f"there is no adapter {adapter!r}; known: {known}")
        rule.check_length(job.length)
        placed, limit = decode.rows_of(job, seed), model.config.max_len
        rows, keys = [], self._keys
        if len(keys) > slots.COMPILED:  # they would grow with all that is ever asked
            keys.clear()
            self._compiled.clear()
        for i, length in enumerate(job.length_B):
            one = jax.tree.map(lambda x, i=i: x[i : i + 1], placed)
            places, longest = one.tokens_BL.shape[1], job.length
            if rule.modality == "text":
                # Padding behind the row changes nothing, so that rows of nearby lengths get one length.
                used = int(np.flatnonzero(one.valid_BL[0])[-1]) + 1
                places = min(layout.bucket(used), limit) if used <= limit else used
                longest = min(layout.bucket(int(length)), places) if rule.steps is None else job.length
                places = max(places, rule.size(longest))  # a block is within its row
                one = decode.padded(one, places, model.vocab.eos)
            if places > limit:
                raise ValueError(
                    f"a row has {places} tokens; the model takes {limit}. Ask for fewer new ones"
                )
            adapted = "lora" in self._params[adapter]
            shape = slots.Shape(model.mesh, model.config, model.vocab, longest, rule, adapted)
            key = LaneKey(shape, places, one.other is not None, adapter)
            size = self._bytes_of(key)
            if self.memory is not None and size > self.memory:
                fewer = (
                    "ask for fewer new tokens"
                    if rule.modality == "text"
                    else "leave out recompute and guide_every"
                )
                raise ValueError(
                    f"what is stored of a row of {places} tokens takes {size / 1e6:.1f} MB on a device, "
                    f"{self.memory / 1e6:.1f} MB are there; {fewer}"
                )
            key = keys.setdefault(key, key)
            reach = decode.reach_of(rule, longest, int(job.start_B[i]), places)
            rows.append(LaneRow(one, key, reach))
        return rows

    def _bytes(self, places):
        """Bytes on a device of the keys and values of a row."""
        c = self.model.config
        of_row = cache.row_bytes(c.n_layers, c.n_kv_heads, places, c.d_head, c.dtype)
        return of_row // self.model.mesh.shape["tensor"]

    def _bytes_of(self, key):
        """Bytes on a device of all that is stored of a row of a lane: keys, values and logits."""
        rule, vocab = key.shape.rule, self.model.vocab
        logits = rule.size(key.shape.length) * (rule.vocabulary(vocab)[1] or vocab.rows)
        return rule.caches * self._bytes(key.places) + rule.keeps_logits * logits * 4

    def _seat(self):
        """Who joins which lane at this turn: first come, first served, as far as slots and memory go."""
        room = self.slots - sum(lane.live for lane in self._lanes.values())
        with self._lock:
            waiting = [ticket for ticket in self._waiting if not ticket.over]
            joining: dict[LaneKey, list[Ticket]] = {}
            full = False
            for ticket in waiting[:room]:
                key = ticket.row.key
                if full and self._bytes_of(key):
                    continue  # what is freed is for the row that there was no memory for
                lane, tickets = self._lanes.setdefault(key, _Lane(key)), joining.setdefault(key, [])
                if self._has_room(lane, len(tickets) + 1):
                    tickets.append(ticket)
                else:
                    full = True
            for key in self._lanes.keys() - joining.keys():
                lane = self._lanes[key]
                lane.size = self._size(lane, lane.live)
            chosen = {id(ticket) for tickets in joining.values() for ticket in tickets}
            self._waiting = collections.deque(x for x in waiting if id(x) not in chosen)
        return joining

    def _clear(self, lane):
        """Empties the slots of those who gave up."""
        for number, ticket in enumerate(lane.tickets):
            if ticket is not None and ticket.over:
                lane.rows = slots.leaver(lane.key.shape)(lane.rows, np.int32(number))
                lane.tickets[number] = None

    def _has_room(self, lane, more):
        """Whether a lane can take so many more rows, when it has grown as far as memory goes."""
        lane.size = self._size(lane, lane.live + more)
        return lane.size >= lane.live + more

    def _size(self, lane, wanted):
        """The number of slots for so many rows."""
        now, sizes = len(lane.tickets), slots.sizes(self.slots, self._parts)
        of_row = self._bytes_of(lane.key)
        if of_row and self.memory is not None:
            others = [other for other in self._lanes.values() if other is not lane]
            taken = sum(self._bytes_of(other.key) * other.size for other in others)
            most = (self.memory * self._parts - taken) // of_row
            # While a lane grows, what it has and what it gets are there at once.
            sizes = [size for size in sizes if size <= now or size + now <= most]
        fit = next((size for size in sizes if size >= wanted), sizes[-1] if sizes else 0)
        if fit > now:
            return fit
        # To become smaller moves all rows. It pays where most slots are empty, and where the smaller lane
        # has been compiled before.
        known = [size for size in self._compiled.get(lane.key, ()) if wanted <= size <= now // 2]
        return min(known, default=now) if wanted <= now // 4 else now

    def _join(self, lane, tickets):
        """Gives each a slot, and makes its first pass."""
        if lane.size != len(lane.tickets):
            self._resize(lane)
        now, of_reach = time.monotonic(), {}
        for ticket in tickets:
            ticket.state, ticket.begun = "running", now - ticket.submitted
            of_reach.setdefault(ticket.row.reach, []).append(ticket)
        for reach, group in of_reach.items():
            free = [number for number, ticket in enumerate(lane.tickets) if ticket is None][: len(group)]
            for number, ticket in zip(free, group, strict=True):
                lane.tickets[number] = ticket
            # One row by itself, or as many as there are slots: two compilations for a lane.
            total = self._parts if len(group) == 1 else lane.size
            number_R = np.array([*free, *[lane.size] * (total - len(free))], np.int32)
            placed = [ticket.row.placed for ticket in group]
            placed += [placed[-1]] * (total - len(placed))
            rows = jax.tree.map(lambda *x_1: np.concatenate(x_1), *placed)
            with jax.set_mesh(self.model.mesh):
                join = slots.joiner(lane.key.shape, reach)
                put = sharding.put_batch(self.model.mesh, rows)
                lane.rows = join(
                    self._params[lane.key.adapter], lane.rows, put, number_R, decode.fresh(*rows[:4])
                )

    def _resize(self, lane):
        kept = [number for number, ticket in enumerate(lane.tickets) if ticket is not None]
        empty = lane.size - len(kept)
        with jax.set_mesh(self.model.mesh):
            if kept:
                numbers = np.array([*kept, *[-1] * empty], np.int32)
                lane.rows = slots.mover(lane.key.shape)(lane.rows, numbers)
            else:
                lane.rows = slots.empty(lane.key.shape, lane.size, lane.key.places, lane.key.other)
        self._compiled.setdefault(lane.key, set()).add(lane.size)
        lane.tickets = [*(lane.tickets[number] for number in kept), *[None] * empty]

    # ---- What becomes of it ---------------------------------------------------------------------

    def _advance(self, lane):
        """Some steps of a lane, and what its rows have become."""
        watched = [ticket for ticket in lane.tickets if ticket is not None and ticket.progress]
        # Who watches sees the first token as soon as it is there.
        most = 1 if any(ticket.every == "step" or not ticket.steps for ticket in watched) else STRIDE
        with jax.set_mesh(self.model.mesh):
            run = slots.runner(lane.key.shape)
            params = self._params[lane.key.adapter]
            lane.rows, report = run(params, lane.rows, np.int32(most), np.bool_(bool(watched)))
        report = jax.device_get(report)
        with self._lock:
            waits = sum(ticket.row.key is lane.key for ticket in self._waiting)
            self.counters["steps"] += int(report.ran)
            self.counters["idle"] += int(report.ran) * min(waits, len(lane.tickets) - lane.live)
        told = []
        for number, ticket in enumerate(lane.tickets):
            if ticket is None or ticket.over:
                continue
            start, length = (int(x[0]) for x in (ticket.row.placed.start_B, ticket.row.placed.length_B))
            ticket.ids = report.tokens_SL[number, start : start + length]
            ticket.steps = int(report.steps_S[number])
            ticket.first = ticket.first or time.monotonic() - ticket.submitted
            told.append(ticket)
            if not report.going_S[number]:
                lane.tickets[number] = None
                self.counters["tokens"] += length
                self._end(ticket, "done")
        for ticket in told:
            try:
                if ticket.progress:
                    ticket.progress(ticket)
            except Exception as error:  # one listener's error isn't that of the rows beside it
                self._end(ticket, "failed", error)

    def _end(self, ticket, state, error=None):
        with self._lock:
            if not ticket.over:
                ticket.state, ticket.error = state, error
                ticket.ended = time.monotonic() - ticket.submitted
                self.counters["rows"] += 1
                ticket._over.set()
                if ticket.at_end:
                    ticket.at_end(ticket)

    def _all(self):
        seated = [ticket for lane in self._lanes.values() for ticket in lane.tickets if ticket]
        with self._lock:
            return [*self._waiting, *seated]

    def _end_late(self):
        now = time.monotonic()
        for ticket in self._all():
            if ticket.deadline is not None and now > ticket.deadline and not ticket.over:
                spent, limit = now - ticket.submitted, ticket.deadline - ticket.submitted
                message = (
                    f"the request took {spent:.1f} s, its limit is {limit:.1f} s ({ticket.steps} steps)"
                )
                self._end(ticket, "late", TimeoutError(message))
