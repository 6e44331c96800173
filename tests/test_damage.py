"""Damaged, lost and unfitting checkpoints are found before anything of them is used."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import flip, payload, place, raising, restore, restore_tiny, steps_in, tiny

from mmada_jax.devices import sharding
from mmada_jax.train import optim
from mmada_jax.weights import checkpoint
from mmada_jax.weights.arrays import open_params
from mmada_jax.weights.checkpoint import Checkpoints, newest_params, trust
from mmada_jax.weights.manifest import MANIFEST, fingerprint, verify_manifest, write_manifest
from mmada_jax.weights.state import init_state
from mmada_jax.weights.workdir import (
    newest_step,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with one step, and what it takes to restore it on one device."""
    workdir = tmp_path_factory.mktemp("saved")
    optimizer = optim.make(optim.OptimConfig(), 10)
    init, shapes, one = place(sharding.make_mesh(devices=jax.devices()[:1]), optimizer)
    state = init_state(jax.random.key(0), init, optimizer, one)._replace(step=jnp.int32(3))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state)
    return workdir, shapes, one


DAMAGE = {
    "has changed": flip,
    "bytes instead of": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "is missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_named_before_anything_is_restored(saved, tmp_path, what):
    workdir, shapes, one = saved
    shutil.copytree(workdir, tmp_path / "run")
    path = payload(tmp_path / "run" / "checkpoints" / "3" / "params")
    DAMAGE[what](path)
    named = rf"{path.name} .*{what}"
    with pytest.raises(ValueError, match=rf"/3 is damaged.*{named}"):
        newest_params(tmp_path / "run")
    with (
        Checkpoints(tmp_path / "run") as checkpoints,
        pytest.raises(ValueError, match=rf"no checkpoint in .* is whole.*step 3: .*{named}"),
    ):
        checkpoints.restore(shapes, one)
    assert (tmp_path / "run/checkpoints/3").is_dir()  # to start from scratch is not for us to decide


def test_damaged_steps_are_set_aside_and_the_one_before_is_taken(tmp_path, capsys):
    for again in range(2):
        with Checkpoints(tmp_path, keep=3) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(tiny(step))
        names = {step: payload(tmp_path / "checkpoints" / step) for step in ("2", "3")}
        for path in names.values():
            flip(path)
        with Checkpoints(tmp_path, keep=3) as checkpoints:
            back = restore_tiny(checkpoints)
            assert checkpoints.latest() == int(back.step) == 1
            jax.tree.map(np.testing.assert_array_equal, back, tiny(1))
        aside = ["2.damaged", "3.damaged"] + ["2.damaged.1", "3.damaged.1"] * again
        assert steps_in(tmp_path) == sorted(["1", *aside])
        for line, step in zip(capsys.readouterr().err.splitlines(), ("3", "2"), strict=True):
            assert f"step {step} is damaged" in line
            assert f"{names[step].name} has changed" in line
            assert line.endswith(f"called {aside[-1].replace('3', step)}; going on from step 1")


def test_a_checkpoint_of_another_model_is_no_damage(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(tiny(step))
        other = tiny(0)._replace(params={"w": jnp.zeros(3)})
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), other)
        with pytest.raises(ValueError, match=r"/2/params doesn't fit this run .* not \(3,\)"):
            checkpoints.restore(shapes, shapes)
    assert steps_in(tmp_path) == ["1", "2"]


def test_folders_of_weights_are_told_apart(saved, tmp_path):
    folder = tmp_path / "from_elsewhere"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    first = fingerprint(folder)
    assert first == fingerprint(folder)
    (folder / "model.safetensors").write_bytes(b"weighty")
    assert fingerprint(folder) != first
    step = newest_step(saved[0])
    assert fingerprint(step) == fingerprint(shutil.copytree(step, tmp_path / "copy"))


def test_every_file_is_in_the_manifest_but_what_the_commit_writes(saved):
    step = saved[0] / "checkpoints" / "3"
    verify_manifest(step)
    listed = json.loads((step / MANIFEST).read_text())["files"]
    there = {str(p.relative_to(step)) for p in step.rglob("*") if p.is_file()}
    assert there - set(listed) == {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}


def test_arrays_that_a_manifest_leaves_out_are_damage_and_other_files_are_not(saved, tmp_path):
    step = shutil.copytree(saved[0] / "checkpoints" / "3", tmp_path / "3")
    (step / "params/.DS_Store").write_bytes(b"x")
    (step / "params/notes.txt").write_text("x")
    verify_manifest(step)
    values = json.loads((step / MANIFEST).read_text())
    chunks = [name for name in values["files"] if "/d/" in name and name.startswith("params/")]
    del values["files"][chunks[0]]
    (step / MANIFEST).write_text(json.dumps(values))
    for part in ("", "params"):
        with pytest.raises(ValueError, match=rf"{chunks[0]} is not in {MANIFEST}"):
            verify_manifest(step, part)
    verify_manifest(step, "opt_state")


