"""launch/sweep.py, mostly with a program that trains nothing: trials, tables, resuming, errors."""

import contextlib
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, xla_flags
from programs import Program

from configs import pretrain, vq
from mmada_jax.config import from_dict, to_dict
from mmada_jax.programs import configured
from mmada_jax.train import sweep
from mmada_jax.train.runs import VQRun
from mmada_jax.train.sweep import Hyper as h

BASE = {"program": "vq", "steps": 3, "batch_size": 8, "seed": 0, "optim": {"lr": 0.1, "name": "muon"}}

# Does what launch/train.py does, as far as a sweep sees it; the loss is the learning rate. With seed 13
# it fails as long as there is a file "broken", and all wait after a step as long as there is one "hold".
FAKE = """
import json, pathlib, signal, sys, time
args = dict(arg.removeprefix("--").partition("=")[::2] for arg in sys.argv if arg.startswith("--config."))
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
seed, steps = int(args.get("config.seed", 0)), int(args.get("config.steps", 3))
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
path, sweep = workdir / "metrics.jsonl", workdir.parent
done = len(path.read_text().splitlines()) if path.exists() else 0
with open(sweep / "started", "a") as started:
    print(workdir.name, file=started)
if seed == 13 and (sweep / "broken").exists():
    print("error: thirteen", file=sys.stderr)
    sys.exit(1)
for step in range(done + 1, steps + 1):
    with path.open("a") as file:
        print(json.dumps({"step": step, "loss": float(args["config.optim.lr"]), "up": seed}), file=file)
    while (sweep / "hold").exists() and not stop:
        time.sleep(0.02)
    if stop:
        break
"""


@pytest.fixture
def run(tmp_path):
    """Starts launch/sweep.py with the fake program and a config file that has this get_hyper."""
    (tmp_path / "fake.py").write_text(FAKE)

    def call(hyper, *flags, wait=True):
        (tmp_path / "config.py").write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config(arg): return ConfigDict({BASE!r})\n"
            f"def get_hyper(h): return {hyper}\n"
        )
        command = [ROOT / "launch/sweep.py", "--config", tmp_path / "config.py:some,arg"]
        command += ["--workdir", tmp_path / "sweep", "--program", tmp_path / "fake.py", *flags]
        process = Program(command)
        return (process.communicate()[0].splitlines(), process.returncode) if wait else process

    return call


def results(tmp_path):
    with (tmp_path / "sweep/results.csv").open() as file:
        return list(csv.DictReader(file))


def starts(tmp_path):
    path = tmp_path / "sweep/started"
    return path.read_text().split() if path.exists() else []


def plan(trials, tmp_path, for_all=None):
    return sweep.plan(BASE, trials, tmp_path, ["train.py"], for_all or {})


# ---- What is varied ------------------------------------------------------------------------------


def test_sweeps_combine():
    a, b = h.sweep("a", [1, 2]), h.sweep("b", "xy")
    assert a == [{"a": 1}, {"a": 2}]
    assert h.product([a, b, h.fixed("c", 0)]) == [
        {"a": i, "b": j, "c": 0} for i in (1, 2) for j in ("x", "y")
    ]
    assert h.zipit([a, b, h.fixed("c", 0)]) == [{"a": 1, "b": "x", "c": 0}, {"a": 2, "b": "y", "c": 0}]
    assert h.zipit([h.fixed("a", 1), h.fixed("b", 2)]) == [{"a": 1, "b": 2}]
    assert h.chainit([a, b]) == [{"a": 1}, {"a": 2}, {"b": "x"}, {"b": "y"}]
    assert h.product([h.zipit([a, b]), h.chainit([h.fixed("c", 0), h.sweep("d", [1])])])[:2] == [
        {"a": 1, "b": "x", "c": 0},
        {"a": 1, "b": "x", "d": 1},
    ]
    assert len(h.product([h.sweep(name, range(3)) for name in "abcd"])) == 81


def test_what_does_not_combine():
    with pytest.raises(ValueError, match="a is varied twice"):
        h.product([h.sweep("a", [1]), h.sweep("b", [1]), h.sweep("a", [2])])
    with pytest.raises(ValueError, match=r"sweeps of \[2, 3\] trials"):
        h.zipit([h.sweep("a", [1, 2]), h.sweep("b", [1, 2, 3])])


@pytest.mark.parametrize("config", [pretrain, vq])
def test_the_sweeps_of_the_configs_fit_them(config, tmp_path):
    for arg in ("digits", "digits,smoke", "digits,full", "digits,fast"):
        trials = sweep.plan(config.get_config(arg).to_dict(), config.get_hyper(h), tmp_path, ["x"], {})
        assert len(trials) == 6


