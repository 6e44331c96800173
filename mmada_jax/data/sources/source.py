"""The configuration and the interface of every source of records, and a base class of the formats."""

import dataclasses
import hashlib
import json
import operator
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from mmada_jax.data.records import LeftOut, Record
from mmada_jax.ranges import Ranged, Weight

FORMATS = (
    "arrayrecord", "tfds", "webdataset", "parquet", "jsonl", "llava", "imagefolder", "digits", "totals"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SourceConfig(Ranged):
    """The configuration of a source: its files, the names of its fields, and the use of its records.

    `path` is a file, a folder, a glob or a brace pattern ({00000..00099}) of files. Spaces separate
    several paths, and quotes keep the spaces of a name. `weight` is the source's share among the sources
    of its task. `split` is a split of TFDS. `image`, `text`, `turns` and `short` name the column, the key
    of a JSON object, or the feature that holds this field. An empty name means the usual name of the
    format. `captions` is a side file of captions for tars: .json {key: caption or captions}, .csv with
    image, question and solution, or one file for each image, {dir}/{tar}/{key}.caption. Paths of images
    are relative to `image_root`, by default the folder of the file that names them. `labels` is a file
    with the names of classes, a line for each: `index: name` or `folder: name`. `resize` is the way in
    which an image is brought to its size. With `think` the user's words in turns begin with the prompt to
    think first. Rendered texts aren't changed by it. With `rendered` the texts of lm_chat are whole
    conversations with their control tokens. In all other texts such strings are ordinary text.
    """

    path: str = ""
    format: Literal[FORMATS] = "arrayrecord"
    weight: Weight = 1.0
    split: str = "train"
    image: str = ""
    text: str = ""
    turns: str = ""
    short: str = ""
    captions: str = ""
    image_root: str = ""
    labels: str = ""
    resize: Literal["crop", "squash", "pad"] = "crop"
    think: bool = False
    rendered: bool = False


class Source(Protocol):
    """Records by index. `fingerprint` is a hash that changes when the content of the source changes.

    Reading a record raises ValueError with the source, the record and the reason if the record is
    unreadable. It raises LeftOut if a sound record isn't used. Sources of files also have `ignored`,
    `info` and `from_bucket`. `ignored` has the numbers of samples left out, by reason. `info` is the
    content of the dataset.json of our own records. `from_bucket` says whether any record is read from a
    bucket.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class Records:
    """The base class of the formats. A subclass prepares its `_key` and `_read`, then calls `__init__`."""

    def __init__(
        self,
        config: SourceConfig,
        count: int,
        stamp: bytes,
        ignored: Mapping[str, int] | None = None,
        info: Mapping[str, Any] | None = None,
    ):
        self.path = config.path
        self.ignored = dict(ignored or {})
        self.info = dict(info or {})
        self.from_bucket = False
        self._count = int(count)
        if not count:
            why = "; ".join(f"{reason}: {n}" for reason, n in self.ignored.items())
            raise ValueError(f"{config.path} has no record that can be used ({why or 'it is empty'})")
        asked = (config.format, config.split, config.image, config.text, config.turns, config.short)
        self.fingerprint = hashlib.sha256(json.dumps(asked).encode() + stamp).hexdigest()[:16]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        index = operator.index(index)
        if not 0 <= index < self._count:
            raise IndexError(f"{self.path} has {self._count} records, none is number {index}")
        try:
            return self._read(index)
        except LeftOut as error:
            raise LeftOut(error.why, self._where(index, error)) from error
        # Libraries raise nearly any error for bytes that they can't read. A KeyError or an IndexError would
        # end an iteration.
        except Exception as error:
            raise ValueError(self._where(index, error)) from error

    def _where(self, index: int, error: Exception) -> str:
        return f"{self.path}: record {self._key(index)!r}: {str(error) or type(error).__name__}"

    def _key(self, index: int) -> str:
        raise NotImplementedError

    def _read(self, index: int) -> Record:
        raise NotImplementedError
