"""Rows of Parquet files. A row group is read as a whole, and the groups that were read last are kept."""

import collections
import threading
from typing import Any

import numpy as np

from mmada_jax import nearby
from mmada_jax.data.records import Record
from mmada_jax.data.sources.paths import (
    find_image_roots,
    find_inputs,
    locate,
    open_near,
    relative_names,
    stamp_of,
)
from mmada_jax.data.sources.rows import choose_columns, make_record
from mmada_jax.data.sources.source import Records, SourceConfig

_USUAL = {"text": "content text", "turns": "turns messages conversations"}
CACHED = 256 << 20  # largest size in bytes of the row groups that a source keeps


class Parquet(Records):
    """A record from each row of all files, in the order of the files."""

    def __init__(self, config: SourceConfig, root: str):
        self._paths = find_inputs(config, root, "*.parquet")
        self._names = relative_names(self._paths)
        self._folders = find_image_roots(config, root, self._paths)
        self._files, self._groups = [], []
        alone = {"text": ""} if config.turns else {"turns": ""} if config.text else {}
        described = nearby.each(_describe, self._paths)
        for number, (path, (footer, known)) in enumerate(zip(self._paths, described, strict=True)):
            columns = choose_columns(config, known, path, **_USUAL | alone)
            if columns.turns and not columns.image:
                # A conversation about a picture is never read without the picture.
                columns = columns._replace(
                    image=tuple(name for name in ("image", "images") if name in known)
                )
            self._files.append((footer, columns))
            self._groups += [(number, i) for i in range(footer.num_row_groups)]
        sizes = [self._files[number][0].row_group(i).num_rows for number, i in self._groups]
        self._ends = np.cumsum(sizes)
        self._firsts = np.cumsum([0, *(footer.num_rows for footer, _ in self._files)])
        self._fresh()
        super().__init__(config, sum(sizes), stamp_of(self._paths))

    def _fresh(self) -> None:
        # Threads read a group under the group's lock, so that it is read once.
        self._locks = [threading.Lock() for _ in range(16)]
        self._lock, self._cache, self._cached = threading.Lock(), collections.OrderedDict(), 0

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k not in ("_locks", "_lock", "_cache", "_cached")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._fresh()

    def _key(self, index: int) -> str:
        number, _ = self._groups[locate(self._ends, index)[0]]
        return f"{self._names[number]}:{index - self._firsts[number]}"

    def _read(self, index: int) -> Record:
        group, row = locate(self._ends, index)
        (values,) = self._table(group).slice(row, 1).to_pylist()
        number, _ = self._groups[group]
        return make_record(self._key(index), values, self._files[number][1], self._folders[number])

    def _table(self, group: int):
        with self._locks[group % len(self._locks)]:
            with self._lock:
                if group in self._cache:
                    self._cache.move_to_end(group)
                    return self._cache[group]
            table = self._read_group(group)
            with self._lock:
                self._cache[group] = table
                self._cached += table.nbytes
                while self._cached > CACHED and len(self._cache) > 1:
                    self._cached -= self._cache.popitem(last=False)[1].nbytes
            return table

    def _read_group(self, group: int):
        import pyarrow.parquet

        number, part = self._groups[group]
        footer, columns = self._files[number]
        names = [*columns.image, *columns.text, *columns.turns, *columns.short]
        # Checksums are optional in the format. Arrow checks the checksums of a file only if it is asked to.
        with (
            open_near(self._paths[number], 0) as data,
            pyarrow.parquet.ParquetFile(
                data, metadata=footer, page_checksum_verification=True, pre_buffer=True
            ) as file,
        ):
            return file.read_row_group(part, columns=names, use_threads=False)


def _describe(path: str) -> tuple[Any, list[str]]:
    """The footer of a file and the names of its columns."""
    import pyarrow.parquet

    try:
        with (
            open_near(path, 0) as data,
            pyarrow.parquet.ParquetFile(data, page_checksum_verification=True) as file,
        ):
            return file.metadata, file.schema_arrow.names
    except Exception as error:  # Arrow, Thrift and the system each raise their own
        raise ValueError(f"{path} is no whole Parquet file: {error}; fetch it again") from error
