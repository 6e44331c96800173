"""Preparing data for training: any source -> shards of ArrayRecord, with its images as codes if wanted.

A shard is written under another name, counted, and renamed. A finished shard is kept when the same is
prepared again, so that a process that was killed goes on. Records that can't be used are left out, counted
and named.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import typing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mmada_jax import files
from mmada_jax.data import images, sources
from mmada_jax.data.records import LeftOut, Record, pack
from mmada_jax.devices import sharding
from mmada_jax.model.vision import Vision
from mmada_jax.progress import progress
from mmada_jax.weights import lazy
from mmada_jax.weights.folder import open_image_tokenizer
from mmada_jax.weights.workdir import locked

# Images that a device encodes in one call.
IMAGES = 8
# Records that are written together where nothing is encoded.
RECORDS = 64
# If so many records from the start can't be used, the source is the wrong one, or it is read wrongly.
HOPELESS = 1000
# Suffixes of files that a process which was killed at once may leave in a new folder.
OURS = (".tmp", ".lock")


def prepare(
    config: sources.Config,
    out: str | pathlib.Path,
    *,
    records_per_shard: int = 10_000,
    shuffle: int | None = None,
    image_tokenizer: str | None = None,
    image_size: int | None = None,
    keep_images: bool = False,
    max_skipped: float = 0.01,
) -> tuple[dict, "Skips"]:
    """Writes the shards that are missing in the folder `out`, and dataset.json, which says what there is.

    With the folder of an image tokenizer images are stored as its codes, of sides of `image_size` pixels,
    to which `config.resize` brings them.
    Records are shuffled once by the seed `shuffle`. Returns the content of dataset.json and the records
    that were left out. Raises ValueError or OSError for what can't work, before anything is written if it
    can be known, and as soon as a larger share of the records than `max_skipped` can't be used.
    """
    check(records_per_shard, image_tokenizer, image_size, keep_images, max_skipped)
    source = sources.open_source(config)
    if not len(source):
        raise ValueError(f"{config.path} holds no records")
    encoder = Encoder(image_tokenizer, image_size) if image_tokenizer else None
    settings = {
        **dataclasses.asdict(config), "fingerprint": source.fingerprint, "source_records": len(source),
        "records_per_shard": records_per_shard, "shuffle": shuffle,
        "image_tokenizer": encoder and encoder.sha256, "image_size": image_size, "keep_images": keep_images,
    }  # fmt: skip
    del settings["path"], settings["weight"]  # the same data may lie elsewhere by now
    order = np.arange(len(source))
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(len(source))
    out, n = pathlib.Path(out), records_per_shard
    count = -(-len(source) // n)
    parts = {
        out / f"shard-{k:05}-of-{count:05}.array_record": order[k * n : (k + 1) * n] for k in range(count)
    }
    keep = encoder is None or keep_images
    load = functools.partial(read, source, encoder and encoder.size, config.resize, keep)
    skips = Skips(max_skipped, len(source))
    with claimed(out, settings):
        # Shards of an earlier call are kept, and what they left out counts.
        done = {path: about for path in parts if (about := finished(path))}
        for path, about in done.items():
            skips.add(len(parts[path]), [Skip(**skip) for skip in about["skipped"]])
        left = sum(len(indices) for path, indices in parts.items() if path not in done)
        with progress(out.name, left, " records") as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            for path in parts:
                if path not in done:
                    loaded = ahead(pool, load, parts[path].tolist())
                    done[path] = write_shard(path, loaded, encoder, skips, bar.update)
        report = {
            "records": sum(about["records"] for about in done.values()),
            "shards": {path.name: done[path]["records"] for path in parts},
            # The source itself leaves records out too, as images of a tar without a caption.
            "skipped": collections.Counter(skip.reason for skip in skips.all)
            + collections.Counter(source.ignored),
            "source": {"format": config.format, "path": config.path, "fingerprint": source.fingerprint},
            "image_size": image_size,
            "codes": encoder.codes if encoder else 0,
            "image_tokenizer": encoder and encoder.sha256,
        }
        write_json(out / "dataset.json", report)
    return report, skips


def check(
    records_per_shard: int,
    image_tokenizer: str | None,
    image_size: int | None,
    keep_images: bool,
    max_skipped: float,
) -> None:
    """Raises ValueError for settings that make no sense, alone or together."""
    if records_per_shard < 1:
        raise ValueError(f"--records_per_shard is {records_per_shard}; it must be at least 1")
    if not 0 <= max_skipped <= 1:
        raise ValueError(f"--max_skipped is {max_skipped}; it is a share from 0 to 1")
    if image_tokenizer and not image_size:
        raise ValueError("--image_tokenizer needs --image_size, the one of training (256 or 512)")
    if not image_tokenizer and (image_size or keep_images):
        raise ValueError(
            "--image_size and --keep_images are for --image_tokenizer; without one images stay the "
            "files that they are, and training brings them to its size"
        )


# ---- Records -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Skip:
    """A record that is left out, and why."""

    index: int
    key: str
    reason: str
    error: str = ""


class Skips:
    """What was left out of a source of `records`, and how many records were seen."""

    def __init__(self, share: float, records: int):
        self._share, self._records, self._seen = share, records, 0
        self.all: list[Skip] = []

    def add(self, seen: int, skips: list[Skip]) -> None:
        """Counts. Raises ValueError, naming examples, as soon as more than the share is left out, or
        all of a good many from the start."""
        self._seen += seen
        self.all += skips
        n = len(self.all)
        if n > self._share * self._records or n == self._seen >= HOPELESS:
            raise ValueError(
                f"{n:,} of the first {self._seen:,} records can't be used, of {self._records:,} "
                f"--max_skipped allows {int(self._share * self._records):,}: {self.examples()}"
            )

    def examples(self) -> str:
        """The first five."""
        return "; ".join(
            " ".join(filter(None, ["record", str(skip.index), skip.key and f"({skip.key})"]))
            + f": {skip.reason}"
            + (f", {skip.error}" if skip.error else "")
            for skip in self.all[:5]
        )


Loaded = tuple[int, Record, np.ndarray | None]


def read(
    source: sources.Source, size: int | None, how: images.Resize, keep: bool, index: int
) -> Loaded | Skip:
    """Reads a record and decodes its image, to see that it can be and, with `size`, into the pixels
    [I, J, 3] to encode. Without `keep` the record comes back without its image."""
    try:
        record = source[index]
    except LeftOut as error:
        return Skip(index, "", error.why, str(error))
    except ValueError as error:
        return Skip(index, "", "unreadable record", str(error))
    if not (record.turns or any(text.strip() for text in record.texts)):
        return Skip(index, record.key, "no text")
    if record.image is None:
        return Skip(index, record.key, "no image") if size else (index, record, None)
    try:
        if isinstance(record.image, bytes):
            image, data = images.open_image(record.image), record.image
        else:
            image = images.to_image(record.image)
            data = images.png_of(image) if keep else None
        pixels = images.resize(image, size, how) if size else None
    except ValueError as error:
        return Skip(index, record.key, "unreadable image", str(error))
    return index, dataclasses.replace(record, image=data if keep else None), pixels


def ahead(pool: ThreadPoolExecutor, load: Callable[[int], typing.Any], indices: list[int]) -> Iterator:
    """Calls `load` for each index, in threads, and yields the results in order. At most 4 * RECORDS results
    wait to be taken."""
    waiting, indices = collections.deque(), iter(indices)
    for index in itertools.islice(indices, 4 * RECORDS):
        waiting.append(pool.submit(load, index))
    while waiting:
        yield waiting.popleft().result()
        for index in itertools.islice(indices, 1):
            waiting.append(pool.submit(load, index))


class Encoder:
    """The image tokenizer in a folder of any kind, on all devices: pixels -> codes."""

    def __init__(self, path: str, size: int):
        folder = open_image_tokenizer(path)
        down, channels = folder.config.downsampling, folder.config.pixel_channels
        if size % down or channels != 3:
            raise ValueError(
                f"the image tokenizer in {path} takes {channels} channels and sides divisible by {down}; "
                f"images are to have 3 and {size}"
            )
        self.size, self.codes = size, (size // down) ** 2
        self.sha256 = lazy.sha256(folder.tensors())
        self._vision = Vision.place(folder.params, folder.config, sharding.make_mesh())
        self.batch = IMAGES * self._vision.mesh.size

    def __call__(self, pixels: list[np.ndarray]) -> np.ndarray:
        """At most `batch` images uint8 [I, J, 3] -> codes int32 [n, N]."""
        batch = np.zeros((self.batch, self.size, self.size, 3), np.uint8)
        batch[: len(pixels)] = pixels
        return self._vision.encode(batch).reshape(self.batch, -1)[: len(pixels)]


# ---- Shards --------------------------------------------------------------------------------------


def write_shard(
    path: pathlib.Path,
    loaded: Iterable[Loaded | Skip],
    encoder: Encoder | None,
    skips: Skips,
    count: Callable[[int], typing.Any],
) -> dict:
    """Writes a shard, and beside it a JSON file with its records and what was left out."""
    skipped = []
    with array_record(path) as write:
        while group := list(itertools.islice(loaded, encoder.batch if encoder else RECORDS)):
            bad = [one for one in group if isinstance(one, Skip)]
            good = [one for one in group if not isinstance(one, Skip)]
            codes = encoder([pixels for _, _, pixels in good]) if encoder else [None] * len(good)
            for (index, record, _), codes_N in zip(good, codes, strict=True):
                try:
                    write(pack(dataclasses.replace(record, codes=codes_N)))
                except ValueError as error:  # text that is no Unicode
                    bad.append(Skip(index, record.key, "unreadable record", str(error)))
            skipped += bad
            skips.add(len(group), bad)
            count(len(group))
    about = {"records": count_records(path), "skipped": [dataclasses.asdict(skip) for skip in skipped]}
    write_json(path.with_suffix(".json"), about)
    return about


@contextlib.contextmanager
def array_record(path: pathlib.Path) -> Iterator[Callable[[bytes], None]]:
    """A function that writes one record; the file gets its name when all are in it."""
    temporary, count = path.with_suffix(".tmp"), itertools.count()
    try:
        with library_errors(path):
            writer = ArrayRecordWriter(str(temporary), "group_size:1")  # for reading in any order

        def write(data: bytes) -> None:
            with library_errors(path):
                writer.write(data)
            next(count)

        yield write
        with library_errors(path):
            writer.close()  # errors of all writes show up here
        found, written = count_records(temporary), next(count)
        if found != written:
            raise OSError(f"{path} was written with {written} records and read back with {found}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def library_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns an error of ArrayRecord into an OSError that names the file and the remedy."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(
            f"{path} can't be written: {str(error).splitlines()[0]}; the shards that are finished are "
            "kept, mend that and give the command again"
        ) from error


def count_records(path: pathlib.Path) -> int:
    """Counts the records of a shard. -1: it isn't whole. A file that was cut off opens empty."""
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    return reader.num_records() if reader.ok() else -1


