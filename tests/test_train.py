"""The training program: one compilation, exact resume, NaN batches, bad configurations."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax import convert, metrics, optim, sharding
from mmada_jax.checkpoint import newest_step, open_params
from mmada_jax.run import parse
from mmada_jax.state import init_state, state_shardings
from mmada_jax.train import make_step, model_program, train

ROOT = pathlib.Path(__file__).parent.parent


def losses(workdir):
    return {row["step"]: row["loss"] for row in metrics.read(workdir / "metrics.jsonl")}


def params(workdir):
    return convert.in_memory(open_params(newest_step(workdir) / "params"))


def start(program, config, mesh):
    optimizer = optim.make(parse(config).optim, config["steps"])
    objective = program.objective
    _, shardings = state_shardings(mesh, objective.init_params, objective.axes, optimizer)
    state = init_state(jax.random.key(0), objective.init_params, optimizer, shardings)
    return state, make_step(objective, optimizer, mesh, shardings, program.accumulate)


def test_step_compiles_once_and_meshes_agree(smoke_config, image_tokenizer, tmp_path):
    adamw = smoke_config["optim"] | {"name": "adamw", "eps": 1e-3}  # no sign(0) to amplify noise
    config = smoke_config | {"image_tokenizer": str(image_tokenizer), "optim": adamw}
    results = []
    one, two = {"devices": jax.devices()[:1]}, {"devices": jax.devices()[:2]}
    for accumulate, sizes in ((1, one), (1, {"data": 2, "fsdp": 2, "tensor": 2}), (2, two)):
        program = model_program(parse(config | {"accumulate": accumulate}), tmp_path)
        mesh = sharding.make_mesh(**sizes)
        with jax.set_mesh(mesh):
            state, step_fn = start(program, config, mesh)
            for step in range(2):
                batch = sharding.put_batch(mesh, program.batch(step))
                state, values = step_fn(state, jax.random.key(0), batch)
            assert step_fn._cache_size() == 1
        results.append((float(values["loss"]), jax.device_get(state.params)))
    (loss, params), *others = results
    for other_loss, other_params in others:
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other_params, params)


def test_nan_gradient_changes_nothing_and_is_counted():
    optimizer = optim.make(optim.Config(warmup=0, lr=0.1), 5)
    params = {"w": jnp.ones(3)}
    update = jax.jit(optimizer.update)
    updates, opt_state = update({"w": jnp.array([1.0, jnp.nan, 1.0])}, optimizer.init(params), params)
    assert not np.any(updates["w"])
    assert int(optim.skipped(opt_state)) == 1
    optim.check_finite(opt_state)
    updates, opt_state = update({"w": jnp.ones(3)}, opt_state, params)
    assert np.all(updates["w"] < 0)
    for _ in range(optim.MAX_SKIPPED):
        _, opt_state = update({"w": jnp.full(3, jnp.inf)}, opt_state, params)
    with pytest.raises(FloatingPointError, match="not finite"):
        optim.check_finite(opt_state)


def launch(config, workdir, *flags, **kwargs):
    """launch/train.py on one device, as a user runs it."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, ROOT / "launch/train.py", "--config", config, "--workdir", workdir, *flags]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


def test_resume_after_kill_and_after_sigterm_is_bit_exact(image_tokenizer, tmp_path):
    flags = [f"--config.image_tokenizer={image_tokenizer}", "--config.save_every=3", "--config.steps=12"]
    config = ROOT / "configs/pretrain.py:digits,smoke"
    with launch(config, tmp_path / "whole", *flags) as whole:
        assert "step 12/12" in whole.communicate()[0]
    for number, mark in ((signal.SIGKILL, "step 5/12"), (signal.SIGTERM, "step 8/12")):
        with launch(config, tmp_path / "broken", *flags) as process:
            for line in process.stdout:
                if line.startswith(mark):
                    process.send_signal(number)
            assert process.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 0), line
            assert number == signal.SIGKILL or "run again to resume" in line
    with launch(config, tmp_path / "broken", *flags) as process:
        out = process.communicate()[0]
    assert "resuming at step" in out
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    whole, broken = (params(tmp_path / name) for name in ("whole", "broken"))
    jax.tree.map(np.testing.assert_array_equal, whole, broken)

    before = (tmp_path / "broken/metrics.jsonl").read_bytes()
    with launch(config, tmp_path / "broken", *flags) as process:
        assert "done already" in process.communicate()[0]
    assert (tmp_path / "broken/metrics.jsonl").read_bytes() == before
    with launch(config, tmp_path / "broken", *flags, "--config.max_text=21") as process:
        out = process.communicate()[0]
    assert process.returncode == 1
    assert "holds another model (max_text is 22 there and 21 now)" in out


def test_bad_configurations_are_refused_before_anything_is_written(smoke_config, image_tokenizer, tmp_path):
    good = smoke_config | {"image_tokenizer": str(image_tokenizer)}
    bad = {
        "did you mean 'steps'": {"stepz": 3},
        "lower max_text": {"max_text": 500},
        "no image tokenizer": {"image_tokenizer": "nowhere"},
        "unknown preset": {"preset": "huge"},
        "mixture": {"mixture": {"t2i": 0}},
        "mesh": {"mesh": {"data": 3, "fsdp": 1, "tensor": 1}},
        "batch_size": {"batch_size": 0},
        "shards": {"batch_size": 12},
        "2 parts of `accumulate`": {"accumulate": 2},
        "config.program": {"program": "gan"},
        "model.dtype": {"model": {"dtype": "float64"}},
    }
    for message, change in bad.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(good | change, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_drop_what_will_be_written_again_and_a_torn_line(tmp_path):
    with metrics.Metrics(tmp_path, 10) as m:
        for step in (1, 2, 3):
            m.write(step, {"loss": float(step)}, 100)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "lo')
    with metrics.Metrics(tmp_path, 10, resume_step=2) as m:
        m.write(3, {"loss": 30.0}, 100)
    assert losses(tmp_path) == {1: 1.0, 2: 2.0, 3: 30.0}


def test_progress_line_has_speed_and_eta(tmp_path, capsys):
    with metrics.Metrics(tmp_path, 3) as m:
        time.sleep(0.01)
        m.write(1, {"loss": 2.5}, 100)
    line = capsys.readouterr().out
    assert "step 1/3" in line
    assert "loss 2.5" in line
    assert "tokens/s" in line
    assert "ETA" in line
