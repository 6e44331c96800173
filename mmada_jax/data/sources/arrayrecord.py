"""Shards of ArrayRecord with our own records, which `mmada prepare` has written."""

import json
import posixpath

import numpy as np

from mmada_jax import nearby, storage
from mmada_jax.data.records import Record, unpack
from mmada_jax.data.sources.paths import (
    below,
    find_inputs,
    is_folder,
    locate,
    read_json,
    relative_names,
    stamp_of,
)
from mmada_jax.data.sources.shards import open_shard
from mmada_jax.data.sources.source import Records, SourceConfig


class ArrayRecords(Records):
    """The records of all shards, in the order of dataset.json or of the paths in the config."""

    def __init__(self, config: SourceConfig, root: str):
        paths, info, counts = find_inputs(config, root), {}, {}
        remedy = "fetch or write it again"
        folders = [path for path in paths if is_folder(path)]
        if folders and len(paths) > 1:
            raise ValueError(f"{folders[0]} is a folder among several paths; make it a source of its own")
        if folders:
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
            if storage.in_bucket(folder):
                nearby.look_at(folder, counts)
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