def test_commands_make_what_was_planned(run, tmp_path):
    # The printed line, read by a shell and as the options of a program, gives the planned configuration.
    flags = ("--commands", "--config.batch_size=16")
    trials = "h.product([h.sweep('optim.lr', [1e-5, 0.1 + 0.2, 3]), h.sweep('optim.name', ['adamw'])])"
    lines, code = run(trials, *flags)
    assert code == 0
    assert not (tmp_path / "sweep").exists()
    for line, lr in zip(lines, (1e-5, 0.1 + 0.2, 3), strict=True):
        python, program, *words = shlex.split(line)
        assert (python, program) == ("python", str(tmp_path / "fake.py"))
        args = configured.parse(configured.config_parser("", "train", ""), words)
        read = to_dict(from_dict(VQRun, args.config))
        want = BASE | {"batch_size": 16, "optim": {"lr": lr, "name": "adamw"}}
        assert read == to_dict(from_dict(VQRun, want))
        assert args.workdir.startswith(str(tmp_path / "sweep/trial-00"))


def test_folders_are_named_after_what_is_varied(tmp_path):
    trials = plan([{"optim.name": "adamw", "seed": 3}, {"seed": 4}], tmp_path)
    assert [trial.folder.name for trial in trials] == ["trial-000-name-adamw_seed-3", "trial-001-seed-4"]
    assert plan([{"optim.name": "adamw", "seed": 4}], tmp_path / "a b")[0].command == [
        "train.py", "--workdir", str(tmp_path / "a b/trial-000-name-adamw_seed-4"),
        "--config.optim.name=adamw", "--config.seed=4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        (
            [{"optim.rl": 1.0}],
            r"unknown config key 'optim.rl'; did you mean 'optim.lr'\? Known: adversarial",
        ),
        ([{"optim": {"lr": 1.0}}], "unknown config key 'optim'"),
        ([{"seed": 1}, {"steps": 1.5}], r"trial 1 \(steps=1.5\): steps is 1.5; it must be of type int"),
        ([{"optim.name": "adamv"}], "optim.name is 'adamv'; it must be one of"),
        ([{"steps": 0}], "steps is 0; it must be at least 1"),
        ([{"seed": 1}, {"seed": 2}, {"seed": 1}], r"trial 2 \(seed=1\) is the same as trial-000-seed-1"),
        ([{"seed": 1}, {"optim.lr": 0.1}, {"seed": 0}], "trial 2 .* is the same as trial-001"),
        ([{"batch_size": 16}], "leave out --config.batch_size"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said_before_anything_runs(trials, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan(trials, tmp_path / "sweep", {"batch_size": 8})
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(arg): ...", "has no get_hyper"),
        ("def get_hyper(h): return []", r"returns \[\]; it must be a list of dicts"),
        ("def get_hyper(h): return h.sweep('a', [1])[0]", "it must be a list of dicts"),
    ],
)
def test_files_without_a_sweep(source, message, tmp_path):
    (tmp_path / "config.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        sweep.get_sweep(str(tmp_path / "config.py"))


# ---- Running -------------------------------------------------------------------------------------


def test_a_failing_trial_stops_no_other_and_only_it_is_tried_again(run, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/broken").touch()
    trials = "h.zipit([h.sweep('optim.lr', [0.3, 0.1, 0.2]), h.sweep('seed', [5, 13, 7])])"
    lines, code = run(trials)
    assert code == 1
    (failed,) = [line for line in lines if "failed" in line]
    log = tmp_path / "sweep/trial-001-lr-0.1_seed-13/log.txt"
    assert failed.startswith(
        f"[2/3] {log.parent.name} failed (exit status 1): error: thirteen (all in {log})"
    )
    assert lines[0] == "[0/3] trial-000-lr-0.3_seed-5 starts; ETA unknown"
    assert all(re.search("; ETA [0-9]+s$", line) for line in lines[2:-1])
    assert lines[-1].startswith("2 of 3 trials are done")
    rows = results(tmp_path)
    assert [(row["optim.lr"], row["status"]) for row in rows] == [
        ("0.2", "done"), ("0.3", "done"), ("0.1", "failed")]  # fmt: skip
    assert [row["loss"] for row in rows] == ["0.2", "0.3", ""]

    (tmp_path / "sweep/broken").unlink()
    lines, code = run(trials, "--metric", "-up")
    assert code == 0
    assert lines[0] == "2 of 3 trials are done already"
    assert sum(" starts" in line for line in lines) == 1
    assert re.search("is done in [0-9]+s, up 13; ETA 0s", lines[2])
    assert [row["up"] for row in results(tmp_path)] == ["13", "7", "5"]
    markdown = (tmp_path / "sweep/results.md").read_text().splitlines()
    assert markdown[0] == "| trial | optim.lr | seed | status | minutes | step | loss | up |"
    assert len(markdown) == 5 and markdown[2].startswith("| trial-001-lr-0.1_seed-13 | 0.1 | 13 | done |")

    lines, code = run(trials)
    assert (lines[0], code) == ("3 of 3 trials are done already", 0)
    assert len(starts(tmp_path)) == 4


def test_a_metric_that_is_not_there_is_said(run):
    lines, code = run("h.sweep('optim.lr', [1.0])", "--metric", "los")
    assert "but its metrics have no 'los', only step, loss, up" in lines[1]
    assert code == 0


@pytest.fixture
def hold(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/hold").touch()
    return tmp_path / "sweep/hold"


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("parallel", [1, 3])
def test_as_many_run_at_a_time_as_asked_for(run, parallel, hold, tmp_path):
    process = run("h.sweep('optim.lr', [.1, .2, .3, .4])", f"--parallel={parallel}", wait=False)
    wait_for(lambda: len(starts(tmp_path)) == parallel)
    time.sleep(0.5)
    assert len(starts(tmp_path)) == parallel
    hold.unlink()
    process.communicate()
    assert process.returncode == 0
    assert len(starts(tmp_path)) == 4


TWO = "h.sweep('optim.lr', [0.1, 0.2])"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_trials_save_and_they_continue(run, number, hold, tmp_path):
    process = run(TWO, wait=False)
    wait_for((tmp_path / "sweep/trial-000-lr-0.1/metrics.jsonl").exists)
    time.sleep(0.5)
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == 128 + number
    assert "stopped at step 1/3" in out
    assert out.splitlines()[-1] == "run again to resume"
    assert [row["status"] for row in results(tmp_path)] == ["stopped", "waiting"]
    seconds = read_seconds(tmp_path)
    assert seconds > 0.5

    hold.unlink()
    lines, code = run(TWO, "--parallel=2")
    assert code == 0
    assert "trial-000-lr-0.1 continues at step 1" in lines[0]
    assert [row["step"] for row in results(tmp_path)] == ["3", "3"]
    assert read_seconds(tmp_path) > seconds  # of both attempts


def read_seconds(tmp_path):
    return json.loads((tmp_path / "sweep/trial-000-lr-0.1/trial.json").read_text())["seconds"]


def test_a_trial_that_a_killed_sweep_left_is_not_started_twice(run, hold, tmp_path):
    with run(TWO, wait=False) as process:
        wait_for((tmp_path / "sweep/trial-000-lr-0.1/metrics.jsonl").exists)
        process.kill()
    lines, code = run(TWO)
    assert code == 1
    (line,) = lines
    assert line.startswith(f"error: a sweep or a trial is running in {tmp_path / 'sweep'} (taken by ")
    assert line.endswith("; wait or end it")

    def is_free():
        with contextlib.suppress(ValueError), sweep.lock(tmp_path / "sweep"):
            return True

    hold.unlink()
    wait_for(is_free)
    lines, code = run(TWO)
    assert "continues at step 3" in lines[0]
    assert [row["step"] for row in results(tmp_path)] == ["3", "3"]
    assert code == 0


def test_a_trial_that_still_runs_is_waited_for(tmp_path, capsys):
    folder = tmp_path / "trial-000-lr-0.1"
    folder.mkdir()
    with sweep.lock_trial(folder, 0):
        still_runs = f"the trial in {folder} still runs .taken by process"
        with pytest.raises(ValueError, match=still_runs), sweep.lock(tmp_path, patience=0.3):
            pass
        assert capsys.readouterr().out.startswith(
            "waiting for trial-000-lr-0.1, which a killed sweep has left"
        )
    with sweep.lock(tmp_path, patience=0):
        pass


def test_another_sweep_is_refused(run, tmp_path):
    assert run("h.sweep('optim.lr', [0.1])")[1] == 0
    before = sorted(tmp_path.rglob("*"))
    folder = tmp_path / "sweep/trial-000-lr-0.1"
    cases = {
        f"error: {folder} is no trial of this sweep": ("h.sweep('optim.lr', [0.2])",),
        f"error: {folder} holds another trial (steps is 3 there and 4 now)": (
            "h.sweep('optim.lr', [0.1])",
            "--config.steps=4",
        ),
    }
    for message, args in cases.items():
        (line,), code = run(*args)
        assert line.startswith(message) and "choose an empty workdir" in line
        assert code == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert run("h.sweep('optim.lr', [0.1, 0.2])")[1] == 0  # more of the same is no other
    assert len(results(tmp_path)) == 2


def test_bad_flags(run, tmp_path):
    for flag, message in {
        "--program=nowhere.py": "error: no program nowhere.py",
        "--parallel=0": "error: ",
        "--config.stepz=3": "error: unknown config key",
        "surplus": "error: unexpected argument 'surplus'",
    }.items():
        lines, code = run("h.sweep('seed', [0])", flag)
        assert lines[-1].startswith(message)
        assert code == 1
    assert not (tmp_path / "sweep").exists()


def test_two_real_trials(image_tokenizer, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from configs.pretrain import get_config\n"
        "def get_hyper(h): return h.sweep('optim.lr', [1e-3, 2e-3])\n"
    )
    command = [sys.executable, ROOT / "launch/sweep.py", "--config", f"{config}:digits,smoke", "--workdir",
               tmp_path / "sweep", "--parallel=2", "--config.steps=2", "--config.batch_size=4",
               f"--config.image_tokenizer={image_tokenizer}"]  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    logs = "".join(path.read_text() for path in tmp_path.glob("sweep/*/log.txt"))
    assert out.returncode == 0, out.stdout + out.stderr + logs
    rows = results(tmp_path)
    assert {row["optim.lr"] for row in rows} == {"0.001", "0.002"}
    assert {row["step"] for row in rows} == {"2"}
    assert rows == sorted(rows, key=lambda row: float(row["loss"]))
