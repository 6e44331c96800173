"""A workdir: its owner, its small files, and the model that they describe."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from states import counting, raising, tiny

from mmada_jax import storage
from mmada_jax.data import digits
from mmada_jax.nets import transformer
from mmada_jax.serve.api import MMaDA
from mmada_jax.train import runs, supervised
from mmada_jax.train.supervised import train
from mmada_jax.weights import folder, lazy
from mmada_jax.weights.checkpoint import Checkpoints, newest_params, trust
from mmada_jax.weights.folder import (
    IMAGE_TOKENIZER,
    image_tokenizer_of,
    keep_image_tokenizer,
    open_folder,
)
from mmada_jax.weights.inspect import inspect
from mmada_jax.weights.manifest import MANIFEST
from mmada_jax.weights.workdir import (
    CONFIG,
    FILES,
    MODEL,
    NAMES,
    check_files,
    check_workdir,
    claim_workdir,
    claimed,
    newest_step,
    read_config,
    record_files,
)


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
@pytest.mark.parametrize("n", range(6))  # so many files are written before the program is killed
def test_a_start_may_be_killed_at_every_moment(tmp_path, before, n):
    texts = {"tokenizer.json": "1"}
    if before != "nothing":
        claim_workdir(tmp_path, {"number": 1}, texts)
    if before == "another version":
        (tmp_path / FILES).unlink()
    write, left = storage.write_whole, [None] * n

    def cut_off(path, text):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write(path, text)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(storage, "write_whole", cut_off)
        claim_workdir(tmp_path, {"number": 2}, {"tokenizer.json": "2"}, {"model": 2})
    check_files(tmp_path)
    # The config.json of an older version describes its model, so it stays until model.json is there.
    if (tmp_path / "config.json").is_file() and read_config(tmp_path) == {"number": 2}:
        assert json.loads((tmp_path / MODEL).read_text()) == {"model": 2}
    claim_workdir(tmp_path, {"number": 3}, {"tokenizer.json": "3"}, {"model": 3})
    assert read_config(tmp_path) == {"number": 3}
    assert json.loads((tmp_path / MODEL).read_text()) == {"model": 3}
    check_files(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_workdir_with_steps_and_no_configuration_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(tiny(1))
    (tmp_path / "checkpoints/1" / MANIFEST).write_text("{}")  # as an older version's: no hashes of files
    with pytest.raises(ValueError, match=r"has checkpoints but no config\.json"):
        check_workdir(tmp_path, {}, ())


# ---- Which model a workdir holds -----------------------------------------------------------------


@pytest.fixture
def workdir(model_workdir, tmp_path):
    """A copy of a model's workdir that may be changed."""
    return shutil.copytree(model_workdir, tmp_path / "run")


def make_older(workdir):
    """A workdir as it was left before there was a model.json."""
    for name in (MODEL, FILES):
        (workdir / name).unlink()
    if (workdir / IMAGE_TOKENIZER).is_dir():
        shutil.rmtree(workdir / IMAGE_TOKENIZER)
    record_files(workdir)


def same_source(a, b):
    for name in ("kind", "model_type", "config", "values", "generation", "step"):
        assert getattr(a, name) == getattr(b, name), name
    assert lazy.sha256(a.tensors()) == lazy.sha256(b.tensors())
    ours, theirs = image_tokenizer_of(a), image_tokenizer_of(b)
    assert lazy.sha256(ours.tensors()) == lazy.sha256(theirs.tensors())


def test_a_workdir_stands_by_itself(model_workdir, workdir, tmp_path):
    # Neither the configuration of its run nor anything outside of the workdir says what its model is.
    claim_workdir(workdir, {"program": "model"})
    source = open_folder(workdir)
    same_source(source, open_folder(model_workdir))
    assert source.image_tokenizer == workdir / IMAGE_TOKENIZER


def test_model_json_says_all_that_the_plan_of_the_run_says(model_workdir):
    run = runs.parse(read_config(model_workdir))
    what, source = runs.plan(run, model_workdir), open_folder(model_workdir)
    assert source.config == what.model
    assert source.values["image_grid"] == list(what.grid)
    assert source.values["max_text"] == run.max_text
    assert source.values["codebook_size"] == what.vocab.codebook_size == what.vq.codebook_size
    assert source.generation == digits.GENERATION
    assert image_tokenizer_of(source).config == what.vq


def test_without_weights_no_array_is_looked_for(workdir):
    shutil.rmtree(workdir / "checkpoints")
    source = open_folder(workdir, weights=False)
    assert source.step is None
    assert source.params == transformer.param_shapes(source.config)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        open_folder(workdir)


