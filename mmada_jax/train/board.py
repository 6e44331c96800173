"""TensorBoard's file of a run, written by the thread that calls.

tensorboardX makes the summaries. Its writer isn't used: a thread of its own writes, dies of the first
error, and blocks the program once its queue of ten is full.
"""

import math
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmada_jax import nearby, storage
from mmada_jax.storage import Growing

# The names of files with samples: the step and, of a run with several tasks, the task.
_SAMPLES = re.compile(r"([0-9]{8,})(?:-(.+))?\.md")


class Board:
    """One file in WORKDIR/tensorboard, begun anew at each start of a run: with the `rows` and the samples
    that the workdir holds up to the step `last`. The files of earlier starts are removed once it is whole:
    whatever these lack after a kill, or have beyond that step, the board is the same as the rows.

    `began` is when the run would have begun if it had never been down, in seconds since 1970.
    """

    def __init__(self, workdir: storage.Path, began: float, rows: Sequence[Mapping[str, float]], last: int):
        self._began = began
        folder, name = (
            workdir / "tensorboard",
            f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}",
        )
        self._old = [
            path for path in folder.glob("events.out.tfevents.*") if path.name != name and path.is_file()
        ]

        def begin() -> Iterator[bytes]:
            yield _record(wall_time=began, file_version="brain.Event:2")
            yield from map(self._row, rows)
            seconds = {row["step"]: row.get("wall_seconds", 0.0) for row in rows}
            there = storage.files_below(workdir / "samples")
            texts = {name: found for name in there if (found := _SAMPLES.fullmatch(name))}
            texts = {name: found for name, found in texts.items() if int(found[1]) <= last}
            pictures = [name for text in texts if (name := f"{text.removesuffix('.md')}.png") in there]
            read = nearby.each(lambda path: storage.path(path).read_bytes(),
                               [str(there[name].path) for name in (*texts, *pictures)])  # fmt: skip
            data = dict(zip((*texts, *pictures), read, strict=True))
            for name, found in texts.items():
                step, png = int(found[1]), data.get(f"{name.removesuffix('.md')}.png", b"")
                yield self._samples(step, seconds.get(step, 0.0), data[name], png, found[2] or "")

        self._file = Growing(folder / name, begin, pause=30)

    def begin(self) -> None:
        """Writes the file as it begins, and what has waited. This and all others raise OSError where the
        disk refuses, and what they were to write waits."""
        self._write(b"")

    def flush(self) -> None:
        """Writes what waits."""
        if self._old or self._file.waiting:
            self._file.flush()
            self._remove_old()

    def add(self, row: Mapping[str, float]) -> None:
        """Writes the finite values of a row."""
        self._write(self._row(row))

    def show(self, step: int, seconds: float, text: bytes, png: bytes, task: str = "") -> None:
        """Writes samples, `seconds` after the run began: Markdown and, unless it is empty, a picture. Their
        tag is `samples`, or of a task TASK/samples."""
        self._write(self._samples(step, seconds, text, png, task))

    def _write(self, entry: bytes) -> None:
        self._file.add(entry)
        if not storage.in_bucket(self._file.path):  # there it is written later
            self._remove_old()

    def _remove_old(self) -> None:
        for path in self._old:
            path.unlink(missing_ok=True)
        self._old = []

    def _row(self, row: Mapping[str, float]) -> bytes:
        from tensorboardX import summary

        values = [
            value
            for name, x in row.items()
            if name != "step" and math.isfinite(x)
            for value in summary.scalar(name, float(x)).value
        ]
        return self._event(row["step"], row.get("wall_seconds", 0.0), values)

    def _samples(self, step: int, seconds: float, text: bytes, png: bytes, task: str) -> bytes:
        from tensorboardX import summary

        tag = f"{task}/samples" if task else "samples"
        values = list(summary.text(tag, text.decode(errors="replace")).value)
        width, height = struct.unpack(">ii", png[16:24]) if len(png) >= 24 else (0, 0)
        if width > 0 and height > 0:  # else the file has lost what it held
            image = summary.Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=png
            )
            values.append(summary.Summary.Value(tag=tag, image=image))
        return self._event(step, seconds, values)

    def _event(self, step: int, seconds: float, values: list[Any]) -> bytes:
        from tensorboardX.proto.summary_pb2 import Summary

        seconds = seconds if math.isfinite(seconds) else 0.0
        return _record(step=step, wall_time=self._began + seconds, summary=Summary(value=values))


def _record(**event: Any) -> bytes:
    """An Event as a TFRecord: its length and its bytes, each with a checksum."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = Event(**event).SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join(
        (length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data)))
    )
