"""Objects in Google Cloud Storage, gs://BUCKET/NAME, with the methods of a path.

An object is written whole or not at all, and there are no folders: a folder is
there as long as an object lies below it. Requests go through gcsfs (the extra `gcp`), which finds
credentials as Google's libraries do and repeats what may be repeated. What fails in the end is an OSError
that names the object and the remedy. Nothing is remembered between two questions, since other processes
write too.
"""

import contextlib
import errno
import functools
import io
import json
import logging
import os
import pathlib
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from mmada_jax import outages

SCHEME = "gs://"
PATIENCE = 50  # seconds that a request has, with all its repetitions, beside the time that its bytes take
SLOW = 1 << 20  # bytes a second that every network has
BLOCK = 8 << 20  # bytes that are fetched at once where a file is read from its beginning to its end


class Bucket(os.PathLike[str]):
    """An object, or the objects below a name. It has the methods of pathlib.Path that have a meaning
    there."""

    def __init__(self, path: str):
        # A path of this class begins with one slash, that of a user with the scheme.
        name, _, key = path.removeprefix(SCHEME if path.startswith(SCHEME) else "/").partition("/")
        if name in ("", ".", "..") or "\n" in path or "\0" in path:
            raise ValueError(f"{path!r} names no bucket; write gs://BUCKET/NAME")
        if posixpath.normpath(key).split("/")[0] == "..":
            raise ValueError(f"{path!r} leads out of its bucket; write gs://BUCKET/NAME")
        self._pure = pathlib.PurePosixPath(posixpath.normpath(f"/{name}/{key}"))

    # ---- Names, as in pathlib --------------------------------------------------------------------

    def __fspath__(self) -> str:
        return f"gs:/{self._pure}"

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"Bucket({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bucket) and self._pure == other._pure

    def __lt__(self, other: "Bucket") -> bool:
        return self._pure < other._pure

    def __hash__(self) -> int:
        return hash(self._pure)

    def __truediv__(self, name: str | os.PathLike[str]) -> "Bucket":
        return Bucket(f"{self._pure}/{os.fspath(name)}")

    @property
    def bucket(self) -> str:
        """The name of the bucket."""
        return self._pure.parts[1]

    @property
    def key(self) -> str:
        """The name of the object in its bucket, empty for the bucket itself."""
        return "/".join(self._pure.parts[2:])

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """The suffix of the last part, with its dot."""
        return self._pure.suffix

    @property
    def parent(self) -> "Bucket":
        """What lies around it; the bucket lies in itself."""
        return self.parents[0] if self.parents else self

    @property
    def parents(self) -> list["Bucket"]:
        """All that lies around it, up to the bucket."""
        return [Bucket(str(around)) for around in list(self._pure.parents)[:-1]]

    def with_name(self, name: str) -> "Bucket":
        """Another name beside it."""
        return Bucket(str(self._pure.with_name(name)))

    def with_suffix(self, suffix: str) -> "Bucket":
        """The same name with another suffix."""
        return Bucket(str(self._pure.with_suffix(suffix)))

    def is_relative_to(self, other: object) -> bool:
        """Whether it is `other`, or lies below it."""
        return isinstance(other, Bucket) and self._pure.is_relative_to(other._pure)

    def relative_to(self, other: "Bucket") -> pathlib.PurePosixPath:
        """The name below `other`."""
        return self._pure.relative_to(other._pure)

    def absolute(self) -> "Bucket":
        """Itself: no name is relative."""
        return self

    expanduser = absolute

    # ---- What is there ---------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What the storage says of the object, as its size and crc32c. Raises FileNotFoundError."""
        if not self.key:
            raise FileNotFoundError(errno.ENOENT, "there is a bucket and no object", str(self))
        return _call(self, "GET", "b/{}/o/{}", self.bucket, self.key, json_out=True)

    def stat(self) -> os.stat_result:
        """The size, as of a file, and nothing else. Raises FileNotFoundError."""
        return os.stat_result((0o100644, 0, 0, 0, 0, 0, int(self.info()["size"]), 0, 0, 0))

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        with contextlib.suppress(FileNotFoundError):
            return bool(self.info())
        return False

    def is_dir(self) -> bool:
        """Whether objects lie below this name."""
        with contextlib.suppress(FileNotFoundError):
            page = self._page(maxResults=1, fields="items(name)")
            return not self.key or bool(page.get("items"))
        return False

    def exists(self) -> bool:
        """Whether there is an object of this name, or below it."""
        return self.is_file() or self.is_dir()

    def list(self, recursive: bool = False) -> "list[Entry]":
        """What lies directly below this name, or at any depth, in the order of names. Folders have the type
        "directory". Raises FileNotFoundError if there is no such bucket."""
        found, token = [], None
        delimiter = {} if recursive else {"delimiter": "/"}
        while True:
            page = self._page(**delimiter, **({"pageToken": token} if token else {}))
            for item in page.get("items", ()):
                if not item["name"].endswith("/"):  # such objects stand for folders in the web console
                    found.append(Entry(Bucket(f"{self.bucket}/{item['name']}"), item))
            found += [Entry(Bucket(f"{self.bucket}/{name}"), None) for name in page.get("prefixes", ())]
            token = page.get("nextPageToken")
            if not token:
                # A folder that spans several pages may be named in each of them.
                once = {entry.path: entry for entry in found}
                return sorted(once.values(), key=lambda entry: entry.path)

    def _page(self, **params: Any) -> dict[str, Any]:
        prefix = f"{self.key}/" if self.key else ""
        try:
            return _call(self, "GET", "b/{}/o", self.bucket, prefix=prefix, json_out=True, **params)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "there is no such bucket", str(self)) from error

    def iterdir(self) -> "Iterator[Bucket]":
        """What lies directly below this name."""
        return iter([entry.path for entry in self.list()])

    def glob(self, pattern: str) -> "Iterator[Bucket]":
        """What matches a pattern directly below this name, or in the folder that the pattern names."""
        folder, _, pattern = pattern.rpartition("/")
        inside = (self / folder if folder else self).list()
        return iter([entry.path for entry in inside if pathlib.PurePath(entry.path.name).match(pattern)])

    def rglob(self, pattern: str) -> "Iterator[Bucket]":
        """The objects at any depth whose last part matches a pattern."""
        inside = self.list(recursive=True)
        return iter([entry.path for entry in inside if pathlib.PurePath(entry.path.name).match(pattern)])

    # ---- Reading ---------------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        """All bytes of the object, in one request for each BLOCK of them."""
        parts = [self.read_range(0, BLOCK)]
        while len(parts[-1]) == BLOCK:
            parts.append(self.read_range(len(parts) * BLOCK, BLOCK))
        return b"".join(parts)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The object as text."""
        return self.read_bytes().decode(encoding)

    def read_range(self, at: int, size: int) -> bytes:
        """The bytes from `at` on, `size` of them or as many as there are, in one request."""
        if size <= 0:
            return b""
        end, seconds = at + size, patience() + size / SLOW
        try:
            return _ask(self, "cat_file", f"{self.bucket}/{self.key}", at, end, seconds=seconds)
        except outages.Unserved as error:
            if error.code == 416:  # it ends before
                return b""
            raise

    def open(self, mode: str = "rb", block: int = BLOCK, size: int | None = None) -> io.BufferedIOBase:
        """The object as a file to read: in requests of at least `block` bytes, or of what is asked for.
        Without its `size` it is asked for."""
        if mode != "rb":
            raise ValueError(f"{self} can be opened to be read (rb), not as {mode!r}")
        raw = _Reading(self, int(self.info()["size"]) if size is None else size)
        return io.BufferedReader(raw, block) if block else raw

    # ---- Writing ---------------------------------------------------------------------------------

    def write_bytes(self, data: bytes) -> None:
        """Writes the object, whole or not at all."""
        seconds = PATIENCE + len(data) / SLOW
        _ask(self, "pipe_file", f"{self.bucket}/{self.key}", bytes(data), seconds=seconds)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Any]:
        """A file to write the object to, in parts; it is there when the block ends without an error."""
        with _told(self, 10 * PATIENCE, (TimeoutError,)):
            file = _fs().open(f"{self.bucket}/{self.key}", "wb", block_size=32 << 20)
            try:
                yield file
                file.close()
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()  # what is uploaded already
                file.closed = True  # or it would be completed when it is forgotten
                raise

    def write_text(self, text: str) -> None:
        """Writes text as UTF-8."""
        self.write_bytes(text.encode())

    def write_if(self, data: bytes, generation: int) -> int | None:
        """Writes the object if its generation is still this one; 0: if there is none. Returns the new
        generation, or None if another process was quicker. `data` must be small."""
        where = f"{_fs().base.removesuffix('storage/v1/')}upload/storage/v1/b/{self.bucket}/o"
        about = json.dumps({"name": self.key}).encode()
        kinds = (b"application/json; charset=UTF-8", about), (b"application/octet-stream", data)
        parts = [b"--==0==\r\nContent-Type: %b\r\n\r\n%b\r\n" % part for part in kinds]
        try:
            answer = _call(
                self, "POST", where, uploadType="multipart", ifGenerationMatch=str(generation),
                headers={"Content-Type": 'multipart/related; boundary="==0=="'},
                data=b"".join(parts) + b"--==0==--", json_out=True,
            )  # fmt: skip
        except FileExistsError:
            return None
        return int(answer["generation"])

    def upload(self, file: str | os.PathLike[str]) -> None:
        """Writes a file of this machine as the object, whole or not at all."""
        seconds = PATIENCE + os.path.getsize(file) / SLOW
        _ask(self, "put_file", os.fspath(file), f"{self.bucket}/{self.key}", seconds=seconds)

    def unlink(self, missing_ok: bool = False, generation: int | None = None) -> None:
        """Removes the object, with `generation` only if that is still its generation."""
        only = {} if generation is None else {"ifGenerationMatch": str(generation)}
        try:
            _call(self, "DELETE", "b/{}/o/{}", self.bucket, self.key, **only)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self, keep: "tuple[Bucket, ...]" = ()) -> None:
        """Removes all objects below this name but for those to `keep`."""
        there = [entry.path for entry in self.list(recursive=True) if entry.path not in keep]
        each(lambda path: path.unlink(missing_ok=True), there)

    def rename(self, target: "Bucket", last: str) -> None:
        """Copies all objects below this name to `target`, within the bucket's storage, and removes them;
        the object `last` is removed first. Killed between, both are there, or this one without `last`."""
        there = [entry.path for entry in self.list(recursive=True)]

        def copy(path: Bucket) -> None:
            to = target / str(path.relative_to(self))
            names = [f"{where.bucket}/{where.key}" for where in (path, to)]
            _ask(path, "cp_file", *names, seconds=10 * PATIENCE)

        each(copy, there)
        (self / last).unlink(missing_ok=True)
        self.rmtree()

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: there are no folders."""


