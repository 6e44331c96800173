"""Batches of rows, made of records on the host.

A batch is a function of the seed and the step alone. Every task has a fixed number of rows in a batch.
The sources of a task take turns by their weights. Each source goes through its records in an order that
is shuffled anew in every epoch. So the step is the only position in the data. Any number of processes can
resume a run by loading the batches from that step on.

This module doesn't import jax, so that loading processes don't start jax. `devices.sharding` places rows on
devices, and `model.vision` makes tokens of pixels.
"""

import collections
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np
from absl import flags

from mmada_jax import storage
from mmada_jax.data import images, records, sources
from mmada_jax.data.records import Record
from mmada_jax.data.texts import text_of
from mmada_jax.tokens import layout
from mmada_jax.tokens.tokenizer import Template, TextTokenizer
from mmada_jax.tokens.vocab import Vocab

T = TypeVar("T")

# A source is given up after this number of unusable records in a row, and after fewer that its bucket
# hasn't served: each of those has taken up to a minute.
TRIES, OUTAGES = 100, 3
UNREADABLE = "unreadable"


class RawRows(NamedTuple):
    """Rows of a batch, whose images may still be pixels. Where `encode_B` is True, the image tokens must
    still be made of `pixels_BIJC`. Both fields are None if all images of all sources have codes."""

    batch: layout.Batch
    pixels_BIJC: np.ndarray | None
    encode_B: np.ndarray | None


class Loaded(NamedTuple):
    """The rows of a step on one process. `skipped` counts the replaced records by source and reason."""

    rows: Any
    skipped: Mapping[str, int]


def rows_per_task(mixture: dict[str, int], batch_size: int) -> dict[str, int]:
    """Splits the `batch_size` rows of all processes among tasks by the weights of the mixture. The
    numbers of rows sum up to `batch_size` (method of the largest remainders)."""
    unknown = [task for task in mixture if task not in layout.TASKS]
    total = sum(mixture.values())
    if unknown or total <= 0 or min(mixture.values()) < 0:
        raise ValueError(
            f"mixture {mixture} must give non-negative weights, not all zero, to tasks among "
            f"{', '.join(layout.TASKS)}"
        )
    shares = {task: batch_size * weight / total for task, weight in mixture.items()}
    rows = {task: int(share) for task, share in shares.items()}
    by_remainder = sorted(shares, key=lambda task: rows[task] - shares[task])
    for task in by_remainder[: batch_size - sum(rows.values())]:
        rows[task] += 1
    return rows


# ---- Sources -------------------------------------------------------------------------------------


def open_sources(
    data: Mapping[str, Mapping[str, sources.SourceConfig]],
    tasks: Sequence[str],
    root: str = "",
    key: str = "data",
) -> dict[str, dict[str, sources.Source]]:
    """Opens the sources of `tasks`. Raises ValueError or OSError for a source that can't be opened, with
    its name under config.`key`, and ValueError for a task without a source."""
    opened: dict[str, dict[str, sources.Source]] = {}
    for task in tasks:
        of_task = data.get(task, {})
        opened[task] = _open_weighted(
            of_task, root, f"config.{key}.{task}", layout.image_start(task, 1) > 0
        )
        if not opened[task]:
            raise ValueError(
                f"the mixture has rows of {task!r} and config.{key}.{task} no source with a weight; "
                f"name one there, or set mixture.{task} to 0"
            )
    return opened


def open_pictures(
    data: Mapping[str, sources.SourceConfig], root: str = "", key: str = "data"
) -> dict[str, sources.Source]:
    """Opens the sources of pictures under config.`key`. Raises ValueError or OSError for a source that
    can't be opened, and ValueError if none has a weight."""
    opened = _open_weighted(data, root, f"config.{key}", True)
    if not opened:
        raise ValueError(f"config.{key} has no source with a weight; raise one")
    return opened


def _open_weighted(configs, root, key, with_images):
    """The sources with a weight. Errors begin with the source's place in the configuration."""
    opened = {}
    for name, config in configs.items():
        try:
            if config.weight:
                opened[name] = sources.open_source(config, root, with_images)
        except (ValueError, OSError) as error:
            # Other types of errors may need more arguments than a message.
            plain = next(
                kind for kind in (FileNotFoundError, OSError, ValueError) if isinstance(error, kind)
            )
            raise plain(f"{key}.{name}: {error}") from error
    return opened


