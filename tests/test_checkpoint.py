"""Checkpoints: there and back on other meshes, retention, what is missing, what is damaged."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax import disk
from mmada_jax.devices import sharding
from mmada_jax.nets import transformer
from mmada_jax.train import optim
from mmada_jax.weights import checkpoint
from mmada_jax.weights.arrays import open_params, write_params
from mmada_jax.weights.checkpoint import Checkpoints, newest_params, trust
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.lazy import Lazy
from mmada_jax.weights.manifest import MANIFEST, fingerprint, verify_manifest, write_manifest
from mmada_jax.weights.state import TrainState, all_finite, init_state, state_shardings
from mmada_jax.weights.workdir import (
    FILES,
    NAMES,
    check_files,
    check_workdir,
    claim_workdir,
    claimed,
    newest_step,
    read_config,
)

CONFIG = transformer.Config(
    d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_mlp=32, vocab=64, max_len=16, dtype="float32"
)


def place(mesh, optimizer):
    def init(key):
        return transformer.init_params(key, CONFIG)

    shapes, shardings = state_shardings(mesh, init, transformer.param_axes(CONFIG), optimizer)
    return init, shapes, shardings


def test_a_state_comes_back_on_another_mesh(tmp_path):
    optimizer = optim.make(optim.Config(), 10)
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
        _, shapes, shardings = place(mesh, optim.make(optim.Config(name=name), 10))
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


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        newest_step(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no workdir of a training run: config\.json is missing"):
        read_config(tmp_path / "elsewhere")


def test_a_workdir_holds_one_model(tmp_path):
    config = {"preset": "digits", "model": {"dtype": "float32"}, "steps": 3}
    check_workdir(tmp_path / "new", config, ("preset", "model"))
    claim_workdir(tmp_path, config)
    assert read_config(tmp_path) == config
    check_workdir(tmp_path, config | {"steps": 5}, ("preset", "model"))
    with pytest.raises(ValueError, match=r"model\.dtype is 'float32' there and 'bfloat16' now"):
        check_workdir(tmp_path, config | {"model": {"dtype": "bfloat16"}}, ("preset", "model"))
    check_workdir(tmp_path, config | {"model": {"dtype": "bfloat16"}}, ("model",), free=("model.dtype",))


# ---- Damage ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with one step, and what it takes to restore it on one device."""
    workdir = tmp_path_factory.mktemp("saved")
    optimizer = optim.make(optim.Config(), 10)
    init, shapes, one = place(sharding.make_mesh(devices=jax.devices()[:1]), optimizer)
    state = init_state(jax.random.key(0), init, optimizer, one)._replace(step=jnp.int32(3))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state)
    return workdir, shapes, one


def payload(step):
    """The largest file of a step: arrays, of which Orbax keeps no checksum."""
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


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


def tiny(step):
    """A state of a megabyte, and what it takes to restore it."""
    w = jnp.asarray(np.random.default_rng(step).normal(size=1 << 18), jnp.float32)
    return TrainState(np.int32(step), {"w": w}, {"count": jnp.int32(step)})


def restore_tiny(checkpoints, like=None):
    state = like or tiny(0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return checkpoints.restore(shapes, jax.tree.map(lambda _: one, state))


def steps_in(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


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
    flip(payload(step))
    trust(tmp_path / "run")
    with pytest.raises(ValueError, match="has changed"):
        newest_params(tmp_path / "run")
    (step / MANIFEST).unlink()
    shutil.rmtree(step / "params/d")
    with pytest.raises(ValueError, match=r"can't be trusted.*checkpoints/3: params "):
        trust(tmp_path / "run")
    with pytest.raises(ValueError, match="it has no arrays"):
        trust(tmp_path)


def restore(workdir, shapes, shardings):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(shapes, shardings)


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


def raising(error):
    def call(*_, **__):
        raise error

    return call


# ---- Values that are not finite --------------------------------------------------------------------


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


# ---- One owner -------------------------------------------------------------------------------------


def test_a_workdir_has_one_owner_until_that_ends_and_readers_need_not_wait(tmp_path):
    with Checkpoints(tmp_path) as first:
        first.save(tiny(1))
        first.latest()
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"another process has .* process {os.getpid()} on "):
                Checkpoints(tmp_path)
        assert newest_params(tmp_path)[1] == 1
        first.save(tiny(2))
    with Checkpoints(tmp_path) as second:
        assert second.latest() == 2


def test_a_killed_owner_leaves_no_lock(tmp_path):
    program = "import sys, time; from mmada_jax.weights.workdir import claimed\n"
    program += "with claimed(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with (
            pytest.raises(ValueError, match=rf"has this .*process {process.pid} on "),
            claimed(tmp_path),
        ):
            pass
        process.kill()
        process.wait()
        with claimed(tmp_path):
            pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.flock", raising(OSError(errno.ENOLCK, "No locks available")))
    with claimed(tmp_path):
        assert "can't be locked (No locks available)" in capsys.readouterr().err


