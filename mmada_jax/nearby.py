"""Copies on this machine of what data sources read from a bucket, so that it is fetched once.

Facts (size and generation) of an object are those of the moment when a source was opened. Beginnings and
ends of objects, and indices of their content, are kept in ~/.cache/mmada_jax/bucket (at most 1 GiB). With
`use`, or MMADA_CACHE_DIR and MMADA_CACHE_GIB, which worker processes inherit, whole objects are kept too,
in a folder of one's own. A copy has the name of its generation: an object that was written anew is fetched
anew. What was used least recently goes first, but nothing that was used within the hour: a run whose data
is larger than the room would fetch the same objects over and over. What can't be kept is read from the
bucket.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from mmada_jax import bucket, storage
from mmada_jax.bucket import BLOCK, Bucket, Entry

FOLDER, GIB = "MMADA_CACHE_DIR", "MMADA_CACHE_GIB"
_SHARE = 8  # an object that would take more than this part of the limit isn't kept
FETCH = 4 * BLOCK  # bytes that are asked for at once, of an object that is fetched whole
IN_USE = 3600  # seconds since its last use for which a copy stays
_PAUSE = 300  # seconds for which nobody looks for room again where there was none


class Facts(NamedTuple):
    """What was known of an object when its source was opened."""

    size: int
    generation: str


_facts: dict[str, Facts | None] = {}  # None: there was no such object
_full: dict[str, float] = {}  # folder -> when it was full
_locks = [threading.Lock() for _ in range(64)]


def use(folder: str, gib: float) -> None:
    """Keeps whole objects in a folder of this machine, at most so many GiB; does nothing for an empty name.
    Raises ValueError for a folder of a bucket, or for no room."""
    if not folder:
        return
    if storage.in_bucket(folder) or gib <= 0:
        raise ValueError(
            f"cache_dir {folder!r} with cache_gib {gib:g}: name a folder of this machine and some "
            "room, as 50"
        )
    os.environ[FOLDER], os.environ[GIB] = os.path.abspath(os.path.expanduser(folder)), str(gib)


# ---- Facts ---------------------------------------------------------------------------------------


def note(entry: Entry) -> None:
    """Remembers the facts of an object that was listed."""
    if entry.item:
        _facts[str(entry.path)] = Facts(entry.size, str(entry.item.get("generation", "")))


def look(path: Bucket) -> Facts | None:
    """The facts of an object as they are now, which are remembered; None if there is none."""
    _facts[str(path)] = None
    with contextlib.suppress(FileNotFoundError):
        note(Entry(path, path.info()))
    return _facts[str(path)]


def remember(path: str, known: Facts) -> None:
    """Takes over the facts of an object from another process, if there are none of it."""
    _facts.setdefault(path, known)


def look_at(folder: str, names: Iterable[str]) -> list[Facts | None]:
    """The facts of some objects in a folder as they are now. The folder is listed once; what doesn't lie
    directly in it is asked for."""
    where = storage.path(folder)
    listed = {str(entry.path): entry for entry in where.list()}

    def one(name: str) -> Facts | None:
        entry = listed.get(str(where / name))
        if entry is None:
            return look(where / name)
        note(entry)
        return _facts[str(entry.path)]

    return [one(name) for name in names]


def facts(path: str) -> Facts | None:
    """The facts of an object that are remembered, or those of now; None if there was no such object."""
    return _facts[path] if path in _facts else look(Bucket(path))


def each(do: Callable[[str], object], paths: Iterable[str]) -> list:
    """The results of `do` for several paths, in order; those of a bucket are asked for side by side."""
    paths = list(paths)
    if len(paths) < 2 or not all(storage.in_bucket(path) for path in paths):
        return [do(path) for path in paths]
    return bucket.each(do, paths)


# ---- Copies --------------------------------------------------------------------------------------


def kept(path: str, what: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives of the object at `path`, from an earlier time if it was kept. `what` tells it from
    other things that are made of the object. A path of this machine is never kept."""
    known = facts(path) if storage.in_bucket(path) else None
    if known is None:
        return make()
    copy = _copy(path, known, what)
    with contextlib.suppress(OSError):
        data = copy.read_bytes()
        if data[:_HASH] == _hash(data[_HASH:]):
            os.utime(copy)
            return data[_HASH:]
        copy.unlink()
    data = make()
    _keep(copy, [_hash(data), data], _HASH + len(data))
    return data


_HASH = 16  # bytes of the hash before what is kept


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_HASH).digest()