def left_out(opened: Mapping[str, Mapping[str, sources.Source]], key: str = "data") -> list[str]:
    """A line for each source under config.`key` that leaves samples out, with their numbers by reason."""
    lines = []
    for task, of_task in opened.items():
        for name, source in of_task.items():
            if ignored := getattr(source, "ignored", {}):
                reasons = ", ".join(f"{reason} {n:,}" for reason, n in ignored.items())
                where = ".".join(filter(None, ("config", key, task, name)))
                lines.append(f"{where}: {len(source):,} records; left out: {reasons}")
    return lines


class Skipped:
    """Counts the records that a process had to replace. `limit` is the largest share of rows whose
    records may be unreadable."""

    def __init__(self, limit: float):
        self._limit, self._rows = limit, 0
        self._counts: collections.Counter[str] = collections.Counter()

    def count(self, skipped: Mapping[str, int], rows: int) -> None:
        """Adds the counts of replaced records in a step of `rows` rows. Raises ValueError above `limit`."""
        self._counts.update(skipped)
        self._rows += rows
        bad = sum(n for name, n in self._counts.items() if name.endswith(UNREADABLE))
        if bad > max(10, self._limit * self._rows):
            raise ValueError(
                f"{bad} records out of {self._rows} couldn't be read, more than max_skipped="
                f"{self._limit}: {dict(self._counts)}; mend the data, or raise max_skipped"
            )

    def values(self) -> dict[str, float]:
        """The counts so far, as metrics."""
        return {f"skipped {name}": float(n) for name, n in self._counts.items()}


# ---- Rows ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape(layout.RowShape):
    """The lengths of a run's rows. `pixels` has the numbers of rows, columns and channels of an image."""

    pixels: tuple[int, int, int]


class Turns:
    """Which record each row of each step has. The sources `opened` of a task take turns by the weights in
    `data`; `rows` counts the rows of each task in a global batch. A subclass, a frozen dataclass with these
    fields, makes rows of records."""

    data: Mapping[str, Mapping[str, sources.SourceConfig]]
    opened: Mapping[str, Mapping[str, sources.Source]]
    rows: Mapping[str, int]
    seed: int

    @functools.cached_property
    def places(self) -> list[tuple[str, int]]:
        """(task, number among the rows of the task) for each row of a batch. Tasks alternate, so that every
        process and every device has a share of each task."""
        order = [((k + 0.5) / count, task, k) for task, count in self.rows.items() for k in range(count)]
        return [(task, k) for _, task, k in sorted(order)]

    @functools.cached_property
    def _orders(self) -> dict[str, grain.MapDataset]:
        """By task, a map from the position among the task's rows in all steps to (source name, index)."""
        orders = {}
        for task, of_task in self.opened.items():
            each = [
                grain.MapDataset.range(len(source))
                .seed(zlib.crc32(f"{self.seed} {task} {name}".encode()))
                .shuffle()
                .repeat()
                .map(functools.partial(lambda name, index: (name, int(index)), name))
                for name, source in of_task.items()
            ]
            weights = [self.data[task][name].weight for name in of_task]
            orders[task] = each[0] if len(each) == 1 else grain.MapDataset.mix(each, weights)
        return orders

    @property
    def description(self) -> dict[str, Any]:
        """The facts that decide which record a row of a step has. A run keeps them to compare on resume.

        The content of the files is part of the description. The paths of the files aren't.
        """
        of_sources: dict[str, dict[str, Any]] = {}
        for task, of_task in self.opened.items():
            for name, source in of_task.items():
                values = dataclasses.asdict(self.data[task][name])
                for where in ("path", "image_root", "captions", "labels"):
                    del values[where]
                if not values["rendered"]:  # older runs have descriptions without this field
                    del values["rendered"]
                values |= {"records": len(source), "fingerprint": source.fingerprint}
                of_sources.setdefault(task, {})[name] = values
        return {"seed": self.seed, "rows": dict(self.rows), "sources": of_sources}

    @property
    def from_bucket(self) -> bool:
        """Whether any record is read from a bucket."""
        opened = (source for of_task in self.opened.values() for source in of_task.values())
        return any(getattr(source, "from_bucket", False) for source in opened)

    def __getstate__(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state):
        self.__dict__.update(state)

    def record_at(self, task: str, position: int) -> tuple[str, int]:
        """(name of the source, index) of the record at a position among the rows of a task in all steps."""
        return self._orders[task][position]

    def made(self, step: int, which: Sequence[int] | None, skipped: collections.Counter[str]) -> list[Any]:
        """What is made of the rows with the numbers `which` of the batch of `step`, in this order. By
        default of all rows. Replaced records are counted in `skipped`."""
        places = [self.places[row] for row in (range(len(self.places)) if which is None else which)]
        return [self._row(task, step * self.rows[task] + k, skipped) for task, k in places]

    def _make(
        self, task: str, config: sources.SourceConfig, record: Record, rng: np.random.Generator
    ) -> Any:
        """A row of a record. Raises LeftOut or any other error if there is none."""
        raise NotImplementedError

    def _row(self, task: str, position: int, skipped: collections.Counter[str]) -> Any:
        name, index = self.record_at(task, position)
        source = self.opened[task][name]
        number = layout.TASKS.index(task) if task in layout.TASKS else len(layout.TASKS)
        rng = np.random.default_rng([self.seed, number, position])
        outages = set()
        for tried in range(1, TRIES + 1):
            try:
                record = source[index]
                if record.codes is not None and not sources.codes_of(source):
                    raise ValueError(
                        f"record {record.key!r} has image codes of an unknown tokenizer; name the folder "
                        "with their dataset.json, not the shards"
                    )
                return self._make(task, self.data[task][name], record, rng)
            except records.LeftOut as error:
                last, why = error, error.why
            except Exception as error:  # libraries raise nearly everything for a record that is damaged
                last, why = error, UNREADABLE
                outages |= {index} if storage.is_outage(error) else set()
            skipped[f"{task}.{name}: {why}"] += 1
            if len(outages) == min(OUTAGES, len(source)) or tried == TRIES:
                break
            index = int(rng.integers(len(source)))
        raise ValueError(
            f"{self._where(task, name)}: {tried} records, one after the other, can't be used: "
            f"{str(last) if isinstance(last, ValueError) else repr(last)}"
        ) from last

    def _where(self, task: str, name: str) -> str:
        """The place of a source in the configuration."""
        return f"config.data.{task}.{name}"


