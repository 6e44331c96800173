"""Several processes on the loopback: the same numbers, one checkpoint, one end."""

import contextlib
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from conftest import xla_flags
from PIL import Image
from programs import Program

from configs import cot, unigrpo
from mmada_jax.data import digits
from mmada_jax.devices import distributed, sharding
from mmada_jax.devices.distributed import initialize_distributed, several_processes
from mmada_jax.train import metrics, optim
from mmada_jax.train.runs import parse
from mmada_jax.train.supervised import model_program
from mmada_jax.weights.checkpoint import Checkpoints
from mmada_jax.weights.state import state_shardings

ROOT = pathlib.Path(__file__).parent.parent


@contextlib.contextmanager
def launch(workdir, *flags, devices=1, program="train", config="pretrain"):
    """A program as a user runs it, on so many devices; dead at the end of the block."""
    config = config if isinstance(config, pathlib.Path) else ROOT / f"configs/{config}.py:digits,smoke"
    command = [ROOT / f"launch/{program}.py", "--config", config]
    with Program([*command, "--workdir", workdir, *flags], {"XLA_FLAGS": xla_flags(devices)}) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def launch_two(port, *args, **what):
    """Two processes of one device each."""
    who = ("--coordinator", f"127.0.0.1:{port}", "--num_processes", "2", "--process_id")
    with launch(*args, *who, "0", **what) as first, launch(*args, *who, "1", **what) as second:
        yield first, second


def losses(workdir):
    return {row["step"]: row["loss"] for row in metrics.read(workdir / "metrics.jsonl")}


def restore(workdir, config, image_tokenizer):
    config = config | {"image_tokenizer": str(image_tokenizer)}
    config["optim"] = config["optim"] | {"name": "adamw"}
    run = parse(config)
    mesh, optimizer = sharding.make_mesh(), optim.make(run.optim, run.steps)
    objective = model_program(run, workdir, mesh).objective
    made = state_shardings(mesh, objective.init_params, objective.axes, optimizer)
    shapes, shardings = made
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(shapes, shardings)


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_stop_and_resume_together(
    smoke_config, image_tokenizer, free_port, tmp_path
):
    adamw = ["--config.optim.name=adamw", "--config.optim.eps=1e-3"]  # no sign(0) to amplify noise
    flags = [f"--config.image_tokenizer={image_tokenizer}", *adamw]
    flags += ["--config.steps=20", "--config.save_every=20"]

    # SIGTERM at the process that isn't the first.
    with launch_two(free_port, tmp_path / "two", *flags) as (first, second):
        out = ""
        for line in first.stdout:
            out += line
            if line.startswith("step 5/20"):
                second.send_signal(signal.SIGTERM)
        other = second.communicate()[0]
        assert (first.wait(), second.returncode) == (0, 0), out + other
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+); run again to resume", out)[1])
    assert 5 <= stopped < 20
    assert "step" not in other  # only the first process prints
    assert (tmp_path / f"two/checkpoints/{stopped}").is_dir()

    with launch_two(free_port, tmp_path / "two", *flags) as (first, second):
        other, out = second.communicate()[0], first.communicate()[0]
        assert (first.returncode, second.returncode) == (0, 0), out + other
    assert f"resuming at step {stopped}" in out
    with launch(tmp_path / "one", *flags, devices=2) as process:
        out = process.communicate()[0]
        assert process.returncode == 0, out
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two) == list(one) == list(range(1, 21))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)

    # What two have saved, one restores, whatever its devices.
    states = [restore(tmp_path / name, smoke_config, image_tokenizer) for name in ("one", "two")]
    assert int(states[1].step) == 20
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)


# The smoke form of stage 3 with a turn of sums, of drawing and of questions about scans.
THREE_TASKS = """
from configs import unigrpo

def get_config(arg=None):
    config = unigrpo.get_config("digits,smoke")
    asked = config.tasks.arithmetic.copy_and_resolve_references()
    asked.update(layout="mmu", data={"path": "vqa_sum", "split": "train"})
    config.tasks.reading, config.iterations = asked, 3
    return config
"""


