"""Shards of ArrayRecord, on a disk or in a bucket: records by their number.

The library reads gs:// itself, with one request for a record. It repeats a request for a quarter of an
hour and has no way to ask for less (array_record 0.8.6), so a thread waits for it here.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from mmada_jax import files, nearby, storage
from mmada_jax.bucket import Bucket, patience
from mmada_jax.data.sources.paths import HEAD, start_of
from mmada_jax.outages import failure, unanswered

T = TypeVar("T")
HOME = os.getpid()  # the process that has loaded this module, and not one that was forked of it
TRIES = 3  # requests that are made for one record, one after the other, while none is answered


class Shard:
    """The records of one shard. Threads may share it. A copy in another process opens the file anew."""

    def __init__(self, path: str):
        self._path = path
        self._facts = nearby.facts(path) if storage.in_bucket(path) else None
        self._fresh()
        self._count = self._ask(lambda reader: reader.num_records())

    def _fresh(self) -> None:
        self._process, self._place, self._reader = os.getpid(), None, None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("_path", "_facts", "_count")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._facts:
            nearby.remember(self._path, self._facts)
        self._fresh()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        def read(reader: Any) -> bytes:
            return reader.read([index])[0]

        try:
            try:
                return self._ask(read)
            except RuntimeError:
                if not nearby.drop(self._path):  # a copy on this machine, which may be damaged
                    raise
                return self._ask(read)
        except RuntimeError as error:
            if self._facts:
                now = Bucket(self._path).info()  # tells what is wrong, if it is gone or can't be read
                if str(now.get("generation")) != self._facts.generation:
                    raise ValueError(f"{self._path} was written anew after it was opened") from error
            raise ValueError(_line(error)) from error

    def _ask(self, what: Callable[[Any], T]) -> T:
        if self._process != os.getpid():  # a child that was forked has no connections of its own yet
            self._fresh()
        near = nearby.nearest(self._path)
        if storage.in_bucket(near) and os.getpid() != HOME:
            raise ValueError(
                f"{near} can't be read by a process that was forked: the library of ArrayRecord may crash "
                "there; start processes by spawn, or keep copies in MMADA_CACHE_DIR"
            )
        if storage.in_bucket(near):
            # With the generation no other object is read. And without it a # in the name would begin one.
            place = f"{near}#{self._facts.generation}" if self._facts else near
            return _within(patience(), lambda: what(self._opened(place, place)), near)
        # A copy that had to go and was fetched again is another file, and the old one still takes room.
        return what(self._opened(near, (near, os.stat(near).st_ino) if near != self._path else near))

    def _opened(self, near: str, place: Any) -> Any:
        """The reader of what is at a place."""
        from array_record.python.array_record_module import ArrayRecordReader

        if self._place == place:
            return self._reader
        # Of threads that come at the same time one opens it. If it gets no answer, another one tries.
        held = self._lock.acquire(timeout=patience() / TRIES / 2)
        try:
            if self._place != place:
                # The buffer and the options are those by which the library's own source reads in any order.
                options = "readahead_buffer_size:0,max_parallelism:0"
                reader = ArrayRecordReader(near, options=options, file_reader_buffer_size=32768)
                self._reader, self._place = reader, place
            return self._reader
        finally:
            if held:
                self._lock.release()


def _within(seconds: float, do: Callable[[], T], path: str) -> T:
    """What `do` returns, which is begun up to TRIES times while there is no answer. Raises OSError if there
    is none in the end."""
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((do(), None))
        except Exception as error:
            answers.put((None, error))

    for _ in range(TRIES):
        # A daemon, since a program must not wait at its end for what never comes.
        threading.Thread(target=run, daemon=True).start()
        try:
            value, error = answers.get(timeout=seconds / TRIES)
        except queue.Empty:
            continue
        unanswered.clear()
        if error:
            raise error
        return value
    raise failure(Bucket(path), TimeoutError(), seconds)


def open_shard(path: str, count: int | None, remedy: str) -> Shard:
    """Opens a shard. Raises ValueError if it isn't whole or doesn't have `count` records."""
    start = start_of(path, HEAD)
    if not start and not storage.path(path).is_file():
        raise FileNotFoundError(f"the shard {path} is missing; {remedy}")
    files.refuse_pointer(start, path)
    try:
        shard = _whole(path, count)
        if shard is None and nearby.drop(path):  # a copy on this machine, which may be damaged
            shard = _whole(path, count)
        shard = Shard(path) if shard is None else shard
    except RuntimeError as error:
        raise ValueError(
            f"{path} is no whole ArrayRecord ({_line(error) or 'truncated'}); {remedy}"
        ) from error
    # The library takes a truncated file, and an object that it gets no permission for, for an empty one.
    if storage.in_bucket(path) and not len(shard) and count != 0:
        Bucket(path).read_range(0, 1)
    if count is None and not len(shard):
        raise ValueError(f"{path} has no records: it is empty or truncated; {remedy}")
    if count is not None and len(shard) != count:
        raise ValueError(f"{path} has {len(shard)} records instead of {count}: it is truncated; {remedy}")
    return shard


def _whole(path: str, count: int | None) -> Shard | None:
    """A shard with `count` records, or None."""
    with contextlib.suppress(RuntimeError):
        shard = Shard(path)
        if len(shard) == count if count is not None else len(shard):
            return shard
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
