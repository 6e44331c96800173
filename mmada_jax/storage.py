"""Where files lie: on this machine's disks or in a bucket, gs://BUCKET/NAME. All that lists, reads, writes,
renames and locks asks here.

`path` makes a path of a text: a pathlib.Path, or a Bucket, which has the same methods where they have a
meaning. What differs between the two is below. Files are written whole or not at all, or grow by entries,
also while the disk is full. files.py reads what people have written.
"""

import contextlib
import errno
import fcntl
import io
import os
import pathlib
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TextIO

from mmada_jax import bucket
from mmada_jax.bucket import Bucket
from mmada_jax.lease import Lease, look
from mmada_jax.outages import Unserved

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Path = pathlib.Path | Bucket
Name = str | os.PathLike

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(gs|gcs|s3|az|hf|file|https?):/")


# ---- Paths ---------------------------------------------------------------------------------------


def path(name: Name) -> Path:
    """The path of a text or another path. Raises ValueError for s3:// and others that aren't read or
    written, ImportError if gs:// is named and what it needs isn't installed."""
    if isinstance(name, Bucket | pathlib.Path):
        return name
    text = os.fspath(name)
    if text.startswith(bucket.SCHEME):
        where = Bucket(text)
        bucket.connect()
        return where
    if found := _SCHEME.match(text):
        raise ValueError(
            f"{text} can't be read or written: name a folder of this machine or a bucket, gs://BUCKET/NAME "
            f"({found[0]} isn't one)"
        )
    return pathlib.Path(text)


def join(folder: Name, name: Name) -> Path:
    """The path `name`, which is relative to `folder`, absolute, or of a bucket."""
    text = os.fspath(name)
    if _SCHEME.match(text) or os.path.isabs(text):
        return path(name)
    return path(folder) / name


def resolved(name: Name) -> Path:
    """The absolute path without links and `..`: TensorStore refuses paths with `..`. Raises OSError for a
    link that leads back to itself."""
    where = path(name)
    if isinstance(where, Bucket):
        return where
    try:
        return where.resolve()
    except RuntimeError as error:
        raise OSError(errno.ELOOP, "the link leads back to itself", os.fspath(name)) from error


def relative_to(where: Path, folder: Path) -> str:
    """The name by which `join(folder, name)` finds `where`: relative to the folder, if both lie on disks or
    in one bucket."""
    if isinstance(where, Bucket) != isinstance(folder, Bucket):
        return str(where if isinstance(where, Bucket) else where.absolute())
    if isinstance(where, Bucket) and where.bucket != folder.bucket:
        return str(where)
    plain = lambda p: f"/{p.key}" if isinstance(p, Bucket) else p  # noqa: E731
    return os.path.relpath(plain(where), plain(folder))


def refuse_place(folder: Path) -> None:
    r"""Raises ValueError for a folder that arrays can't be written to: Orbax takes [...] in a path for a
    pattern and then finds no files, TensorStore takes \ for /."""
    if found := re.search(r"\[[^/]+\]|\\", str(folder)):
        raise ValueError(
            f"checkpoints can't be written to {folder}: Orbax doesn't take {found[0]!r} in a path; name "
            "another folder"
        )


def in_bucket(name: Name) -> bool:
    """Whether a path is of a bucket."""
    return isinstance(name, Bucket) or os.fspath(name).startswith(bucket.SCHEME)


def kvstore(folder: Path) -> dict[str, Any]:
    """A folder as TensorStore's specification of where keys and values lie."""
    if isinstance(folder, Bucket):
        return {"driver": "gcs", "bucket": folder.bucket, "path": f"{folder.key}/"}
    return {"driver": "file", "path": f"{folder}/"}


# ---- What is there -------------------------------------------------------------------------------


class File(NamedTuple):
    """A file below a folder. `crc32c` is the checksum that a bucket keeps of its objects (base64, as Google
    writes it), None on a disk."""

    path: Path
    size: int
    crc32c: str | None = None


def files_below(folder: Path) -> dict[str, File]:
    """All files at any depth below a folder by their names there, in order. A bucket is asked once."""
    if isinstance(folder, Bucket):
        found = [File(e.path, e.size, e.item.get("crc32c")) for e in folder.list(recursive=True)]
    else:
        found = [File(p, p.stat().st_size) for p in folder.rglob("*") if p.is_file()]
    return dict(sorted((file.path.relative_to(folder).as_posix(), file) for file in found))


def nothing_at(where: Path) -> str:
    """Says that nothing is there, and where something is."""
    around = next((p for p in where.parents if p.exists()), None)
    return f"{where} doesn't exist" + (f"; the nearest folder that does is {around}" if around else "")


