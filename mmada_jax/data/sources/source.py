"""What every source of records has: its configuration, its interface, and what the formats share."""

import dataclasses
import hashlib
import json
import operator
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from mmada_jax.data.records import LeftOut, Record
from mmada_jax.ranges import Ranged, Weight

FORMATS = ("arrayrecord", "tfds", "webdataset", "parquet", "jsonl", "llava", "imagefolder", "digits")


@dataclasses.dataclass(frozen=True)
class SourceConfig(Ranged):
    """One source: what `open_source` needs, and what the pipeline does with its records.

    `path` is a file, a folder, a glob or a brace pattern ({00000..00099}) of files; several are
    separated by spaces, and quotes keep the spaces of a name. `weight` is the source's share among
    those of its task. `split` is that of TFDS. `image`, `text`, `turns`, `short` name the column, the
    key of a JSON object, or the feature that holds each; empty is the format's usual one. `captions` is
    a side file of captions for tars: .json {key: caption or captions}, .csv with image, question and
    solution, or one file for each image, {dir}/{tar}/{key}.caption. `image_root` is the folder that the
    paths of images are relative to, by default that of the file which names them. `labels` has the
    names of classes, a line for each: `index: name` or `folder: name`. `resize` is how an image comes
    to its size; with `think` the prompt to think first leads the user's words (of turns; a text
    that is rendered already stays as it is). With `rendered` the texts of lm_chat are whole
    conversations with their control tokens; in all other texts such strings are ordinary text.
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
    """Records by index. `fingerprint` changes when what the source holds does.

    A record that can't be read is a ValueError naming the source, the record and the reason, and one
    that is left out for a reason of its own a LeftOut. Sources of files also have `ignored`, reasons
    and how many samples were left out for each, and `info`, the content of the dataset.json of our own
    records.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class Records:
    """What the formats share. A subclass sets up what its `_key` and `_read` need, then calls this."""

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
        # Libraries raise nearly anything for bytes that they can't read; a KeyError or an IndexError
        # would end an iteration.
        except Exception as error:
            raise ValueError(self._where(index, error)) from error

    def _where(self, index: int, error: Exception) -> str:
        return f"{self.path}: record {self._key(index)!r}: {str(error) or type(error).__name__}"

    def _key(self, index: int) -> str:
        raise NotImplementedError

    def _read(self, index: int) -> Record:
        raise NotImplementedError