def finished(path: pathlib.Path) -> dict | None:
    """Reads the JSON file beside a shard; None if the shard is missing or not whole."""
    about = path.with_suffix(".json")
    if not (path.is_file() and about.is_file()):
        return None
    values = files.read_json(about, dict)
    records, skipped = values.get("records"), values.get("skipped")
    names = {field.name for field in dataclasses.fields(Skip)}
    if (
        not isinstance(records, int)
        or not isinstance(skipped, list)
        or not all(isinstance(skip, dict) and skip.keys() == names for skip in skipped)
    ):
        raise ValueError(f"{about} doesn't say what {path.name} holds; delete both and prepare again")
    return values if count_records(path) == records else None


@contextlib.contextmanager
def claimed(out: pathlib.Path, settings: dict) -> Iterator[None]:
    """Locks the folder to write for this process. Raises ValueError if it holds data of other settings."""
    path = out / "prepare.json"
    if out.exists() and not path.is_file() and any(p.suffix not in OURS for p in out.iterdir()):
        raise ValueError(f"{out} is there already and holds something else; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / "prepare.lock", f"another process is writing to {out}"):
        if path.is_file():
            old, new = files.read_json(path, dict), json.loads(json.dumps(settings))
            different = [
                f"{key} is {old.get(key)!r} there and {new.get(key)!r} now"
                for key in old | new
                if old.get(key) != new.get(key)
            ]
            if different:
                raise ValueError(f"{out} was begun with other settings ({'; '.join(different)}); name "
                                 "another folder or give the same settings")  # fmt: skip
        else:
            write_json(path, settings)
        yield


def write_json(path: pathlib.Path, values: dict) -> None:
    """Writes a JSON file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=1))
    temporary.replace(path)