@dataclasses.dataclass(frozen=True)
class Pipeline(Turns):
    """Rows of tokens by step.

    `cond_dropout` is the share of t2i rows without their text. With `cut_long` a text that doesn't fit is
    cut, as in the first two phases of the reference. Without `cut_long` another record replaces its record.
    """

    tokenizer: TextTokenizer
    vocab: Vocab
    data: Mapping[str, Mapping[str, sources.SourceConfig]]
    opened: Mapping[str, Mapping[str, sources.Source]]
    rows: Mapping[str, int]
    shape: Shape
    seed: int
    cond_dropout: float = 0.1
    cut_long: bool = False
    think_prompt: str = records.THINK_PROMPT
    think_draw_prompt: str = records.THINK_DRAW_PROMPT

    def load(self, step: int, which: Sequence[int] | None = None) -> Loaded:
        """The rows with the numbers `which` of the batch of `step`, in this order. By default all rows."""
        skipped: collections.Counter[str] = collections.Counter()
        rows, pixels = zip(*self.made(step, which, skipped), strict=True)
        batch = layout.stack(rows)
        if not self.encodes:
            return Loaded(RawRows(batch, None, None), skipped)
        blank = np.zeros(self.shape.pixels, self._pixel_dtype)
        encode_B = np.array([image is not None for image in pixels])
        pixels_BIJC = np.stack([blank if image is None else image for image in pixels])
        return Loaded(RawRows(batch, pixels_BIJC, encode_B), skipped)

    @functools.cached_property
    def encodes(self) -> bool:
        """Whether any source has images without codes. If so, every batch has pixels."""
        return any(
            layout.image_start(task, self.shape.max_text) and not sources.codes_of(source)
            for task, of_task in self.opened.items()
            for source in of_task.values()
        )

    @functools.cached_property
    def _pixel_dtype(self) -> type:
        formats = {config.format for of_task in self.data.values() for config in of_task.values()}
        return np.float32 if "digits" in formats else np.uint8  # scans have 17 shades, in floats

    def _make(
        self, task: str, config: sources.SourceConfig, record: Record, rng: np.random.Generator
    ) -> tuple[layout.Batch, np.ndarray | None]:
        vocab, S, L = self.vocab, self.shape.max_text, self.shape.length
        codes, pixels = self._image(config, record) if layout.image_start(task, S) else (None, None)
        text = text_of(task, config, record, rng, self.think_prompt, self.think_draw_prompt)
        if task == "lm":
            return layout.lm(vocab, self.tokenizer.encode(text), L), None
        if task == "lm_chat":
            return layout.lm_chat(vocab, self._fitting(text, L - 1, record), L), None
        if task == "t2i":
            ids = self._fitting(text, S - 2, record) if rng.random() >= self.cond_dropout else []
            return layout.t2i(vocab, ids, codes, S), pixels
        ids = self._fitting(text, S - 1, record)
        row = layout.r2i(vocab, ids, codes, S) if task == "r2i" else layout.mmu(vocab, codes, ids, S)
        return row, pixels

    def _fitting(self, text: str | Template, limit: int, record: Record) -> list[int]:
        ids = self.tokenizer.encode(text)
        if len(ids) > limit and not self.cut_long:
            message = f"record {record.key!r} has {len(ids)} tokens of text; the limit is {limit}"
            raise records.LeftOut("too long", message)
        return ids

    def _image(self, config: sources.SourceConfig, record: Record) -> tuple[np.ndarray, np.ndarray | None]:
        """The ids of the image's tokens and None, or placeholders for the ids and the pixels to encode."""
        if record.codes is not None:
            if len(record.codes) != self.shape.n_image:
                raise ValueError(
                    f"record {record.key!r} has {len(record.codes)} image codes, rows have "
                    f"{self.shape.n_image}"
                )
            return self.vocab.image_ids(record.codes), None
        if record.image is None and self.encodes:
            raise records.LeftOut("no picture", f"record {record.key!r} has no image")
        if record.image is None or not self.encodes:
            raise ValueError(f"record {record.key!r} has no image codes")
        pixels = record.image
        if isinstance(pixels, bytes):
            I, J, C = self.shape.pixels
            pixels = images.to_bytes(pixels, (I, J), C, config.resize)
        if pixels.shape != self.shape.pixels:
            raise ValueError(f"record {record.key!r} has pixels {pixels.shape}, not {self.shape.pixels}")
        return np.full(self.shape.n_image, self.vocab.image_offset, np.int32), pixels


