"""Metrics of a run: what a row says, and that no disk and no damaged file stops a run."""

import contextlib
import json
import math
import os
import pathlib
import resource
import struct
import subprocess
import sys
import time
import types

import jax
import pytest
from conftest import xla_flags
from PIL import Image
from programs import Program

from mmada_jax.data.images import png_of
from mmada_jax.storage import Growing, write_whole
from mmada_jax.train import metrics

ROOT = pathlib.Path(__file__).parent.parent


def rows(workdir):
    return metrics.read(workdir / "metrics.jsonl")


def losses(workdir):
    return {row["step"]: row["loss"] for row in rows(workdir) if "loss" in row}


def events(workdir):
    """What TensorBoard finds in a workdir: every Event of every file."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (n,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
            record, data = data[12 : 12 + n], data[16 + n :]
            found.append(Event.FromString(record))
    return found


def on_board(workdir):
    """{step: {tag: value}} of TensorBoard's scalars, which must be there once; and its other tags."""
    scalars, others = {}, []
    for event in events(workdir):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                assert value.tag not in scalars.setdefault(event.step, {})
                scalars[event.step][value.tag] = value.simple_value
            else:
                others.append((event.step, value.tag))
    return scalars, sorted(others)


def in_rows(workdir):
    """The same of metrics.jsonl."""
    return {
        row["step"]: {name: x for name, x in row.items() if name != "step" and math.isfinite(x)}
        for row in rows(workdir)
    }


def assert_same(workdir):
    board, _ = on_board(workdir)
    wanted = in_rows(workdir)
    assert board.keys() == wanted.keys()
    for step, values in wanted.items():
        assert board[step] == pytest.approx(values, rel=1e-6), step


def test_metrics_drop_what_will_be_written_again_and_a_torn_line(tmp_path):
    with metrics.Metrics(tmp_path, 10) as m:
        for step in (1, 2, 3):
            m.write(step, {"loss": float(step)}, 100)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "lo')
    with metrics.Metrics(tmp_path, 10, resume_step=2) as m:
        m.write(3, {"loss": 30.0}, 100)
    assert losses(tmp_path) == {1: 1.0, 2: 2.0, 3: 30.0}


