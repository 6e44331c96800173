"""Checkpoints: there and back on other meshes, retention, saves that fail, numbers that aren't finite."""

import contextlib
import errno
import os
import re
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import place, restore_tiny, steps_in, tiny

from mmada_jax.devices import sharding
from mmada_jax.train import optim
from mmada_jax.weights import checkpoint
from mmada_jax.weights.arrays import open_params
from mmada_jax.weights.checkpoint import Checkpoints
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.state import TrainState, all_finite, init_state
from mmada_jax.weights.workdir import (
    newest_step,
)


def test_a_state_comes_back_on_another_mesh(tmp_path):
    optimizer = optim.make(optim.OptimConfig(), 10)
    init, _, eight = place(sharding.make_mesh(fsdp=4, tensor=2), optimizer)
    state = init_state(jax.random.key(0), init, optimizer, eight)
    state = state._replace(step=jnp.int32(7))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    _, shapes, one = place(sharding.make_mesh(devices=jax.devices()[:1]), optimizer)
    with Checkpoints(tmp_path) as checkpoints:
        back = checkpoints.restore(shapes, one)
        alone = sharding.put_params(open_params(newest_step(tmp_path) / "params"), one.params)
    assert int(back.step) == 7
    jax.tree.map(np.testing.assert_array_equal, back, state)
    jax.tree.map(np.testing.assert_array_equal, alone, state.params)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(back.params))


def test_moments_lie_as_their_params_do():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    for name in ("adamw", "muon"):
        _, shapes, shardings = place(mesh, optim.make(optim.OptimConfig(name=name), 10))
        wanted = {
            (path[-1].key, x.shape): s.spec
            for (path, x), s in zip(
                jax.tree.leaves_with_path(shapes.params), jax.tree.leaves(shardings.params), strict=True
            )
        }
        found = 0
        for (path, x), s in zip(
            jax.tree.leaves_with_path(shapes.opt_state), jax.tree.leaves(shardings.opt_state), strict=True
        ):
            if hasattr(path[-1], "key"):  # a param's moment; the rest are counters and constants
                assert s.spec == wanted[path[-1].key, x.shape], (name, path)
                found += 1
        assert found >= len(wanted)


def test_the_newest_few_are_kept_and_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(TrainState(np.int32(step), {"w": jnp.ones(2)}, {"count": jnp.int32(0)}))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]


def test_an_unfinished_save_is_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(TrainState(np.int32(1), {"w": jnp.ones(2)}, {"count": jnp.int32(0)}))
    (tmp_path / "checkpoints/2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1


def test_moments_that_are_not_finite_are_neither_saved_nor_resumed(tmp_path, capsys):
    def moments(step, value):
        return tiny(step)._replace(opt_state={"m": jnp.full(8, value, jnp.float32)})

    poisoned = moments(2, np.nan)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(moments(1, 0.5))
        with pytest.raises(FloatingPointError, match=r"optimizer are not finite after step 2 .* step 1\. "):
            checkpoints.save(poisoned)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "all_finite", lambda _: True)  # as an older version did
            checkpoints.save(poisoned)
    with Checkpoints(tmp_path) as checkpoints:
        assert int(restore_tiny(checkpoints, moments(0, 0.0)).step) == 1
    assert steps_in(tmp_path) == ["1", "2.damaged"]
    assert "its numbers of the optimizer are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_params_that_are_not_finite_are_neither_saved_nor_started_from(tmp_path, capsys, bad):
    def poisoned(step):
        state = tiny(step)
        return state._replace(params={"w": state.params["w"].at[7].set(bad)})

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(tiny(1))
        with pytest.raises(FloatingPointError, match=r"after step 2 .* resumes from step 1\. "):
            checkpoints.save(poisoned(2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "all_finite", lambda _: True)  # as an older version did
            checkpoints.save(poisoned(3))
    with Checkpoints(tmp_path) as checkpoints:
        assert int(restore_tiny(checkpoints).step) == 1
    assert steps_in(tmp_path) == ["1", "3.damaged"]
    assert "step 3 is damaged (its params are not finite)" in capsys.readouterr().err


def test_what_is_finite_is_told_wherever_it_lies():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    x = np.zeros((8, 8), np.float32)
    for at in ((0, 0), (7, 7), None):
        y = x.copy()
        if at:
            y[at] = np.nan
        for tree in (y, jnp.asarray(y, jnp.bfloat16), jax.device_put(y, place)):
            assert all_finite({"a": tree, "b": np.zeros(3, np.int32)}) == (at is None)


@contextlib.contextmanager
def small_files():
    """No file may grow beyond 100 kB: what writes more gets an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def no_manifest():
    """The disk is full when the arrays are written."""

    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmada_jax.weights.checkpoint.write_manifest", fail)
        yield


@contextlib.contextmanager
def no_folder():
    """The disk is full when the save begins."""

    def fail(path, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "mkdir", fail)
        yield


FULL = {small_files: "File too large", no_manifest: "No space left", no_folder: "No space left"}


@pytest.mark.parametrize("full", FULL)
def test_a_save_that_fails_costs_only_itself(tmp_path, capsys, full):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(tiny(step))
        assert checkpoints.latest() == 2
        with full():
            for step in (3, 4):
                checkpoints.save(tiny(step))
                assert checkpoints.latest() == 2
        assert checkpoints.failed == 2
        assert {"1", "2"} <= set(steps_in(tmp_path))
        checkpoints.save(tiny(5))
        assert checkpoints.latest() == 5
        assert steps_in(tmp_path) == ["2", "5"]  # nothing is left to fill the disk
        assert checkpoints.failed == 2
        jax.tree.map(np.testing.assert_array_equal, restore_tiny(checkpoints), tiny(5))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2
    for line, step in zip(lines, (3, 4), strict=True):
        assert f"the checkpoint of step {step} could not be saved" in line
        assert FULL[full] in line
        assert re.search(r"it needs 1\.0 MB, [\d,.]+ MB are free; going on without it$", line)


@pytest.mark.parametrize("full", FULL)
def test_the_last_save_must_not_fail(tmp_path, full):
    def save(*steps):
        with Checkpoints(tmp_path) as checkpoints:
            for step in steps[:-1]:
                checkpoints.save(tiny(step))
            checkpoints.latest()
            with full():
                checkpoints.save(tiny(steps[-1]))
                checkpoints.latest()

    with pytest.raises(
        OSError, match=rf"step 1 could .*{FULL[full]}.*; the newest complete step is none: "
    ):
        save(1)
    with pytest.raises(OSError, match=r"step 3 could not .* newest complete step is 2: make room in "):
        save(2, 3)
    assert steps_in(tmp_path) == ["2"]


def test_another_error_is_not_hidden_by_that_of_the_last_save(tmp_path, capsys):
    def fail():
        with no_manifest(), Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(tiny(1))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "step 1 could not be saved" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run (1)", "a[b", "50%", "x*?", "ünï"])
def test_any_other_folder_is_taken(tmp_path, name):
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(tiny(1))
    with Checkpoints(tmp_path / name) as checkpoints:
        assert int(restore_tiny(checkpoints).step) == 1


def test_a_link_to_itself_is_an_error_with_its_name(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for use in (Checkpoints, newest_step, open_folder):
        with pytest.raises(OSError, match="loop"):
            use(tmp_path / "loop")
