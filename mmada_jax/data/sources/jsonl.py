"""JSON lines: files with one JSON object in each line."""

import io

import numpy as np

from mmada_jax import files, nearby, storage
from mmada_jax.data.records import Record
from mmada_jax.data.sources.paths import (
    find_image_roots,
    find_inputs,
    locate,
    open_near,
    read_file,
    relative_names,
    stamp_of,
)
from mmada_jax.data.sources.rows import choose_columns, make_record
from mmada_jax.data.sources.source import Records, SourceConfig

_BLANK = 64  # bytes of the longest line that may be nothing but spaces


class JsonLines(Records):
    """A record from each line. The places of the lines are kept in memory, and their content isn't."""

    def __init__(self, config: SourceConfig, root: str):
        self._paths = find_inputs(config, root, "*.jsonl")
        self._names = relative_names(self._paths)
        self._folders = find_image_roots(config, root, self._paths)
        self._columns = choose_columns(
            config,
            None,
            config.path,
            image="image images",
            text="" if config.turns else "text caption",
            turns="" if config.text else "turns messages conversations",
            short="short",
        )
        lines = nearby.each(_lines_of, self._paths)
        self._lines = np.concatenate(lines)  # [n, 3]: line number, offset, size
        self._ends = np.cumsum([len(part) for part in lines])
        super().__init__(config, len(self._lines), stamp_of(self._paths, self._lines.tobytes()))

    def _key(self, index: int) -> str:
        return f"{self._names[locate(self._ends, index)[0]]}:{self._lines[index, 0]}"

    def _read(self, index: int) -> Record:
        file, _ = locate(self._ends, index)
        number, at, size = self._lines[index].tolist()
        row = files.parse_json(read_file(self._paths[file], at, size), f"line {number}", dict)
        return make_record(self._key(index), row, self._columns, self._folders[file])


def _lines_of(path: str) -> np.ndarray:
    """The lines of a file, as `_find_lines` gives them. The lines of an object of a bucket are kept."""

    def found():
        data = io.BytesIO()
        np.save(data, _find_lines(path), allow_pickle=False)
        return data.getvalue()

    if not storage.in_bucket(path):
        return _find_lines(path)
    return np.load(io.BytesIO(nearby.kept(path, "lines", found)), allow_pickle=False)


def _find_lines(path: str) -> np.ndarray:
    """The number (from 1), offset and size in bytes of each line that isn't blank, [n, 3]."""
    parts, at, number, left = [], 0, 1, b""  # `left` is the beginning of a line, at byte `at`
    with open_near(path, 16 << 20) as file:
        while True:
            block = file.read(16 << 20)
            data = left + block
            ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
            if not block and data:
                ends = np.append(ends, len(data))  # the last line may have no end
            sizes = np.diff(ends, prepend=0)
            lines = np.stack([number + np.arange(len(ends)), at + ends - sizes, sizes], axis=1)
            short = np.flatnonzero(sizes <= _BLANK)
            blank = [not data[ends[i] - sizes[i] : ends[i]].strip() for i in short.tolist()]
            parts.append(np.delete(lines, short[np.array(blank, bool)], axis=0))
            done = int(ends[-1]) if len(ends) else 0
            at, number, left = at + done, number + len(ends), data[done:]
            if not block:
                return np.concatenate(parts)
