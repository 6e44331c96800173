"""The engine that writes shards by actors of Ray, on one machine or on many.

Each actor opens the source itself and writes whole shards, as the plain loop does. This process, the
driver, hands out shards and counts. A shard whose worker dies is written again by a new one, a few times.

Ray Data would hand out shards, too. It doesn't say which row a lost worker had (ActorDiedError names the
actor), by default tries that row for ever, and tells of a shard when it is whole: the driver couldn't name
the shard, nor count what is left out while it is written. So this is Ray's core, with a loop of its own.
"""

import collections
import contextlib
import dataclasses
import math
import os
import socket
import sys
import time
import typing
from collections.abc import Iterator, Mapping

import numpy as np

from mmada_jax import cluster, storage
from mmada_jax.model.prepare import Job, Tally, Writer
from mmada_jax.model.reading import Skip

# A shard is given up when so many workers have died over it.
TRIES = 3
# Seconds between two counts that a worker sends, and of waiting for any worker before that is told.
TELL, PATIENCE = 0.2, 60.0
# Seconds until a worker that was killed is gone.
GONE = 10.0


class OnRay:
    """The engine. `address` is that of a running cluster, by default RAY_ADDRESS; without both one is
    started on this machine, and ended.

    Each of `workers` actors gets `cpus`, `gpus` and other `resources` of one node. By default there is one
    on each node, since a worker uses all cores as the plain loop does; where `cpus`, `gpus` or `resources`
    are given, there are as many as the cluster has room for. Raises ImportError without Ray, ValueError for
    numbers that make no sense.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        cpus: float | None = None,
        gpus: float = 0,
        resources: Mapping[str, float] | None = None,
    ):
        cluster.require("--engine ray")
        if workers is not None and workers < 1:
            raise ValueError(f"--workers is {workers}; it must be at least 1")
        for name, number in {"--worker_cpus": cpus, "--worker_gpus": gpus, **(resources or {})}.items():
            if number is not None and not 0 <= number < math.inf:
                raise ValueError(f"{name} is {number} for each worker; it must be at least 0")
        self._address, self._workers = address, workers
        self._one_a_node = cpus is None and not gpus and not resources
        self._need = {"CPU": 1 if cpus is None else cpus, "GPU": gpus, **(resources or {})}

    def __call__(self, writer: Writer, missing: dict[storage.Path, np.ndarray], tally: Tally) -> None:
        """Writes the missing shards. Raises what a worker raises, or ChildProcessError, which names a shard
        over which workers die again and again."""
        if not missing:
            return
        with cluster.connected(self._address) as started:
            count = min(self._count(started), len(missing))
            with contextlib.closing(_Workers(self._need, writer, missing, tally)) as workers:
                workers.write(count)

    def _count(self, started: bool) -> int:
        """How many workers there are to be. Raises ValueError if a cluster of our own has no room for them;
        one that was joined may grow."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = [
            int(min(node.get(name, 0) // number for name, number in self._need.items() if number))
            if any(self._need.values())
            else 1
            for node in nodes
        ]
        fit = sum(min(1, n) for n in room) if self._one_a_node else sum(room)
        asked = self._workers or 1
        if asked > sum(room):
            has = "; ".join(_resources(node) for node in nodes)
            told = (
                f"there is room for {sum(room)} of {asked} workers with {_resources(self._need)} each: the "
                f"cluster has {has}"
            )
            if started:
                raise ValueError(f"{told}; ask for less (--workers, --worker_cpus, --worker_gpus)")
            print(f"{told}; others wait until it has more", file=sys.stderr)
        return self._workers or fit or 1


def _resources(of: Mapping[str, float]) -> str:
    """As `2 CPU, 4 TPU`. What Ray names after its nodes, and memory, isn't asked for by workers."""
    left_out = ("node:", "accelerator_type:", "memory", "object_store_memory")
    return ", ".join(f"{n:g} {name}" for name, n in of.items() if n and not name.startswith(left_out))


class Actor:
    """A process of the cluster that writes shards. Its methods are generators, whose values Ray passes on
    at once."""

    def begin(self, job: Job, folder: str, settings: dict) -> Iterator[str]:
        """Opens the source; relative paths are below `folder`, where it is. Yields the host. Raises
        ValueError if it can't, or if the source isn't the driver's."""
        host = socket.gethostname()
        with contextlib.suppress(OSError):
            os.chdir(folder)
        try:
            self._writer = Writer(job)
        except (ValueError, OSError) as error:
            raise ValueError(f"a worker on {host} can't begin: {error}") from error
        here = self._writer.settings
        if different := [
            f"{name} is {here.get(name)!r} there and {settings.get(name)!r} here"
            for name in settings | here
            if here.get(name) != settings.get(name)
        ]:
            raise ValueError(f"a worker on {host} has other data ({'; '.join(different)}); all hosts must "
                             "see the same files, and have the same mmada_jax")  # fmt: skip
        yield host

    def write(self, path: storage.Path, indices: np.ndarray) -> Iterator[tuple[int, list[Skip]]]:
        """Writes a shard; yields what Writer.write yields, summed over a moment."""
        seen, skips, told = 0, [], time.monotonic()
        with contextlib.closing(self._writer.write(path, indices)) as written:
            for more, bad in written:
                seen, skips = seen + more, skips + bad
                if time.monotonic() - told > TELL:
                    yield seen, skips
                    seen, skips, told = 0, [], time.monotonic()
        yield seen, skips


@dataclasses.dataclass
class _Worker:
    """An actor, what it sends (None: it waits for a shard), and its shard (None: it begins)."""

    actor: typing.Any
    stream: typing.Any
    shard: storage.Path | None = None


class _Workers:
    """The workers of one call, as the driver sees them."""

    def __init__(
        self,
        need: Mapping[str, float],
        writer: Writer,
        missing: dict[storage.Path, np.ndarray],
        tally: Tally,
    ):
        import ray

        self._ray = ray
        # They aren't restarted by Ray: which shard a worker had would be unknown.
        self._actor = ray.remote(Actor).options(
            num_cpus=need["CPU"], num_gpus=need["GPU"], max_restarts=0, max_task_retries=0,
            resources={name: n for name, n in need.items() if name not in ("CPU", "GPU")},
            scheduling_strategy="SPREAD",
        )  # fmt: skip
        self._writer, self._missing, self._tally = writer, missing, tally
        self._waiting = collections.deque(missing)
        self._deaths: collections.Counter[storage.Path | None] = collections.Counter()
        self._workers: list[_Worker] = []

    def write(self, count: int) -> None:
        """Writes all shards, by `count` workers."""
        for _ in range(count):
            self._hire()
        while self._waiting or any(worker.shard for worker in self._workers):
            for worker in self._workers:
                if worker.stream is None and self._waiting:
                    worker.shard = self._waiting.popleft()
                    worker.stream = worker.actor.write.remote(worker.shard, self._missing[worker.shard])
            streams = [worker.stream for worker in self._workers if worker.stream is not None]
            ready, _ = self._ray.wait(streams, timeout=PATIENCE)
            if not ready and not any(worker.shard for worker in self._workers):
                self._tell(f"no worker has begun for {PATIENCE:.0f} s; waiting for the cluster")
            for worker in [w for w in self._workers if any(w.stream is stream for stream in ready)]:
                self._receive(worker)

    def close(self) -> None:
        """Ends the workers, and waits until those are gone that write."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        for worker in self._workers:
            with contextlib.suppress(StopIteration, self._ray.exceptions.RayError):
                while worker.shard and self._ray.wait([worker.stream], timeout=GONE)[0]:
                    self._ray.get(next(worker.stream))

    def _hire(self) -> None:
        actor = self._actor.remote()
        begun = actor.begin.remote(self._writer.job, os.getcwd(), self._writer.settings)
        self._workers.append(_Worker(actor, begun))

    def _receive(self, worker: _Worker) -> None:
        """Takes what a worker has sent: a count, its end, or its death."""
        try:
            sent = self._ray.get(next(worker.stream))
        except StopIteration:
            if worker.shard is not None:
                self._tally.finish(worker.shard)
            worker.stream = worker.shard = None
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause or error from error
        except self._ray.exceptions.RayError as error:
            self._bury(worker, _reason(error))
        else:
            if worker.shard is None:
                self._deaths[None] = 0
                if not self._tally.bar.last_print_n:
                    self._tally.bar.unpause()  # the time that Ray needs to start says nothing of the rest
            else:
                self._tally.add(worker.shard, *sent)

    def _bury(self, worker: _Worker, reason: str) -> None:
        """A worker has died: its shard, if it had one, waits again, and a new worker is begun."""
        self._workers.remove(worker)
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(worker.actor)  # where it is only out of reach
        shard, self._deaths[worker.shard] = worker.shard, self._deaths[worker.shard] + 1
        times = self._deaths[shard]
        if shard is not None:
            self._tally.forget(shard)
            self._waiting.append(shard)
        if times == TRIES:
            if shard is None:
                raise ChildProcessError(f"{times} workers in turn have died while they began: {reason}")
            indices = self._missing[shard]
            raise ChildProcessError(
                f"{times} workers have died while they wrote {shard} (records {indices.min():,} to "
                f"{indices.max():,} of the source), the last: {reason}; it may hold a record that no "
                "process survives, or need more memory than there is. The shards that are finished are kept"
            )
        what = f"wrote {shard.name}" if shard else "began"
        self._tell(f"a worker has died while it {what} ({times} of {TRIES} times); again by another")
        self._hire()

    def _tell(self, line: str) -> None:
        self._tally.bar.write(line, file=sys.stderr)


def _reason(error: Exception) -> str:
    """What Ray says of a death, without its guesses and its numbers of actors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes")[0][:300] if lines else type(error).__name__
