"""The files of a source: finding them, checking their format, reading them."""

import fnmatch
import glob
import hashlib
import io
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mmada_jax import files, nearby, storage
from mmada_jax.bucket import Bucket
from mmada_jax.data.sources.source import SourceConfig

# Suffixes of pictures. images.open_image reads the formats of IMAGES, and doesn't read UNREAD_IMAGES.
IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp")
UNREAD_IMAGES = (
    "tif", "tiff", "heic", "heif", "avif", "jp2", "jxl", "svg", "ico", "tga", "ppm", "pgm", "pbm",
    "pnm", "exr", "hdr", "psd", "dng", "dds", "pcx",
)  # fmt: skip
# Largest sizes in bytes of an image file, and of a caption or a line of a side file.
MAX_IMAGE, MAX_TEXT = 64 << 20, 1 << 20

_PATTERN = re.compile(r"[*?\[]")  # what a glob pattern has and a name hasn't
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
    starts = nearby.each(lambda path: start_of(path, HEAD), paths)
    for path, start in zip(paths, starts, strict=True):
        if not storage.in_bucket(path) and not os.path.isdir(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is no regular file")
        files.refuse_pointer(start, path)
    if start := starts[0].removeprefix(b"\xef\xbb\xbf"):  # a byte order mark
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
    names = [name for word in shlex.split(words) for name in _braces(word)]
    paths = [storage.join(root, name) for name in names]
    # What names one object of a bucket; the bucket is asked for many of them side by side.
    plain = [
        str(path)
        for path, name in zip(paths, names, strict=True)
        if isinstance(path, Bucket) and not _PATTERN.search(name)
    ]
    is_object = dict(zip(plain, nearby.each(lambda path: nearby.look(Bucket(path)), plain), strict=True))
    for path, name in zip(paths, names, strict=True):
        path = path if isinstance(path, Bucket) else storage.path(os.path.abspath(path))
        is_pattern, inside = bool(_PATTERN.search(name)), [str(path)]
        matching = _matches(path, name) if is_pattern and isinstance(path, Bucket) else []
        if is_object.get(str(path)):
            pass
        elif matching:
            inside = matching
        elif is_pattern and not isinstance(path, Bucket) and not path.exists():
            inside = glob.glob(os.path.join(glob.escape(os.path.abspath(root)), name), recursive=True)
            inside = sorted(file for file in inside if os.path.isfile(file))
        elif pattern and path.is_dir():
            inside = _files_below(path, pattern)
            path = path / pattern
        elif not (path.is_dir() if str(path) in is_object else path.exists()):
            why = f"no file matches {path}" if is_pattern else storage.nothing_at(path)
            raise FileNotFoundError(why)
        if not inside:
            raise FileNotFoundError(f"no file matches {path}")
        found += inside
    if not found:
        raise ValueError("a source has an empty path; name its files")
    return list(dict.fromkeys(found))


def is_folder(path: str) -> bool:
    """Whether a path that `find_files` has found is a folder."""
    # What is no object is a folder there, or it wouldn't have been found.
    return nearby.facts(path) is None if storage.in_bucket(path) else os.path.isdir(path)


def _matches(pattern: Bucket, name: str) -> list[str]:
    """The objects that a pattern matches, as glob matches files. `name` is the end of the pattern, as it
    was given; what comes before it is no pattern."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    rest = parts[next(n for n, part in enumerate(parts) if _PATTERN.search(part)) :]
    folder = pattern.parents[len(rest) - 1]
    fits = re.compile("".join(_expression(rest)))
    there = [entry for entry in folder.list(recursive=len(rest) > 1) if entry.item]
    there = [entry for entry in there if fits.fullmatch(str(entry.path.relative_to(folder)))]
    for entry in there:
        nearby.note(entry)
    return [str(entry.path) for entry in there]


def _expression(parts: Sequence[str]) -> Iterator[str]:
    """The regular expression of a pattern of glob, whose ** stands for any number of folders. What begins
    with a dot is matched only by a dot."""
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            yield r"(?:(?!\.)[^/]+/)*" + (r"(?!\.)[^/]+" if last else "")
            continue
        yield r"(?!\.)" if part[0] in "*?[" else ""
        for text in re.findall(r"\[!?\]?[^]]*\]|.", part, re.DOTALL):
            if text in "*?":
                yield "[^/]*" if text == "*" else "[^/]"
            elif len(text) > 1:  # [a-z] or [!a-z]
                inside = re.sub(r"([\\^\[\]&~|])", r"\\\1", text[1:-1].removeprefix("!"))
                yield f"[{'^/' if text[1] == '!' else ''}{inside}]"
            else:
                yield re.escape(text)
        yield "" if last else "/"


def _files_below(folder: storage.Path, pattern: str) -> list[str]:
    """The files below a folder that match a pattern such as *.tar. Upper case matches too."""
    if isinstance(folder, Bucket):
        there = folder.list(recursive=True)
        for entry in there:
            nearby.note(entry)
        below = [entry.path for entry in there]
    else:
        below = [path for path in folder.rglob("*") if path.is_file()]
    below = [path for path in below if path.name[0] != "."]
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
    if len(paths) != 1 or not storage.path(paths[0]).is_dir():
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
    """The paths relative to the deepest folder that contains all of them, or to the root if the paths lie
    in several buckets."""
    plain = [path.replace("gs:/", "", 1) if storage.in_bucket(path) else path for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in plain]) if paths else ""
    return [os.path.relpath(path, common) for path in plain]


_ENDS = 256 << 10  # bytes of the beginning and of the end of a file that tell it from others
_TOGETHER = 64  # files whose ends are in memory at a time
HEAD = 1024  # bytes of the beginning that tell a pointer of git LFS, and one format from another


def stamp_of(paths: Sequence[str], more: bytes = b"") -> bytes:
    """A hash that differs between different files. It is made of the names, the sizes, the first 256 KiB
    and the last 256 KiB of the files, and of `more`."""
    seen = hashlib.sha256(more)
    names = relative_names(paths)
    for first in range(0, len(paths), _TOGETHER):
        part = slice(first, first + _TOGETHER)
        ends = nearby.each(_end, paths[part])
        for path, name, end in zip(paths[part], names[part], ends, strict=True):
            seen.update(f"{name}:{size_of(path)}\n".encode(errors="replace"))
            seen.update(start_of(path))
            seen.update(end)
    return seen.digest()


def _end(path: str) -> bytes:
    """The last 256 KiB of a file, without what is among the first 256 KiB."""
    size = size_of(path)
    at = max(_ENDS, size - _ENDS)
    if at >= size:
        return b""
    return nearby.kept(path, "end", lambda: storage.read_range(storage.path(path), at, size - at))


def start_of(path: str, size: int = _ENDS) -> bytes:
    """The first `size` bytes of a file, 256 KiB at most; nothing of a folder."""
    where = storage.path(path)
    if not isinstance(where, Bucket):
        return storage.read_range(where, 0, size) if where.is_file() else b""
    if nearby.facts(path) is None:
        return b""
    return nearby.kept(path, "start", lambda: where.read_range(0, _ENDS))[:size]


def size_of(path: str) -> int:
    """The size of a file in bytes."""
    facts = nearby.facts(path) if storage.in_bucket(path) else None
    return facts.size if facts else storage.path(path).stat().st_size


def locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """(number of the part that contains `index`, place in this part). Part i ends before `ends[i]`."""
    part = int(np.searchsorted(ends, index, side="right"))
    return part, index - (int(ends[part - 1]) if part else 0)


def find_image_roots(config: SourceConfig, root: str, paths: Sequence[str]) -> list[str]:
    """For each path the folder that contains the images that the file there names."""
    if not config.image_root:
        return [str(storage.path(path).parent) for path in paths]
    return find_files(config.image_root, root)[:1] * len(paths)


def below(folder: str, name: str) -> str:
    """The path of `name` in `folder`. Raises ValueError for a name that leads out of the folder."""
    if os.path.isabs(name) or "://" in name or ".." in re.split(r"[/\\]", name):
        raise ValueError(f"path {name!r} leads out of {folder}")
    return f"{folder}/{name}" if storage.in_bucket(folder) else os.path.join(folder, name)


def read_file(path: str, at: int = 0, size: int | None = None, limit: int = MAX_IMAGE) -> bytes:
    """The `size` bytes of a file from byte `at` on, or all its bytes. Raises ValueError if these are no
    bytes, or more than `limit`. A bucket is asked once."""
    where = storage.path(nearby.nearest(path))
    whole = size is None
    if whole and isinstance(where, Bucket):
        data = where.read_range(0, limit + 1)
        size = len(data)
    elif whole:
        size = os.stat(where).st_size
        if not where.is_file():
            raise ValueError(f"{path} is no regular file")
    if not 0 < size <= limit:
        raise ValueError(f"{size} bytes in {path}, expected 1 to {limit}")
    if not (whole and isinstance(where, Bucket)):
        data = storage.read_range(where, at, size)
    if len(data) != size:
        raise ValueError(f"{path} ends before byte {at + size}; it has changed since it was opened")
    files.refuse_pointer(data, path if whole else f"what {path} has at byte {at}")
    return data


def read_json(path: str, remedy: str, kind: type = dict) -> Any:
    """The value in a JSON file. Raises FileNotFoundError or ValueError, each with the remedy."""
    missing = f"{path} doesn't exist; {remedy}"
    if not storage.in_bucket(path) and not os.path.isfile(path):
        raise FileNotFoundError(missing)
    try:
        return files.read_json(path, kind)
    except FileNotFoundError as error:
        raise FileNotFoundError(missing) from error
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error


def open_near(path: str, block: int) -> io.BufferedIOBase:
    """A file, or an object of which so many bytes are asked for at once (0: those that are read), or its
    copy on this machine."""
    return storage.open_file(storage.path(nearby.nearest(path)), block, size_of(path))
