"""Data sets that TFDS has prepared as ArrayRecord. Images stay encoded."""

import contextlib
import os
import pathlib
import posixpath
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmada_jax import files, nearby, storage
from mmada_jax.data.records import Record
from mmada_jax.data.sources.imagefolder import find_labels, read_labels
from mmada_jax.data.sources.paths import find_folder, locate, stamp_of
from mmada_jax.data.sources.rows import choose_columns, make_record
from mmada_jax.data.sources.shards import open_shard
from mmada_jax.data.sources.source import Records, SourceConfig


class Tfds(Records):
    """A record for each example of a split. A slice such as train[:50%] is a split too."""

    def __init__(self, config: SourceConfig, root: str):
        import tensorflow_datasets as tfds

        folder = find_folder(config, root)
        with _description(folder) as described:
            try:
                builder = tfds.builder_from_directory(described)
                splits, self._features = builder.info.splits, builder.info.features
            except Exception as error:  # JSON, protocol buffers and the library each raise their own
                raise ValueError(f"{folder} is no dataset that TFDS can read: {error}") from error
            _check_split(config.split, splits, folder)
            self._columns = choose_columns(
                config, sorted(self._features), folder, image="image", text="text caption label"
            )
            # No image is decoded, neither the image of the record nor another image of the example.
            self._decoders = {
                name: _StaysEncoded()
                for name, feature in self._features.items()
                if isinstance(getattr(feature, "feature", feature), tfds.features.Image)
            }
            try:
                builder.as_data_source(config.split)  # chooses a format with random access
            except NotImplementedError as error:
                raise ValueError(
                    f"{folder} is stored as {builder.info.file_format.value}, which has no random access; "
                    "prepare it with file_format='array_record'"
                ) from error
            parts = builder.info.splits[config.split].file_instructions
        names = [posixpath.basename(os.fspath(part.filename)) for part in parts]
        paths = [f"{folder}/{name}" for name in names]
        if storage.in_bucket(folder):
            nearby.look_at(folder, names)
        counts = {path: part.examples_in_shard for path, part in zip(paths, parts, strict=True)}
        self._shards = nearby.each(
            lambda path: open_shard(path, counts[path], "prepare the dataset again"), paths
        )
        self._skips, self._ends = [part.skip for part in parts], np.cumsum([part.take for part in parts])
        labels = find_labels(config, root)
        self._classes = {
            name: read_labels(labels, self._features[name].names) if labels else self._features[name].names
            for name in self._columns.text
            if isinstance(self._features[name], tfds.features.ClassLabel)
        }
        self._split = config.split
        stamp = stamp_of([*paths, *filter(None, [labels])])
        super().__init__(config, sum(part.take for part in parts), stamp)

    def _key(self, index: int) -> str:
        return f"{self._split}:{index}"

    def _read(self, index: int) -> Record:
        shard, at = locate(self._ends, index)
        data = self._shards[shard][self._skips[shard] + at]
        row = self._features.deserialize_example_np(data, decoders=self._decoders)
        values = {name: row[name] for name in self._columns.image}
        for name in self._columns.text + self._columns.turns + self._columns.short:
            values[name] = self._classes[name][row[name]] if name in self._classes else _plain(row[name])
        return make_record(self._key(index), values, self._columns)


@contextlib.contextmanager
def _description(folder: str) -> Iterator[str]:
    """A folder of this machine with the files that describe a data set. Those of a bucket are copied: the
    library asks for each of them again and again."""
    where = storage.path(folder)
    there = storage.scan(where)
    if "dataset_info.json" not in {file.name for file in there}:
        found = sorted(where.rglob("dataset_info.json"))
        hint = f", such as {found[0].parent}" if found else ""
        raise FileNotFoundError(
            f"{folder} has no dataset_info.json; name the folder of a prepared version{hint}"
        )
    names = [file.name for file in there if file.is_file and file.name.endswith((".json", ".txt"))]
    if not storage.in_bucket(folder):
        for name in names:
            files.refuse_pointer(where / name)
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        contents = nearby.each(files.read_bytes, [str(where / name) for name in names])
        for name, data in zip(names, contents, strict=True):
            (pathlib.Path(copy) / name).write_bytes(data)
        yield copy


def _check_split(split: str, splits: Any, folder: str) -> None:
    """Raises ValueError unless `split` is a slice of a split that there is."""
    try:
        splits[split].file_instructions  # noqa: B018
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder} has no split {split!r}; known: {', '.join(splits)}") from error


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
