"""The training program: one compilation, exact resume after whatever, bad configurations, metrics."""

import contextlib
import functools
import pathlib
import random
import re
import resource
import shutil
import signal
import time
import traceback

import jax
import numpy as np
import pytest
from conftest import save_params, xla_flags
from programs import Program

from configs import vq
from mmada_jax import config as config_lib
from mmada_jax.devices import sharding
from mmada_jax.diffusion import corrupt, loss
from mmada_jax.serve.api import MMaDA
from mmada_jax.train import metrics, optim, pictures
from mmada_jax.train import supervised as train_lib
from mmada_jax.train.runs import parse
from mmada_jax.train.supervised import make_step, model_program, place_frozen, train
from mmada_jax.weights import lazy
from mmada_jax.weights.arrays import open_params
from mmada_jax.weights.inspect import inspect
from mmada_jax.weights.state import init_state, state_shardings
from mmada_jax.weights.workdir import claim_workdir, claimed, newest_step, read_config

ROOT = pathlib.Path(__file__).parent.parent


def rows(workdir):
    return metrics.read(workdir / "metrics.jsonl")


def losses(workdir):
    return {row["step"]: row["loss"] for row in rows(workdir)}


def start(program, config, mesh):
    optimizer = optim.make(parse(config).optim, config["steps"])
    objective = program.objective
    _, shardings = state_shardings(mesh, objective.init_params, objective.axes, optimizer)
    state = init_state(jax.random.key(0), objective.init_params, optimizer, shardings)
    frozen, places = place_frozen(program, mesh)
    step_fn = make_step(objective, optimizer, mesh, shardings, program.accumulate, places)
    return state, (lambda *given: step_fn(*given, *frozen)) if frozen else step_fn


def two_steps(program, config, mesh):
    """The loss of the second step, the params after it, and the jitted step."""
    with jax.set_mesh(mesh):
        state, step_fn = start(program, config, mesh)
        for step in range(2):
            batch = program.encode(sharding.put_batch(mesh, program.load(step, None).rows))
            state, values = step_fn(state, jax.random.key(0), batch)
    return float(values["loss"]), jax.device_get(state.params), step_fn


@pytest.mark.slow
def test_step_compiles_once_and_meshes_agree(smoke_config, image_tokenizer, tmp_path):
    adamw = smoke_config["optim"] | {"name": "adamw", "eps": 1e-3}  # no sign(0) to amplify noise
    config = smoke_config | {"image_tokenizer": str(image_tokenizer), "optim": adamw}
    results = []
    one, two = {"devices": jax.devices()[:1]}, {"devices": jax.devices()[:2]}
    for accumulate, sizes in ((1, one), (1, {"data": 2, "fsdp": 2, "tensor": 2}), (2, two)):
        mesh = sharding.make_mesh(**sizes)
        program = model_program(parse(config | {"accumulate": accumulate}), tmp_path, mesh)
        *result, step_fn = two_steps(program, config, mesh)
        assert step_fn._cache_size() == 1
        results.append(result)
    (loss, params), *others = results
    for other_loss, other_params in others:
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other_params, params)


class Found(Exception):
    pass


