"""Where records come from: files in the formats that MMaDA's data has, each by random access.

A source knows where its records are when it is open, and reads one when it is asked for it: no file
stays open between two reads (ArrayRecords aside, whose reader is made for that), so that threads may
share a source and processes may copy it. Images stay encoded, and what a folder, an archive or a row
names is read only where it lies below its own folder.
"""

import collections
import csv
import dataclasses
import glob
import hashlib
import json
import operator
import os
import pathlib
import re
import shlex
import tarfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from mmada_jax.data import digits
from mmada_jax.data.records import Record, unpack

FORMATS = ("arrayrecord", "tfds", "webdataset", "parquet", "jsonl", "llava", "imagefolder", "digits")
IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "text", "caption", "json")
MAX_IMAGE, MAX_TEXT = 64 << 20, 1 << 20  # bytes of one image file, of one caption or side file's line
MAX_MEMBERS = 2_000_000  # of one tar
CACHED = 256 << 20  # bytes of row groups that a Parquet source keeps


@dataclasses.dataclass(frozen=True)
class Config:
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
    that is rendered already stays as it is).
    """

    path: str = ""
    format: Literal[FORMATS] = "arrayrecord"
    weight: float = 1.0
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


class Source(Protocol):
    """Records by index. `fingerprint` changes when what the source holds does.

    A record that can't be read is a ValueError naming the source, the record and the reason. Sources of
    files also have `ignored`, reasons and how many samples were left out for each, and `info`, the
    content of the dataset.json of our own records.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def open_source(config: Config, root: str = "") -> Source:
    """Opens a source; relative paths are below `root`.

    Raises FileNotFoundError or ValueError naming the path, what is wrong with it and the remedy; also
    if none of a few records that are tried can be read.
    """
    if config.format not in _OPEN:
        raise ValueError(f"unknown format {config.format!r} of {config.path}; known: {', '.join(FORMATS)}")
    make, uses = _OPEN[config.format]
    unused = [name for name in _FIELDS if getattr(config, name) and name not in uses]
    if unused:
        raise ValueError(f"{config.path}: format {config.format!r} has no use for {', '.join(unused)}")
    if config.format == "digits":
        return digits.open_records(config.path, config.split)
    source = make(config, root)
    errors = []
    for index in np.linspace(0, len(source) - 1, 16).astype(int):
        try:
            source[index]
            return source
        except ValueError as error:
            errors.append(error)
    raise ValueError(f"no record that was tried can be read; the first: {errors[0]}") from errors[0]


def codes_of(source: Source) -> int:
    """The codes of each image in a source's records; 0 if they have none, or by an unknown tokenizer."""
    return getattr(source, "info", {}).get("codes", 0)


