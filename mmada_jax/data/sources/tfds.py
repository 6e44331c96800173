"""Data sets that TFDS has prepared as ArrayRecord. Images stay encoded."""

import os
from typing import Any

import numpy as np

from mmada_jax import files, storage
from mmada_jax.data.records import Record
from mmada_jax.data.sources.arrayrecord import open_shard
from mmada_jax.data.sources.imagefolder import find_labels, read_labels
from mmada_jax.data.sources.paths import find_folder, stamp_of
from mmada_jax.data.sources.rows import choose_columns, make_record
from mmada_jax.data.sources.source import Records, SourceConfig


class Tfds(Records):
    """A record for each example of a split. A slice such as train[:50%] is a split too."""

    def __init__(self, config: SourceConfig, root: str):
        import tensorflow_datasets as tfds

        folder = find_folder(config, root)
        if not (storage.path(folder) / "dataset_info.json").is_file():
            found = sorted(storage.path(folder).rglob("dataset_info.json"))
            hint = f", such as {found[0].parent}" if found else ""
            raise FileNotFoundError(
                f"{folder} has no dataset_info.json; name the folder of a prepared version{hint}"
            )
        for path in storage.path(folder).glob("*.json"):
            files.refuse_pointer(path)
        try:
            builder = tfds.builder_from_directory(folder)
            splits, features = builder.info.splits, builder.info.features
        except Exception as error:  # JSON, protocol buffers and the library each raise their own
            raise ValueError(f"{folder} is no dataset that TFDS can read: {error}") from error
        try:
            parts = splits[config.split].file_instructions
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{folder} has no split {config.split!r}; known: {', '.join(splits)}"
            ) from error
        self._columns = choose_columns(
            config, sorted(features), folder, image="image", text="text caption label"
        )
        # No image is decoded, neither the image of the record nor another image of the example.
        images = [
            name
            for name, feature in features.items()
            if isinstance(getattr(feature, "feature", feature), tfds.features.Image)
        ]
        try:
            decoders = {name: _StaysEncoded() for name in images}
            self._rows = builder.as_data_source(config.split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"{folder} is stored as {builder.info.file_format.value}, which has no random access; "
                "prepare it with file_format='array_record'"
            ) from error
        for part in parts:
            open_shard(os.fspath(part.filename), part.examples_in_shard, "prepare the dataset again")
        paths, labels = [os.fspath(part.filename) for part in parts], find_labels(config, root)
        self._classes = {
            name: read_labels(labels, features[name].names) if labels else features[name].names
            for name in self._columns.text
            if isinstance(features[name], tfds.features.ClassLabel)
        }
        self._split = config.split
        super().__init__(config, len(self._rows), stamp_of([*paths, *filter(None, [labels])]))

    def _key(self, index: int) -> str:
        return f"{self._split}:{index}"

    def _read(self, index: int) -> Record:
        row = self._rows[index]
        values = {name: row[name] for name in self._columns.image}
        for name in self._columns.text + self._columns.turns + self._columns.short:
            values[name] = self._classes[name][row[name]] if name in self._classes else _plain(row[name])
        return make_record(self._key(index), values, self._columns)


class _StaysEncoded:
    """A decoder of TFDS that leaves an image, or each image of a sequence, encoded.

    The library's SkipDecoding doesn't work for sequences.
    """

    def setup(self, *, feature: Any) -> None:
        """Does nothing. TFDS calls it with the feature."""

    def decode_example_np(self, value: Any) -> Any:
        """The value, which isn't changed."""
        return value

    decode_batch_example_np = decode_example_np


def _plain(value: Any) -> Any:
    """A value of TFDS as a value of JSON. Bytes become str, and arrays become lists."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
