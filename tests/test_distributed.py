"""Several processes on the loopback: the same numbers, one checkpoint, one end."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from configs import cot, unigrpo
from mmada_jax import metrics, optim, sharding
from mmada_jax.checkpoint import Checkpoints
from mmada_jax.data import digits
from mmada_jax.distributed import initialize_distributed, several_processes
from mmada_jax.run import parse
from mmada_jax.state import state_shardings
from mmada_jax.train import model_program

ROOT = pathlib.Path(__file__).parent.parent


@contextlib.contextmanager
def launch(workdir, *flags, devices=1, program="train", config="pretrain"):
    """A program as a user runs it, on so many devices; dead at the end of the block."""
    # Most of the time goes into compiling, once in each process.
    xla = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    command = [
        sys.executable,
        ROOT / f"launch/{program}.py",
        "--config",
        ROOT / f"configs/{config}.py:digits,smoke",
    ]
    command += ["--workdir", workdir, *flags]
    process = subprocess.Popen(
        command, env=os.environ | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with process:
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


def test_two_processes_learn_from_rewards_as_one_does(model_workdir, free_port, tmp_path):
    what = {"program": "rl", "config": "unigrpo"}
    flags = [f"--config.init={model_workdir}", "--config.optim.eps=1e-3"]
    with launch_two(free_port, tmp_path / "two", *flags, **what) as (first, second):
        other, out = second.communicate()[0], first.communicate()[0]
        assert (first.returncode, second.returncode) == (0, 0), out + other
    assert "step" not in other
    with launch(tmp_path / "one", *flags, devices=2, **what) as process:
        out = process.communicate()[0]
        assert process.returncode == 0, out
    one, two = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in two] == [1, 2]
    for a, b in zip(one, two, strict=True):
        assert set(a) == set(b)
        for name in (n for n in a if n.endswith(("/reward", "/entropy", "/loss", "/groups_that_differ"))):
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert list((tmp_path / "two/samples").glob("*.png"))


# Runs of both programs, one after the other, in a process of two.
RUNS = """
import json, sys
from mmada_jax import sharding, train
from mmada_jax.rl import train as rl

address, number, runs = sys.argv[1:]
sharding.initialize_distributed(address, 2, int(number))
for config, workdir in json.loads(runs):
    (rl if config["program"] == "rl" else train).train(config, workdir)
"""


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
    xla = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    with contextlib.ExitStack() as stack:
        two = [
            stack.enter_context(subprocess.Popen(
                [sys.executable, "-c", RUNS, f"127.0.0.1:{free_port}", str(number), json.dumps(runs)],
                env=os.environ | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"}, cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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
    assert {"000000-drawing.png", "000001-reading.md"} <= samples


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
