"""Conversations about images in LLaVA's format: a JSON file with a list of objects."""

import collections
from typing import Any

from mmada_jax.data.records import LeftOut, Record
from mmada_jax.data.sources.paths import (
    find_image_roots,
    find_inputs,
    read_json,
    relative_names,
    stamp_of,
)
from mmada_jax.data.sources.rows import Columns, make_record, one_of
from mmada_jax.data.sources.source import Records, SourceConfig

_IMAGE = ("image", "images")


class Llava(Records):
    """A record from each object about one image, or about no image if `with_images` is False. The lists are
    kept in memory."""

    def __init__(self, config: SourceConfig, root: str, with_images: bool = True):
        self._rows: list[tuple[str, str, dict]] = []
        ignored, paths = collections.Counter(), find_inputs(config, root, "*.json")
        folders = find_image_roots(config, root, paths)
        for path, name, folder in zip(paths, relative_names(paths), folders, strict=True):
            rows = read_json(path, "expected a list of {image, conversations}", list)
            for number, row in enumerate(rows):
                about = _about(row)
                if about == ("one image" if with_images else "no image"):
                    self._rows.append((f"{name}:{number}", folder, row))
                else:
                    ignored[about] += 1
        stamp = stamp_of(paths, b"" if with_images else b"without images")
        super().__init__(config, len(self._rows), stamp, ignored)

    def _key(self, index: int) -> str:
        return self._rows[index][0]

    def _read(self, index: int) -> Record:
        key, folder, row = self._rows[index]
        if not {"conversations", "messages"} & row.keys() and "prompt" in row:
            turns = [("human", row["prompt"]), ("gpt", row.get("response"))]
            row = {**row, "conversations": [{"from": role, "value": value} for role, value in turns]}
        return make_record(key, row, Columns(image=_IMAGE, turns=("conversations", "messages")), folder)


def _about(row: Any) -> str:
    """A phrase that says what a row is about: one image, no image, or the reason to leave the row out."""
    if not isinstance(row, dict):
        return "no object"
    if row.get("video") or row.get("audio"):
        return "video or audio"
    try:
        images = [one_of(row.get(name)) for name in _IMAGE]
    except LeftOut as error:
        return error.why
    return "one image" if any(images) else "no image"
