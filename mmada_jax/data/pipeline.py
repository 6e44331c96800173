"""Records -> batches, on the host: which records a step has, and how they become rows.

A batch is a function of (seed, step) alone: every task has a fixed number of rows in it, row by row
the records of a task's sources follow each other by the sources' weights, and each source goes
through its records in an order that is shuffled anew in every epoch. So the one position of the data
is the step; a run is resumed, by any number of processes, by asking for the batches from there on.

Nothing here knows jax, so that processes that load don't start it: `devices.sharding` places rows on
devices, `model.vision` makes tokens of pixels.
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

from mmada_jax.data import digits, images, records, sources
from mmada_jax.data.records import Record
from mmada_jax.data.texts import text_of
from mmada_jax.tokens import layout
from mmada_jax.tokens.tokenizer import Template, TextTokenizer
from mmada_jax.tokens.vocab import Vocab

T = TypeVar("T")

# Number of records, one after the other, that can't be used until a source is given up.
TRIES = 100
UNREADABLE = "unreadable"


class RawRows(NamedTuple):
    """Rows of a batch, whose images may still be pixels: where `encode_B` is set, the tokens of the image
    are yet to be made of `pixels_BIJC`. Both are None if no source has images without codes."""

    batch: layout.Batch
    pixels_BIJC: np.ndarray | None
    encode_B: np.ndarray | None


class Loaded(NamedTuple):
    """The rows of a step that a process has, and how many records of which source were replaced, why."""

    rows: Any
    skipped: Mapping[str, int]


def rows_per_task(mixture: dict[str, int], batch_size: int) -> dict[str, int]:
    """Splits `batch_size` global rows by the mixture's weights, exactly (largest remainders)."""
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
    """Opens the sources of `tasks`; raises ValueError or OSError, naming the one under config.`key`, where
    that isn't possible, and for a task without one."""
    opened: dict[str, dict[str, sources.Source]] = {}
    for task in tasks:
        configs = {name: config for name, config in data.get(task, {}).items() if config.weight}
        if not configs:
            raise ValueError(
                f"the mixture has rows of {task!r} and config.{key}.{task} no source with a weight; "
                f"name one there, or set mixture.{task} to 0"
            )
        for name, config in configs.items():
            try:
                source = sources.open_source(config, root, with_images=layout.image_start(task, 1) > 0)
            except (ValueError, OSError) as error:
                # Its own type is kept if a message is all that it takes; others become one of these three.
                plain = next(
                    kind for kind in (FileNotFoundError, OSError, ValueError) if isinstance(error, kind)
                )
                raise plain(f"config.{key}.{task}.{name}: {error}") from error
            opened.setdefault(task, {})[name] = source
    return opened


def left_out(opened: Mapping[str, Mapping[str, sources.Source]], key: str = "data") -> list[str]:
    """A line for each source under config.`key` that leaves samples out: how many, for what reasons."""
    lines = []
    for task, of_task in opened.items():
        for name, source in of_task.items():
            if ignored := getattr(source, "ignored", {}):
                reasons = ", ".join(f"{reason} {n:,}" for reason, n in ignored.items())
                lines.append(f"config.{key}.{task}.{name}: {len(source):,} records; left out: {reasons}")
    return lines