@pytest.fixture
def clock(monkeypatch):
    """What metrics take for the time; tests turn it on."""
    clock = types.SimpleNamespace(now=1000.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_a_row_tells_speed_waits_and_utilisation(tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setattr("mmada_jax.devices.chips.peak_tflops", lambda kind: 5)
    flops = 10**12 * jax.device_count()
    with metrics.Metrics(tmp_path, 100, flops_per_step=flops, began=990.0) as m:
        clock.now += 20  # compilation, and the first step
        m.restart_clock(1)
        m.write(1, {"loss": 3.0}, 100)
        clock.now += 6
        with m.waiting():
            clock.now += 2
        with m.pausing():
            clock.now += 100
        m.write(5, {"loss": 2.5, "lr": 1e-3, "skipped": 0.0, "failed_saves": 0}, 100)
        clock.now += 4
        m.write(9, {"loss": 2.25, "lr": 1e-3, "skipped": 2.0, "failed_saves": 1}, 100)
    first, second, third = rows(tmp_path)
    assert first == {"step": 1, "loss": 3.0, "goodput": 0, "productive_seconds": 0, "wall_seconds": 30}
    assert second == {
        "step": 5, "loss": 2.5, "lr": 1e-3, "skipped": 0, "failed_saves": 0, "tokens_per_second": 50,
        "data_wait": 0.25, "mfu": 0.1, "goodput": 6 / 138, "productive_seconds": 6, "wall_seconds": 138,
    }  # fmt: skip
    assert (third["tokens_per_second"], third["data_wait"], third["mfu"]) == (100, 0, 0.2)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/100  loss 3",
        "step 5/100  loss 2.5  50 tokens/s  MFU 10.0%  waiting for data 25%  ETA 3m10s",
        "step 9/100  loss 2.25  skipped 2  failed_saves 1  100 tokens/s  MFU 20.0%  ETA 1m31s",
    ]


def test_goodput_is_over_all_starts_of_a_run(tmp_path, clock):
    with metrics.Metrics(tmp_path, 9) as m:
        for step in (1, 2, 3, 4):
            clock.now += 5
            m.write(step, {}, 1)
    clock.now += 1000  # the run is down
    with metrics.Metrics(tmp_path, 9, resume_step=2, began=clock.now - 4) as m:
        clock.now += 6
        m.restart_clock(3)
        clock.now += 10
        m.write(4, {}, 1)
    assert [row["goodput"] for row in rows(tmp_path)] == [1, 1, (10 + 10) / (20 + 4 + 6 + 10)]


def test_what_is_not_known_is_left_out(tmp_path):
    with metrics.Metrics(tmp_path, 3, flops_per_step=10**9) as m:
        time.sleep(0.01)
        m.write(1, {"loss": 2.5}, 100)
    assert not {"mfu", "hbm_gib"} & rows(tmp_path)[0].keys()  # of a CPU


@pytest.fixture
def full(tmp_path):
    """Makes files of this process full: writes beyond so many bytes of any file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(nbytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_a_full_disk_refuses_are_written_once_there_is_room(tmp_path, full, capsys):
    picture = Image.new("RGB", (40, 30))
    with metrics.Metrics(tmp_path, 300) as m:
        for step in range(1, 301):
            if step == 20:
                full(4 << 10)
            if step == 250:
                full(1 << 30)
            if step % 100 == 0:
                m.show(step, picture, ["a line " * 1000])
            m.write(step, {f"loss_{i}": float(step) for i in range(12)}, 100)
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "couldn't be written" in shown.err
    assert "step 300/300" in shown.out
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 301))
    assert rows(tmp_path)[-1]["failed_writes"] > 100
    assert_same(tmp_path)
    # Samples of steps while the disk was full are in TensorBoard, not in files.
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "00000100.png",
        "00000200.png",
        "00000300.md",
        "00000300.png",
    ]
    assert on_board(tmp_path)[1] == [
        (step, tag) for step in (100, 200, 300) for tag in ("samples", "samples/text_summary")
    ]


def test_a_disk_that_stays_full_costs_rows_and_says_how_many(tmp_path, full, capsys):
    with metrics.Metrics(tmp_path, 50) as m:
        m.write(1, {"loss": 1.0}, 100)
        full((tmp_path / "metrics.jsonl").stat().st_size)
        for step in range(2, 51):
            m.write(step, {"loss": 1.0}, 100)
    full(1 << 30)
    assert "the last 49 rows of" in capsys.readouterr().err
    assert losses(tmp_path) == {1: 1.0}


def test_a_file_that_a_full_disk_refuses_is_named(tmp_path, full):
    full(10)
    with pytest.raises(OSError, match=r"config\.json"):
        write_whole(tmp_path / "config.json", "x" * 100)
    full(1 << 30)
    assert not list(tmp_path.iterdir())


def test_a_run_on_a_full_disk_starts_and_keeps_the_rows_that_are_there(tmp_path, full):
    with metrics.Metrics(tmp_path, 9) as m:
        m.write(1, {"loss": 1.0}, 100)
        m.write(2, {"loss": 2.0}, 100)
    full(0)
    with metrics.Metrics(tmp_path, 9, resume_step=1) as m:
        m.write(2, {"loss": 20.0}, 100)
        assert losses(tmp_path) == {1: 1.0, 2: 2.0}
        full(1 << 30)
        m.write(3, {"loss": 30.0}, 100)
    assert losses(tmp_path) == {1: 1.0, 2: 20.0, 3: 30.0}
    assert_same(tmp_path)


def test_what_is_no_fault_of_the_disk_is_raised(tmp_path):
    with metrics.Metrics(tmp_path, 9) as m:
        with pytest.raises(OSError, match="mode F"):  # Pillow's
            m.show(1, Image.new("F", (2, 2)), [])
        with pytest.raises(TypeError):
            m.show(1, None, 3)


def test_a_picture_of_any_size_and_mode_comes_back(tmp_path):
    with metrics.Metrics(tmp_path, 9) as m:
        m.show(1, Image.new("L", (7, 3)), ["a"])
        m.write(1, {}, 100)
    (image,) = [v.image for e in events(tmp_path) for v in e.summary.value if v.HasField("image")]
    assert (image.width, image.height) == (7, 3)
    assert image.encoded_image_string == (tmp_path / "samples/00000001.png").read_bytes()


def test_tensorboard_and_the_rows_are_the_same_after_a_kill(tmp_path):
    with metrics.Metrics(tmp_path, 9) as m:
        for step in (1, 2, 3, 4):
            m.show(step, Image.new("L", (2, 2)), ["a"])
            m.write(step, {"loss": float(step), "nothing": math.nan}, 100)
    # What was on its way when the run was killed: the end of its board is cut off, or not there at all.
    (board,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(board, board.stat().st_size * 2 // 3)
    with metrics.Metrics(tmp_path, 9, resume_step=3) as m:
        m.write(4, {"loss": 40.0}, 100)
        assert_same(tmp_path)  # row by row, not at the end
        times = [event.wall_time for event in events(tmp_path) if event.summary.value]
    scalars, others = on_board(tmp_path)
    assert scalars[4]["loss"] == 40
    assert [step for step, tag in others if tag == "samples"] == [1, 2, 3]
    assert times[-1] == pytest.approx(time.time(), abs=5)


def test_samples_of_tasks_have_names_of_their_own_on_the_board(tmp_path):
    png = png_of(Image.new("L", (2, 2)))
    with metrics.Metrics(tmp_path, 9) as m:
        m.save_samples(1, b"drawn", png, "draw")
        m.save_samples(2, b"said", b"", "text")
        m.write(2, {}, 100)
    tags = [(1, "draw/samples"), (1, "draw/samples/text_summary"), (2, "text/samples/text_summary")]
    assert on_board(tmp_path)[1] == tags
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "00000001-draw.md", "00000001-draw.png", "00000002-text.md",
    ]  # fmt: skip
    # A start after the first iteration makes the board anew, from the files.
    with metrics.Metrics(tmp_path, 9, resume_step=1) as m:
        m.write(2, {}, 100)
    assert on_board(tmp_path)[1] == tags[:2]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with metrics.Metrics(tmp_path, 9) as m:
        m.write(1, {"loss": math.nan, "a": math.inf, "b": -math.inf, "c": 2.0}, 100)

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=refuse)
    assert [row[name] for name in ("loss", "a", "b", "c")] == [None, None, None, 2.0]
    assert math.isnan(rows(tmp_path)[0]["loss"])


DAMAGE = {
    "a control byte": lambda line: b"\x01" + line,
    "no UTF-8": lambda line: b"\xff" + line,
    "no UTF-8 within": lambda line: line.replace(b"loss", b"lo\xc3s"),
    "a hole": lambda line: bytes(len(line)),
    "cut": lambda line: line[:7],
    "two in one": lambda line: line[:9] + line,
    "no row": lambda line: b"3",
    "a list": lambda line: b"[1]",
    "no step": lambda line: b'{"loss": 1.0}',
    "no number": lambda line: line.replace(b"1.0", b'"x"'),
    "a step of null": lambda line: b'{"step": null}',
    "a step of true": lambda line: b'{"step": true}',
    "a step before all": lambda line: line.replace(b"5", b"-5"),
    "a step of no time": lambda line: line.replace(b"5", b"-1" + b"0" * 30),
    "deep": lambda line: b"[" * 100_000,
    "empty": lambda line: b"",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_line_costs_that_line_and_is_reported(tmp_path, name, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "loss": 1.0}).encode() for i in range(1, 11)]
    lines[4] = DAMAGE[name](lines[4])
    path.write_bytes(b"\n".join(lines) + b"\n")
    with metrics.Metrics(tmp_path, 20, 9) as m:
        shown = capsys.readouterr()
        assert "1 of 10 lines are damaged and left out; the first is line 5" in shown.err
        m.write(10, {"loss": 2.0}, 100)
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert_same(tmp_path)


ODD_FILES = {
    "a picture that is cut": lambda at: at("samples/00000005.png").write_bytes(b"\x89PNG\r\n"),
    "a picture of zeros": lambda at: at("samples/00000005.png").write_bytes(bytes(500)),
    "a picture of ones": lambda at: at("samples/00000005.png").write_bytes(b"\xff" * 500),
    "a sample of another name": lambda at: at("samples/\u00b2\u00b2.md").write_text("- a\n"),
    "a folder for a sample": lambda at: at("samples/00000006.md").mkdir(),
    "a folder for the board": lambda at: at("tensorboard/events.out.tfevents.1.x").mkdir(),
    "a folder for the rows": lambda at: at("metrics.jsonl").mkdir(),
    "a second folder for the rows": lambda at: (
        at("metrics.jsonl").mkdir(),
        at("metrics.unreadable.jsonl").mkdir(),
    ),
    "numbers that floats haven't": lambda at: at("metrics.jsonl").write_text(
        '{"step": 1, "a": 1%s, "b": 1e300}\n' % ("0" * 30)
    ),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_nothing_that_lies_in_a_workdir_stops_its_metrics(tmp_path, name):
    def at(path):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        return tmp_path / path

    at("samples/00000005.md").write_text("- a\n")
    ODD_FILES[name](at)
    with metrics.Metrics(tmp_path, 20, 9) as m:
        m.write(10, {"loss": 2.0}, 100)
        m.show(10, None, ["b"])
    assert losses(tmp_path)[10] == 2.0 and "failed_writes" not in rows(tmp_path)[-1]
    for folder in (tmp_path / "tensorboard").glob("*/"):
        folder.rmdir()
    assert [step for step, tag in on_board(tmp_path)[1] if "text" in tag] == [5, 10]


def test_an_entry_is_on_the_disk_whole_or_not_at_all(tmp_path, full):
    file = Growing(tmp_path / "folder/file", lambda: [b"begin."])
    file.add(b"one.")
    assert file.path.read_bytes() == b"begin.one."
    full(12)
    for entry in (b"two.", b"three."):
        with pytest.raises(OSError, match="too large"):
            file.add(entry)
        assert file.waiting
    full(1 << 30)
    file.add()
    assert file.path.read_bytes() == b"begin.one.two.three."
    file.path.unlink()
    file.add(b"four.")
    assert file.path.read_bytes() == b"four."


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mount isn't allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_run_whose_disk_is_full_for_a_while_loses_no_row(small_disk, tmp_path):
    workdir, fill, steps = small_disk / "run", small_disk / "fill", 40
    command = [
        ROOT / "launch/train.py", "--config", ROOT / "configs/vq.py:digits,smoke",
        "--workdir", workdir, f"--config.steps={steps}", "--config.log_every=1", "--config.save_every=1000",
        "--config.batch_size=8",
    ]  # fmt: skip
    with Program(command, {"XLA_FLAGS": xla_flags(1)}) as process:
        out = []
        for line in process.stdout:
            out.append(line)
            if line.startswith("step 5/"):
                with contextlib.suppress(OSError), fill.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(1 << 12))
            if line.startswith("step 30/"):
                fill.unlink()
        assert process.wait() == 0, "".join(out)
    assert len([line for line in out if line.startswith("warning")]) == 1, "".join(out)
    assert [row["step"] for row in rows(workdir)] == list(range(1, steps + 1))
    assert rows(workdir)[-1]["failed_writes"] > 20
    assert_same(workdir)


def test_a_log_on_a_full_disk_ends_nothing(tmp_path, monkeypatch):
    with open("/dev/full", "w") as full, metrics.Metrics(tmp_path, 9) as m:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        m.write(1, {"loss": 1.0}, 100)
        metrics.warn("something")
        monkeypatch.undo()
        m.write(2, {"loss": 1.0}, 100)
        with contextlib.suppress(OSError):
            full.close()
    assert list(losses(tmp_path)) == [1, 2]
