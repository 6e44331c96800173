"""Metrics of a run: JSON lines (always), TensorBoard, and one progress line with speed and ETA."""

import contextlib
import datetime
import io
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax
import numpy as np
from PIL import Image

from mmada_jax.devices import chips
from mmada_jax.disk import Growing, write_whole
from mmada_jax.train.board import Board

_COUNTS = ("skipped", "failed_saves", "failed_writes")  # in the progress line where there are any
_UNSHOWN = (*_COUNTS, "lr", "scored")


class Metrics:
    """Writes WORKDIR/metrics.jsonl and WORKDIR/tensorboard; rows beyond `resume_step` are dropped,
    since the run is about to write them again. Only the first process writes and prints.

    What the disk refuses ends no run: it is reported once, kept, and tried again with every row, which
    counts these failures (`failed_writes`).

    `flops_per_step` is what the model asks for on all devices, or gives it by a row's values; 0 if it
    isn't known. `began` is the time.perf_counter() when this start of the run did.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        steps: int,
        resume_step: int = 0,
        flops_per_step: int | Callable[[Mapping[str, float]], float] = 0,
        began: float | None = None,
    ):
        self._silent = jax.process_index() > 0
        self._steps, self._last, self._last_time = steps, resume_step, time.perf_counter()
        self._waited = self._paused = 0.0  # seconds since the last row
        self._failed = 0
        self._flops = flops_per_step
        self._peak = (chips.peak_tflops(jax.devices()[0].device_kind) or 0) * 1e12 * jax.device_count()
        if self._silent:
            return
        self._workdir = pathlib.Path(workdir)
        path = self._workdir / "metrics.jsonl"
        try:
            rows = read(path)
        except OSError as error:
            rows = []
            warn(f"{path} can't be read ({error}); {_set_aside(path)}")
        kept = [row for row in rows if row["step"] <= resume_step]
        # The time of steps that are to be repeated was spent, and for nothing.
        spent = _last(rows, "wall_seconds")
        self._began = (self._last_time if began is None else began) - spent
        self._productive = _last(kept, "productive_seconds")
        self._file = Growing(path, lambda: map(_line, kept))
        now = datetime.datetime.now().timestamp()
        self._board = Board(self._workdir, now - self._seconds(), kept, resume_step)
        for begin in (self._file.add, self._board.begin):
            with self.surviving():
                begin()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._silent or not self._file.waiting:
            return
        with self.surviving():
            self._file.add()
        with self.surviving():
            self._board.begin()
        if self._file.waiting:
            rows = self._file.waiting.count(b"\n")
            warn(f"the last {rows} rows of {self._file.path} were never written")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for data: part of a step, but not productive."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Leaves the time within (a checkpoint, an evaluation) out of the speed, and not productive."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def restart_clock(self, step: int) -> None:
        """Leaves all since the last row (a compilation, and the steps up to `step`) out of the speed."""
        self._last, self._last_time = step, time.perf_counter()
        self._waited = self._paused = 0.0

    def write(
        self,
        step: int,
        values: dict[str, float],
        tokens_per_step: int,
        shown: Collection[str] | None = None,
    ) -> None:
        """Records one row and prints the progress line, with the values named in `shown` or, if that is
        None, with all but those of evaluations.

        tokens_per_second  over the steps since the last row
        data_wait          share of their time that was spent waiting for batches
        mfu                model's operations over those of the devices, where their peak is known
        hbm_gib            of the fullest device of this process, where it can be asked
        goodput            productive_seconds / wall_seconds: time of steps that count, over all since
                           the run was first started; the time that it was down isn't known
        failed_writes      of metrics and samples in this start of the run, if there are any

        A value that isn't finite is null in metrics.jsonl, and left out of TensorBoard.
        """
        if self._silent:
            return
        now = time.perf_counter()
        busy = now - self._last_time - self._paused
        wall = self._seconds()
        self._productive += busy - self._waited
        row = {"step": step, **values}
        if shown is None:
            shown = [n for n in values if n not in _UNSHOWN and not n.startswith("held_out")]
        if self._failed:
            row["failed_writes"] = self._failed
        line = [f"step {step}/{self._steps}", *(f"{name} {values[name]:.3g}" for name in shown)]
        line += [f"{name} {row[name]:.0f}" for name in _COUNTS if row.get(name)]
        if step > self._last:  # else nothing is known of the speed yet
            seconds, wait = busy / (step - self._last), self._waited / busy
            row |= {"tokens_per_second": tokens_per_step / seconds, "data_wait": wait}
            line.append(f"{tokens_per_step / seconds:,.0f} tokens/s")
            flops = self._flops(values) if callable(self._flops) else self._flops
            if flops and self._peak:
                row["mfu"] = flops / self._peak / seconds
                line.append(f"MFU {row['mfu']:.1%}")
            line += [f"waiting for data {wait:.0%}"] if wait > 0.02 else []
            line.append(f"ETA {duration(seconds * (self._steps - step))}")
        stats = [device.memory_stats() for device in jax.local_devices()]
        if all(stats):
            row["hbm_gib"] = max(s["bytes_in_use"] for s in stats) / 2**30
        row |= {
            "goodput": self._productive / wall,
            "productive_seconds": self._productive,
            "wall_seconds": wall,
        }
        for write, entry in ((self._file.add, _line(row)), (self._board.add, row)):
            with self.surviving():
                write(entry)
        tell("  ".join(line))
        self.restart_clock(step)

    def show(self, step: int, picture: Image.Image | None, lines: Sequence[str]) -> None:
        """Saves samples: a list of lines, and a picture."""
        if self._silent:
            return
        text = "".join(f"- {line}\n" for line in lines).encode()
        self.save_samples(step, text, b"" if picture is None else png_of(picture))

    def save_samples(self, step: int, text: bytes, png: bytes = b"", task: str = "") -> None:
        """Saves Markdown and, unless it is empty, a PNG: WORKDIR/samples/STEP.md and STEP.png, or of a task
        STEP-TASK.md and STEP-TASK.png, and both for TensorBoard."""
        if self._silent:
            return
        with self.surviving():
            self._board.show(step, self._seconds(), text, png, task)
        for suffix, data in ((".md", text), (".png", png)):
            if data:
                name = f"{step:08}{'-' * bool(task)}{task}{suffix}"
                with self.surviving():
                    write_whole(self._workdir / "samples" / name, data)

    @contextlib.contextmanager
    def surviving(self) -> Iterator[None]:
        """What the operating system refuses within doesn't end the run; it is counted, and said once.
        Libraries' errors about the data, which have no number, are raised."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            if not self._failed:
                warn(f"metrics or samples couldn't be written ({error}); training goes on")
            self._failed += 1

    def _seconds(self) -> float:
        """Since the run was first started, without the time that it was down."""
        return time.perf_counter() - self._began


