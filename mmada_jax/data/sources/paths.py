"""The files of a source: finding them, checking their format, reading them."""

import fnmatch
import glob
import hashlib
import os
import pathlib
import re
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mmada_jax import files
from mmada_jax.data.sources.source import SourceConfig

# Suffixes of pictures. images.open_image reads the formats of IMAGES, and doesn't read UNREAD_IMAGES.
IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp")
UNREAD_IMAGES = (
    "tif", "tiff", "heic", "heif", "avif", "jp2", "jxl", "svg", "ico", "tga", "ppm", "pgm", "pbm",
    "pnm", "exr", "hdr", "psd", "dng", "dds", "pcx",
)  # fmt: skip
# Largest sizes in bytes of an image file, and of a caption or a line of a side file.
MAX_IMAGE, MAX_TEXT = 64 << 20, 1 << 20

_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")

# Signatures of formats: offset, bytes at this offset, format.
_SIGNATURES = (
    (0, b"PAR1", "parquet"),
    (257, b"ustar", "webdataset"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"[", "llava"),
    (0, b"{", "jsonl"),
)


def find_inputs(config: SourceConfig, root: str, pattern: str = "") -> list[str]:
    """The files of a source. Raises ValueError for a pointer of git LFS, for a path that is no regular
    file, and if the signature of the first file belongs to another format."""
    paths = find_files(config.path, root, pattern)
    for path in paths:
        if not os.path.isdir(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is no regular file")
        files.refuse_pointer(path)
    if os.path.isfile(paths[0]):
        with open(paths[0], "rb") as file:
            start = file.read(512).removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        looks = next((name for at, mark, name in _SIGNATURES if start[at:].startswith(mark)), config.format)
        if looks == "gzip":
            raise ValueError(f"{paths[0]} is compressed, which has no random access; decompress it first")
        if looks != config.format:
            raise ValueError(f"{paths[0]} is not of format {config.format!r}; it looks like {looks!r}")
    return paths


def find_files(words: str, root: str, pattern: str = "") -> list[str]:
    """The absolute paths of the files that `words` name, in order. With a pattern, a folder stands for
    all files below it that match."""
    found: list[str] = []
    if "://" in words:
        raise ValueError(f"{words} is no local path; mount the bucket (Cloud Storage FUSE) and name that")
    for word in shlex.split(words):
        for name in _braces(word):
            path = os.path.abspath(os.path.join(root, name))
            inside = [path]
            if not os.path.exists(path) and re.search(r"[*?\[]", name):
                inside = glob.glob(os.path.join(glob.escape(os.path.abspath(root)), name), recursive=True)
                inside = sorted(file for file in inside if os.path.isfile(file))
            elif pattern and os.path.isdir(path):
                inside = _files_below(path, pattern)
                path = os.path.join(path, pattern)
            elif not os.path.exists(path):
                parent = next(p for p in pathlib.Path(path).parents if p.exists())
                raise FileNotFoundError(f"{path} doesn't exist; the nearest folder that does is {parent}")
            if not inside:
                raise FileNotFoundError(f"no file matches {path}")
            found += inside
    if not found:
        raise ValueError("a source has an empty path; name its files")
    return list(dict.fromkeys(found))


def _files_below(folder: str, pattern: str) -> list[str]:
    """The files below a folder that match a pattern such as *.tar. Upper case matches too."""
    below = [p for p in pathlib.Path(folder).rglob("*") if p.name[0] != "." and p.is_file()]
    fits = sorted(str(p) for p in below if fnmatch.fnmatch(p.name.lower(), pattern))
    packed = [p for p in below if fnmatch.fnmatch(p.name.lower().removesuffix(p.suffix.lower()), pattern)]
    packed = [p for p in packed if p.suffix.lower() in _PACKED]
    if packed:
        raise ValueError(
            f"{packed[0]} is compressed, which has no random access; decompress it, or name the other "
            "files by a glob"
        )
    return fits


def find_folder(config: SourceConfig, root: str) -> str:
    """The folder of a source that consists of one folder. Raises ValueError if it doesn't."""
    paths = find_files(config.path, root)
    if len(paths) != 1 or not os.path.isdir(paths[0]):
        raise ValueError(f"{config.path} isn't one folder, which format {config.format!r} expects")
    return paths[0]


def _braces(word: str) -> Iterator[str]:
    """All words that a word with ranges {00000..00099} or lists {a,b} stands for."""
    found = re.search(r"\{([^{}]*)\}", word)
    if not found:
        yield word
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    options: Iterable[str] = found[1].split(",")
    if numbers:
        first, last = numbers.groups()
        options = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    if (not numbers and "," not in found[1]) or (numbers and int(last) < int(first)):
        raise ValueError(
            f"{found[0]} in {word} is neither a range like {{000..099}} nor a list like {{a,b}}"
        )
    for option in options:
        yield from _braces(word[: found.start()] + option + word[found.end() :])


def relative_names(paths: Sequence[str]) -> list[str]:
    """The paths relative to the deepest folder that contains all of them."""
    common = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [os.path.relpath(path, common) for path in paths]


def stamp_of(paths: Sequence[str], more: bytes = b"") -> bytes:
    """A hash that differs between different files. It is made of the names, the sizes, the first 256 KiB
    and the last 256 KiB of the files, and of `more`."""
    seen = hashlib.sha256(more)
    for path, name in zip(paths, relative_names(paths), strict=True):
        size = os.path.getsize(path)
        seen.update(f"{name}:{size}\n".encode(errors="replace"))
        with open(path, "rb") as file:
            seen.update(file.read(256 << 10))
            file.seek(max(file.tell(), size - (256 << 10)))
            seen.update(file.read(256 << 10))
    return seen.digest()


def locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """(number of the part that contains `index`, place in this part). Part i ends before `ends[i]`."""
    part = int(np.searchsorted(ends, index, side="right"))
    return part, index - (int(ends[part - 1]) if part else 0)


def find_image_root(config: SourceConfig, root: str, path: str) -> str:
    """The folder that contains the images that the file at `path` names."""
    if not config.image_root:
        return os.path.dirname(path)
    return find_files(config.image_root, root)[0]


def below(folder: str, name: str) -> str:
    """The path of `name` in `folder`. Raises ValueError for a name that leads out of the folder."""
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
        raise ValueError(f"path {name!r} leads out of {folder}")
    return os.path.join(folder, name)


def read_file(path: str, at: int = 0, size: int | None = None, limit: int = MAX_IMAGE) -> bytes:
    """The `size` bytes of a file from byte `at` on, or all its bytes. Raises ValueError if these are no
    bytes, or more than `limit`."""
    # Each read opens the file. That takes microseconds, and threads and processes share no handle.
    # O_NONBLOCK keeps a pipe without a writer from blocking.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is no regular file")
        size = found.st_size if size is None else size
        if not 0 < size <= limit:
            raise ValueError(f"{size} bytes in {path}, expected 1 to {limit}")
        data = os.pread(file, size, at)
    finally:
        os.close(file)
    if len(data) != size:
        raise ValueError(f"{path} ends before byte {at + size}; it has changed since it was opened")
    files.refuse_pointer(data, path if len(data) == found.st_size else f"what {path} has at byte {at}")
    return data


def read_json(path: str, remedy: str, kind: type = dict) -> Any:
    """The value in a JSON file. Raises FileNotFoundError or ValueError, each with the remedy."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} doesn't exist; {remedy}")
    try:
        return files.read_json(path, kind)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
