"""Preparing data for training: any source -> shards of ArrayRecord, with its images as codes if wanted.

A shard is written under another name, counted, and renamed. A finished shard is kept when the same is
prepared again, so that a process that was killed goes on. Records that can't be used are left out, counted
and named. An engine says where shards are written: here one by one, in model/actors.py by actors of Ray.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import secrets
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tqdm import tqdm

from mmada_jax import files, storage
from mmada_jax.bucket import SCHEME
from mmada_jax.data import sources
from mmada_jax.data.records import pack
from mmada_jax.data.sources.shards import Shard
from mmada_jax.model.reading import RECORDS, Encoder, Skip, Skips, ahead, read
from mmada_jax.progress import progress

# Suffixes of files that a process which was killed at once may leave in a new folder.
OURS = (".tmp", ".lock")


def prepare(
    config: sources.Config,
    out: storage.Name,
    *,
    records_per_shard: int = 10_000,
    shuffle: int | None = None,
    image_tokenizer: str | None = None,
    image_size: int | None = None,
    keep_images: bool = False,
    max_skipped: float = 0.01,
    engine: "Engine | None" = None,
) -> tuple[dict, "Skips"]:
    """Writes the shards that are missing in the folder `out`, and dataset.json, which says what there is.

    With the folder of an image tokenizer images are stored as its codes, of sides of `image_size` pixels,
    to which `config.resize` brings them.
    Records are shuffled once by the seed `shuffle`. `engine` writes the shards, by default `one_by_one`.
    Returns the content of dataset.json and the records that were left out. Raises ValueError or OSError for
    what can't work, before anything is written if it can be known, and as soon as a larger share of the
    records than `max_skipped` can't be used; Stopped for Ctrl-C.
    """
    check(records_per_shard, image_tokenizer, image_size, keep_images, max_skipped)
    job = Job(config, records_per_shard, shuffle, image_tokenizer, image_size, keep_images)
    writer = Writer(job)
    source, encoder = writer.source, writer.encoder
    order = np.arange(len(source))
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(len(source))
    out, n = storage.path(out), records_per_shard
    count = -(-len(source) // n)
    parts = {
        out / f"shard-{k:05}-of-{count:05}.array_record": order[k * n : (k + 1) * n] for k in range(count)
    }
    skips = Skips(max_skipped, len(source), parts)
    with claimed(out, writer.settings):
        # Shards of an earlier call are kept, and what they left out counts.
        done = {path: about for path in parts if (about := finished(path))}
        for path, about in done.items():
            skips.add(path, len(parts[path]), [Skip(**skip) for skip in about["skipped"]])
        missing = {path: indices for path, indices in parts.items() if path not in done}
        with progress(out.name, sum(map(len, missing.values())), " records") as bar:
            tally = Tally(skips, done, bar)
            try:
                (engine or one_by_one)(writer, missing, tally)
            except KeyboardInterrupt as stop:
                raise Stopped(
                    f"stopped: {len(done)} of {count} shards are finished; the same command goes on"
                ) from stop
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


# ---- Shards --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """What is prepared: all that a process elsewhere needs to write a shard of it."""

    config: sources.Config
    records_per_shard: int
    shuffle: int | None
    image_tokenizer: str | None
    image_size: int | None
    keep_images: bool


class Writer:
    """The source of a job and its image tokenizer, opened: writes shards.

    `settings` are what the bytes of the shards depend on."""

    def __init__(self, job: Job):
        self.job = job
        self.source = source = sources.open_source(job.config)
        if not len(source):
            raise ValueError(f"{job.config.path} holds no records")
        self.encoder = Encoder(job.image_tokenizer, job.image_size) if job.image_tokenizer else None
        self.settings = {
            **dataclasses.asdict(job.config), "fingerprint": source.fingerprint,
            "source_records": len(source), "records_per_shard": job.records_per_shard,
            "shuffle": job.shuffle, "image_tokenizer": self.encoder and self.encoder.sha256,
            "image_size": job.image_size, "keep_images": job.keep_images,
        }  # fmt: skip
        del self.settings["path"], self.settings["weight"]  # the same data may lie elsewhere by now

    def write(self, path: storage.Path, indices: np.ndarray) -> Iterator[tuple[int, list[Skip]]]:
        """Writes a shard of the records `indices`, and beside it a JSON file with their number and what was
        left out. Yields on the way how many more were seen, and which of them are left out."""
        encoder, skipped = self.encoder, []
        keep = encoder is None or self.job.keep_images
        load = functools.partial(read, self.source, encoder and encoder.size, self.job.config.resize, keep)
        # Records of a bucket are waited for side by side.
        threads = max(os.cpu_count() or 1, 16 if SCHEME in self.job.config.path else 1)
        with array_record(path) as write, ThreadPoolExecutor(threads) as pool:
            loaded = ahead(pool, load, indices.tolist())
            while group := list(itertools.islice(loaded, encoder.batch if encoder else RECORDS)):
                pixels = [one[2] for one in group if not isinstance(one, Skip)]
                codes, bad = iter(encoder(pixels) if encoder else [None] * len(pixels)), []
                for one in group:
                    if isinstance(one, Skip):
                        bad.append(one)
                        continue
                    index, record, _ = one
                    try:
                        write(pack(dataclasses.replace(record, codes=next(codes))))
                    except ValueError as error:  # text that is no Unicode
                        bad.append(Skip(index, record.key, "unreadable record", str(error)))
                skipped += bad
                yield len(group), bad
        about = {"records": count_records(path), "skipped": [dataclasses.asdict(skip) for skip in skipped]}
        write_json(path.with_suffix(".json"), about)


class Stopped(KeyboardInterrupt):
    """Ctrl-C while shards were written. Its text says how far it came, and what to do."""


@dataclasses.dataclass(frozen=True)
class Tally:
    """How far it is: what was left out, what the JSON files of the finished shards say, and the bar."""

    skips: Skips
    done: dict[storage.Path, dict]
    bar: tqdm

    def add(self, shard: storage.Path, seen: int, skips: list[Skip]) -> None:
        """Counts records of a shard. Raises ValueError if too many are left out."""
        self.skips.add(shard, seen, skips)
        self.bar.update(seen)

    def forget(self, shard: storage.Path) -> None:
        """Takes back what was counted of a shard that has to be written again."""
        self.bar.update(-self.skips.forget(shard))

    def finish(self, shard: storage.Path) -> None:
        """Takes a shard that was written for finished. Raises OSError if it isn't there, or not whole."""
        about = finished(shard)
        if about is None:
            raise OSError(f"{shard} was written, and isn't there now or not whole; all hosts that write "
                          "must see the same folder --out")  # fmt: skip
        self.done[shard] = about


