"""Whole runs whose folders lie in a bucket, killed and damaged: the same numbers as on a disk."""

import contextlib
import json
import pathlib
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from buckets import environment, skip_without_server, upload
from conftest import xla_flags
from programs import Program
from states import flip, payload

from mmada_jax import storage
from mmada_jax.serve.api import MMaDA
from mmada_jax.train import metrics
from mmada_jax.train.rl import loop
from mmada_jax.train.supervised import train
from mmada_jax.weights.convert import from_torch, to_torch
from mmada_jax.weights.inspect import inspect
from mmada_jax.weights.manifest import COMMITTED
from mmada_jax.weights.workdir import newest_step, steps
from tests.rl_toys import history, one_device, params, rl_config, stopped_in, toy_rewards  # noqa: F401

skip_without_server()
ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "configs/pretrain.py:digits,smoke"


@pytest.fixture
def place(request, folder, tmp_path):
    """A folder on a disk, or in a bucket."""
    return folder if request.param == "bucket" else tmp_path


@contextlib.contextmanager
def launch(proxy, cwd, workdir, *flags, devices=1):
    words = [ROOT / "launch/train.py", "--config", CONFIG, "--workdir", workdir, *flags]
    known = {name: value for name, value in environment(proxy).items()}
    here = pathlib.Path.cwd()
    with contextlib.chdir(cwd), Program(words, known | {"XLA_FLAGS": xla_flags(devices)}) as process:
        try:
            with contextlib.chdir(here):
                yield process
        finally:
            process.kill()


def said(process):
    """What a program prints until it ends, but for TensorStore's search for credentials."""
    out = process.communicate()[0]
    return "".join(line for line in out.splitlines(True) if "google_auth_provider" not in line)


def hash_of(workdir):
    report = inspect(workdir)
    return report["step"], report["state_sha256"]


def losses(workdir):
    return {row["step"]: row["loss"] for row in metrics.read(workdir / "metrics.jsonl")}


FLAGS = ["--config.steps=8", "--config.save_every=2", "--config.log_every=1", "--config.eval_every=4",
         "--config.eval_rows=8", "--config.samples=1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(proxy, image_tokenizer, tmp_path_factory):
    """An undisturbed run on a disk."""
    cwd = tmp_path_factory.mktemp("whole")
    with launch(proxy, cwd, cwd / "run", *FLAGS, f"--config.image_tokenizer={image_tokenizer}") as process:
        out = said(process)
    assert "step 8/8" in out, out
    return cwd / "run"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "bucket"], indirect=True)
def test_a_run_that_is_killed_while_it_saves_goes_on_to_the_bit(
    whole, place, proxy, image_tokenizer, tmp_path
):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    tokenizer = image_tokenizer
    if storage.in_bucket(place):
        tokenizer = upload(image_tokenizer, f"{place.name}-tokenizer")
    flags = [*FLAGS, f"--config.image_tokenizer={tokenizer}"]
    # Killed when the step's arrays are written, before the object that commits it.
    if storage.in_bucket(place):
        proxy.fails = lambda request: (
            503 if COMMITTED in request.target and "%2F4%2F" in request.target else None
        )
    with launch(proxy, cwd, place / "run", *flags) as process:
        for line in process.stdout:
            if line.startswith("step 5/"):
                process.kill()
        assert process.wait() == -signal.SIGKILL
    proxy.fails = lambda request: None
    known = steps(place / "run")
    assert known in ([2], [2, 4])
    with launch(proxy, cwd, place / "run", *flags) as process:
        out = said(process)
    assert f"resuming at step {known[-1]}\n" in out and "step 8/8" in out, out
    assert "warning" not in out, out
    assert hash_of(place / "run") == hash_of(whole)
    assert losses(place / "run") == losses(whole)
    there = {name.split("/")[0] for name in storage.files_below(place / "run")}
    assert there - {".lock"} == {name.split("/")[0] for name in storage.files_below(whole)} - {".lock"}
    assert len(list((place / "run/tensorboard").iterdir())) == 1
    assert {p.name for p in (place / "run/samples").iterdir()} == {
        p.name for p in (whole / "samples").iterdir()
    }
    assert not list(cwd.iterdir())
    # What was trained is used where it lies.
    assert MMaDA.load(str(place / "run")).generate("1+1", max_new=4, block=4, steps=4).text is not None


@pytest.mark.slow
def test_two_processes_save_and_restore_one_state_and_find_a_flipped_byte(
    proxy, folder, image_tokenizer, free_port, tmp_path
):
    flags = [f"--config.image_tokenizer={image_tokenizer}", "--config.save_every=2", "--config.log_every=1"]

    def two(workdir, last):
        who = ["--coordinator", f"127.0.0.1:{free_port}", "--num_processes", "2", "--process_id"]
        more = [*flags, f"--config.steps={last}", *who]
        with (
            launch(proxy, tmp_path, workdir, *more, "0") as first,
            launch(proxy, tmp_path, workdir, *more, "1") as second,
        ):
            out, other = said(first), said(second)
        assert (first.returncode, second.returncode) == (0, 0), out + other
        return out

    two(tmp_path / "disk", 4)
    two(folder / "run", 4)
    assert hash_of(folder / "run") == hash_of(tmp_path / "disk")
    damaged = payload(newest_step(folder / "run") / "params")
    flip(damaged)
    out = two(folder / "run", 4)
    assert "step 4 is damaged" in out and damaged.name in out and "crc32c" in out
    assert "resuming at step 2\n" in out
    assert hash_of(folder / "run") == hash_of(tmp_path / "disk")


