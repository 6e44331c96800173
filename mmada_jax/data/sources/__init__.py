"""Sources of records: files in the formats of MMaDA's data. Any record can be read by its index.

An open source knows the places of its records, and reads a record when its index is asked for. No file
stays open between two reads, so threads can share a source and processes can copy it. (Readers of
ArrayRecord stay open, and support both.) Images stay encoded. A path that a folder, an archive or a row
names is read only if it lies below the folder of its source.
"""

import shlex

import numpy as np

from mmada_jax import storage
from mmada_jax.data import digits, totals
from mmada_jax.data.sources.arrayrecord import ArrayRecords
from mmada_jax.data.sources.imagefolder import ImageFolder
from mmada_jax.data.sources.jsonl import JsonLines
from mmada_jax.data.sources.llava import Llava
from mmada_jax.data.sources.parquet import Parquet
from mmada_jax.data.sources.source import FORMATS, Source, SourceConfig
from mmada_jax.data.sources.tfds import Tfds
from mmada_jax.data.sources.webdataset import Tars

__all__ = ["FORMATS", "Config", "Source", "SourceConfig", "codes_of", "open_source"]

Config = SourceConfig  # the name by which model/prepare.py knows it

# The class of each format, and the fields of SourceConfig that it uses.
_FIELDS = ("image", "text", "turns", "short", "captions", "image_root", "labels")
_OPEN = {
    "arrayrecord": (ArrayRecords, ()),
    "tfds": (Tfds, ("image", "text", "turns", "short", "labels")),
    "webdataset": (Tars, ("text", "turns", "short", "captions")),
    "parquet": (Parquet, ("image", "text", "turns", "short", "image_root")),
    "jsonl": (JsonLines, ("image", "text", "turns", "short", "image_root")),
    "llava": (Llava, ("image_root",)),
    "imagefolder": (ImageFolder, ("labels",)),
    "digits": (None, ()),
    "totals": (None, ()),
}


def open_source(config: SourceConfig, root: str = "", with_images: bool = True) -> Source:
    """Opens a source. Relative paths are below `root`. A LLaVA file has rows with and without images, and
    `with_images` says which rows are used.

    Raises FileNotFoundError or ValueError with the path, the fault and the remedy. A source is also refused
    if a few of its records are tried and none can be read.
    """
    if config.format not in _OPEN:
        raise ValueError(f"unknown format {config.format!r} of {config.path}; known: {', '.join(FORMATS)}")
    make, uses = _OPEN[config.format]
    unused = [name for name in _FIELDS if getattr(config, name) and name not in uses]
    if unused:
        raise ValueError(f"{config.path}: format {config.format!r} has no use for {', '.join(unused)}")
    if config.format == "digits":
        return digits.open_records(config.path, config.split)
    if config.format == "totals":
        return totals.open_records(config.path, config.split)
    source = Llava(config, root, with_images) if config.format == "llava" else make(config, root)
    source.from_bucket = _from_bucket(config, root)
    errors = []
    for index in np.linspace(0, len(source) - 1, 16).astype(int):
        try:
            source[index]
            return source
        except ValueError as error:
            errors.append(error)
            if storage.is_outage(error):
                break
    raise ValueError(f"no record that was tried can be read; the first: {errors[0]}") from errors[0]


def _from_bucket(config: SourceConfig, root: str) -> bool:
    names = (config.path, config.image_root, config.captions)
    return any(storage.in_bucket(storage.join(root, word)) for name in names for word in shlex.split(name))


def codes_of(source: Source) -> int:
    """The number of codes of each image in a source, or 0 if images have no codes of a known tokenizer."""
    return getattr(source, "info", {}).get("codes", 0)