def read(path: str | pathlib.Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, null as nan; none if there is no such file.

    Lines that are damaged are left out, and a warning counts them; a last line cut off by a crash isn't
    worth one. Raises OSError where the file can't be read.
    """
    path = pathlib.Path(path)
    if not (path.is_file() or path.is_dir()):
        return []
    rows, damaged = [], []
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, last], 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number <= len(lines):
            damaged.append((number, line))
    if damaged:
        number, line = damaged[0]
        warn(
            f"{path}: {len(damaged)} of {len(lines)} lines are damaged and left out; the first is line "
            f"{number}: {line[:60]!r}"
        )
    return rows


def _row(line: bytes) -> dict[str, float] | None:
    """What a line of metrics.jsonl says, None if that is no row."""
    try:
        row = json.loads(line)
        row = {name: math.nan if value is None else value for name, value in row.items()}
        for value in row.values():
            math.isfinite(value)  # raises for what is no number
        step = row["step"]
        return row if type(step) is int and 0 <= step < 2**63 else None
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return None


def _set_aside(path: pathlib.Path) -> str:
    """Renames what can't be read to a name that is free; what has become of it."""
    aside, again = path.with_name("metrics.unreadable.jsonl"), 1
    while aside.exists():
        aside, again = path.with_name(f"metrics.unreadable.{again}.jsonl"), again + 1
    try:
        path.rename(aside)
    except OSError as error:
        return f"it can't be renamed ({error})"
    return f"it is now called {aside.name}"


def _line(row: Mapping[str, float]) -> bytes:
    """A row as a line of metrics.jsonl; JSON has no NaN and no infinity."""
    values = {name: float(value) if isinstance(value, np.generic) else value for name, value in row.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def _last(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """The last finite value of that name, 0 if there is none."""
    return next((row[name] for row in reversed(rows) if math.isfinite(row.get(name, math.nan))), 0.0)


def png_of(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def tell(line: str) -> None:
    """Prints a line; a log that lies on a full disk, or whose reader has gone, ends no run."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def warn(line: str) -> None:
    """Prints a warning on stderr, likewise."""
    with contextlib.suppress(OSError):
        print(f"warning: {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """75 -> 1m15s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
