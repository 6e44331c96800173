"""mmada sweep --engine ray, mostly with a program that trains nothing: resuming, early stops, endings."""

import csv
import json
import os
import pathlib
import shutil
import signal
import tempfile
import time

import pytest
from conftest import ROOT, xla_flags
from programs import Program, end_heirs

pytestmark = pytest.mark.cluster

BASE = {"program": "vq", "steps": 12, "batch_size": 8, "seed": 0, "optim": {"lr": 0.1, "name": "muon"}}
# As the program of test_sweep.py, but with saves: it goes on from the last one, every second step, and
# repeats the rows after it. When it is told to end it needs a second to save. Half a row follows its rows.
FAKE = """
import json, os, pathlib, signal, sys, time
args = dict(arg.removeprefix("--").partition("=")[::2] for arg in sys.argv if arg.startswith("--config."))
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
lr, seed, steps = float(args["config.optim.lr"]), int(args.get("config.seed", 0)), 12
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
path, save, sweep = workdir / "metrics.jsonl", workdir / "save", workdir.parent
done = int(save.read_text()) if save.exists() else 0
rows = path.read_text().splitlines()[:done] if path.exists() else []
path.write_text("".join(row + chr(10) for row in rows))
with open(sweep / "started", "a") as started:
    inherited = os.environ.get("OMP_NUM_THREADS"), "RAY_AUTH_TOKEN" in os.environ
    print(workdir.name, done, *inherited, file=started)
if seed == 13:
    print("error: thirteen", file=sys.stderr)
    sys.exit(1)
for step in range(done + 1, steps + 1):
    with path.open("a") as file:
        print(json.dumps({"step": step, "loss": None if lr > 9 else lr / step}), file=file)
        print('{"step"', end="", file=file, flush=True)
        if step < steps or not stop:
            file.truncate(file.tell() - 7)
    time.sleep(0.05)
    while any((folder / f"hold-{step}").exists() for folder in (sweep, workdir)) and not stop:
        time.sleep(0.02)
    if step % 2 == 0:
        save.write_text(str(step))
    if stop:
        time.sleep(1)
        save.write_text(str(step))
        break
"""


@pytest.fixture
def alone(tmp_path):
    """An environment for programs; those that have it, and what they leave, are removed."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="mt_"))
    yield {"OURS": str(tmp_path), "TMPDIR": str(folder)}
    left = list(folder.iterdir())
    # Agents of a Ray that was killed wait a minute before they end, and may still write.
    end_heirs(f"OURS={tmp_path}")
    shutil.rmtree(folder)
    assert not left


@pytest.fixture
def run(alone, tmp_path):
    """Starts launch/sweep.py --engine ray with the fake program and a config file with some functions."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "sweep").mkdir()

    def call(functions, *flags, new_session=False):
        (tmp_path / "config.py").write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config(): return ConfigDict({BASE!r})\n{functions}\n"
        )
        command = [ROOT / "launch/sweep.py", "--config", tmp_path / "config.py", "--engine", "ray"]
        command += ["--workdir", tmp_path / "sweep", "--program", tmp_path / "fake.py", *flags]
        return Program(command, alone, new_session)

    return call


def wait_for(condition, process=None):
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def results(tmp_path):
    with (tmp_path / "sweep/results.csv").open() as file:
        return {row["trial"]: row for row in csv.DictReader(file)}


def starts(tmp_path):
    lines = (tmp_path / "sweep/started").read_text().splitlines()
    assert all(line.endswith(" None False") for line in lines)  # what Ray sets isn't inherited
    return [tuple(line.split()[:2]) for line in lines]


