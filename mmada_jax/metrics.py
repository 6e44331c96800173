"""Metrics of a run: JSON lines (always), TensorBoard, and one progress line with speed and ETA."""

import json
import math
import pathlib
import sys
import threading
import time

import jax


class Metrics:
    """Writes WORKDIR/metrics.jsonl and WORKDIR/tensorboard; rows beyond `resume_step` are dropped,
    since the run is about to write them again. Only the first process writes and prints."""

    def __init__(self, workdir: str | pathlib.Path, steps: int, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        self._silent = jax.process_index() > 0
        if self._silent:
            return
        workdir = pathlib.Path(workdir)
        self._steps, self._last, self._last_time = steps, resume_step, time.perf_counter()
        path = workdir / "metrics.jsonl"
        kept = [row for row in read(path) if row["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._silent:
            return
        self._file.close()
        self._board.close()

    def write(self, step: int, values: dict[str, float], tokens_per_step: int) -> None:
        """Records one row and prints the progress line."""
        if self._silent:
            return
        now = time.perf_counter()
        seconds = (now - self._last_time) / max(1, step - self._last)
        self._last, self._last_time = step, now
        row = {"step": step, **values, "tokens_per_second": tokens_per_step / seconds}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._board.add_scalar(name, value, step)
        shown = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        eta = seconds * (self._steps - step)
        print(
            f"step {step}/{self._steps}  {shown}  {seconds * 1e3:.0f} ms/step  "
            f"{row['tokens_per_second']:,.0f} tokens/s  ETA {duration(eta)}",
            flush=True,
        )

    def resume_clock(self) -> None:
        """Leaves the time since the last row (compilation, an evaluation) out of the speed."""
        self._last_time = time.perf_counter()


class Progress:
    """Progress of a copy on stderr: bytes, speed and ETA. Call it with the bytes that are done more;
    threads may. A terminal shows one line that changes, a log a line every ten seconds."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._terminal = sys.stderr.isatty()
        self._lock, self._start, self._shown = threading.Lock(), time.perf_counter(), 0.0

    def __enter__(self):
        self._shown = self._start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self._show(time.perf_counter(), "\n")  # where it ended, if it failed

    def __call__(self, n: int) -> None:
        """Counts `n` bytes."""
        with self._lock:
            self._done += n
            now = time.perf_counter()
            if now - self._shown > (0.2 if self._terminal else 10):
                self._shown = now
                self._show(now, "" if self._terminal else "\n")

    def _show(self, now: float, end: str) -> None:
        seconds = max(now - self._start, 1e-9)
        speed = self._done / seconds
        share = self._done / max(self._total, 1)
        eta = duration((self._total - self._done) / speed) if speed else "unknown"
        bar = "#" * int(30 * share)
        unit, name = (1e9, "GB") if self._total >= 1e9 else (1e6, "MB")
        done, total = self._done / unit, self._total / unit
        line = (
            f"{self._what} [{bar:30}] {share:4.0%}  {done:.2f}/{total:.2f} {name}  "
            f"{speed / 1e6:,.0f} MB/s  " + (f"in {duration(seconds)}" if share >= 1 else f"ETA {eta}")
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
