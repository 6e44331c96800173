"""JSON lines: files with one JSON object in each line."""

import numpy as np

from mmada_jax import files
from mmada_jax.data.records import Record
from mmada_jax.data.sources.paths import (
    find_image_root,
    find_inputs,
    locate,
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
        self._folders = [find_image_root(config, root, path) for path in self._paths]
        self._columns = choose_columns(
            config,
            None,
            config.path,
            image="image images",
            text="" if config.turns else "text caption",
            turns="" if config.text else "turns messages conversations",
            short="short",
        )
        lines = [_find_lines(path) for path in self._paths]
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


def _find_lines(path: str) -> np.ndarray:
    """The number (from 1), offset and size in bytes of each line that isn't blank, [n, 3]."""
    edges, at = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(16 << 20):
            edges.append(at + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")))
            at += len(block)
    starts = np.concatenate([*edges, [at]])
    sizes = np.diff(starts)
    lines = np.stack([np.arange(1, len(starts)), starts[:-1], sizes], axis=1)
    lines = lines[sizes > len("\r\n")]
    blank = [_is_blank(path, at, size) for _, at, size in lines.tolist() if size <= _BLANK]
    lines[lines[:, 2] <= _BLANK, 2] *= ~np.array(blank, bool)
    return lines[lines[:, 2] > 0]


def _is_blank(path: str, at: int, size: int) -> bool:
    return not read_file(path, at, size).strip()
