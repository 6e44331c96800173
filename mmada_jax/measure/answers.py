"""Answers of an evaluation that are kept one by one, so that it goes on where it was interrupted."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from mmada_jax.disk import Growing


class Answers:
    """Answers that are known already, by the hash of what was asked, kept in a file line by line. A line
    that was cut off by the end of a process is asked for anew."""

    def __init__(self, path: pathlib.Path | None):
        self._known: dict[str, Any] = {}
        self._file = path and Growing(path, self._lines)
        for line in path.read_text().splitlines() if path and path.is_file() else ():
            with contextlib.suppress(ValueError):
                key, value = json.loads(line)
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


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of `stops`."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