# Writes the shards of the dict, each of so many records of the source, and tells the tally.
Engine = Callable[[Writer, dict[storage.Path, np.ndarray], Tally], None]


def one_by_one(writer: Writer, missing: dict[storage.Path, np.ndarray], tally: Tally) -> None:
    """The engine of one process."""
    for path, indices in missing.items():
        with contextlib.closing(writer.write(path, indices)) as written:
            for seen, skips in written:
                tally.add(path, seen, skips)
        tally.finish(path)


@contextlib.contextmanager
def array_record(path: storage.Path) -> Iterator[Callable[[bytes], None]]:
    """A function that writes one record; the file gets its name when all are in it."""
    count = itertools.count()
    with _unfinished(path) as temporary:
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
        storage.put(temporary, path)


@contextlib.contextmanager
def _unfinished(path: storage.Path) -> Iterator[pathlib.Path]:
    """Where a file is written: beside its place under another name each time, since a worker whose driver
    was killed may still write the same file. What belongs into a bucket is written to this machine's disk:
    the library writes nowhere else."""
    if storage.in_bucket(path):
        with tempfile.TemporaryDirectory(prefix="mmada_jax-") as folder:
            yield pathlib.Path(folder) / path.name
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def library_errors(path: storage.Path) -> Iterator[None]:
    """Turns an error of ArrayRecord into an OSError that names the file and the remedy."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(
            f"{path} can't be written: {str(error).splitlines()[0]}; the shards that are finished are "
            "kept, mend that and give the command again"
        ) from error


def count_records(path: storage.Path) -> int:
    """Counts the records of a shard. -1: it isn't whole. A file that was cut off opens empty."""
    if storage.in_bucket(path):
        try:
            return len(Shard(str(path)))
        except ValueError:
            return -1
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    return reader.num_records() if reader.ok() else -1


def finished(path: storage.Path) -> dict | None:
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
def claimed(out: storage.Path, settings: dict) -> Iterator[None]:
    """Locks the folder to write for this process. Raises ValueError if it holds data of other settings."""
    path = out / "prepare.json"
    if out.exists() and not path.is_file() and any(p.suffix not in OURS for p in out.iterdir()):
        raise ValueError(f"{out} is there already and holds something else; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    with storage.locked(out / "prepare.lock", f"another process is writing to {out}"):
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
        remove_unfinished(out)
        try:
            yield
        finally:
            remove_unfinished(out)


def write_json(path: storage.Path, values: dict) -> None:
    """Writes a JSON file, whole or not at all."""
    storage.write_whole(path, json.dumps(values, indent=1))


def remove_unfinished(out: storage.Path) -> None:
    """Removes what processes that were killed have left. If one of them lives still, it can't rename its
    file, and fails: nobody waits for it."""
    for path in out.glob("*.tmp"):
        path.unlink(missing_ok=True)
