"""Tars in WebDataset's format. An image and its text are members whose names have the same stem."""

import collections
import csv
import io
import json
import os
import pathlib
import re
import tarfile
from collections.abc import Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from mmada_jax import files, nearby, storage
from mmada_jax.bucket import BLOCK
from mmada_jax.data.records import Record
from mmada_jax.data.sources.paths import (
    IMAGES,
    MAX_IMAGE,
    MAX_TEXT,
    UNREAD_IMAGES,
    find_files,
    find_inputs,
    open_near,
    read_file,
    read_json,
    relative_names,
    size_of,
    stamp_of,
)
from mmada_jax.data.sources.rows import Columns, check_columns, choose_columns, make_record
from mmada_jax.data.sources.source import Records, SourceConfig

CAPTIONS = ("txt", "text", "caption", "json")
MAX_MEMBERS = 2_000_000  # largest number of members of a tar


class _Sample(NamedTuple):
    """The places of a sample's parts in a tar. `row` counts the questions about one image."""

    tar: int
    image_at: int
    image_size: int
    text_at: int
    text_size: int
    is_json: int
    row: int
    key_at: int
    key_end: int


class Tars(Records):
    """A record for each image with a text. A side file may give several questions about an image, and
    then each question has a record."""

    def __init__(self, config: SourceConfig, root: str):
        self._tars = find_inputs(config, root, "*.tar")
        self._names = [name.removesuffix(".tar") for name in relative_names(self._tars)]
        self._columns = choose_columns(
            config, None, config.path, text="" if config.turns else "caption prompt"
        )
        if config.captions and self._columns.asked:
            raise ValueError(f"{config.path}: captions replace the keys {', '.join(self._columns.asked)}")
        suffixes = ("json",) if self._columns.asked else CAPTIONS
        self._root, self._template, self._about, side_files = root, "", None, []
        if "{" in config.captions:
            self._template = config.captions
        elif config.captions:
            side_files = find_files(config.captions, root)[:1]
            self._columns = Columns(text=("captions",), turns=("turns",))
            self._about = _read_captions(side_files[0])
        ignored, tables, keys = collections.Counter(), [], bytearray()
        scanned = nearby.each(_samples_of, self._tars)
        for number, (samples, unused) in enumerate(scanned):
            table = []
            ignored.update(unused)
            for key, members in samples.items():
                image = next((members[s] for s in IMAGES if s in members), None)
                ignored["another image of a sample"] += max(0, sum(s in members for s in IMAGES) - 1)
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
        # The samples are one array and one string: LAION's millions, as objects, would fill the memory.
        self._samples, self._keys = np.concatenate(tables), bytes(keys)
        ignored = +ignored  # + removes the reasons whose count is 0
        stamp = stamp_of([*self._tars, *side_files], self._samples.tobytes() + self._keys)
        super().__init__(config, len(self._samples), stamp, ignored)

    def _sample(self, index: int) -> tuple[_Sample, str]:
        sample = _Sample(*self._samples[index].tolist())
        return sample, self._keys[sample.key_at : sample.key_end].decode()

    def _rows_about(self, key: str) -> Sequence[Mapping]:
        """The rows of the side file about a sample. They lie under its key or under the key's last part."""
        return self._about.get(key) or self._about.get(key.rpartition("/")[2], ())

    def _key(self, index: int) -> str:
        sample, key = self._sample(index)
        return f"{self._names[sample.tar]}/{key}" + (f"#{sample.row}" if sample.row else "")

    def _read(self, index: int) -> Record:
        sample, key = self._sample(index)
        path = self._tars[sample.tar]
        if self._template:
            side_file = self._side_file(path, key)
            text = _decode(read_file(side_file, limit=MAX_TEXT), side_file)
            row = {"caption": text.partition("\n")[0].strip()}
        elif self._about is not None:
            row = self._rows_about(key)[sample.row]
        else:
            data = read_file(path, sample.text_at, sample.text_size)
            if sample.is_json:
                row = files.parse_json(data, "its JSON", dict)
            else:
                row = {"caption": _decode(data, "its caption").strip()}
        image = read_file(path, sample.image_at, sample.image_size)
        return make_record(self._key(index), row, self._columns, image=image)

    def _side_file(self, tar: str, key: str) -> str:
        values = {"dir": os.path.dirname(tar), "tar": pathlib.Path(tar).stem, "key": key.rpartition("/")[2]}
        # str.format isn't used, since it would also read attributes of the values.
        path = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self._template)
        return str(storage.join(storage.path(self._root).absolute(), path))


def _decode(data: bytes, name: str) -> str:
    if b"\0" in data:
        raise ValueError(f"{name} has zero bytes, as a file has where it was never written; fetch it again")
    return files.decode(data, name)


_Samples = dict[str, dict[str, tuple[int, int]]]


def _samples_of(path: str) -> tuple[_Samples, collections.Counter]:
    """The samples of a tar, and the counts of what can't be used. Those of an object of a bucket are
    kept."""

    def scanned():
        ignored = collections.Counter()
        return _scan(path, ignored), ignored

    if not storage.in_bucket(path):
        return scanned()
    samples, ignored = json.loads(nearby.kept(path, "tar", lambda: json.dumps(scanned()).encode()))
    return samples, collections.Counter(ignored)