class Place(NamedTuple):
    """What lies in a folder. `size` is in bytes."""

    name: str
    is_dir: bool
    is_file: bool
    is_link: bool = False
    size: int = 0


def scan(folder: Path) -> list[Place]:
    """What lies directly in a folder. A bucket is asked once."""
    if isinstance(folder, Bucket):
        return [
            Place(e.path.name, e.item is None, e.item is not None, False, e.size) for e in folder.list()
        ]
    found = []
    for entry in os.scandir(folder):
        is_file = entry.is_file()
        size = entry.stat().st_size if is_file else 0
        found.append(Place(entry.name, entry.is_dir(), is_file, entry.is_symlink(), size))
    return found


def has_files(folder: Path) -> bool:
    """Whether anything is in a folder, or there is a file of this name."""
    if isinstance(folder, Bucket):
        return folder.is_file() or bool(folder.list())  # an object NAME/ stands for an empty folder
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def free_bytes(folder: Path) -> int | None:
    """The room that is left, in bytes; None in a bucket, which has no end."""
    return None if isinstance(folder, Bucket) else shutil.disk_usage(folder).free


def is_outage(error: BaseException | None) -> bool:
    """Whether an error, or an error that caused it, says that a bucket has not served a request, though its
    object may be there."""
    while error is not None:
        if isinstance(error, Unserved):
            return True
        error = error.__cause__
    return False


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or an error that caused it, says that the disk, a quota or a limit is full. The
    errors of libraries may have any type."""
    signs = ("RESOURCE_EXHAUSTED", "No space left", "File too large", "quota exceeded")
    while error is not None:
        number = getattr(error, "errno", None)
        if number in FULL or any(s in str(error) for s in signs):
            return True
        error = error.__cause__ or error.__context__
    return False


def failures() -> tuple[type[Exception], ...]:
    """The types of errors by which libraries say that files couldn't be read or written. gcsfs raises some
    of its own through Orbax."""
    gcsfs = sys.modules.get("gcsfs.retry")
    return (OSError, ValueError, RuntimeError, *((gcsfs.HttpError,) if gcsfs else ()))


# ---- Reading -------------------------------------------------------------------------------------


def read_range(where: Path, at: int, size: int) -> bytes:
    """The bytes from `at` on, `size` of them or as many as there are. A bucket is asked once."""
    if isinstance(where, Bucket):
        return where.read_range(at, size)
    # Each read opens the file. That takes microseconds, and threads and processes share no handle.
    # O_NONBLOCK keeps a pipe without a writer from blocking.
    file = os.open(where, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ValueError(f"{where} is no regular file")
        return os.pread(file, size, at)
    finally:
        os.close(file)


def open_file(where: Path, block: int = bucket.BLOCK, size: int | None = None) -> io.BufferedIOBase:
    """A file to read. Of a bucket so many bytes are asked for at once; 0: what is read. An object whose
    `size` is given isn't asked for it."""
    return where.open("rb", block, size) if isinstance(where, Bucket) else where.open("rb")


# ---- Writing -------------------------------------------------------------------------------------