def test_a_step_whose_manifest_is_lost_or_damaged_is_refused_until_it_is_trusted(saved, tmp_path):
    workdir, shapes, one = saved
    shutil.copytree(workdir, tmp_path / "run")
    step = tmp_path / "run/checkpoints/3"
    (step / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"is damaged.*can't be read"):
        verify_manifest(step)
    (step / MANIFEST).unlink()
    for read in (newest_params, lambda path: restore(path, shapes, one)):
        with pytest.raises(ValueError, match=rf"{MANIFEST} is missing.* trust --src {tmp_path}/run\)"):
            read(tmp_path / "run")
    assert step / MANIFEST in trust(tmp_path / "run")
    newest_params(tmp_path / "run")
    restore(tmp_path / "run", shapes, one)

    # What is not whole can't be trusted, and what has a manifest already stays damaged.
    flip(payload(step / "params"))
    trust(tmp_path / "run")
    with pytest.raises(ValueError, match="has changed"):
        newest_params(tmp_path / "run")
    (step / MANIFEST).unlink()
    shutil.rmtree(step / "params/d")
    with pytest.raises(ValueError, match=r"can't be trusted.*checkpoints/3: params "):
        trust(tmp_path / "run")
    with pytest.raises(ValueError, match="it has no arrays"):
        trust(tmp_path)


EMPTIED = {
    "all": lambda params: [path.unlink() for path in params.rglob("*") if path.is_file()],
    "folder": shutil.rmtree,
    "store": lambda params: [
        path.unlink() for path in params.rglob("*") if path.is_file() and path.name != "_METADATA"
    ],
    "another": lambda params: (shutil.rmtree(params), shutil.copytree(params.parent / "opt_state", params)),
}


@pytest.mark.parametrize("how", EMPTIED)
def test_arrays_that_are_missing_are_found_though_the_manifest_lists_what_is_there(tmp_path, how, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(tiny(step))
    newest = tmp_path / "checkpoints/2"
    EMPTIED[how](newest / "params")
    write_manifest(newest)
    with Checkpoints(tmp_path) as checkpoints:
        if how == "another":  # whole by itself, but of no run like this one
            with pytest.raises(ValueError, match=r"/2/params doesn't fit this run .* missing w"):
                restore_tiny(checkpoints)
            return
        assert int(restore_tiny(checkpoints).step) == 1
    assert "step 2 is damaged (params" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["params", "opt_state"])
def test_a_step_that_loses_arrays_while_it_is_written_is_not_committed(tmp_path, capsys, lost):
    with pytest.MonkeyPatch.context() as patch, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(tiny(1))
        checkpoints.latest()
        written = checkpoint.missing

        def lose(folder):
            if folder.name == lost and folder.parent.name.startswith("2."):
                shutil.rmtree(folder / "d")
            return written(folder)

        patch.setattr(checkpoint, "missing", lose)
        checkpoints.save(tiny(2))
        assert checkpoints.latest() == 1
        checkpoints.save(tiny(3))
    assert steps_in(tmp_path) == ["1", "3"]
    assert re.search(f"step 2 could not be saved .*{lost} has lost arrays", capsys.readouterr().err)


def test_a_step_that_cannot_be_restored_is_set_aside(tmp_path, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(tiny(step))
    with Checkpoints(tmp_path) as checkpoints, pytest.MonkeyPatch.context() as patch:
        read = checkpoints._manager.restore

        def fail(step, **what):
            if step == 2:
                raise ValueError("DATA_LOSS: checksum of a node")
            return read(step, **what)

        patch.setattr(checkpoints._manager, "restore", fail)
        assert int(restore_tiny(checkpoints).step) == 1
    assert steps_in(tmp_path) == ["1", "2.damaged"]
    assert "step 2 is damaged (it can't be read: DATA_LOSS" in capsys.readouterr().err
    # Where none is whole nothing is renamed, and no memory is no damage.
    for error, message in (("DATA_LOSS", "no checkpoint in .* is whole"), ("RESOURCE_EXHAUSTED", "^RES")):
        with Checkpoints(tmp_path) as checkpoints, pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints._manager, "restore", raising(ValueError(error)))
            with pytest.raises(ValueError, match=message):
                restore_tiny(checkpoints)
        assert steps_in(tmp_path) == ["1", "2.damaged"]


def test_another_dtype_shape_or_leaf_is_an_error_and_never_a_cast(saved):
    workdir, shapes, one = saved

    def ask(**change):
        params = dict(shapes.params)
        for name, shape in change.items():
            params[name] = shape
        with Checkpoints(workdir) as checkpoints:
            checkpoints.restore(shapes._replace(params=params), one)

    norm = shapes.params["norm_D"]
    with pytest.raises(ValueError, match="norm_D is float32, bfloat16 is asked for"):
        ask(norm_D=jax.ShapeDtypeStruct(norm.shape, jnp.bfloat16))
    with pytest.raises(ValueError, match=r"norm_D has shape \(16,\), not \(17,\)"):
        ask(norm_D=jax.ShapeDtypeStruct((17,), jnp.float32))
    with pytest.raises(ValueError, match="missing other"):
        ask(other=norm)
    moments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes.opt_state)
    with (
        pytest.raises(ValueError, match=r"is (float32|int32|bool), bfloat16 is asked for"),
        Checkpoints(workdir) as checkpoints,
    ):
        checkpoints.restore(shapes._replace(opt_state=moments), one)


def test_reading_leaves_a_workdir_as_it_is(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    (tmp_path / "run/checkpoints/9.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    step = newest_step(tmp_path / "run")
    assert step == tmp_path / "run/checkpoints/3"
    open_params(step / "params")
    assert sorted(tmp_path.rglob("*")) == before
