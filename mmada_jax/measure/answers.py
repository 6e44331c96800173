"""Answers of an evaluation that are kept one by one, so that it goes on where it was interrupted."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from mmada_jax import storage
from mmada_jax.storage import Growing


class Answers:
    """Answers that are known already, by the hash of what was asked, kept in a file line by line. What a
    line that was cut off or damaged had is asked for anew. One process at a time may write: see `alone`."""

    def __init__(self, path: storage.Path | None):
        self._known: dict[str, Any] = {}
        self._file = path and Growing(path, self._lines)
        for line in path.read_bytes().splitlines() if path and path.is_file() else ():
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                key, value = json.loads(line)
                if isinstance(key, str) and isinstance(value, str | list):
                    self._known[key] = value

    def __len__(self) -> int:
        return len(self._known)

    def _lines(self):
        return [self._line(key) for key in self._known]

    def _line(self, key):
        return json.dumps([key, self._known[key]]).encode() + b"\n"

    def key(self, *asked: Any) -> str:
        """The hash of what is asked and of all that the answer depends on."""
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The answer, None if it isn't known."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps an answer; it is in the file when this returns."""
        if self._file:
            self._file.add()  # what is known already, before this one
        self._known[key] = value
        if self._file:
            self._file.add(self._line(key))


@contextlib.contextmanager
def alone(folder: storage.Path) -> Iterator[None]:
    """A folder, made if it isn't there, to which no other evaluation writes. Raises ValueError if one
    does. The folder itself is locked: `storage.locked` leaves a file, and judges read all files."""
    if storage.in_bucket(folder):
        raise ValueError(f"--out {folder}: judges read its files, so it must be a folder of this machine")
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another evaluation writes to {folder}; wait for it, or name another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(held)