def write_whole(name: Name, data: str | bytes | Iterable[bytes]) -> None:
    """Writes a file whole or not at all, text as UTF-8, and its folder where that is missing."""
    where = path(name)
    data = data.encode() if isinstance(data, str) else data
    if isinstance(where, Bucket):
        where.write_bytes(data if isinstance(data, bytes) else b"".join(data))
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    # Other programs may write the same file, on other machines too, so a process number isn't unique.
    temporary = where.with_name(f"{where.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
        temporary.replace(where)
    except OSError as error:  # a failed write names no file
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(where)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(where: Path) -> Iterator[BinaryIO]:
    """A file to write from its beginning to its end. An object of a bucket is there when the block has
    ended without an error; a few MB of it are in memory at a time."""
    with where.writing() if isinstance(where, Bucket) else where.open("wb") as file:
        yield file


def put(file: pathlib.Path, where: Path) -> None:
    """Gives a complete file of this machine its place, whole or not at all; the file is gone afterwards."""
    if isinstance(where, Bucket):
        where.upload(file)
        file.unlink()
    else:
        file.replace(where)


def rmtree(folder: Path, ignore_errors: bool = False) -> None:
    """Removes a folder with all that is in it."""
    if not isinstance(folder, Bucket):
        shutil.rmtree(folder, ignore_errors=ignore_errors)
        return
    with contextlib.suppress(*((OSError,) if ignore_errors else ())):
        folder.rmtree()


class Growing:
    """A file that is begun anew and grows by whole entries.

    `begin` gives the first bytes of the file. On a disk an entry is in the file when `add` returns; entries
    that the disk refuses are kept in memory, in `waiting`, and written with the next entry. Until then
    readers may see a part of an entry.

    Nothing can be added to an object of a bucket, which takes about one write a second. So the whole file
    is in memory, and is written anew, by a thread, at most every `pause` seconds and with `flush`.
    """

    def __init__(self, name: Name, begin: Callable[[], Iterable[bytes]], pause: float = 10.0):
        self.path, self.waiting = path(name), bytearray()
        self._begin, self._size = begin, -1  # bytes of whole entries in the file; -1: not begun
        self._pause, self._written = pause, -float("inf")
        # Of a bucket: what is written, the write under way, and how many bytes that wait it has.
        self._whole: bytearray | None = None
        self._upload: Future | None = None
        self._of, self._pool = 0, None

    def add(self, entry: bytes = b"") -> None:
        """Writes the entries that wait, and `entry`. Raises OSError if the disk refuses, or if a bucket has
        refused the last write."""
        self.waiting += entry
        if isinstance(self.path, Bucket):
            self._add_to_bucket(wait=False)
            return
        if self._size < 0:
            write_whole(self.path, self._begin())
            self._size = self.path.stat().st_size
        if self.waiting:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() > self._size:
                    file.truncate(self._size)  # cuts off the part of an entry that a full disk has left
                self._size = min(file.tell(), self._size)  # somebody may have emptied or removed the file
                file.write(self.waiting)
            self._size += len(self.waiting)
            self.waiting.clear()

    def flush(self) -> None:
        """Writes what waits. Raises OSError as `add` does."""
        if isinstance(self.path, Bucket):
            self._add_to_bucket(wait=True)
        elif self.waiting or self._size < 0:
            self.add()

    def _add_to_bucket(self, wait: bool) -> None:
        refuse_lost(self.path)
        if self._whole is None:
            self._whole = bytearray(b"".join(self._begin()))
        if self._upload and (wait or self._upload.done()):
            upload, self._upload = self._upload, None
            self._written = time.monotonic()  # a bucket that has failed gets a pause too
            upload.result()
            self._whole += self.waiting[: self._of]
            del self.waiting[: self._of]
            self._size = len(self._whole)
        if self._upload is None and (self.waiting or self._size < 0) and (wait or self._is_time()):
            self._pool = self._pool or ThreadPoolExecutor(1, "upload")
            self._of = len(self.waiting)
            self._upload = self._pool.submit(self.path.write_bytes, bytes(self._whole + self.waiting))
            if wait:
                self._add_to_bucket(wait)

    def _is_time(self) -> bool:
        # A long file takes longer to be written, so that it is written less often.
        return time.monotonic() - self._written > self._pause + len(self._whole) / bucket.SLOW


# ---- One owner -----------------------------------------------------------------------------------


_held: list[Lease] = []  # of this process


def refuse_lost(where: Path) -> None:
    """Raises OSError if the lease of a folder around `where` was taken by another process: what this one
    writes there would destroy what that one has."""
    for lease in _held:
        if lease.lost and isinstance(where, Bucket) and where.is_relative_to(lease.path.parent):
            told = (
                "another process has taken the folder, since this one didn't reach the storage for a minute"
            )
            raise OSError(errno.EBUSY, told, str(lease.path.parent))


@contextlib.contextmanager
def locked(name: Name, busy: str) -> Iterator[TextIO | Lease]:
    """Holds the lock of the file `name`, which is made with its folders, or the lease of an object. The
    kernel releases a lock when its process ends, however it ends; a lease ends soon after (lease.py).

    Raises ValueError, with the text `busy` and the owner, if another process has it. If the file system
    knows no locks, a warning says so.
    """
    where = path(name)
    about = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}"
    if isinstance(where, Bucket):
        lease = Lease(where, about, busy, lambda line: print(line, file=sys.stderr, flush=True))
        _held.append(lease)
        try:
            yield lease
        finally:
            _held.remove(lease)
            lease.release()
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    with where.open("a+", errors="replace") as file:
        _take(file, busy)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the owner's name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{about}\n".encode())
        yield file


def refuse_locked(name: Name, busy: str) -> None:
    """Raises ValueError if another process surely has the lock or the lease; nothing is written."""
    where = path(name)
    if isinstance(where, Bucket):
        lease = look(where)
        if lease and lease.lives:
            raise ValueError(f"{busy} (taken by {lease.owner}); wait or end it")
    elif where.is_file():
        with where.open("a+", errors="replace") as file:
            _take(file, busy)


def _take(file: TextIO, busy: str) -> None:
    """Locks a file until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read(200).strip() or "a process that isn't known"
        raise ValueError(f"{busy} (taken by {owner}); wait or end it") from error
    except OSError as error:
        print(
            f"warning: {file.name} can't be locked ({error.strerror}); make sure that no "
            "other program writes there",
            file=sys.stderr, flush=True,
        )  # fmt: skip