@pytest.mark.slow
def test_a_dead_storage_ends_a_run_with_one_line(proxy, folder, image_tokenizer, tmp_path):
    flags = [f"--config.image_tokenizer={image_tokenizer}", "--config.steps=40", "--config.save_every=2"]
    with launch(proxy, tmp_path, folder / "run", *flags, "--config.log_every=1") as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 3/"):
                proxy.fails = lambda request: 403 if request.method != "GET" else None
        status = process.wait()
    out = "".join(lines)
    # Saves that fail don't end the run; the last one that fails is an error.
    assert status == 1 and "step 40/40" in out and "Traceback" not in out, out
    assert re.search(r"warning: the checkpoint of step \d+ could not be saved", out)
    assert re.search(r"^error: the checkpoint of step 40 could not be saved", out, re.M)
    assert "metrics or samples couldn't be written" in out


@pytest.mark.slow
def test_rewards_are_learnt_from_in_a_bucket(config, proxy, folder, tmp_path):
    loop.train(config, tmp_path / "disk")
    prompts = upload(tmp_path, f"{folder.name}/data") / "prompts.jsonl"
    changed = json.loads(json.dumps(config)) | {"init": str(upload(config["init"], f"{folder.name}/init"))}
    changed["tasks"]["text"]["data"]["path"] = str(prompts)
    with stopped_in(1):
        loop.train(changed, folder / "run")
    loop.train(changed, folder / "run")
    disk, run = params(tmp_path / "disk"), params(folder / "run")
    jax.tree.map(np.testing.assert_array_equal, disk, run)
    assert history(tmp_path / "disk", "text/reward") == history(folder / "run", "text/reward")


@pytest.mark.slow
def test_an_image_tokenizer_is_trained_in_a_bucket(proxy, folder, tmp_path):
    from configs import vq

    config = vq.get_config("digits,smoke").to_dict() | {"steps": 4, "save_every": 2, "log_every": 1}
    train(config | {"steps": 4}, tmp_path / "disk")
    train(config, folder / "run")
    (newest_step(folder / "run") / COMMITTED).unlink()
    train(config, folder / "run")
    assert hash_of(folder / "run") == hash_of(tmp_path / "disk")


@pytest.mark.slow
def test_conversion_there_and_back_has_the_same_hashes(proxy, folder, model_workdir, tmp_path, monkeypatch):
    to_torch(model_workdir, tmp_path / "hf")
    from_torch(tmp_path / "hf", tmp_path / "ck")
    src = upload(model_workdir, f"{folder.name}/run")
    to_torch(src, folder / "hf", shard=1 << 20)
    # Killed half-way: nobody takes it for a model, and the same command completes it.
    write, left = storage.write_whole, [None] * 2

    def killed(*args):
        if not left:
            raise SystemExit
        left.pop()
        write(*args)

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(storage, "write_whole", killed)
        patch.setattr(storage, "rmtree", lambda *_, **__: None)
        patch.setattr(storage.Lease, "release", lambda self: self._ended.set())
        from_torch(folder / "hf", folder / "ck")
    with pytest.raises(FileNotFoundError, match="isn't complete"):
        inspect(folder / "ck")
    with pytest.raises(ValueError, match="another process is writing"):
        from_torch(folder / "hf", folder / "ck")  # as far as it can know: the process lives
    (folder / "ck/.unfinished").write_bytes(b"{}")
    monkeypatch.setattr("mmada_jax.lease.EXPIRE", 0.0)
    from_torch(folder / "hf", folder / "ck")
    assert not (folder / "ck/.unfinished").exists()
    reports = [inspect(where)["sha256"] for where in (model_workdir, src, folder / "hf", folder / "ck")]
    assert len(set(reports)) == 1
    names = [set(storage.files_below(where / "ck")) for where in (tmp_path, folder)]
    assert {n for n in names[0] if "/d/" not in n} == {n for n in names[1] if "/d/" not in n}
    with pytest.raises(ValueError, match="is there already and not an empty folder"):
        from_torch(folder / "hf", folder / "ck")
    shutil.rmtree(tmp_path / "ck")
    from_torch(folder / "hf", tmp_path / "ck")  # from a bucket to a disk
    assert inspect(tmp_path / "ck")["sha256"] == reports[0]


def test_a_tensor_that_is_cut_off_in_a_bucket_is_named(proxy, folder, model_workdir, tmp_path):
    to_torch(model_workdir, tmp_path / "hf")
    src = upload(tmp_path / "hf", f"{folder.name}/hf")
    (file,) = src.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"has .* bytes instead of"):
        inspect(src)
    (src / "manifest.sha256.json").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or truncated"):
        inspect(src)