def _scan(path: str, ignored: collections.Counter) -> dict[str, dict[str, tuple[int, int]]]:
    """The samples of a tar: key -> suffix -> (offset, size) of the member's data, in bytes.

    Only headers are read, and nothing is extracted. Parts of a sample beside its image and its text are
    skipped. `ignored` counts the images and samples that can't be used.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    passed_over: set[str] = set()  # keys of unusable images, which `ignored` counts
    others: set[str] = set()  # keys of parts that are neither an image nor a text
    size, count, end = size_of(path), 0, 0
    try:
        with (
            open_near(path, BLOCK) as opened,
            tarfile.open(fileobj=opened, mode="r:") as tar,
        ):
            while member := tar.next():
                tar.members.clear()  # tarfile would keep all members
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
                if member.isdir():
                    continue
                if not stem:
                    ignored["hidden file"] += suffix.rpartition(".")[2] in IMAGES
                    continue
                key = f"{folder}{slash}{stem}"
                if suffix not in IMAGES + CAPTIONS:
                    _, dot, last = suffix.rpartition(".")
                    (passed_over if last in IMAGES + UNREAD_IMAGES else others).add(key)
                    if last in UNREAD_IMAGES:
                        ignored["format of images that isn't read"] += 1
                    elif dot and last in IMAGES:
                        ignored["image with dots in its name"] += 1
                elif not member.isreg() or member.sparse is not None:
                    ignored["link or special file"] += 1
                elif name.startswith("/") or ".." in name.split("/"):
                    ignored["path outside of the tar"] += 1
                elif not 0 < member.size <= (MAX_IMAGE if suffix in IMAGES else MAX_TEXT):
                    ignored["empty or too large"] += 1
                else:
                    found = samples.setdefault(key, {})
                    ignored["name that comes again"] += suffix in found
                    found[suffix] = (member.offset_data, member.size)
            end = tar.offset
            _check_end(path, opened, size, end)
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is no tar, or is damaged after byte {end}: {error}; fetch it again"
        ) from error
    for key in passed_over & samples.keys():
        if not any(suffix in samples[key] for suffix in IMAGES):
            del samples[key]  # the image of this text is counted already
    ignored["no image"] += len(others - samples.keys() - passed_over)
    return samples


def _check_end(path: str, file: BinaryIO, size: int, end: int) -> None:
    """Raises ValueError unless a tar has the mark of an archive's end at byte `end`, and nothing after it.

    tarfile takes a header that is cut off or damaged for the end of the tar. It also takes the first
    block of zeros for the end, even if data follow.
    """
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ValueError(
            f"{path} is truncated at a header: the file ends at byte {size} without the mark of an "
            f"archive's end, which is expected at {end}; fetch it again"
        )
    if any(block):
        raise ValueError(f"{path} is damaged: there is no header at byte {end}; fetch it again")
    data = _first_data(file, end)
    if data is not None:
        raise ValueError(
            f"{path} goes on at byte {data}, after the mark of an archive's end at byte {end}: part of it "
            "was never written, or it is several tars in a row; fetch it again, or split it"
        )
    # The mark has two blocks. Writers fill it up to a record of 20 blocks.
    whole = -(-(end + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    if size > whole:
        raise ValueError(
            f"{path} ends with {size - end} bytes of zeros from byte {end} on, where an archive that is "
            f"whole ends by byte {whole}: the rest was never written, or it was made with large records; "
            "fetch it again, or write it with records of 20 blocks"
        )


def _first_data(file: BinaryIO, at: int) -> int | None:
    """The place of the first byte from `at` on that isn't zero, or None if all bytes are zero."""
    file.seek(at)
    while block := file.read(1 << 20):
        found = np.flatnonzero(np.frombuffer(block, np.uint8))
        if len(found):
            return at + int(found[0])
        at += len(block)
    return None


def _read_captions(path: str) -> dict[str, list[Mapping]]:
    """The rows of a side file by key. Of .json there is one row with all captions of the key, of .csv one
    row for each question with its answer. A key may be the name of an image file."""
    rows: dict[str, list[Mapping]] = {}
    if path.endswith(".json"):
        for key, value in read_json(path, "expected {key: caption or captions}").items():
            rows.setdefault(_key_of(key), []).extend([{"captions": value}] if value else [])
        return rows
    if not path.endswith(".csv"):
        raise ValueError(
            f"captions {path}: expected .json, .csv or a pattern like {{dir}}/{{tar}}/{{key}}.txt"
        )
    text = files.read_text(path)
    header = text.partition("\n")[0]
    # Spreadsheets write different delimiters in different countries.
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    try:
        check_columns(("image", "question", "solution"), reader.fieldnames or (), path)
        for row in reader:
            turns = [("user", row["question"]), ("assistant", row["solution"])]
            rows.setdefault(_key_of(row["image"] or ""), []).append(
                {"turns": [{"role": role, "content": content} for role, content in turns]}
            )
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV after line {reader.line_num}: {error}") from error
    return rows


def _key_of(name: str) -> str:
    """The key of a sample. `name` is the key itself or the name of the sample's image."""
    stem, _, suffix = name.rpartition(".")
    return stem if suffix.lower() in IMAGES + UNREAD_IMAGES else name
