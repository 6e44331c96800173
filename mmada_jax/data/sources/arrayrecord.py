"""Shards of ArrayRecord with our own records, which `mmada prepare` has written."""

import json
import posixpath

import numpy as np

from mmada_jax import files, nearby, storage
from mmada_jax.data.records import Record, unpack
from mmada_jax.data.sources.paths import (
    below,
    find_inputs,
    locate,
    read_json,
    relative_names,
    stamp_of,
    start_of,
)
from mmada_jax.data.sources.source import Records, SourceConfig


class ArrayRecords(Records):
    """The records of all shards, in the order of dataset.json or of the paths in the config."""

    def __init__(self, config: SourceConfig, root: str):
        paths, info, counts = find_inputs(config, root), {}, {}
        remedy = "fetch or write it again"
        if len(paths) == 1 and not start_of(paths[0]) and storage.path(paths[0]).is_dir():
            folder = paths[0]
            info = read_json(
                f"{folder}/dataset.json",
                "mmada prepare writes it at its end; name shards that lack one by a glob",
            )
            counts = info.get("shards")
            if (
                not isinstance(counts, dict)
                or not all(isinstance(n, int) for n in [*counts.values(), info.get("codes", 0)])
                or sum(counts.values()) != info.get("records")
            ):
                raise ValueError(f"{folder}/dataset.json doesn't add up; prepare the records again")
            paths = [below(folder, name) for name in counts]
            remedy = "delete it and run mmada prepare again"
        for path, start in zip(paths, nearby.each(start_of, paths), strict=True):
            if not start and storage.path(path).is_dir():
                raise ValueError(f"{path} is a folder among several paths; make it a source of its own")
        self._names = relative_names(paths)
        counted = lambda path: open_shard(path, counts.get(posixpath.basename(path)), remedy)  # noqa: E731
        self._shards = nearby.each(counted, paths)
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        stamp = stamp_of(paths, json.dumps(info, sort_keys=True).encode())
        ignored = info.get("skipped")  # the counts of records that `mmada prepare` left out
        ignored = ignored if isinstance(ignored, dict) else {}
        super().__init__(config, sum(map(len, self._shards)), stamp, ignored, info)

    def _key(self, index: int) -> str:
        shard, row = locate(self._ends, index)
        return f"{self._names[shard]}:{row}"

    def _read(self, index: int) -> Record:
        shard, row = locate(self._ends, index)
        return unpack(self._shards[shard][row])


def open_shard(path: str, count: int | None, remedy: str):
    """A reader of one shard. Raises ValueError if the shard isn't whole or doesn't have `count` records."""
    import grain

    # The library waits for a bucket that can't be reached, without an end, so this asks for the object
    # first.
    start = start_of(path)
    if not start and not storage.path(path).is_file():
        raise FileNotFoundError(f"the shard {path} is missing; {remedy}")
    files.refuse_pointer(start, path)
    try:
        shard = grain.sources.ArrayRecordDataSource(nearby.nearest(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path} is no whole ArrayRecord ({str(error) or 'truncated'}); {remedy}"
        ) from error
    # A truncated file may open as an empty one.
    if count is None and not len(shard):
        raise ValueError(f"{path} has no records: it is empty or truncated; {remedy}")
    if count is not None and len(shard) != count:
        raise ValueError(f"{path} has {len(shard)} records instead of {count}: it is truncated; {remedy}")
    return shard