def test_a_sweep_that_is_killed_twice_goes_on(run, tmp_path):
    hyper, flags = "def get_hyper(h): return h.sweep('optim.lr', [0.1, 0.2, 0.3])", ("--parallel=2",)
    names = [f"trial-{i:03}-lr-0.{i + 1}" for i in range(3)]
    folders = [tmp_path / "sweep" / name for name in names]

    def is_at(number, step):
        path = folders[number] / "metrics.jsonl"
        return path.exists() and path.read_bytes().count(b"\n") == step

    (tmp_path / "sweep/hold-5").touch()
    with run(hyper, *flags) as process:
        wait_for(lambda: is_at(0, 5) and is_at(1, 5), process)
        process.kill()
    (folders[1] / "hold-9").touch()
    with run(hyper, *flags) as process:
        wait_for(lambda: is_at(1, 9) and is_at(2, 5), process)
        process.kill()
        told = process.stdout.read()
    # Trials of the killed sweep are told to save, for which they need a second.
    assert f"waiting for {names[0]}, which a killed sweep has left, to save and end" in told
    assert f"{names[0]} continues at step 5" in told
    assert f"[1/3] {names[0]} is done in" in told
    process = run(hyper, *flags)
    wait_for(lambda: "9" in (folders[1] / "save").read_text() and (folders[2] / "save").exists(), process)
    for path in (tmp_path / "sweep/hold-5", folders[1] / "hold-9"):
        path.unlink()
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert out.splitlines()[0].startswith("waiting for trial-001")
    assert "1 of 3 trials are done already" in out
    begun = starts(tmp_path)
    assert len(begun) == 7
    # Each goes on from its save, and what is done isn't run again.
    assert set(begun) == {(name, "0") for name in names} | {
        (names[0], "5"), (names[1], "5"), (names[1], "9"), (names[2], "5")
    }  # fmt: skip
    assert [(row["status"], row["step"]) for row in results(tmp_path).values()] == [("done", "12")] * 3
    assert list(results(tmp_path)) == names  # as the plain engine sorts them
    for folder in folders:
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, 13))
    assert (tmp_path / "sweep/results.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "sweep/.ray_tune").exists()


def test_trials_are_stopped_early_and_not_run_again(run, tmp_path):
    pytest.importorskip("optuna")
    space = "def get_space(s): return {'optim.lr': s.choice([0.1, 0.2, 10.0]), 'seed': s.integer(1, 2)}"
    flags = ("--search=optuna", "--trials=3", "--stop=asha", "--grace=3", "--seed=1")
    out, _ = (process := run(space, *flags)).communicate()
    assert process.returncode == 0, out
    diverged = "trial-001-lr-10.0_seed-1"
    assert f"[2/3] {diverged} stopped early at step" in out
    assert "2 of 3 trials are done, 1 were stopped early" in out
    rows = results(tmp_path)
    statuses = [(row["optim.lr"], row["status"]) for row in rows.values()]
    assert statuses == [("0.2", "done"), ("0.2", "done"), ("10.0", "stopped early")]
    assert 3 <= int(rows[diverged]["step"]) < 12
    assert (tmp_path / "sweep" / diverged / "save").read_text() == rows[diverged]["step"]
    begun = starts(tmp_path)
    out, _ = (process := run(space, *flags)).communicate()
    assert out.splitlines()[0] == "3 of 3 trials are done already"
    assert (process.returncode, starts(tmp_path)) == (0, begun)


def test_a_failure_and_a_terminal_that_closes(run, tmp_path):
    (tmp_path / "sweep/hold-5").touch()
    hyper = "def get_hyper(h): return h.sweep('seed', [13, 1, 2])"
    process = run(hyper, "--config.optim.lr=0.1", "--parallel=2", new_session=True)
    path = tmp_path / "sweep/trial-001-seed-1/metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") == 5, process)
    wait_for((tmp_path / "sweep/trial-002-seed-2/metrics.jsonl").exists, process)
    os.killpg(process.pid, signal.SIGHUP)  # all processes of a terminal get it
    out, _ = process.communicate()
    log = tmp_path / "sweep/trial-000-seed-13/log.txt"
    assert f"trial-000-seed-13 failed (exit status 1): error: thirteen (all in {log})" in out
    assert "trial-001-seed-1 stopped at step 5/12" in out and "trial-002-seed-2 stopped at" in out
    assert out.splitlines()[-1] == "run again to resume"
    assert process.returncode == 128 + signal.SIGHUP
    statuses = [row["status"] for _, row in sorted(results(tmp_path).items())]
    assert statuses == ["failed", "stopped", "stopped"]
    assert (path.parent / "save").read_text() == "5"


@pytest.mark.slow
def test_four_real_trials_killed_twice(image_tokenizer, alone, tmp_path):
    (tmp_path / "config.py").write_text(
        "from configs.pretrain import get_config\n"
        "def get_hyper(h): return h.sweep('optim.lr', [1e-3, 2e-3, 3e-3, 4e-3])\n"
    )
    command = [
        ROOT / "launch/sweep.py", "--config", f"{tmp_path}/config.py:digits,smoke", "--engine=ray",
        "--workdir", tmp_path / "sweep", "--parallel=2", f"--config.image_tokenizer={image_tokenizer}",
        "--config.steps=4", "--config.batch_size=4", "--config.save_every=1",
    ]  # fmt: skip
    environment = alone | {"XLA_FLAGS": xla_flags(1)}
    done = {}

    def one_is_done():  # and a later one has begun
        later = list(tmp_path.glob("sweep/trial-00[23]*/checkpoints/[1-4]"))
        return later and any("done" in path.read_text() for path in tmp_path.glob("sweep/*/trial.json"))

    for moment in (lambda: list(tmp_path.glob("sweep/trial-*/checkpoints/[1-4]")), one_is_done):
        with Program(command, environment) as process:
            wait_for(moment, process)
            process.kill()
        of_now = [
            path.parent for path in tmp_path.glob("sweep/trial-*/trial.json") if "done" in path.read_text()
        ]
        done |= {folder: (folder / "log.txt").read_text() for folder in of_now}
    out, _ = (process := Program(command, environment)).communicate()
    logs = "".join(path.read_text() for path in tmp_path.glob("sweep/*/log.txt"))
    assert process.returncode == 0, out + logs
    rows = results(tmp_path)
    assert {(row["status"], row["step"]) for row in rows.values()} == {("done", "4")}
    assert done
    for folder in tmp_path.glob("sweep/trial-*"):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
        log = (folder / "log.txt").read_text()
        assert done.get(folder, log) == log  # what was done isn't run again