def test_an_older_workdir_is_one_line_with_a_remedy_that_helps(model_workdir, workdir):
    make_older(workdir)
    for use in (open_folder, MMaDA.load, runs.open_start):
        with pytest.raises(ValueError, match=rf"has no model\.json.* trust --src {workdir} writes it") as e:
            use(workdir)
        assert "\n" not in str(e.value)
    trust(workdir)
    assert runs.describe_older(workdir) == [workdir / MODEL]
    same_source(open_folder(workdir), open_folder(model_workdir))
    assert runs.describe_older(workdir) == []


def test_an_older_image_tokenizer_opens_as_it_is(image_tokenizer, tmp_path):
    older = shutil.copytree(image_tokenizer, tmp_path / "older")
    make_older(older)
    a, b = open_folder(older), open_folder(image_tokenizer)
    assert (a.config, a.kind) == (b.config, "workdir")
    assert json.dumps(a.values) == json.dumps(b.values)  # as they are exported


def test_resuming_an_older_workdir_describes_its_model(smoke_config, image_tokenizer, tmp_path, capsys):
    config = smoke_config | {"image_tokenizer": str(image_tokenizer), "steps": 2, "eval_every": 0}
    train(config, tmp_path / "whole")
    train(config | {"steps": 1}, tmp_path / "older")
    make_older(tmp_path / "older")
    train(config, tmp_path / "older")
    whole, older = (inspect(tmp_path / name) for name in ("whole", "older"))
    assert older["step"] == 2
    assert older["state_sha256"] == whole["state_sha256"]
    same_source(open_folder(tmp_path / "older"), open_folder(tmp_path / "whole"))


@pytest.mark.parametrize("kind", ["model", "image tokenizer"])
def test_a_configuration_from_before_there_was_a_field_is_the_same_run(
    kind, smoke_config, model_workdir, image_tokenizer, tmp_path
):
    origin = model_workdir if kind == "model" else image_tokenizer
    shutil.copytree(origin, tmp_path / "run")
    values = json.loads((tmp_path / "run" / CONFIG).read_text())
    new = ("lora", "base_dtype", "average", "adversarial", "adversarial_start", "data_root", "held_out")
    new += ("model", "image_size", "init", "data") if kind == "image tokenizer" else ()
    older = {name: value for name, value in values.items() if name not in new}
    assert len(older) < len(values)
    (tmp_path / "run" / CONFIG).write_text(json.dumps(older))
    record_files(tmp_path / "run")
    run = runs.parse(values)
    supervised.check_same(run, tmp_path / "run")
    change = {"lora": {"rank": 2}} if kind == "model" else {"average": 0.5}
    with pytest.raises(ValueError, match="holds another model"):
        supervised.check_same(runs.parse(values | change), tmp_path / "run")


def test_a_start_verifies_the_image_tokenizer_once(smoke_config, image_tokenizer, tmp_path, monkeypatch):
    config = smoke_config | {"image_tokenizer": str(image_tokenizer), "steps": 1}
    train(config | {"eval_every": 0}, tmp_path)
    verified = counting(monkeypatch, folder, "verify_manifest")
    train(config | {"eval_every": 1}, tmp_path)
    assert verified == [tmp_path / IMAGE_TOKENIZER / "params"]


def test_another_image_tokenizer_in_the_workdir_is_refused(workdir, image_tokenizer):
    source = open_folder(image_tokenizer)
    keep_image_tokenizer(workdir, source)  # the same one
    changed = jax.tree.map(lambda x: x + np.float32(1), lazy.in_memory(source.params))
    other = dataclasses.replace(source, params=lazy.lazy(changed))
    with pytest.raises(ValueError, match=r"is another image tokenizer than the one in .*; choose"):
        keep_image_tokenizer(workdir, other)


def test_a_run_that_goes_on_has_the_image_tokenizer_that_it_began_with(workdir):
    run = runs.parse(read_config(workdir) | {"image_tokenizer": "elsewhere"})
    assert runs.image_tokenizer_path(run, workdir) == workdir / IMAGE_TOKENIZER
    with pytest.raises(
        ValueError, match=r"holds another model \(image_tokenizer is .* and 'elsewhere' now"
    ):
        supervised.check_same(run, workdir)


@pytest.mark.parametrize("change", [{"config": {}}, {"config": None}, {"computed": {"atention": "x"}}])
def test_a_model_json_that_was_spoilt_and_trusted_is_named(workdir, change):
    values = json.loads((workdir / MODEL).read_text())
    (workdir / MODEL).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=rf"{MODEL} is damaged or was changed"):
        open_folder(workdir)
    record_files(workdir)
    with pytest.raises(ValueError, match=rf"{MODEL} is damaged"):
        open_folder(workdir)
