"""Writing files: whole or not at all, or growing by entries, also while the disk is full. Reading is in
files.py, and what is written is known elsewhere."""

import errno
import os
import pathlib
import re
import secrets
from collections.abc import Callable, Iterable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def resolved(path: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path without links and `..`: TensorStore refuses paths with `..`. Raises OSError for a
    link that leads back to itself."""
    try:
        return pathlib.Path(path).resolve()
    except RuntimeError as error:
        raise OSError(errno.ELOOP, "the link leads back to itself", os.fspath(path)) from error


def refuse_place(folder: pathlib.Path) -> None:
    r"""Raises ValueError for a folder that arrays can't be written to: Orbax takes [...] in a path for a
    pattern and then finds no files, TensorStore takes \ for /."""
    if found := re.search(r"\[[^/]+\]|\\", str(folder)):
        raise ValueError(
            f"checkpoints can't be written to {folder}: Orbax doesn't take {found[0]!r} in a path; name "
            "another folder"
        )


def write_whole(path: str | os.PathLike[str], data: str | bytes | Iterable[bytes]) -> None:
    """Writes a file whole or not at all, text as UTF-8, and its folder where that is missing."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other programs may write the same file, on other machines too, so a process number isn't unique.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    data = data.encode() if isinstance(data, str) else data
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
        temporary.replace(path)
    except OSError as error:  # a failed write names no file
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


class Growing:
    """A file that is begun anew and grows by whole entries. An entry is in the file when `add` returns.

    `begin` gives the first bytes of the file. Entries that the disk refuses are kept in memory, in
    `waiting`, and written with the next entry. Until then readers may see a part of an entry.
    """

    def __init__(self, path: str | os.PathLike[str], begin: Callable[[], Iterable[bytes]]):
        self.path, self.waiting = pathlib.Path(path), bytearray()
        self._begin, self._size = begin, -1  # bytes of whole entries in the file; -1: not begun

    def add(self, entry: bytes = b"") -> None:
        """Writes the entries that wait, and `entry`. Raises OSError if the disk refuses."""
        self.waiting += entry
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