@pytest.mark.slow
def test_two_processes_learn_from_rewards_as_one_does(model_workdir, free_port, tmp_path):
    (tmp_path / "three.py").write_text(THREE_TASKS)
    what = {"program": "rl", "config": tmp_path / "three.py"}
    flags = [f"--config.init={model_workdir}", "--config.optim.eps=1e-3"]

    # Either dies, maybe while both save. The other doesn't wait for it, and both begin where that leaves
    # them.
    for dies, iteration in ((1, 1), (0, 2)):
        with launch_two(free_port, tmp_path / "two", *flags, **what) as two:
            out = ""
            for line in two[0].stdout:
                out += line
                if line.startswith(f"step {iteration}/"):
                    two[dies].kill()
            status = two[1 - dies].wait(timeout=120)
            end = out if dies == 1 else two[1].stdout.read()
        assert status != 0, end
        # Where process 0 dies, jax's client may end the other one by itself.
        if dies == 1 or "another task died" not in end:
            assert status == 1 and "Traceback" not in end, end
            assert end.splitlines()[-1].startswith("error: another process of this run has ended")
        # Processes that are connected wait for one whose disk is slow.
        begun = re.split("starting from|resuming at", out)
        assert len(begun) == 2 and not re.search("connected to [1-9]", begun[1]), out

    with launch_two(free_port, tmp_path / "two", *flags, **what) as (first, second):
        other, out = second.communicate()[0], first.communicate()[0]
        assert (first.returncode, second.returncode) == (0, 0), out + other
    assert "step" not in other
    with launch(tmp_path / "one", *flags, devices=2, **what) as process:
        out = process.communicate()[0]
        assert process.returncode == 0, out
    one, two = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in two] == [1, 2, 3]
    for a, b in zip(one, two, strict=True):
        assert set(a) == set(b)
        for name in (n for n in a if n.endswith(("/reward", "/entropy", "/loss", "/groups_that_differ"))):
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert list((tmp_path / "two/samples").glob("*.png"))


# Runs of both programs, one after the other, in a process of two.
RUNS = """
import json, sys
from mmada_jax.devices import distributed
from mmada_jax.train import supervised
from mmada_jax.train.rl import loop as rl

address, number, runs = sys.argv[1:]
distributed.initialize_distributed(address, 2, int(number))
for config, workdir in json.loads(runs):
    (rl if config["program"] == "rl" else supervised).train(config, workdir)
"""


@pytest.mark.slow
def test_two_processes_show_samples_of_every_kind(smoke_config, image_tokenizer, free_port, tmp_path):
    scan = ((digits.canvas(*digits.load("test").pixels[:2])[..., 0] + 1) * 127.5).astype(np.uint8)
    Image.fromarray(scan).save(tmp_path / "scan.png")
    (tmp_path / "asked.jsonl").write_text(
        '{"prompt": "which digits?", "answer": "1", "image": "scan.png"}\n'
    )
    small = {"n_layers": 1, "unroll": 1, "d_mlp": 64}
    often = {"image_tokenizer": str(image_tokenizer), "steps": 1, "eval_every": 1, "samples": 1}
    often |= {"eval_rows": 8, "batch_size": 8, "model": smoke_config["model"] | small}
    thinks = cot.get_config("digits,smoke").to_dict()
    learns = unigrpo.get_config("digits,smoke").to_dict() | {"init": str(tmp_path / "cot")}
    reading = {"layout": "mmu", "data": {"path": str(tmp_path / "asked.jsonl"), "format": "jsonl"}}
    learns["tasks"]["reading"] = learns["tasks"].pop("arithmetic") | reading
    learns["objective"]["mu"] = 1
    runs = [
        (smoke_config | often, str(tmp_path / "pretrain")),
        (thinks | often, str(tmp_path / "cot")),
        (learns, str(tmp_path / "rl")),
    ]
    (tmp_path / "runs.py").write_text(RUNS)
    with contextlib.ExitStack() as stack:
        two = [
            stack.enter_context(Program(
                [tmp_path / "runs.py", f"127.0.0.1:{free_port}", number, json.dumps(runs)],
                {"XLA_FLAGS": xla_flags(2)},
            ))
            for number in (0, 1)
        ]  # fmt: skip
        for process in two:
            stack.callback(process.kill)
        said = [process.communicate()[0] for process in reversed(two)]
    assert [process.returncode for process in two] == [0, 0], "".join(said)
    for workdir in ("pretrain", "cot"):
        (row,) = metrics.read(tmp_path / workdir / "metrics.jsonl")
        assert any(name.startswith("held_out_") for name in row), row
        assert (tmp_path / workdir / "samples/00000001.png").is_file()
        assert (tmp_path / workdir / "samples/00000001.md").read_text().count("\n") >= 3
    samples = {path.name for path in (tmp_path / "rl/samples").iterdir()}
    assert {"00000001-drawing.png", "00000002-reading.md"} <= samples


