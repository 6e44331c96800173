"""Conversion there and back: bit-exact, complete or not there at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, golden_weights, load_golden, xla_flags
from folders import (
    CONVERT,
    VALUES,
    call,
    cast,
    expect_error,
    publish,
    same_bits,
)
from safetensors.numpy import load_file

from launch import bench
from mmada_jax.nets import vq
from mmada_jax.weights import convert, hub, lazy, magvit_keys
from mmada_jax.weights.convert import from_torch, to_torch
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.inspect import inspect


@pytest.fixture(scope="module")
def weights():
    return golden_weights(load_golden("backbone_gqa")[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["single", "sharded", "bin", "sharded bin"])
def test_the_model_there_and_back(weights, tmp_path, form, dtype):
    state = cast(weights, lazy.DTYPES[dtype])
    src = publish(tmp_path / "src", state, form=form)
    (src / "tokenizer_config.json").write_text('{"kept": true}')
    (src / "modeling_theirs.py").write_text("raise SystemExit('code that came with a checkpoint was run')")
    from_torch(src, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back")
    same_bits(hub.read_tensors(tmp_path / "back"), state)
    same_bits(hub.read_tensors(src), state)
    reports = [inspect(tmp_path / name) for name in ("src", "ours", "back")]
    assert len({report["sha256"] for report in reports}) == 1
    assert [report["kind"] for report in reports] == [
        "Hugging Face folder", "checkpoint", "Hugging Face folder"
    ]  # fmt: skip
    for report in reports:
        assert report["parameters"] == sum(array.size for array in state.values())
        assert report["dtype"] == dtype
        assert report["model_type"] == "mmada"
    for name in ("ours", "back"):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert "tokenizer_config.json" in files
        assert "modeling_theirs.py" not in files
        values = json.loads((tmp_path / name / "config.json").read_text())
        assert {key: values[key] for key in VALUES} == VALUES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours", "src"]


def test_the_hash_is_that_of_the_bytes_in_key_order(weights, tmp_path):
    import hashlib

    src = publish(tmp_path / "src", weights)
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(weights[key].tobytes())
    assert inspect(src)["sha256"] == digest.hexdigest()
    changed = dict(weights)
    key = "model.transformer.blocks.1.up_proj.weight"
    changed[key] = np.nextafter(weights[key], 9, dtype=np.float32)
    assert inspect(publish(tmp_path / "other", changed))["sha256"] != digest.hexdigest()


@pytest.mark.slow
def test_the_published_image_tokenizer_there_and_back(tmp_path):
    shapes = load_golden("magvitv2_state_dict_shapes")[0]
    pool = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)
    state = {key: np.resize(pool, shape) for key, shape in shapes.items()} | magvit_keys.constants(
        vq.VQConfig()
    )
    assert len(state) == 382
    src = publish(tmp_path / "src", state, {"_class_name": "MAGVITv2"}, form="bin")
    from_torch(src, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back")
    same_bits(hub.read_tensors(tmp_path / "back"), state)
    report = inspect(tmp_path / "ours")
    assert report["parameters"] == 55_439_171 + 39_947_833
    assert report["model_type"] == "magvitv2"


@pytest.mark.parametrize(("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_dtype_casts_in_both_directions(weights, tmp_path, stored, asked):
    state = cast(weights, lazy.DTYPES[stored])
    src = publish(tmp_path / "src", state)
    from_torch(src, tmp_path / "cast", dtype=asked)
    to_torch(tmp_path / "cast", tmp_path / "back")
    same_bits(hub.read_tensors(tmp_path / "back"), cast(state, lazy.DTYPES[asked]))
    from_torch(src, tmp_path / "kept")
    to_torch(tmp_path / "kept", tmp_path / "back2", dtype=asked)
    same_bits(hub.read_tensors(tmp_path / "back2"), cast(state, lazy.DTYPES[asked]))
    assert json.loads((tmp_path / "back2" / "config.json").read_text())["dtype"] == asked


def test_shards_have_a_limit_and_an_index(weights, tmp_path):
    src, limit = publish(tmp_path / "src", weights), 300_000
    from_torch(src, tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back", shard=limit)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    where = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert where["metadata"]["total_size"] == sum(array.nbytes for array in weights.values())
    merged = {}
    for file in files:
        part = load_file(file)
        assert sum(a.nbytes for a in part.values()) <= limit or len(part) == 1
        assert {where["weight_map"][key] for key in part} == {file.name}
        assert file.stat().st_mode & 0o777 == 0o644 & ~os.umask(os.umask(0o022))
        merged |= part
    same_bits(merged, weights)


def test_growing_llada_into_mmada(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("mmada_jax.weights.lazy.PIECE", 50_000)  # several pieces of embedding and head
    state = cast(weights, ml_dtypes.bfloat16)
    values = {k: v for k, v in VALUES.items() if k != "codebook_size"} | {"model_type": "llada"}
    src = publish(tmp_path / "src", state, values)
    assert call("from-torch", "--src", src, "--dst", tmp_path / "ours", "--add-image-vocab", 128) is None
    to_torch(tmp_path / "ours", tmp_path / "back")
    grown, old = hub.read_tensors(tmp_path / "back"), VALUES["vocab_size"]
    for key in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        rows, was = grown.pop(key), state[key]
        assert rows.shape == (old + 128, VALUES["d_model"])
        assert rows[:old].tobytes() == was.tobytes()
        mean = was.astype(np.float64).mean(0).astype(np.float32).astype(ml_dtypes.bfloat16)
        assert rows[old:].tobytes() == np.stack([mean] * 128).tobytes()
    same_bits(grown, {key: state[key] for key in grown})
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    expected = {
        "model_type": "mmada", "vocab_size": old + 128, "embedding_size": old + 128,
        "new_vocab_size": old + 128, "llm_vocab_size": old, "codebook_size": 128,
    }  # fmt: skip
    assert {key: written[key] for key in expected} == expected
    again = call(
        "from-torch", "--src", tmp_path / "back", "--dst", tmp_path / "x", "--add-image-vocab", 128
    )
    assert "has an image vocabulary of 128 codes already" in again
    with pytest.raises(ValueError, match="-1 image codes can't be added"):
        from_torch(src, tmp_path / "x", add_image_vocab=-1)


def test_a_target_that_is_not_empty(weights, tmp_path):
    src = publish(tmp_path / "src", weights)
    (tmp_path / "dst").mkdir()
    from_torch(src, tmp_path / "dst")  # empty is as good as new
    before = sorted((tmp_path / "dst").rglob("*"))
    expect_error(src, tmp_path / "dst", "is there already and not an empty folder; name another one")
    assert sorted((tmp_path / "dst").rglob("*")) == before
    (tmp_path / "file").write_text("precious")
    expect_error(src, tmp_path / "file", "is there already")
    expect_error(tmp_path / "dst", tmp_path / "file", "is there already", way="to-torch")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_target_in_the_source_and_a_link_to_a_target(weights, tmp_path):
    src = publish(tmp_path / "src", weights)
    expect_error(src, src / "params", "lies in the source")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    from_torch(src, tmp_path / "link")
    assert inspect(tmp_path / "real")["sha256"] == inspect(src)["sha256"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["a#b", "a?b", "a|b", "a%20b", "ä ö"])
def test_odd_names_of_folders(weights, tmp_path, name):
    src = publish(tmp_path / "src", weights)
    from_torch(src, tmp_path / name)
    to_torch(tmp_path / name, tmp_path / f"{name} back")
    assert inspect(tmp_path / f"{name} back")["sha256"] == inspect(src)["sha256"]


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(weights, tmp_path, monkeypatch):
    src = publish(tmp_path / "src", weights)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    expect_error(src, tmp_path / "dst", "the disk is too full: 0.00 GB are needed, 0.00 GB are free")


@pytest.mark.parametrize("way", ["from-torch", "to-torch"])
def test_a_disk_that_is_full_half_way(weights, tmp_path, way):
    # A limit on the size of a file stands in for the disk: writing fails just so, in the middle.
    src = publish(tmp_path / "src", weights)
    if way == "to-torch":
        from_torch(src, tmp_path / "ours")
        src = tmp_path / "ours"
    around = sorted(tmp_path.iterdir())
    command = f"ulimit -f 200; exec {sys.executable} {CONVERT} {way} --src {src} --dst {tmp_path / 'dst'}"
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert ended.returncode == 1
    assert "error: [Errno 28] the disk is full, nothing was written" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(tmp_path.iterdir()) == around


@pytest.mark.parametrize("way", ["from-torch", "to-torch"])
def test_a_conversion_that_is_killed_never_looks_finished(weights, tmp_path, way):
    src = publish(tmp_path / "src", weights)
    if way == "to-torch":
        from_torch(src, tmp_path / "ours")
        src = tmp_path / "ours"
    dst = tmp_path / "dst"
    # Reports the bytes it has written and waits there to be killed.
    wait = "import time, tqdm; tqdm.tqdm.update = lambda *_: time.sleep(60); "
    script = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); {wait}"
    script += f"sys.argv = ['', {way!r}, '--src', {str(src)!r}, '--dst', {str(dst)!r}]; "
    script += f"runpy.run_path({CONVERT!r}, run_name='__main__')"
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    unfinished = tmp_path / f".dst.unfinished-{process.pid}"
    deadline = time.time() + 60
    while not any(p.is_file() for p in unfinished.glob("folder/**/*")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    # What another process is writing is left alone; what a dead one left behind is cleared away.
    assert call(way, "--src", src, "--dst", dst) is None
    assert unfinished.exists()
    shutil.rmtree(dst)
    process.kill()
    process.wait()
    assert unfinished.exists()
    assert not dst.exists()
    assert call(way, "--src", src, "--dst", dst) is None
    assert not unfinished.exists()
    assert inspect(dst)["sha256"] == inspect(src)["sha256"]


def test_what_a_killed_conversion_of_the_same_process_number_left(weights, tmp_path):
    # In a container every process is number 1.
    src = publish(tmp_path / "src", weights)
    left = tmp_path / f".dst.unfinished-{os.getpid()}"
    (left / "folder").mkdir(parents=True)
    (left / "folder" / "config.json").write_text("{")
    from_torch(src, tmp_path / "dst")
    to_torch(tmp_path / "dst", tmp_path / "back")
    assert inspect(tmp_path / "back")["sha256"] == inspect(src)["sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "dst", "src"]


def test_two_conversions_at_a_time_leave_each_other_alone(weights, tmp_path):
    source = open_folder(publish(tmp_path / "src", weights))
    with convert._target(tmp_path / "dst", source, None) as (first, _):
        (first / "precious").write_text("")
        with convert._target(tmp_path / "dst", source, None) as (
            second,
            _,
        ):  # the process number is the same
            assert first != second
        shutil.rmtree(tmp_path / "dst")
        assert (first / "precious").exists()
    assert sorted(path.name for path in (tmp_path / "dst").iterdir()) == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("error", [Exception, RuntimeError, OSError])
def test_a_full_disk_is_one_line_whatever_a_library_calls_it(weights, tmp_path, monkeypatch, error):
    src = publish(tmp_path / "src", weights)

    def full(*_):
        raise error("No space left on device (os error 28)")

    monkeypatch.setattr(convert, "_carry_files", full)
    with pytest.raises(OSError, match="the disk is full, nothing was written") as raised:
        from_torch(src, tmp_path / "new" / "deep" / "dst")
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [src]


def test_float16_is_too_small_for_some(weights, tmp_path):
    key = "model.transformer.blocks.1.ff_out.weight"
    state = weights | {key: weights[key] * np.float32(1e6)}
    src = publish(tmp_path / "src", state)
    expect_error(src, tmp_path / "dst", key, "beyond the range of float16", more=("--dtype", "float16"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(capfd):
    # The 8B-shaped run (README) may take 4 GB. 1/16 of it may take a 16th of that, beyond what a process
    # holds that has only imported everything.
    idle = subprocess.run(
        [sys.executable, "-c",
         "import mmada_jax.train.runs, mmada_jax.weights.convert; print(open('/proc/self/status').read())"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    idle_gb = int(idle.stdout.split("RssAnon:")[1].split()[0]) * 1024 / 1e9
    report = bench.main(["convert", "--shrink", "4"])
    assert report["equal"]
    assert report["gigabytes"] == pytest.approx(16.17 / 16, rel=0.01)
    for way in ("from-torch", "to-torch"):
        assert report[way]["peak_anonymous_gb"] < idle_gb + 4 / 16
    assert "RATIO" in capfd.readouterr().out