# ---- The other files of a workdir ------------------------------------------------------------------


def change_a_bit(path):
    """JSON that is still JSON."""
    text = path.read_text()
    path.write_text(text.replace("7", "6", 1))


FILE_DAMAGE = {
    "is no JSON|was changed": lambda path: path.write_text("{"),
    "it lacks|was changed": lambda path: path.write_text("{}"),
    "no UTF-8|was changed": lambda path: path.write_bytes(b"\xff" + path.read_bytes()),
    "no JSON|was changed": lambda path: path.write_text(""),
    "was changed": change_a_bit,
    "has no": lambda path: path.unlink(),
}


@pytest.mark.parametrize("what", FILE_DAMAGE)
@pytest.mark.parametrize("name", [*NAMES, FILES])
def test_a_damaged_file_of_a_workdir_is_named(tmp_path, name, what):
    texts = {name: json.dumps({"seven": 7}) for name in NAMES[1:]}
    claim_workdir(tmp_path, {"seven": 7}, texts)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(tiny(1))
    check_files(tmp_path)
    if name == FILES and what == "was changed":
        return  # its own digits are those of the others' hashes
    FILE_DAMAGE[what](tmp_path / name)
    for check in (check_files, lambda workdir: check_workdir(workdir, {}, ())):
        with pytest.raises((ValueError, FileNotFoundError), match=what) as error:
            check(tmp_path)
        assert name in str(error.value)
        assert f"trust --src {tmp_path}" in str(error.value)
    if (tmp_path / name).exists() or name == FILES:
        trust(tmp_path)
        check_files(tmp_path)


@pytest.mark.parametrize("before", ["nothing", "another version", "this version"])
@pytest.mark.parametrize("n", range(5))  # so many files are written before the program is killed
def test_a_start_may_be_killed_at_every_moment(tmp_path, before, n):
    texts = {"tokenizer.json": "1"}
    if before != "nothing":
        claim_workdir(tmp_path, {"number": 1}, texts)
    if before == "another version":
        (tmp_path / FILES).unlink()
    write, left = disk.write_whole, [None] * n

    def cut_off(path, text):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write(path, text)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(disk, "write_whole", cut_off)
        claim_workdir(tmp_path, {"number": 2}, {"tokenizer.json": "2"})
    check_files(tmp_path)
    claim_workdir(tmp_path, {"number": 3}, {"tokenizer.json": "3"})
    assert read_config(tmp_path) == {"number": 3}
    check_files(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_workdir_with_steps_and_no_configuration_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(tiny(1))
    (tmp_path / "checkpoints/1" / MANIFEST).write_text("{}")  # as an older version's: no hashes of files
    with pytest.raises(ValueError, match=r"has checkpoints but no config\.json"):
        check_workdir(tmp_path, {}, ())


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


# ---- Saves that fail -------------------------------------------------------------------------------


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


# ---- Streaming -------------------------------------------------------------------------------------


def test_params_are_streamed_in_pieces_and_come_back_in_any_slice(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, n_layers=3, d_model=512, vocab=10_000)
    shapes = transformer.param_shapes(config)
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    asked = []

    def lazy(array):
        def read(index):
            asked.append(array[index].nbytes)
            return array[index]

        return Lazy(array.shape, array.dtype, read)

    monkeypatch.setattr("mmada_jax.weights.lazy.PIECE", 1 << 20)
    counted = []
    axes = transformer.param_axes(config)
    write_params(tmp_path / "params", jax.tree.map(lazy, arrays), axes, counted.append)
    total = sum(x.nbytes for x in jax.tree.leaves(arrays))
    assert sum(counted) == sum(asked) == total
    # One chunk of rows at least: 256 of the head, 8192 of the embedding.
    assert max(asked) == 8192 * 512 * 4
    back = open_params(tmp_path / "params")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), back, arrays)
    np.testing.assert_array_equal(back["head_DV"][3:300, 8000:9000], arrays["head_DV"][3:300, 8000:9000])
    np.testing.assert_array_equal(back["blocks"]["q_DHK"][1], arrays["blocks"]["q_DHK"][1])
    verify_manifest(tmp_path / "params")


# ---- Places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run[1]", "[!a]", "a\\b"])
def test_a_folder_that_no_arrays_can_be_written_to_is_refused_at_the_start(tmp_path, name):
    for write in (Checkpoints, lambda path: write_params(path, {}, None)):
        with pytest.raises(ValueError, match=r"can't be written to .*; name another folder"):
            write(tmp_path / name / "run")
    assert not list(tmp_path.iterdir())


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
