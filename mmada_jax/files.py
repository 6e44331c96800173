"""Reading files as people have them: bytes, text and JSON, whole, or an error that names the file.

Every reader refuses a pipe or a device, which could block or never end. It also refuses a pointer of git
LFS, which lies in the place of a file after a clone without git-lfs. Where files lie is known in
storage.py.
"""

import codecs
import io
import json
import os
import re
import stat
from typing import Any

from mmada_jax import storage
from mmada_jax.bucket import Bucket

# The first bytes of a pointer (github.com/git-lfs/git-lfs, docs/spec.md), under today's name of the
# specification and the two earlier ones.
_POINTERS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
    b"version http://git-media.io/v/",
)

Path = str | os.PathLike[str]


def refuse_pointer(source: bytes | Path, name: str = "") -> None:
    """Raises ValueError if `source`, the bytes of a file or its path, is a pointer of git LFS.

    `name` is its name in the error, by default the path. Only a regular file is opened.
    """
    if not isinstance(source, bytes):
        name, where = name or os.fspath(source), storage.path(source)
        try:
            if not isinstance(where, Bucket) and not where.is_file():
                return
            source = storage.read_range(where, 0, 1024)  # by its specification a pointer is shorter
        except FileNotFoundError:
            return
    # Editors and shells may have saved it again, with a byte order mark or an empty line before it.
    source = source[:1024].removeprefix(codecs.BOM_UTF8).lstrip()
    if source.startswith(_POINTERS):
        size = re.search(rb"^size (\d+)", source, re.MULTILINE)
        stands_for = f" that stands for {int(size[1])} bytes" if size and len(size[1]) < 20 else ""
        raise ValueError(
            f"{name or 'the file'} is a pointer of git LFS{stands_for}, not the file itself; fetch it: "
            "git lfs pull"
        )


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """All bytes of a regular file. Raises OSError if there is no such file; ValueError for anything that is
    no regular file, for a pointer of git LFS, and for more than `limit` bytes."""
    name, where = os.fspath(path), storage.path(path)
    if isinstance(where, Bucket):
        data = where.read_bytes() if limit is None else where.read_range(0, limit + 1)
        if limit is not None and len(data) > limit:
            raise ValueError(f"{name} has more than {limit} bytes, which is the limit")
        refuse_pointer(data, name)
        return data
    try:
        found = where.stat()
    except ValueError as error:  # the name has a zero byte or half of a surrogate pair
        raise ValueError(f"no file can have the name {name!r:.80}: {error}") from error
    # Opening a pipe that nobody writes to would block.
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{name} is {_kind(found.st_mode)}; name a file")
    if limit is not None and found.st_size > limit:
        raise ValueError(f"{name} has {found.st_size} bytes; the limit is {limit}")
    data = where.read_bytes()
    refuse_pointer(data, name)
    return data


def read_text(path: Path, limit: int | None = None) -> str:
    r"""The text of a file of UTF-8, with a byte order mark or without. Lines end with \n, as Python's own
    reading gives them. Raises like `read_bytes`, and ValueError naming the place of a byte that is no
    UTF-8."""
    return decode(read_bytes(path, limit), os.fspath(path))


def decode(data: bytes, name: str) -> str:
    r"""Bytes of UTF-8 -> text, without a byte order mark, lines ended by \n. Raises ValueError naming
    `name` and the place of the first byte that is no UTF-8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{name}, line {line}: byte {data[error.start]:#04x} is no UTF-8 ({error.reason}); save the "
            "file as UTF-8"
        ) from error
    return io.IncrementalNewlineDecoder(None, translate=True).decode(text, final=True)


def read_json(path: Path, kind: type = object, limit: int | None = None, keys: tuple[str, ...] = ()) -> Any:
    """The value in a file of JSON. Raises like `read_text` and like `parse_json`, and ValueError for an
    object that lacks one of `keys`."""
    value = parse_json(read_text(path, limit), os.fspath(path), kind)
    if lacking := [key for key in keys if key not in value]:
        raise ValueError(f"{os.fspath(path)} is damaged: it lacks {', '.join(lacking)}")
    return value


def parse_json(text: str | bytes, name: str, kind: type = object) -> Any:
    """Text of JSON -> its value, of the Python type `kind`.

    Raises ValueError naming `name` and the place if it is damaged, nested too deeply, or another type.
    """
    text = decode(text, name) if isinstance(text, bytes) else text.removeprefix("\ufeff")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{name} is JSON that is nested too deeply to be read") from error
    except ValueError as error:  # damaged, or a number of too many digits
        raise ValueError(f"{name} is no JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{name} holds {_JSON[type(value)]}, expected {_JSON[kind]}")
    return value


_JSON = {
    dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number",
    bool: "true or false", type(None): "null",
}  # fmt: skip


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device", stat.S_ISBLK: "a device",
    }  # fmt: skip
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "no regular file")
