"""Metrics of a run: JSON lines (always), TensorBoard, and one progress line with speed and ETA."""

import contextlib
import json
import math
import pathlib
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np
from PIL import Image

from mmada_jax import chips

_COUNTS = ("skipped", "failed_saves")  # in the progress line where there are any
_UNSHOWN = (*_COUNTS, "lr")


class Metrics:
    """Writes WORKDIR/metrics.jsonl and WORKDIR/tensorboard; rows beyond `resume_step` are dropped,
    since the run is about to write them again. Only the first process writes and prints.

    `flops_per_step` is what the model asks for on all devices, 0 if it isn't known; `began` the
    time.perf_counter() when this start of the run did.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        steps: int,
        resume_step: int = 0,
        flops_per_step: int = 0,
        began: float | None = None,
    ):
        from tensorboardX import SummaryWriter

        self._silent = jax.process_index() > 0
        self._steps, self._last, self._last_time = steps, resume_step, time.perf_counter()
        self._waited = self._paused = 0.0  # seconds since the last row
        self._failed = False
        peak = chips.peak_tflops(jax.devices()[0].device_kind)
        self._ideal_seconds = flops_per_step / (peak * 1e12 * jax.device_count()) if peak else 0.0
        if self._silent:
            return
        workdir = pathlib.Path(workdir)
        path = workdir / "metrics.jsonl"
        rows = read(path)
        kept = [row for row in rows if row["step"] <= resume_step]
        # The time of steps that are to be repeated was spent, and for nothing.
        spent = rows[-1].get("wall_seconds", 0.0) if rows else 0.0
        self._began = (self._last_time if began is None else began) - spent
        self._productive = kept[-1].get("productive_seconds", 0.0) if kept else 0.0
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self._samples = workdir / "samples"
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._silent:
            return
        with self._surviving():
            self._file.close()
            self._board.close()

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
        """
        if self._silent:
            return
        now = time.perf_counter()
        busy = now - self._last_time - self._paused
        wall = now - self._began
        self._productive += busy - self._waited
        row = {"step": step, **values}
        if shown is None:
            shown = [n for n in values if n not in _UNSHOWN and not n.startswith("held_out")]
        line = [f"step {step}/{self._steps}", *(f"{name} {values[name]:.3g}" for name in shown)]
        line += [f"{name} {values[name]:.0f}" for name in _COUNTS if values.get(name)]
        if step > self._last:  # else nothing is known of the speed yet
            seconds, wait = busy / (step - self._last), self._waited / busy
            row |= {"tokens_per_second": tokens_per_step / seconds, "data_wait": wait}
            line.append(f"{tokens_per_step / seconds:,.0f} tokens/s")
            if self._ideal_seconds:
                row["mfu"] = self._ideal_seconds / seconds
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
        with self._surviving():
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()  # what can't be written stays in the buffer, and is tried again
            for name, value in row.items():
                if name != "step" and math.isfinite(value):
                    self._board.add_scalar(name, value, step)
        print("  ".join(line), flush=True)
        self.restart_clock(step)

    def show(self, step: int, picture: Image.Image | None, lines: Sequence[str]) -> None:
        """Saves samples: WORKDIR/samples/STEP.png and STEP.md, and both for TensorBoard."""
        if self._silent:
            return
        path, text = self._samples / f"{step:08}", "".join(f"- {line}\n" for line in lines)
        with self._surviving():
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".md").write_text(text)
            self._board.add_text("samples", text, step)
            if picture is not None:
                picture.save(path.with_suffix(".png"))
                pixels = np.asarray(picture.convert("RGB"))
                self._board.add_image("samples", pixels, step, dataformats="HWC")

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """A disk that is full doesn't end the run; it is said once."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                print(
                    f"warning: metrics or samples couldn't be written ({error}); training goes on",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            self._failed = True


class Progress:
    """Progress on stderr, in bytes or whatever `unit` names: what is done, speed and ETA. Call it with
    what is done more; threads may. A terminal shows one line that changes, a log a line every ten
    seconds."""

    def __init__(self, what: str, total: int, unit: str = "bytes"):
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._terminal = sys.stderr.isatty()
        self._lock, self._start, self._shown = threading.Lock(), time.perf_counter(), 0.0

    def __enter__(self):
        self._shown = self._start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self._show(time.perf_counter(), "\n")  # where it ended, if it failed

    def __call__(self, n: int) -> None:
        """Counts `n` more."""
        with self._lock:
            self._done += n
            now = time.perf_counter()
            if now - self._shown > (0.2 if self._terminal else 10):
                self._shown = now
                self._show(now, "" if self._terminal else "\n")

    def _show(self, now: float, end: str) -> None:
        seconds = max(now - self._start, 1e-9)
        speed = self._done / seconds
        share = self._done / self._total if self._total else 1
        eta = duration((self._total - self._done) / speed) if speed else "unknown"
        bar = "#" * int(30 * share)
        if self._unit == "bytes":
            size, name = (1e9, "GB") if self._total >= 1e9 else (1e6, "MB")
            done = f"{self._done / size:.2f}/{self._total / size:.2f} {name}  {speed / 1e6:,.0f} MB/s"
        else:
            done = f"{self._done:,}/{self._total:,} {self._unit}  {speed:,.0f} {self._unit}/s"
        line = f"{self._what} [{bar:30}] {share:4.0%}  {done}  " + (
            f"in {duration(seconds)}" if share >= 1 else f"ETA {eta}"
        )
        print(("\r" if self._terminal else "") + line, end=end, file=sys.stderr, flush=True)


def read(path: str | pathlib.Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line cut off by a crash is left out."""
    path = pathlib.Path(path)
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def duration(seconds: float) -> str:
    """75 -> 1m15s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