class Entry(NamedTuple):
    """What lies in a folder. `item` is what the storage says of an object, None for a folder."""

    path: Bucket
    item: Mapping[str, Any] | None

    @property
    def size(self) -> int:
        """The size in bytes, 0 of a folder."""
        return int(self.item.get("size", 0)) if self.item else 0


AT_ONCE = 16  # requests at a time, where many objects are asked for


def each(do: Callable[[Any], Any], asked: Iterable[Any]) -> list[Any]:
    """The results of `do` for what is asked of a bucket, in order; requests are made side by side."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(do, asked))


class _Reading(io.RawIOBase):
    """The bytes of an object, a request for each read."""

    def __init__(self, path: Bucket, size: int):
        self._path, self._at, self._size = path, 0, size
        self.name = str(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._at))
        data = self._path.read_range(self._at, size)
        if len(data) != size:
            raise OSError(errno.EIO, "the object was changed while it was read", str(self._path))
        buffer[:size] = data
        self._at += size
        return size


# ---- Requests ------------------------------------------------------------------------------------


def _fs() -> Any:
    """The file system of gcsfs, one for each process. A child that was forked needs connections of its
    own."""
    return _connect(os.getpid())


@functools.lru_cache(maxsize=1)
def _connect(pid: int) -> Any:
    del pid
    connect()
    import gcsfs

    return gcsfs.GCSFileSystem(use_listings_cache=False, skip_instance_cache=True)


@functools.cache
def connect() -> None:
    """Prepares libraries for paths of gs://. Raises ImportError with the remedy if they aren't
    installed."""
    # The search for hierarchical buckets warns at each call where there are no credentials.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec.config
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise ImportError("a path of gs:// needs gcsfs: pip install 'mmada_jax[gcp]'") from error
    # Orbax and TFDS make a file system of gcsfs themselves. A listing that is kept would hide what other
    # processes write.
    for scheme in ("gcs", "gs"):
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    # What it logs is a traceback of the error that is raised here in one line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
    logging.getLogger("google.auth").setLevel(logging.ERROR)


def patience() -> float:
    """Seconds that a read has. After one without an answer others have less: a run is to end soon then."""
    return PATIENCE / 10 if outages.unanswered.is_set() else PATIENCE


def _call(path: Bucket, method: str, where: str, /, *args: str, **params: Any) -> Any:
    return _ask(path, "call", method, where, *args, **params)


def _ask(path: Bucket, name: str, /, *args: Any, seconds: float = PATIENCE, **params: Any) -> Any:
    """Calls a method of gcsfs. Raises FileNotFoundError, FileExistsError, or an OSError with the remedy."""
    with _told(path, seconds):
        return getattr(_fs(), name)(*args, timeout=seconds, **params)


@contextlib.contextmanager
def _told(
    path: Bucket, seconds: float, also: tuple[type[Exception], ...] = (OSError, ValueError)
) -> Iterator[None]:
    """Turns the errors of requests, and those of the types `also`, into errors that users understand."""
    try:
        yield
        outages.unanswered.clear()
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no such object", str(path)) from error
    except FileExistsError:
        raise
    except Exception as error:  # of gcsfs, aiohttp, google.auth or requests
        if not isinstance(error, also) and not outages.of_network(error):
            raise
        raise outages.failure(path, error, seconds) from error