@dataclasses.dataclass(frozen=True)
class Pictures(Turns):
    """Pictures by step, float32 [rows, I, J, C] in [-1, 1], which train the image tokenizer. `pixels` has
    the numbers of rows, columns and channels of one."""

    data: Mapping[str, Mapping[str, sources.SourceConfig]]
    opened: Mapping[str, Mapping[str, sources.Source]]
    rows: Mapping[str, int]
    seed: int
    pixels: tuple[int, int, int]

    def load(self, step: int, which: Sequence[int] | None = None) -> Loaded:
        """The pictures with the numbers `which` of the batch of `step`, in this order. By default all."""
        skipped: collections.Counter[str] = collections.Counter()
        return Loaded(np.stack(self.made(step, which, skipped)), skipped)

    def _make(
        self, task: str, config: sources.SourceConfig, record: Record, rng: np.random.Generator
    ) -> np.ndarray:
        if record.image is None:
            raise records.LeftOut("no picture", f"record {record.key!r} has no picture")
        return images.to_pixels(record.image, self.pixels[:2], self.pixels[2], config.resize)

    def _where(self, task: str, name: str) -> str:
        return f"config.{task}.{name}"


# ---- Batches -------------------------------------------------------------------------------------


def threads_of(asked: int, from_bucket: bool) -> int:
    """How many threads load: as many as are asked for, or, for 0, two for files of this machine and 16 for
    a bucket, whose answers take long and can be waited for side by side."""
    return asked or (16 if from_bucket else 2)


def iterate(
    load: Callable[[int], T], first: int, steps: int, threads: int = 2, workers: int = 0
) -> Iterator[T]:
    """The results of load(step) for each step from `first` to `steps` - 1. Threads load ahead. If
    `workers` isn't 0, that many processes load, with `threads` threads each. The results don't depend on
    these numbers."""
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    loaded = grain.MapDataset.range(first, steps).map(load).to_iter_dataset(ahead)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads its own flags, and programs without absl parse none
            flags.FLAGS.mark_as_parsed()
        # Batches come through a pipe. With shared memory grain leaves some behind and Python warns of it.
        copied = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        loaded = grain.experimental.WithOptionsIterDataset(loaded, copied)
        loaded = loaded.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _begin_worker)
    return iter(loaded)


def _begin_worker(_number: int, _count: int) -> None:
    # Only the parent obeys a signal to all processes of a run: it stops when a step is saved. A worker ends
    # when its parent has ended for any reason.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