class Skipped:
    """Counts the records that a process had to replace, and gives up where `limit` of them, as a share,
    couldn't be read."""

    def __init__(self, limit: float):
        self._limit, self._rows = limit, 0
        self._counts: collections.Counter[str] = collections.Counter()

    def count(self, skipped: Mapping[str, int], rows: int) -> None:
        """Adds the records that were replaced in a step of `rows` rows. Raises ValueError beyond the
        limit."""
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
    """The shape of the rows of a run, and the rows, columns and channels of an image in pixels."""

    pixels: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Rows by step, from the sources of each task. `rows` counts the rows of each task in a global batch.

    `cond_dropout` is the share of t2i rows without their text, `cut_long` whether a text that doesn't
    fit is cut (as in the first two phases of the reference) or its record replaced by another.
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

    @functools.cached_property
    def places(self) -> list[tuple[str, int]]:
        """(task, number among the rows of the task) of each row of a batch. Tasks alternate, so that
        every process and device has its share of each."""
        order = [((k + 0.5) / count, task, k) for task, count in self.rows.items() for k in range(count)]
        return [(task, k) for _, task, k in sorted(order)]

    @functools.cached_property
    def _orders(self) -> dict[str, grain.MapDataset]:
        """Task -> position among all rows of the task, over all steps -> (name of the source, index)."""
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
        """What decides which record is where in which step; a run keeps it, to compare on resume.

        Where the files lie isn't part of it, what is in them is.
        """
        of_sources: dict[str, dict[str, Any]] = {}
        for task, of_task in self.opened.items():
            for name, source in of_task.items():
                values = dataclasses.asdict(self.data[task][name])
                for where in ("path", "image_root", "captions", "labels"):
                    del values[where]
                if not values["rendered"]:  # runs from before this field have a description without it
                    del values["rendered"]
                values |= {"records": len(source), "fingerprint": source.fingerprint}
                of_sources.setdefault(task, {})[name] = values
        return {"seed": self.seed, "rows": dict(self.rows), "sources": of_sources}

    def __getstate__(self):
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state):
        self.__dict__.update(state)

    def record_at(self, task: str, position: int) -> tuple[str, int]:
        """(name of the source, index) of the record at a position among all rows of a task."""
        return self._orders[task][position]

    def load(self, step: int, which: Sequence[int] | None = None) -> Loaded:
        """The rows `which` of the batch of `step` (all by default), in that order."""
        skipped: collections.Counter[str] = collections.Counter()
        places = [self.places[row] for row in (range(len(self.places)) if which is None else which)]
        rows, pixels = [], []
        for task, k in places:
            row, image = self._row(task, step * self.rows[task] + k, skipped)
            rows.append(row)
            pixels.append(image)
        batch = layout.stack(rows)
        if not self.encodes:
            return Loaded(RawRows(batch, None, None), skipped)
        blank = np.zeros(self.shape.pixels, self._pixel_dtype)
        encode_B = np.array([image is not None for image in pixels])
        pixels_BIJC = np.stack([blank if image is None else image for image in pixels])
        return Loaded(RawRows(batch, pixels_BIJC, encode_B), skipped)

    @functools.cached_property
    def encodes(self) -> bool:
        """Whether any source has images without codes: then every batch has pixels."""
        return any(
            layout.image_start(task, self.shape.max_text) and not sources.codes_of(source)
            for task, of_task in self.opened.items()
            for source in of_task.values()
        )

    @functools.cached_property
    def _pixel_dtype(self) -> type:
        formats = {config.format for of_task in self.data.values() for config in of_task.values()}
        return np.float32 if "digits" in formats else np.uint8  # scans have 17 shades, in floats

    def _row(self, task: str, position: int, skipped) -> tuple[layout.Batch, np.ndarray | None]:
        name, index = self.record_at(task, position)
        source = self.opened[task][name]
        rng = np.random.default_rng([self.seed, layout.TASKS.index(task), position])
        for _ in range(TRIES):
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
            skipped[f"{task}.{name}: {why}"] += 1
            index = int(rng.integers(len(source)))
        raise ValueError(
            f"config.data.{task}.{name}: {TRIES} records, one after the other, can't be used: "
            f"{str(last) if isinstance(last, ValueError) else repr(last)}"
        ) from last

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
        """The ids of the image's tokens; or placeholders for them, and the pixels that are yet to be
        encoded."""
        if record.codes is not None:
            if len(record.codes) != self.shape.n_image:
                raise ValueError(
                    f"record {record.key!r} has {len(record.codes)} image codes, rows have "
                    f"{self.shape.n_image}"
                )
            return self.vocab.image_ids(record.codes), None
        if record.image is None or not self.encodes:
            raise ValueError(f"record {record.key!r} has no image{'' if self.encodes else ' codes'}")
        pixels = record.image
        if isinstance(pixels, bytes):
            I, J, _ = self.shape.pixels
            pixels = images.resize(images.open_image(pixels), (I, J), config.resize)
        if pixels.shape != self.shape.pixels:
            raise ValueError(f"record {record.key!r} has pixels {pixels.shape}, not {self.shape.pixels}")
        return np.full(self.shape.n_image, self.vocab.image_offset, np.int32), pixels


@dataclasses.dataclass(frozen=True)
class Canvases:
    """Batches of canvases [rows, 8, 16, 1] of digits, for training the image tokenizer."""

    rows: int
    seed: int

    def load(self, step: int, which: Sequence[int] | None = None) -> Loaded:
        """The canvases `which` of `step`, all by default."""
        of_digits = digits.open_records("reading", "train")
        which = range(self.rows) if which is None else which
        first = zlib.crc32(f"{self.seed}".encode()) + step * self.rows
        picked = [of_digits[(first + row) % len(of_digits)].image for row in which]
        return Loaded(np.stack(picked), {})


# ---- Batches -------------------------------------------------------------------------------------


def iterate(
    load: Callable[[int], T], first: int, steps: int, threads: int = 2, workers: int = 0
) -> Iterator[T]:
    """load(first), load(first + 1), ... up to `steps`. Threads load ahead, or `workers` processes with
    that many threads each. What comes out doesn't depend on how many there are."""
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    loaded = grain.MapDataset.range(first, steps).map(load).to_iter_dataset(ahead)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads its own; a program without absl has none
            flags.FLAGS.mark_as_parsed()
        # Batches come through a pipe, since grain leaves shared memory behind at the end, with a warning.
        copied = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        loaded = grain.experimental.WithOptionsIterDataset(loaded, copied)
        loaded = loaded.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _begin_worker)
    return iter(loaded)


def _begin_worker(_number: int, _count: int) -> None:
    # A signal to all processes of a run is for the parent alone, which stops when a step is saved. A
    # worker ends when its parent has ended, however that was.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
