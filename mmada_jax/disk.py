"""Files that are written whole or not at all, and files that grow, also while the disk is full."""

import errno
import os
import pathlib
import re
import secrets
from collections.abc import Callable, Iterable


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it follows from, says that the disk, a quota or a limit is full; that
    of a library may have any type."""
    signs = ("RESOURCE_EXHAUSTED", "No space left", "File too large", "quota exceeded")
    while error is not None:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(s in str(error) for s in signs):
            return True
        error = error.__cause__ or error.__context__
    return False


def resolved(path: str | os.PathLike[str]) -> pathlib.Path:
    """An absolute path without links and `..`, which TensorStore doesn't take. Raises OSError for a link
    that leads back to itself."""
    try:
        return pathlib.Path(path).resolve()
    except RuntimeError as error:
        raise OSError(errno.ELOOP, "the link leads back to itself", os.fspath(path)) from error


def refuse_place(folder: pathlib.Path) -> None:
    r"""Raises ValueError for a folder that arrays can't be written to: Orbax reads [...] in its path as a
    pattern and finds no files, TensorStore reads \ as /."""
    if found := re.search(r"\[[^/]+\]|\\", str(folder)):
        raise ValueError(
            f"checkpoints can't be written to {folder}: Orbax doesn't take {found[0]!r} in a path; name "
            "another folder"
        )


def write_whole(path: str | os.PathLike[str], data: str | bytes | Iterable[bytes]) -> None:
    """Writes a file whole or not at all, text as UTF-8, and its folder where that is missing."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several programs may write the same file, on machines that number their processes alike.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    data = data.encode() if isinstance(data, str) else data
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
        temporary.replace(path)
    except OSError as error:  # that of a write names no file
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


class Growing:
    """A file that is begun anew and grows by whole entries, each on the disk when `add` returns.

    `begin` gives what it begins with. What the disk refuses is kept in memory, in `waiting`, and tried
    again with the next entry: readers never see a part of one for longer than that.
    """

    def __init__(self, path: str | os.PathLike[str], begin: Callable[[], Iterable[bytes]]):
        self.path, self.waiting = pathlib.Path(path), bytearray()
        self._begin, self._size = begin, -1  # bytes on the disk that are whole entries; -1: not begun

    def add(self, entry: bytes = b"") -> None:
        """Writes what has waited, and `entry`. Raises OSError where the disk refuses."""
        self.waiting += entry
        if self._size < 0:
            write_whole(self.path, self._begin())
            self._size = self.path.stat().st_size
        if self.waiting:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() > self._size:
                    file.truncate(self._size)  # a part of an entry, left when the disk refused
                self._size = min(file.tell(), self._size)  # somebody may have emptied or removed it
                file.write(self.waiting)
            self._size += len(self.waiting)
            self.waiting.clear()
