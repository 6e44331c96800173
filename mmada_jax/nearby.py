"""Copies on this machine of what data sources read from a bucket, so that it is fetched once.

Facts (size and generation) of an object are those of the moment when a source was opened. Beginnings and
ends of objects, and indices of their content, are kept in ~/.cache/mmada_jax/bucket (at most 1 GiB). With
`use`, or MMADA_CACHE_DIR and MMADA_CACHE_GIB, which worker processes inherit, whole objects are kept too,
in a folder of one's own. What was used least recently goes first. A copy has the name of its generation: an
object that was written anew is fetched anew.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mmada_jax import storage
from mmada_jax.bucket import Bucket, Entry

FOLDER, GIB = "MMADA_CACHE_DIR", "MMADA_CACHE_GIB"
AT_ONCE = 16  # requests at a time, where many objects are asked for
_SHARE = 8  # an object that would take more than this part of the limit isn't kept


class Facts(NamedTuple):
    """What was known of an object when its source was opened."""

    size: int
    generation: str


_facts: dict[str, Facts] = {}
_locks = [threading.Lock() for _ in range(64)]


def use(folder: str, gib: float) -> None:
    """Keeps whole objects in a folder of this machine, at most so many GiB. Raises ValueError for a folder
    of a bucket, or for no room."""
    if storage.in_bucket(folder) or gib <= 0:
        raise ValueError(
            f"cache_dir {folder!r} with cache_gib {gib:g}: name a folder of this machine and some "
            "room, as 50"
        )
    os.environ[FOLDER], os.environ[GIB] = os.path.abspath(folder), str(gib)


def note(entry: Entry) -> None:
    """Remembers the facts of an object that was listed."""
    if entry.item:
        _facts[str(entry.path)] = Facts(entry.size, str(entry.item.get("generation", "")))


def look(path: Bucket) -> Facts | None:
    """The facts of an object as they are now, which are remembered; None if there is none."""
    _facts.pop(str(path), None)
    with contextlib.suppress(FileNotFoundError):
        note(Entry(path, path.info()))
    return _facts.get(str(path))


def facts(path: str) -> Facts | None:
    """The facts of an object that are remembered, or those of now."""
    return _facts.get(path) or look(Bucket(path))


def each(do: Callable[[str], object], paths: Iterable[str]) -> list:
    """The results of `do` for several paths, in order; those of a bucket are asked for side by side."""
    paths = list(paths)
    if len(paths) < 2 or not all(storage.in_bucket(path) for path in paths):
        return [do(path) for path in paths]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(do, paths))


def kept(path: str, what: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives of the object at `path`, from an earlier time if it was kept. `what` tells it from
    other things that are made of the object. A path of this machine is never kept."""
    known = facts(path) if storage.in_bucket(path) else None
    if known is None:
        return make()
    copy = _copy(path, known, what)
    with contextlib.suppress(OSError):
        data = copy.read_bytes()
        os.utime(copy)
        return data
    data = make()
    if _make_room(copy, len(data)):
        with contextlib.suppress(OSError):  # the disk is full: it is made again next time
            storage.write_whole(copy, data)
    return data


def nearest(path: str) -> str:
    """The copy of an object on this machine, if there is one or if whole objects are kept; else the
    path."""
    if not storage.in_bucket(path) or FOLDER not in os.environ:
        return path
    known = facts(path)
    if known is None:
        return path
    copy = _copy(path, known, "whole")
    with _locks[hash(path) % len(_locks)]:  # threads fetch it once
        if not _is_whole(copy, known):
            if not _make_room(copy, known.size):
                return path
            try:
                _fetch(Bucket(path), copy)
            except storage.failures():  # what the disk or the network refuses is read piece by piece
                return path
    with contextlib.suppress(OSError):
        os.utime(copy)
    return str(copy)


def _fetch(path: Bucket, copy: pathlib.Path) -> None:
    temporary = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
    try:
        with storage.open_file(path, 32 << 20) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 32 << 20)
        temporary.replace(copy)
    finally:
        temporary.unlink(missing_ok=True)


def _is_whole(copy: pathlib.Path, known: Facts) -> bool:
    with contextlib.suppress(OSError):
        return copy.stat().st_size == known.size
    return False


def _folder() -> tuple[pathlib.Path, float]:
    """The folder of the copies, and how many bytes it may have."""
    if folder := os.environ.get(FOLDER):
        return pathlib.Path(folder), float(os.environ.get(GIB, 10)) * 2**30
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "mmada_jax" / "bucket", 2**30


def _copy(path: str, known: Facts, what: str) -> pathlib.Path:
    name = hashlib.sha256("\n".join((path, known.generation, str(known.size), what)).encode())
    return _folder()[0] / f"{name.hexdigest()[:32]}.copy"


def _make_room(copy: pathlib.Path, size: int) -> bool:
    """Removes the copies that were used least recently. Returns whether there is room for one more."""
    folder, limit = _folder()
    if size > limit / _SHARE:
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = [(file.stat(), file) for file in folder.glob("*.copy")]
    except OSError:  # nothing can be written, or another process has just removed one
        return False
    left = limit - size - sum(about.st_size for about, _ in there)
    for about, file in sorted(there, key=lambda pair: pair[0].st_mtime):
        if left >= 0:
            break
        file.unlink(missing_ok=True)
        left += about.st_size
    return True