def test_processes_that_do_not_meet_end_with_one_line(free_port, tmp_path):
    address = f"127.0.0.1:{free_port}"
    alone = [
        "--coordinator",
        address,
        "--num_processes",
        "2",
        "--process_id",
        "1",
        "--connect_timeout",
        "1",
    ]
    with launch(tmp_path, *alone) as process:
        out = process.communicate()[0]
    assert process.returncode == 1
    assert out.startswith(f"error: process 1 of 2 and the others didn't meet at {address} within 1 s")
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("explicit", "message"),
    [
        (("host:1", None, None), "belong together"),
        ((None, 2, 0), "belong together"),
        (("host", 2, 0), "HOST:PORT"),
        (("host:1", 2, 2), "process_id is 2"),
    ],
)
def test_flags_that_can_not_be_meant_are_refused(explicit, message):
    with pytest.raises(ValueError, match=message):
        initialize_distributed(*explicit)


def test_a_taken_port_is_an_error(free_port):
    with socket.create_server(("", free_port)), pytest.raises(OSError, match="in use"):
        initialize_distributed(f"127.0.0.1:{free_port}", 2, 0)


def test_only_an_environment_of_several_processes_is_taken_for_one():
    several = [
        {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[1-2]"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"},
        {"MEGASCALE_COORDINATOR_ADDRESS": "a:1"},
    ]
    alone = [
        {},
        {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"},
        {"SLURM_NTASKS": "2"},  # the batch script, not srun
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_WORKER_HOSTNAMES": "WARNING: could not determine TPU worker hostnames, please set it"},
    ]
    assert [several_processes(e) for e in several] == [True] * len(several)
    assert [several_processes(e) for e in alone] == [False] * len(alone)


class Store:
    """The coordinator's store, for processes that are threads."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, key):
        with self.changed:
            return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                return self.values[key]
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")


def settle(said, timeout=60.0):
    """What each process is told when it has `said` so; None never comes."""
    store, n = Store(), len(said)
    talks = [distributed._Talk(store, "key", i, n) for i in range(n)]
    with ThreadPoolExecutor(n) as pool:
        told = [
            pool.submit(talk.settle, what, timeout)
            for talk, what in zip(talks, said, strict=True)
            if what is not None
        ]
    return [verdict.result() for verdict in told]


def values(**what):
    config = {"seed": 0, "optim": {"lr": 0.1}}
    return {"phase": "training", "values": {"config": config, "devices": 1} | what}


@pytest.mark.parametrize(
    ("last", "verdict"),
    [
        (values(), ""),
        (
            values(config={"seed": 1, "optim": {"lr": 0.1}}),
            "config.seed is 0 in process 0 and 1 in",
        ),
        (values(config={"seed": 0, "optim": {"lr": 1}}), "config.optim.lr is 0.1 in process 0 and 1 in"),
        (values(config={"optim": {"lr": 0.1}}), "config.seed is 0 in process 0 and missing in process 2"),
        (values(more=None), "more is missing in process 0 and null in process 2"),
        (values(devices=4), "devices is 1 in process 0 and 4 in process 2"),
        (values() | {"phase": "evaluation"}, "process 0 runs training, process 2 evaluation"),
        ({"failed": "the disk is gone"}, "process 2 has failed: the disk is gone"),
    ],
)
def test_all_processes_are_told_the_first_difference(last, verdict):
    told = settle([values(), values(), last])
    assert len(set(told)) == 1
    assert verdict in told[0] and bool(verdict) == bool(told[0])
    first = settle([last, values(), values()])  # whichever it is that differs
    assert len(set(first)) == 1 and bool(first[0]) == bool(verdict)


def test_a_process_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "_PATIENCE", 0.0)
    why = "has not started its run; do all run the same program?"
    assert settle([values(), None], 0.2) == [f"process 1 {why}"]
    assert settle([None, values()], 0.0) == [f"process 0 {why}"]


def test_settings_that_change_numbers_are_compared(monkeypatch):
    told = []
    one = types.SimpleNamespace(client=object(), process_id=0, num_processes=2)
    monkeypatch.setattr(distributed.distributed, "global_state", one)
    monkeypatch.setattr(distributed._Talk, "settle", lambda self, said, timeout: told.append(said) or "")

    def differences(name, value, restore):
        with distributed.together("training"):
            pass
        jax.config.update(name, value)
        try:
            with distributed.together("training"):
                pass
        finally:
            jax.config.update(name, restore)
        return distributed._disagreement(*told[-2:], 1)

    for name, value in (
        ("jax_default_prng_impl", "rbg"),
        ("jax_default_matmul_precision", "float32"),
        ("jax_enable_x64", True),
    ):
        assert f"{name} is " in differences(name, value, jax.config.values[name])
    assert not differences("jax_log_compiles", True, False)
    flags = "--xla_a=1 --xla_dump_to=/x --xla_force_host_platform_device_count=2"
    assert distributed._settings({"XLA_FLAGS": flags})["XLA_FLAGS"] == "--xla_a=1"


def test_a_process_alone_agrees_with_itself():
    with distributed.together("training") as same:
        same["anything"] = object()
    with pytest.raises(KeyError), distributed.together("training"):
        raise KeyError("what is raised within")


@pytest.mark.parametrize("other", ["--config.seed=1", "rl", "devices"])
def test_processes_that_disagree_end_with_one_line(other, free_port, tmp_path):
    who = ("--coordinator", f"127.0.0.1:{free_port}", "--num_processes", "2", "--process_id")
    flags = [other] if other.startswith("--") else []
    what = {"rl": {"program": "rl", "config": "unigrpo"}, "devices": {"devices": 2}}.get(other, {})
    with (
        launch(tmp_path / "run", *who, "0") as first,
        launch(tmp_path / "run", *who, "1", *flags, **what) as second,
    ):
        ended = [(process.communicate(timeout=240)[0], process.returncode) for process in (first, second)]
    difference = {
        "--config.seed=1": "config.seed is 0 in process 0 and 1 in process 1",
        "devices": "devices is 1 in process 0 and 2 in process 1",
        "rl": "process 0 runs mmada train, process 1 mmada rl",
    }[other]
    for out, status in ended:
        assert status == 1
        assert out.startswith("error: the processes of this run disagree: ") and difference in out
        assert out.count("\n") == 1
    assert not (tmp_path / "run").exists()


SIGNALS = """
import hashlib, os, signal, sys, threading, time, jax
from mmada_jax.devices import sharding
from mmada_jax.devices.distributed import watch_signals
def send():
    for _ in range(int(sys.argv[1])):
        time.sleep(0.3)
        os.kill(os.getpid(), int(sys.argv[2]))
with watch_signals(sharding.make_mesh()) as signalled:
    assert signalled() == 0
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    # No handler of Python's runs meanwhile, as when a step is compiled.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 5_000_000)
    thread.join()
    assert signalled() == int(sys.argv[2])
print("saved")
os.kill(os.getpid(), signal.SIGINT)
time.sleep(10)
"""


@pytest.mark.parametrize(("times", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_second_ctrl_c_ends_at_once_whatever_the_program_does(times, number):
    command = [sys.executable, "-c", SIGNALS, str(times), str(int(number))]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    at_once = times == 2 and number == signal.SIGINT
    assert ended.stdout == ("" if at_once else "saved\n"), ended.stderr
    if at_once:
        assert (ended.returncode, ended.stderr) == (130, "stopped at once by a second Ctrl-C\n")
    else:  # what it was before is so again
        assert ended.returncode == -signal.SIGINT and "KeyboardInterrupt" in ended.stderr


def test_signals_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with distributed.watch_signals(sharding.make_mesh()) as signalled:
            signal.raise_signal(signal.SIGINT)
            assert signalled() == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