def nearest(path: str) -> str:
    """The copy of an object on this machine, if there is one or if whole objects are kept; else the
    path."""
    if not storage.in_bucket(path) or FOLDER not in os.environ:
        return path
    known = facts(path)
    if known is None:
        return path
    copy = _copy(path, known, "whole")
    if _is_whole(copy, known):
        return str(copy)
    with _locks[hash(path) % len(_locks)]:  # threads fetch it once
        blocks = (
            storage.read_range(Bucket(path), at, min(FETCH, known.size - at))
            for at in range(0, known.size, FETCH)
        )
        return str(copy) if _is_whole(copy, known) or _keep(copy, blocks, known.size) else path


def drop(path: str) -> bool:
    """Removes the copy of an object whose bytes have turned out to be damaged. Returns whether there was
    one."""
    known = facts(path) if storage.in_bucket(path) and FOLDER in os.environ else None
    with contextlib.suppress(OSError):
        if known:
            _copy(path, known, "whole").unlink()
            return True
    return False


def _is_whole(copy: pathlib.Path, known: Facts) -> bool:
    """Whether there is a copy of the size that it must have; it counts as used."""
    with contextlib.suppress(OSError):
        about = copy.stat()
        if about.st_mtime < time.time() - IN_USE / 60:
            os.utime(copy)
        return about.st_size == known.size
    return False


def _folder() -> tuple[pathlib.Path, float]:
    """The folder of the copies, and how many bytes it may have."""
    if folder := os.environ.get(FOLDER):
        return pathlib.Path(folder), float(os.environ.get(GIB, 50)) * 2**30
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "mmada_jax" / "bucket", 2**30


def _copy(path: str, known: Facts, what: str) -> pathlib.Path:
    name = hashlib.sha256("\n".join((path, known.generation, str(known.size), what)).encode())
    return _folder()[0] / f"{name.hexdigest()[:32]}.copy"


def _keep(copy: pathlib.Path, blocks: Iterable[bytes], size: int) -> bool:
    """Writes a copy of `size` bytes, whole or not at all. Returns whether there is one now: what the disk
    refuses isn't kept. Errors of the storage are raised."""
    temporary = copy.with_name(f"{copy.stem}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        if not _reserve(temporary, size):
            return False
        with temporary.open("r+b") as file:
            written = sum(map(file.write, blocks))
        if written == size:  # else the object was written anew meanwhile
            temporary.replace(copy)
        return written == size
    except OSError as error:
        if storage.is_outage(error):
            raise
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _reserve(temporary: pathlib.Path, size: int) -> bool:
    """Makes a file of `size` bytes for a copy, if there is room within the limit, or if copies can go. The
    limit is that of all processes together."""
    folder, limit = _folder()
    if size > limit / _SHARE or time.monotonic() < _full.get(str(folder), 0) + _PAUSE:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    # A file has the number of bytes in the folder. With many small copies it takes long to count them.
    with (folder / "size").open("a+b") as total:
        fcntl.flock(total, fcntl.LOCK_EX)
        total.seek(0)
        known = total.read(32)
        used = int(known) if known.isdigit() else limit
        if used + size > limit:
            # A tenth more than is needed goes, so that not every copy has to look for room.
            used = _shrink(folder, max(0, 0.9 * limit - size))
        fits = used + size <= limit
        if fits:
            with temporary.open("wb") as file:
                file.truncate(size)
        else:
            _full[str(folder)] = time.monotonic()
        total.truncate(0)
        total.write(b"%d" % (used + size * fits))
    return fits


def _shrink(folder: pathlib.Path, limit: float) -> int:
    """Removes copies until at most `limit` bytes are left, or only what is in use. Returns how many are."""
    there, now = {}, time.time()
    for file in folder.iterdir():
        if file.suffix not in (
            ".copy",
            ".tmp",
        ):  # .tmp: being fetched, or left by a process that was killed
            continue
        # One that is being fetched may have got its name since it was listed.
        for name in (file, file.with_name(f"{file.name.partition('.')[0]}.copy")):
            with contextlib.suppress(OSError):  # another process has just removed it
                about = name.stat()
                there[name] = (about.st_mtime, about.st_size)
                break
    used = sum(size for _, size in there.values())
    for file, (last, size) in sorted(there.items(), key=lambda pair: pair[1]):
        if used <= limit or last > now - IN_USE:
            break
        file.unlink(missing_ok=True)
        used -= size
    return used


def _begin_anew() -> None:
    # A thread that had a lock when the process was forked isn't there in the child.
    _locks[:] = [threading.Lock() for _ in _locks]


os.register_at_fork(after_in_child=_begin_anew)
