"""Conversations about images as LLaVA has them: one JSON list of objects."""

import collections

from mmada_jax.data.records import Record
from mmada_jax.data.sources.paths import (
    find_image_root,
    find_inputs,
    read_json,
    relative_names,
    stamp_of,
)
from mmada_jax.data.sources.rows import Columns, make_record
from mmada_jax.data.sources.source import Config, Records


class Llava(Records):
    """A record from each object of the lists, which are kept in memory."""

    def __init__(self, config: Config, root: str):
        self._rows: list[tuple[str, str, dict]] = []
        ignored, paths = collections.Counter(), find_inputs(config, root, "*.json")
        for path, name in zip(paths, relative_names(paths), strict=True):
            rows = read_json(path, "expected a list of {image, conversations}", list)
            folder = find_image_root(config, root, path)
            for number, row in enumerate(rows):
                image = row.get("image") if isinstance(row, dict) else None
                if image and isinstance(image, str):
                    self._rows.append((f"{name}:{number}", folder, row))
                else:
                    ignored["no image"] += 1
        super().__init__(config, len(self._rows), stamp_of(paths), ignored)

    def _key(self, index: int) -> str:
        return self._rows[index][0]

    def _read(self, index: int) -> Record:
        key, folder, row = self._rows[index]
        if "conversations" not in row and "prompt" in row:
            turns = [("human", row["prompt"]), ("gpt", row.get("response"))]
            row = {**row, "conversations": [{"from": role, "value": value} for role, value in turns]}
        return make_record(key, row, Columns(image=("image",), turns=("conversations",)), folder)
