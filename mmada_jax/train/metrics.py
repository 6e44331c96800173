"""Metrics of a run: JSON lines (always), TensorBoard, and one progress line with speed and ETA."""

import contextlib
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax
import numpy as np
from PIL import Image

from mmada_jax import storage
from mmada_jax.data.images import png_of
from mmada_jax.devices import chips
from mmada_jax.storage import Growing, write_whole
from mmada_jax.train.board import Board

_COUNTS = ("skipped", "failed_saves", "failed_writes")  # the progress line shows them unless they are 0
_UNSHOWN = (*_COUNTS, "lr", "scored")


class Metrics:
    """Writes WORKDIR/metrics.jsonl and WORKDIR/tensorboard. Only the first process writes and prints.

    Rows beyond `resume_step` are dropped, since the run will write them again. A write that the disk
    refuses doesn't end the run. The first refusal is reported. Refused rows are kept and written again
    with every new row, which counts the refusals (`failed_writes`).

    `flops_per_step` is the number of operations of a step on all devices, or a function of a row's values
    that gives this number; 0 means that it is unknown. `began` is time.perf_counter() at the moment when
    this process began the run.
    """

    def __init__(
        self,
        workdir: storage.Name,
        steps: int,
        resume_step: int = 0,
        flops_per_step: int | Callable[[Mapping[str, float]], float] = 0,
        began: float | None = None,
    ):
        self._silent = jax.process_index() > 0
        self._steps, self._last, self._last_time = steps, resume_step, time.perf_counter()
        self._waited = self._paused = 0.0  # seconds, summed since the last row
        self._failed = 0
        self._flops = flops_per_step
        self._peak = (chips.peak_tflops(jax.devices()[0].device_kind) or 0) * 1e12 * jax.device_count()
        if self._silent:
            return
        self._workdir = storage.path(workdir)
        path = self._workdir / "metrics.jsonl"
        try:
            rows = read(path)
        except OSError as error:
            if storage.in_bucket(path):
                raise  # the rows are there, and the file would be written without them
            rows = []
            warn(f"{path} can't be read ({error}); {_set_aside(path)}")
        kept = [row for row in rows if row["step"] <= resume_step]
        # The steps that will be repeated took time, which counts as spent but not as productive.
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
        if self._silent:
            return
        self.flush()
        if self._file.waiting:
            rows = self._file.waiting.count(b"\n")
            warn(f"the last {rows} rows of {self._file.path} were never written")

    def flush(self) -> None:
        """Writes what waits. Call it before a step is saved: a run that goes on from that step doesn't
        write the rows before it again."""
        for flush in () if self._silent else (self._file.flush, self._board.flush):
            with self.surviving():
                flush()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for data. It is part of a step, but isn't productive."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Leaves the time of the block (a checkpoint, an evaluation) out of the speed and of goodput."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def restart_clock(self, step: int) -> None:
        """Leaves the time since the last row (a compilation, steps up to `step`) out of the speed."""
        self._last, self._last_time = step, time.perf_counter()
        self._waited = self._paused = 0.0

    def write(
        self,
        step: int,
        values: dict[str, float],
        tokens_per_step: int,
        shown: Collection[str] | None = None,
    ) -> None:
        """Records one row and prints the progress line. The line has the values named in `shown`. If
        `shown` is None, the line has all values except the values of evaluations.

        tokens_per_second  speed in the steps since the last row
        data_wait          share of the time of these steps in which the process waited for batches
        mfu                operations of the model over the peak of the devices, if the peak is known
        hbm_gib            memory in use on the fullest device of this process, in GiB, if it can be read
        goodput            productive_seconds / wall_seconds. Productive is the time of steps that count.
                           Wall time begins with the first start of the run, and leaves out the time
                           between starts
        failed_writes      number of refused writes of metrics and samples in this start, unless it is 0

        A value that isn't finite is null in metrics.jsonl, and TensorBoard doesn't get it.
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
        if step > self._last:  # otherwise the speed isn't known yet
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
        """Saves Markdown and a PNG, unless the PNG is empty. The files are WORKDIR/samples/STEP.md and
        STEP.png, or STEP-TASK.md and STEP-TASK.png if `task` is given. TensorBoard gets both too."""
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
        """Counts errors of the operating system in the block instead of raising them. The first one is
        printed. An OSError without an error number is a library's error about the data, and is raised."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            if not self._failed:
                warn(f"metrics or samples couldn't be written ({error}); training goes on")
            self._failed += 1

    def _seconds(self) -> float:
        """The time in seconds since the first start of the run, without the time between starts."""
        return time.perf_counter() - self._began


def read(path: storage.Name) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, with nan for null. There are no rows if there is no such file.

    Damaged lines are left out, and a warning counts them. The warning doesn't count a last line that a
    crash has cut off. Raises OSError if the file can't be read.
    """
    path = storage.path(path)
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
    """The row in a line of metrics.jsonl, or None if the line holds no row."""
    try:
        row = json.loads(line)
        row = {name: math.nan if value is None else value for name, value in row.items()}
        for value in row.values():
            math.isfinite(value)  # raises TypeError unless the value is a number
        step = row["step"]
        return row if type(step) is int and 0 <= step < 2**63 else None
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return None


def _set_aside(path: storage.Path) -> str:
    """Renames an unreadable file to a free name. Returns a clause that says what happened to the file."""
    aside, again = path.with_name("metrics.unreadable.jsonl"), 1
    while aside.exists():
        aside, again = path.with_name(f"metrics.unreadable.{again}.jsonl"), again + 1
    try:
        path.rename(aside)
    except OSError as error:
        return f"it can't be renamed ({error})"
    return f"it is now called {aside.name}"


def _line(row: Mapping[str, float]) -> bytes:
    """A row as a line of metrics.jsonl, with null for values that aren't finite, which JSON lacks."""
    values = {name: float(value) if isinstance(value, np.generic) else value for name, value in row.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def _last(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """The last finite value of the field `name`, or 0 if there is none."""
    return next((row[name] for row in reversed(rows) if math.isfinite(row.get(name, math.nan))), 0.0)


def tell(line: str) -> None:
    """Prints a line. Nothing is raised if the log's disk is full, or if the log's reader has ended."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def warn(line: str) -> None:
    """Prints a warning on stderr, under the same conditions as `tell`."""
    with contextlib.suppress(OSError):
        print(f"warning: {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time in seconds as text: 75 becomes 1m15s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