def test_the_loss_is_found_in_three_files(smoke_config, image_tokenizer, tmp_path, monkeypatch):
    """docs/contributing.md says which: whoever looks for the loss comes through no other."""
    passed = {}

    def note(module, name, end):
        def noted(*args):
            files = [pathlib.Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
            ours = [
                str(file.relative_to(ROOT)) for file in files if file.is_relative_to(ROOT / "mmada_jax")
            ]
            passed[f"{module.__name__}.{name}"] = set(ours)
            return end(*args)

        monkeypatch.setattr(module, name, noted)

    def stop(*_):
        raise Found

    note(corrupt, "corrupt", corrupt.corrupt)
    note(loss, "weighted_nll", stop)
    with pytest.raises(Found):
        train(smoke_config | {"image_tokenizer": str(image_tokenizer)}, tmp_path)
    assert passed == {
        "mmada_jax.diffusion.corrupt.corrupt": {"mmada_jax/train/supervised.py"},
        "mmada_jax.diffusion.loss.weighted_nll": {"mmada_jax/train/supervised.py"},
    }


def launch(config, workdir, *flags):
    """launch/train.py on one device, as a user runs it."""
    command = [ROOT / "launch/train.py", "--config", config, "--workdir", workdir, *flags]
    return Program(command, {"XLA_FLAGS": xla_flags(1)})


def state_hash(workdir):
    report = inspect(workdir)
    return report["step"], report["state_sha256"]


@pytest.mark.slow
def test_resume_is_bit_exact_whatever_happened(smoke_config, image_tokenizer, tmp_path, capsys):
    steps, chance = 24, random.Random(0)
    change = {"image_tokenizer": str(image_tokenizer), "steps": steps, "save_every": 3}
    flags = [f"--config.{name}={value}" for name, value in change.items()]
    config = ROOT / "configs/pretrain.py:digits,smoke"
    with launch(config, tmp_path / "whole", *flags) as whole:
        assert f"step {steps}/{steps}" in whole.communicate()[0]
    want = state_hash(tmp_path / "whole")
    assert want[0] == steps

    def run_until(done, act):
        """Trains on; calls `act` with the process a little after the step `done`; its output."""
        with launch(config, tmp_path / "broken", *flags) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith(f"step {done}/"):
                    time.sleep(chance.uniform(0, 0.1))
                    act(process)
            return process.wait(), "".join(lines)

    for low, high in ((2, 5), (7, 10), (12, 14)):
        status, out = run_until(chance.randint(low, high), Program.kill)
        assert status == -signal.SIGKILL, out
    status, out = run_until(16, Program.terminate)
    assert status == 0, out
    assert "run again to resume" in out

    # The disk is full: small files can be written, arrays can not.
    stopped = newest_step(tmp_path / "broken").name
    status, out = run_until(
        int(stopped) + 1, lambda p: resource.prlimit(p.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    )
    assert status == 1
    assert f"step {steps}/{steps}" in out
    message = rf"error: the checkpoint of step {steps} could not be saved .* newest complete step is (\d+):"
    newest = re.search(message, out)[1]
    assert int(stopped) <= int(newest) < steps
    failed = len(re.findall("^warning: the checkpoint of step .* could not be saved .* free", out, re.M))
    assert "Traceback" not in out
    assert failed == (steps - 1) // 3 - int(newest) // 3
    assert (
        rows(tmp_path / "broken")[-1]["failed_saves"] == failed - 1
    )  # it is known when the next save begins

    for damaged in (False, True):
        if damaged:
            flip(max(newest_step(tmp_path / "broken").rglob("*/d/*"), key=lambda p: p.stat().st_size))
        with launch(config, tmp_path / "broken", *flags) as process:
            out = process.communicate()[0]
        assert (f"step {steps} is damaged" in out) == damaged
        assert f"resuming at step {21 if damaged else newest}\n" in out
        assert state_hash(tmp_path / "broken") == want
        assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    # Time that was lost stays lost.
    assert np.all(np.diff([row["wall_seconds"] for row in rows(tmp_path / "broken")]) > 0)
    assert rows(tmp_path / "broken")[-1]["goodput"] < rows(tmp_path / "whole")[-1]["goodput"]

    before = (tmp_path / "broken/metrics.jsonl").read_bytes()
    train(smoke_config | change, tmp_path / "broken")
    assert "done already" in capsys.readouterr().out
    assert (tmp_path / "broken/metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"holds another model \(max_text is 24 there and 21 now\)"):
        train(smoke_config | change | {"max_text": 21}, tmp_path / "broken")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_state_hash_is_that_of_every_bit(image_tokenizer, tmp_path):
    config = vq.get_config("digits,smoke").to_dict()
    params = lazy.in_memory(open_params(newest_step(image_tokenizer) / "params"))
    opt_state = {"count": np.int32(3), "mu": params}
    changed = opt_state | {"count": np.int32(4)}
    split = jax.device_put(params, sharding.replicated(sharding.make_mesh()))
    reports = []
    for i, (weights, state) in enumerate(((params, opt_state), (split, opt_state), (params, changed))):
        save_params(tmp_path / str(i), config, weights, state)
        reports.append(inspect(tmp_path / str(i)))
    assert len({report["sha256"] for report in reports}) == 1
    assert reports[0]["state_sha256"] == reports[1]["state_sha256"] != reports[2]["state_sha256"]
    assert reports[0]["step"] == 1


def test_a_step_whose_params_give_no_gradient_is_not_resumed_for_ever(tmp_path):
    # The second step takes params to where they are finite and gradients are not; nothing is saved while
    # updates are skipped.
    flags = [
        "--config.steps=30",
        "--config.save_every=1",
        "--config.optim.lr=1e3",
        "--config.optim.warmup=1",
        "--config.commitment=1e9",
    ]
    with launch(ROOT / "configs/vq.py:digits,smoke", tmp_path, *flags) as process:
        out = process.communicate()[0]
    assert process.returncode == 1
    assert re.search(r"error: 20 updates in a row .* resumes from step 1\. Lower optim\.lr, .*\n$", out)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2.damaged"]
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 0, *range(1, 21)]


@pytest.fixture
def tiny_vq(monkeypatch):
    """A run of the image tokenizer on one device, which saves each step; steps in `bad` get pixels that are
    NaN."""
    one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", one)
    bad, load = set(), pictures.Canvases.load

    def spoilt(self, step, which):
        loaded = load(self, step, which)
        return loaded._replace(rows=loaded.rows + np.float32(np.nan)) if step in bad else loaded

    monkeypatch.setattr(pictures.Canvases, "load", spoilt)
    few = {"steps": 4, "batch_size": 8, "save_every": 1, "log_every": 1}
    config = vq.get_config("digits,smoke").to_dict() | few
    return config | {"optim": config["optim"] | {"max_skipped": 2}}, bad


def test_batches_that_are_not_finite_cost_their_steps_alone(tiny_vq, tmp_path):
    config, bad = tiny_vq
    bad |= {1, 3}
    state = train(config, tmp_path / "run")  # though the last batch is one of them
    assert int(state.step) == 4
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 1, 1, 2]
    assert newest_step(tmp_path / "run").name == "4"

    # Too many in a row end it, and it goes on when the data is mended.
    bad |= {2}
    with pytest.raises(
        FloatingPointError, match=r"2 updates in a row .* the next run starts from scratch\."
    ):
        train(config, tmp_path / "other")
    bad.clear()
    assert int(train(config, tmp_path / "other").step) == 4


def test_nothing_is_saved_at_sigterm_that_a_checkpoint_has_already(tiny_vq, tmp_path, monkeypatch):
    config, bad = tiny_vq
    bad |= {1}
    asked = []

    @contextlib.contextmanager
    def at_the_second(mesh):
        yield lambda: (asked.append(1) or len(asked) == 2) * signal.SIGTERM

    monkeypatch.setattr(train_lib, "watch_signals", at_the_second)
    assert int(train(config, tmp_path).step) == 2
    assert newest_step(tmp_path).name == "1"


def test_a_run_whose_workdir_is_another_runs_changes_nothing_there(tiny_vq, tmp_path):
    config, _ = tiny_vq
    claim_workdir(tmp_path, config_lib.to_dict(parse(config)))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with claimed(tmp_path), pytest.raises(ValueError, match="another process has this workdir"):
        train(config | {"steps": 9}, tmp_path)
    after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {path: data for path, data in after.items() if path.name != ".lock"} == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_damaged_file_of_a_workdir_is_named_by_whoever_opens_it(model_workdir, tmp_path, name):
    workdir = shutil.copytree(model_workdir, tmp_path / "run")
    config, path = read_config(workdir), workdir / name
    path.write_text(path.read_text() + " ")  # still JSON
    begin = config | {"init": str(workdir)}
    for use in (
        lambda: train(config, workdir),
        lambda: train(begin, tmp_path / "next"),
        lambda: inspect(workdir),
        lambda: MMaDA.load(workdir),
    ):
        with pytest.raises(ValueError, match=rf"run/{name} is damaged or was changed"):
            use()
    assert not (tmp_path / "next").exists()


def test_params_that_are_not_finite_are_no_start(model_workdir, smoke_config, image_tokenizer, tmp_path):
    stored = open_params(newest_step(model_workdir) / "params")
    params = jax.tree.map(lambda x: np.full_like(x, np.nan), lazy.in_memory(stored))
    config = smoke_config | {"image_tokenizer": str(image_tokenizer)}
    texts = {"tokenizer.json": (model_workdir / "tokenizer.json").read_text()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmada_jax.weights.checkpoint.all_finite", lambda _: True)
        save_params(tmp_path / "bad", config, params, texts=texts)
    with pytest.raises(ValueError, match=r"config\.init: the params in .*bad are not finite"):
        train(config | {"init": str(tmp_path / "bad")}, tmp_path / "run")


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