class _Records:
    """What the formats share. A subclass sets up what its `_key` and `_read` need, then calls this."""

    def __init__(
        self,
        config: Config,
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
        # What the libraries raise for bytes that they can't read; KeyError and IndexError among them,
        # which would end an iteration.
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{self.path}: record {self._key(index)!r}: {reason}") from error

    def _key(self, index: int) -> str:
        raise NotImplementedError

    def _read(self, index: int) -> Record:
        raise NotImplementedError


# ---- Our own records, and TFDS ---------------------------------------------------------------------


class _ArrayRecords(_Records):
    def __init__(self, config: Config, root: str):
        paths, info, counts = _inputs(config, root), {}, {}
        remedy = "fetch or write it again"
        if len(paths) == 1 and os.path.isdir(paths[0]):
            folder = paths[0]
            info = _read_json(
                os.path.join(folder, "dataset.json"),
                "launch/prepare.py writes it at its end; name shards that lack one by a glob",
            )
            counts = info.get("shards")
            if (
                not isinstance(counts, dict)
                or not all(isinstance(n, int) for n in counts.values())
                or sum(counts.values()) != info.get("records")
            ):
                raise ValueError(f"{folder}/dataset.json doesn't add up; prepare the records again")
            paths = [_below(folder, name) for name in counts]
            remedy = "delete it and run launch/prepare.py again"
        for path in paths:
            if os.path.isdir(path):
                raise ValueError(f"{path} is a folder among several paths; make it a source of its own")
        self._names = _names(paths)
        self._shards = [_open_shard(p, counts.get(os.path.basename(p)), remedy) for p in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        stamp = _stamp(paths, json.dumps(info, sort_keys=True).encode())
        super().__init__(config, sum(map(len, self._shards)), stamp, info=info)

    def _key(self, index: int) -> str:
        shard, row = _locate(self._ends, index)
        return f"{self._names[shard]}:{row}"

    def _read(self, index: int) -> Record:
        shard, row = _locate(self._ends, index)
        return unpack(self._shards[shard][row])


class _Tfds(_Records):
    def __init__(self, config: Config, root: str):
        import tensorflow_datasets as tfds

        folder = _folder(config, root)
        if not os.path.isfile(os.path.join(folder, "dataset_info.json")):
            found = sorted(pathlib.Path(folder).rglob("dataset_info.json"))
            hint = f", such as {found[0].parent}" if found else ""
            raise FileNotFoundError(
                f"{folder} has no dataset_info.json; name the folder of a prepared version{hint}"
            )
        try:
            builder = tfds.builder_from_directory(folder)
            splits, features = builder.info.splits, builder.info.features
        except Exception as error:  # those of JSON, of protocol buffers and of the library's own
            raise ValueError(f"{folder} is no dataset that TFDS can read: {error}") from error
        try:
            parts = splits[config.split].file_instructions
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{folder} has no split {config.split!r}; known: {', '.join(splits)}"
            ) from error
        self._columns = _choose(config, sorted(features), folder, image="image", text="text caption label")
        # No image is decoded here: neither that which is asked for nor another.
        images = [name for name in features if isinstance(features[name], tfds.features.Image)]
        try:
            decoders = {name: tfds.decode.SkipDecoding() for name in images}
            self._rows = builder.as_data_source(config.split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"{folder} is stored as {builder.info.file_format.value}, which has no random access; "
                "prepare it with file_format='array_record'"
            ) from error
        for part in parts:
            _open_shard(os.fspath(part.filename), part.examples_in_shard, "prepare the dataset again")
        paths, labels = [os.fspath(part.filename) for part in parts], _labels_path(config, root)
        self._classes = {
            name: _read_labels(labels, features[name].names) if labels else features[name].names
            for name in self._columns.text
            if isinstance(features[name], tfds.features.ClassLabel)
        }
        self._split = config.split
        super().__init__(config, len(self._rows), _stamp([*paths, *filter(None, [labels])]))

    def _key(self, index: int) -> str:
        return f"{self._split}:{index}"

    def _read(self, index: int) -> Record:
        row = self._rows[index]
        values = {name: row[name] for name in self._columns.image}
        for name in self._columns.text + self._columns.turns + self._columns.short:
            values[name] = self._classes[name][row[name]] if name in self._classes else _plain(row[name])
        return _record(self._key(index), values, self._columns)


def _plain(value: Any) -> Any:
    """A value of TFDS as JSON would have it: text as str, and a list of dicts as that."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return [
            dict(zip(value, items, strict=True)) for items in zip(*map(_plain, value.values()), strict=True)
        ]
    return value


def _open_shard(path: str, count: int | None, remedy: str):
    import grain

    if not os.path.isfile(path):
        raise FileNotFoundError(f"the shard {path} is missing; {remedy}")
    try:
        shard = grain.sources.ArrayRecordDataSource(path)
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


# ---- Tars ------------------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """A sample of a tar: where its parts are. `row` counts the questions about one image."""

    tar: int
    image_at: int
    image_size: int
    text_at: int
    text_size: int
    is_json: int
    row: int
    key_at: int
    key_end: int


class _Tars(_Records):
    def __init__(self, config: Config, root: str):
        self._tars = _inputs(config, root, "*.tar")
        self._names = [name.removesuffix(".tar") for name in _names(self._tars)]
        self._columns = _choose(config, None, config.path, text="" if config.turns else "caption prompt")
        if config.captions and self._columns.asked:
            raise ValueError(f"{config.path}: captions replace the keys {', '.join(self._columns.asked)}")
        suffixes = ("json",) if self._columns.asked else CAPTIONS
        self._root, self._template, self._about, files = os.path.abspath(root), "", None, []
        if "{" in config.captions:
            self._template = config.captions
        elif config.captions:
            files = _find(config.captions, root)[:1]
            self._columns = _Columns(text=("captions",), turns=("turns",))
            self._about = _read_captions(files[0])
        ignored, tables, keys = collections.Counter(), [], bytearray()
        for number, path in enumerate(self._tars):
            table = []
            for key, members in _scan(path, ignored).items():
                image = next((members[s] for s in IMAGES if s in members), None)
                suffix = next((s for s in suffixes if s in members), "")
                rows = 1 if self._template or suffix else 0
                if self._about is not None:
                    rows = len(self._rows_about(key))
                if image is None or not rows:
                    ignored["no image" if image is None else "no caption"] += 1
                    continue
                start = len(keys)
                keys += key.encode("utf-8", "backslashreplace")
                text = members.get(suffix, (0, 0))
                table += [
                    _Sample(number, *image, *text, suffix == "json", row, start, len(keys))
                    for row in range(rows)
                ]
            tables.append(np.array(table, np.int64).reshape(-1, len(_Sample._fields)))
        # One array and one string: as objects, the millions of samples of LAION would not fit.
        self._samples, self._keys = np.concatenate(tables), bytes(keys)
        stamp = _stamp([*self._tars, *files], self._samples.tobytes() + self._keys)
        super().__init__(config, len(self._samples), stamp, ignored)

    def _sample(self, index: int) -> tuple[_Sample, str]:
        sample = _Sample(*self._samples[index].tolist())
        return sample, self._keys[sample.key_at : sample.key_end].decode()

    def _rows_about(self, key: str) -> Sequence[Mapping]:
        """What the side file has about a sample, under its key or the last part of that."""
        return self._about.get(key) or self._about.get(key.rpartition("/")[2], ())

    def _key(self, index: int) -> str:
        sample, key = self._sample(index)
        return f"{self._names[sample.tar]}/{key}" + (f"#{sample.row}" if sample.row else "")

    def _read(self, index: int) -> Record:
        sample, key = self._sample(index)
        path = self._tars[sample.tar]
        if self._template:
            text = _read_file(self._side_file(path, key), limit=MAX_TEXT).decode()
            row = {"caption": text.partition("\n")[0].strip()}
        elif self._about is not None:
            row = self._rows_about(key)[sample.row]
        else:
            data = _read_file(path, sample.text_at, sample.text_size)
            row = _parse_object(data) if sample.is_json else {"caption": data.decode().strip()}
        image = _read_file(path, sample.image_at, sample.image_size)
        return _record(self._key(index), row, self._columns, image=image)

    def _side_file(self, tar: str, key: str) -> str:
        values = {"dir": os.path.dirname(tar), "tar": pathlib.Path(tar).stem, "key": key.rpartition("/")[2]}
        # Not str.format, which follows attributes.
        path = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self._template)
        return os.path.join(self._root, path)


def _scan(path: str, ignored: collections.Counter) -> dict[str, dict[str, tuple[int, int]]]:
    """The samples of a tar: key -> suffix -> (offset, size) of the member's data.

    Nothing is opened or extracted. Members that are not what a sample has are passed over; those that
    no sample should have are counted in `ignored`.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    size, count, end = os.path.getsize(path), 0, 0
    try:
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                tar.members.clear()  # which would keep all of them
                end, count = tar.offset, count + 1
                if count > MAX_MEMBERS or member.size < 0:
                    raise ValueError(f"{path}: refused after {count} members (limit {MAX_MEMBERS})")
                if member.isreg() and member.offset_data + member.size > size:
                    raise ValueError(
                        f"{path} is truncated in the data of {member.name!r}: it should go on to byte "
                        f"{member.offset_data + member.size}, the file ends at {size}; fetch it again"
                    )
                name = member.name.removeprefix("./")
                folder, slash, file = name.rpartition("/")
                stem, _, suffix = file.partition(".")
                suffix = suffix.lower()
                if not stem or suffix not in IMAGES + CAPTIONS:
                    continue
                if not member.isreg() or member.sparse is not None:
                    ignored["link or special file"] += 1
                elif name.startswith("/") or ".." in name.split("/"):
                    ignored["path outside of the tar"] += 1
                elif not 0 < member.size <= (MAX_IMAGE if suffix in IMAGES else MAX_TEXT):
                    ignored["empty or too large"] += 1
                else:
                    found = samples.setdefault(f"{folder}{slash}{stem}", {})
                    found[suffix] = (member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is no tar, or is damaged after byte {end}: {error}; fetch it again"
        ) from error
    # The library takes a header that is cut off or damaged for the end.
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError(
            f"{path} is truncated at a header: the file ends at byte {size} without the mark of an "
            f"archive's end, which is expected at {end}; fetch it again"
        )
    if any(block):
        raise ValueError(f"{path} is damaged: there is no header at byte {end}; fetch it again")
    return samples


def _read_captions(path: str) -> dict[str, list[Mapping]]:
    """A side file as rows by key: one with all captions, or one for each question with its answer."""
    if path.endswith(".json"):
        table = _read_json(path, "expected {key: caption or captions}")
        return {key: [{"captions": value}] if value else [] for key, value in table.items()}
    if not path.endswith(".csv"):
        raise ValueError(
            f"captions {path}: expected .json, .csv or a pattern like {{dir}}/{{tar}}/{{key}}.txt"
        )
    rows: dict[str, list[Mapping]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            _check_columns(("image", "question", "solution"), reader.fieldnames or (), path)
            for row in reader:
                key, _, suffix = (row["image"] or "").rpartition(".")
                turns = [("user", row["question"]), ("assistant", row["solution"])]
                rows.setdefault(key if suffix.lower() in IMAGES else row["image"], []).append(
                    {"turns": [{"role": role, "content": content} for role, content in turns]}
                )
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no CSV after line {reader.line_num}: {error}") from error
    return rows


# ---- Rows of Parquet and JSON ----------------------------------------------------------------------


class _Parquet(_Records):
    def __init__(self, config: Config, root: str):
        import pyarrow.parquet

        self._paths = _inputs(config, root, "*.parquet")
        self._names = _names(self._paths)
        self._folders = [_image_root(config, root, path) for path in self._paths]
        self._files, self._groups = [], []
        for number, path in enumerate(self._paths):
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    footer, known = file.metadata, file.schema_arrow.names
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{path} is no whole Parquet file: {error}; fetch it again") from error
            columns = _choose(config, known, path, text="" if config.turns else "content text")
            self._files.append((footer, columns))
            self._groups += [(number, i) for i in range(footer.num_row_groups)]
        sizes = [self._files[number][0].row_group(i).num_rows for number, i in self._groups]
        self._ends = np.cumsum(sizes)
        self._firsts = np.cumsum([0, *(footer.num_rows for footer, _ in self._files)])
        self._fresh()
        super().__init__(config, sum(sizes), _stamp(self._paths))

    def _fresh(self) -> None:
        # Each group is read under one of these locks: once, though several threads want it.
        self._locks = [threading.Lock() for _ in range(16)]
        self._lock, self._cache, self._cached = threading.Lock(), collections.OrderedDict(), 0

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k not in ("_locks", "_lock", "_cache", "_cached")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._fresh()

    def _key(self, index: int) -> str:
        number, _ = self._groups[_locate(self._ends, index)[0]]
        return f"{self._names[number]}:{index - self._firsts[number]}"

    def _read(self, index: int) -> Record:
        group, row = _locate(self._ends, index)
        (values,) = self._table(group).slice(row, 1).to_pylist()
        number, _ = self._groups[group]
        return _record(self._key(index), values, self._files[number][1], self._folders[number])

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
        with pyarrow.parquet.ParquetFile(self._paths[number], metadata=footer) as file:
            return file.read_row_group(part, columns=names, use_threads=False)


class _JsonLines(_Records):
    def __init__(self, config: Config, root: str):
        self._paths = _inputs(config, root, "*.jsonl")
        self._names = _names(self._paths)
        self._folders = [_image_root(config, root, path) for path in self._paths]
        self._columns = _choose(
            config,
            None,
            config.path,
            image="image",
            text="" if config.turns else "text caption",
            turns="" if config.text else "turns messages conversations",
            short="short",
        )
        lines = [_find_lines(path) for path in self._paths]
        self._lines = np.concatenate(lines)  # [n, 3]: line number, offset, size
        self._ends = np.cumsum([len(part) for part in lines])
        super().__init__(config, len(self._lines), _stamp(self._paths, self._lines.tobytes()))

    def _key(self, index: int) -> str:
        return f"{self._names[_locate(self._ends, index)[0]]}:{self._lines[index, 0]}"

    def _read(self, index: int) -> Record:
        file, _ = _locate(self._ends, index)
        number, at, size = self._lines[index].tolist()
        try:
            row = _parse_object(_read_file(self._paths[file], at, size))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        return _record(self._key(index), row, self._columns, self._folders[file])


def _find_lines(path: str) -> np.ndarray:
    """Number, from 1, offset and size of each line that has room for an object, [n, 3]."""
    edges, at = [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(16 << 20):
            edges.append(at + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")))
            at += len(block)
    starts = np.concatenate([*edges, [at]])
    sizes = np.diff(starts)
    lines = np.stack([np.arange(1, len(starts)), starts[:-1], sizes], axis=1)
    return lines[sizes > len("\r\n")]


class _Llava(_Records):
    def __init__(self, config: Config, root: str):
        self._rows: list[tuple[str, str, dict]] = []
        ignored, paths = collections.Counter(), _inputs(config, root, "*.json")
        for path, name in zip(paths, _names(paths), strict=True):
            rows = _read_json(path, "expected a list of {image, conversations}", list)
            folder = _image_root(config, root, path)
            for number, row in enumerate(rows):
                image = row.get("image") if isinstance(row, dict) else None
                if image and isinstance(image, str):
                    self._rows.append((f"{name}:{number}", folder, row))
                else:
                    ignored["no image"] += 1
        super().__init__(config, len(self._rows), _stamp(paths), ignored)

    def _key(self, index: int) -> str:
        return self._rows[index][0]

    def _read(self, index: int) -> Record:
        key, folder, row = self._rows[index]
        if "conversations" not in row and "prompt" in row:
            turns = [("human", row["prompt"]), ("gpt", row.get("response"))]
            row = {**row, "conversations": [{"from": role, "value": value} for role, value in turns]}
        return _record(key, row, _Columns(image=("image",), turns=("conversations",)), folder)


# ---- Folders of images -----------------------------------------------------------------------------


class _ImageFolder(_Records):
    def __init__(self, config: Config, root: str):
        self._folder = _folder(config, root)
        classes = sorted(e.name for e in os.scandir(self._folder) if e.is_dir() and e.name[0] != ".")
        if not classes:
            raise ValueError(f"{self._folder} has no folders; expected one for each class of images")
        labels = _labels_path(config, root)
        self._texts = [name.replace("_", " ") for name in classes]
        if labels:
            self._texts = _read_labels(labels, classes)
        self._files: list[tuple[int, str]] = []
        seen = hashlib.sha256()
        for number, name in enumerate(classes):
            for entry in sorted(os.scandir(os.path.join(self._folder, name)), key=lambda e: e.name):
                _, _, suffix = entry.name.rpartition(".")
                if suffix.lower() in IMAGES and entry.name[0] != "." and entry.is_file():
                    self._files.append((number, f"{name}/{entry.name}"))
                    seen.update(f"{name}/{entry.name}:{entry.stat().st_size}\n".encode(errors="replace"))
        stamp = seen.digest() + _stamp([*filter(None, [labels])])
        super().__init__(config, len(self._files), stamp)

    def _key(self, index: int) -> str:
        return self._files[index][1]

    def _read(self, index: int) -> Record:
        number, name = self._files[index]
        row = {"image": name, "text": self._texts[number]}
        return _record(name, row, _Columns(image=("image",), text=("text",)), self._folder)


def _labels_path(config: Config, root: str) -> str:
    return _find(config.labels, root)[0] if config.labels else ""


def _read_labels(path: str, names: Sequence[str]) -> list[str]:
    """The text of each class of `names`, from lines that start with its name or its index."""
    lines = [line.strip() for line in _read_file(path).decode().splitlines() if line.strip()]
    known, found = {*names, *map(str, range(len(names)))}, {}
    for line in lines:
        for key, _, text in (line.partition(":"), line.replace("\t", " ").partition(" ")):
            if key.strip() in known:
                found[key.strip()] = text.strip()
                break
    # An index means something only in a list of the very same classes.
    by_index = [str(i) for i in range(len(names))]
    keys = by_index if found.keys() >= set(by_index) and len(lines) == len(names) else names
    keys = names if found.keys() >= set(names) else keys
    missing = [key for key in keys if not found.get(key)]
    if missing:
        raise ValueError(
            f"{path} names no class {missing[0]!r} ({len(missing)} of {len(names)} lack a name); give "
            f"{len(names)} lines `index: name`, or a line `folder: name` for each"
        )
    return [found[key] for key in keys]


# ---- Rows -> records -------------------------------------------------------------------------------

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class _Columns(NamedTuple):
    """The names under which a row may have each field, the first that is there; `asked` must be there."""

    image: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


def _choose(config: Config, known: Sequence[str] | None, where: str, **usual: str) -> _Columns:
    """The columns that the config names, else the usual ones; `known` are those that all rows have."""
    asked = {field: getattr(config, field) for field in ("image", "text", "turns", "short")}
    columns = {field: (name,) for field, name in asked.items() if name}
    asked = tuple(filter(None, asked.values()))
    for field, names in usual.items():
        there = [name for name in names.split() if known is None or name in known]
        columns.setdefault(field, tuple(there if known is None else there[:1]))
    if known is not None:
        _check_columns(asked, known, where)
        if not any(columns.values()):
            raise ValueError(f"{where} has none of the usual columns; name one of: {', '.join(known)}")
    return _Columns(**columns, asked=asked)


def _check_columns(names: Iterable[str], known: Sequence[str], where: str) -> None:
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; it has: {', '.join(known)}")


def _record(
    key: str, row: Mapping[str, Any], columns: _Columns, folder: str = "", image: bytes | None = None
) -> Record:
    """A record from a row; paths of images are below `folder`. Raises ValueError for what isn't one."""
    _check_columns(columns.asked, list(row), "the row")
    fields = dict.fromkeys(("image", "text", "turns", "short"))
    for field in fields:
        present = (row[name] for name in getattr(columns, field) if row.get(name) is not None)
        fields[field] = next(present, None)
    image = _image(fields["image"], folder) if image is None else image
    texts = [fields["text"]] if isinstance(fields["text"], str) else fields["text"] or []
    short = fields["short"] or ""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in [*texts, short]):
        raise ValueError(f"text must be a string or a list of them, not {texts!r:.80} and {short!r:.80}")
    texts = tuple(text for text in texts if text.strip())
    turns = _turns(fields["turns"] or (), image is not None)
    if not texts and not turns and (columns.text or columns.turns):
        names = " or ".join(columns.text + columns.turns)
        raise ValueError(f"there is nothing under {names}; the row has: {', '.join(row)}")
    return Record(key, image, texts=texts, turns=turns, short=short)


def _turns(value: Any, has_image: bool) -> tuple[Mapping[str, str], ...]:
    """{from, value} or {role, content} -> {role, content}; without the place of the image."""
    turns = []
    for turn in value:
        turn = turn if isinstance(turn, Mapping) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(
                f"turn {len(turns)} has role {role!r} and content {content!r:.80}; expected one of "
                f"{', '.join(_ROLES)} and a string"
            )
        if has_image and _ROLES[role] == "user" and all(t["role"] != "user" for t in turns):
            content = content.replace("<image>\n", "").replace("\n<image>", "")
        turns.append({"role": _ROLES[role], "content": content})
    return tuple(turns)


def _image(value: Any, folder: str) -> bytes | None:
    """An image's file from its bytes, its path below `folder`, or a dict of either."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return _read_file(_below(folder, value))
    if value is not None and not (isinstance(value, bytes) and 0 < len(value) <= MAX_IMAGE):
        raise ValueError(f"an image is a path or up to {MAX_IMAGE} bytes, not {type(value).__name__}")
    return value


# ---- Files -----------------------------------------------------------------------------------------

# Offset and bytes by which a file is known, and its format.
_SIGNATURES = (
    (0, b"PAR1", "parquet"),
    (257, b"ustar", "webdataset"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"[", "llava"),
    (0, b"{", "jsonl"),
)


def _inputs(config: Config, root: str, pattern: str = "") -> list[str]:
    """The files of a source. Raises ValueError if the first is plainly of another format."""
    paths = _find(config.path, root, pattern)
    if os.path.isfile(paths[0]):
        with open(paths[0], "rb") as file:
            start = file.read(512)
        looks = next((name for at, mark, name in _SIGNATURES if start[at:].startswith(mark)), config.format)
        if looks == "gzip":
            raise ValueError(f"{paths[0]} is compressed, which has no random access; decompress it first")
        if looks != config.format:
            raise ValueError(f"{paths[0]} is not of format {config.format!r}; it looks like {looks!r}")
    return paths


def _find(words: str, root: str, pattern: str = "") -> list[str]:
    """The absolute paths that are named, in order; with a pattern, a folder is all such files below it."""
    found: list[str] = []
    if "://" in words:
        raise ValueError(f"{words} is no local path; mount the bucket (Cloud Storage FUSE) and name that")
    for word in shlex.split(words):
        for name in _braces(word):
            path = os.path.abspath(os.path.join(root, name))
            inside = [path]
            if not os.path.exists(path) and re.search(r"[*?\[]", name):
                inside = glob.glob(os.path.join(glob.escape(os.path.abspath(root)), name), recursive=True)
                inside = sorted(file for file in inside if os.path.isfile(file))
            elif pattern and os.path.isdir(path):
                files = pathlib.Path(path).rglob(pattern)
                inside = sorted(str(p) for p in files if p.is_file() and p.name[0] != ".")
                path = os.path.join(path, pattern)
            elif not os.path.exists(path):
                parent = next(p for p in pathlib.Path(path).parents if p.exists())
                raise FileNotFoundError(f"{path} doesn't exist; the nearest folder that does is {parent}")
            if not inside:
                raise FileNotFoundError(f"no file matches {path}")
            found += inside
    if not found:
        raise ValueError("a source has an empty path; name its files")
    return list(dict.fromkeys(found))


def _folder(config: Config, root: str) -> str:
    paths = _find(config.path, root)
    if len(paths) != 1 or not os.path.isdir(paths[0]):
        raise ValueError(f"{config.path} isn't one folder, which format {config.format!r} expects")
    return paths[0]


def _braces(word: str) -> Iterator[str]:
    """{00000..00099} and {a,b} -> all words that they stand for."""
    found = re.search(r"\{([^{}]*)\}", word)
    if not found:
        yield word
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    options: Iterable[str] = found[1].split(",")
    if numbers:
        first, last = numbers.groups()
        options = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    if (not numbers and "," not in found[1]) or (numbers and int(last) < int(first)):
        raise ValueError(
            f"{found[0]} in {word} is neither a range like {{000..099}} nor a list like {{a,b}}"
        )
    for option in options:
        yield from _braces(word[: found.start()] + option + word[found.end() :])


def _names(paths: Sequence[str]) -> list[str]:
    """Paths relative to the folder that has them all."""
    common = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [os.path.relpath(path, common) for path in paths]


def _stamp(paths: Sequence[str], more: bytes = b"") -> bytes:
    """What tells files from others, cheaply: names, sizes, and both ends of what they hold."""
    seen = hashlib.sha256(more)
    for path, name in zip(paths, _names(paths), strict=True):
        size = os.path.getsize(path)
        seen.update(f"{name}:{size}\n".encode(errors="replace"))
        with open(path, "rb") as file:
            seen.update(file.read(256 << 10))
            file.seek(max(file.tell(), size - (256 << 10)))
            seen.update(file.read(256 << 10))
    return seen.digest()


def _locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Of parts that end before these indices: which one has `index`, and where in it."""
    part = int(np.searchsorted(ends, index, side="right"))
    return part, index - (int(ends[part - 1]) if part else 0)


def _image_root(config: Config, root: str, path: str) -> str:
    if not config.image_root:
        return os.path.dirname(path)
    return _find(config.image_root, root)[0]


def _below(folder: str, name: str) -> str:
    if os.path.isabs(name) or ".." in re.split(r"[/\\]", name):
        raise ValueError(f"path {name!r} leads out of {folder}")
    return os.path.join(folder, name)


def _read_file(path: str, at: int = 0, size: int | None = None, limit: int = MAX_IMAGE) -> bytes:
    # Opened for each read: microseconds, and no handle that threads or processes would share.
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size if size is None else size
        if not 0 < size <= limit:
            raise ValueError(f"{size} bytes in {path}, expected 1 to {limit}")
        data = os.pread(file, size, at)
    finally:
        os.close(file)
    if len(data) != size:
        raise ValueError(f"{path} ends before byte {at + size}; it has changed since it was opened")
    return data


def _read_json(path: str, remedy: str, kind: type = dict) -> Any:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} doesn't exist; {remedy}")
    try:
        with open(path, "rb") as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); {remedy}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a {type(value).__name__}; {remedy}")
    return value


def _parse_object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {data[:40]!r}")
    return value


# The class of each format, and the fields of Config that it uses.
_FIELDS = ("image", "text", "turns", "short", "captions", "image_root", "labels")
_OPEN = {
    "arrayrecord": (_ArrayRecords, ()),
    "tfds": (_Tfds, ("image", "text", "turns", "short", "labels")),
    "webdataset": (_Tars, ("text", "turns", "short", "captions")),
    "parquet": (_Parquet, ("image", "text", "turns", "short", "image_root")),
    "jsonl": (_JsonLines, ("image", "text", "turns", "short", "image_root")),
    "llava": (_Llava, ("image_root",)),
    "imagefolder": (_ImageFolder, ("labels",)),
    "digits": (None, ()),
}
