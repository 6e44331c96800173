"""Folders between PyTorch and JAX: bit-exact, complete or not there at all, and every bad input named."""

import dataclasses
import errno
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, golden_weights, load_golden, xla_flags
from safetensors.numpy import load_file, save_file

from launch import bench
from mmada_jax.devices import sharding
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.model.inputs import Defaults
from mmada_jax.nets import transformer, vq
from mmada_jax.serve.api import MMaDA
from mmada_jax.tokens.tokenizer import chat
from mmada_jax.weights import convert, hub, lazy, llada_keys, magvit_keys
from mmada_jax.weights.checkpoint import trust
from mmada_jax.weights.convert import from_torch, to_torch
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.inspect import inspect
from mmada_jax.weights.workdir import FILES

CONVERT = str(ROOT / "launch" / "convert.py")
FIELDS = load_golden("backbone_gqa")[0]["config"]
VALUES = {
    "model_type": "mmada", "d_model": FIELDS["d_model"], "n_layers": FIELDS["n_layers"],
    "n_heads": FIELDS["n_heads"], "n_kv_heads": FIELDS["n_kv_heads"],
    "mlp_hidden_size": FIELDS["mlp_hidden_size"], "vocab_size": FIELDS["vocab_size"],
    "embedding_size": FIELDS["embedding_size"], "codebook_size": FIELDS["codebook"],
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "something_else": {"kept": 1},
}  # fmt: skip
CONFIG = llada_keys.config_from_hf(VALUES)
VQ = vq.PRESETS["digits"]


@pytest.fixture(scope="module")
def weights():
    return golden_weights(load_golden("backbone_gqa")[0])


def random_vq(config=VQ, seed=0):
    rng = np.random.default_rng(seed)
    state = {
        key: (0.1 * rng.standard_normal(rule.torch_shape)).astype(np.float32)
        for key, rule in magvit_keys.key_table(config).items()
    }
    return state | magvit_keys.constants(config)


def publish(folder, state, values=VALUES, form="single"):
    """A Hugging Face folder in one of the forms that they come in."""
    folder.mkdir(parents=True)
    if values is not None:
        (folder / "config.json").write_text(json.dumps(values))
    keys = list(state)
    parts = [keys[: len(keys) // 2], keys[len(keys) // 2 :]] if "sharded" in form else [keys]
    stem, suffix = ("pytorch_model", "bin") if "bin" in form else ("model", "safetensors")
    where = {}
    for i, part in enumerate(parts, 1):
        name = f"{stem}.{suffix}" if len(parts) == 1 else f"{stem}-{i:05}-of-{len(parts):05}.{suffix}"
        if suffix == "bin":
            torch = pytest.importorskip("torch", reason="needs torch: bash launch/test.sh --all")
            torch.save({key: to_tensor(torch, state[key]) for key in part}, folder / name)
        else:
            save_file({key: np.ascontiguousarray(state[key]) for key in part}, folder / name)
        where |= dict.fromkeys(part, name)
    if len(parts) > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def to_tensor(torch, array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def cast(state, dtype):
    return {key: array.astype(dtype) for key, array in state.items()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert np.asarray(a[key]).tobytes() == np.asarray(b[key]).tobytes(), key


def call(*args):
    """launch/convert.py; the error that it ends with, or None."""
    argv, sys.argv = sys.argv, [CONVERT, *map(str, args)]
    try:
        runpy.run_path(CONVERT, run_name="__main__")
    except SystemExit as exit:
        return exit.code
    finally:
        sys.argv = argv


# ---- There and back --------------------------------------------------------------------------------


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


def test_the_published_image_tokenizer_there_and_back(tmp_path):
    shapes = load_golden("magvitv2_state_dict_shapes")[0]
    pool = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)
    state = {key: np.resize(pool, shape) for key, shape in shapes.items()} | magvit_keys.constants(
        vq.Config()
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


# ---- The configuration -----------------------------------------------------------------------------


def test_config_from_hf():
    assert CONFIG.n_kv_heads == 2
    assert CONFIG.d_mlp == 200
    published = {
        "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
        "mlp_hidden_size": 12288, "mlp_ratio": 4, "activation_type": "silu", "block_type": "llama",
        "block_group_size": 1, "vocab_size": 126464, "embedding_size": 126464, "alibi": False,
        "max_sequence_length": 4096, "rope": True, "rope_theta": 500000.0, "rope_full_precision": True,
        "layer_norm_type": "rms", "rms_norm_eps": 1e-05, "layer_norm_with_affine": True,
        "attention_layer_norm": False, "include_bias": False, "include_qkv_bias": False,
        "bias_for_layer_norm": False, "input_emb_norm": False, "scale_logits": False,
        "weight_tying": False, "flash_attention": False, "init_fn": "mitchell", "use_cache": False,
    }  # fmt: skip
    want = dataclasses.replace(transformer.PRESETS["llada-8b"], vocab=126464, remat="none")
    assert llada_keys.config_from_hf(published) == want
    bare = {k: v for k, v in published.items() if k not in ("n_kv_heads", "mlp_hidden_size")}
    assert llada_keys.config_from_hf(bare).n_kv_heads == 32
    assert llada_keys.config_from_hf(bare).d_mlp == 4 * 4096
    assert llada_keys.config_from_hf(bare | {"multi_query_attention": True}).n_kv_heads == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alibi", True), ("rope", False), ("include_bias", True), ("include_qkv_bias", True),
        ("bias_for_layer_norm", True), ("block_type", "sequential"), ("activation_type", "swiglu"),
        ("layer_norm_type", "default"), ("weight_tying", True), ("scale_logits", True),
        ("input_emb_norm", True), ("attention_layer_norm", True), ("block_group_size", 4),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"\(1 problems\): {field} is {value!r}, only .* is implemented"):
        llada_keys.config_from_hf(VALUES | {field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_model", None, "d_model is missing"), ("d_model", 96.0, "d_model is 96.0"),
        ("d_model", "96", "d_model is '96', it must be a positive int"),
        ("n_heads", 0, "n_heads is 0"), ("n_heads", True, "n_heads is True"),
        ("n_kv_heads", 0, "n_kv_heads is 0"), ("n_layers", "2", "n_layers is '2'"),
        ("rope_theta", "x", "rope_theta is 'x', it must be a positive float"),
        ("codebook_size", -5, "codebook_size is -5"), ("codebook_size", "64", "codebook_size is '64'"),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_kind_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        llada_keys.config_from_hf(VALUES | {field: value})


def test_all_that_is_wrong_with_a_config_is_one_error():
    values = {"model_type": "llada", "n_layers": 1, "n_heads": 1, "mlp_ratio": 4, "alibi": True}
    wrong = r"\(3 problems\): alibi is True.*; d_model is missing; embedding_size or vocab_size is missing"
    with pytest.raises(ValueError, match=wrong):
        llada_keys.config_from_hf(values)
    with pytest.raises(ValueError, match="model_type 'llama'; known: llada, mmada"):
        llada_keys.config_from_hf(VALUES | {"model_type": "llama"})


# ---- Bad input -------------------------------------------------------------------------------------


def expect_error(src, dst, *parts, way="from-torch", more=()):
    """One line, nothing written, the source as it was."""
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(src.rglob("*"))}
    around = sorted(dst.parent.iterdir())
    error = call(way, "--src", src, "--dst", dst, *more)
    assert isinstance(error, str), "no error"
    assert error.startswith("error: ")
    assert "\n" not in error
    for part in parts:
        assert str(part) in error, error
    assert sorted(dst.parent.iterdir()) == around
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(src.rglob("*"))} == before


def test_a_truncated_shard(weights, tmp_path):
    src = publish(tmp_path / "src", weights, form="sharded")
    shard = src / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    for keep in (len(whole) - 1, len(whole) // 2, 20, 4, 0):
        shard.write_bytes(whole[:keep])
        expect_error(src, tmp_path / "dst", shard.name, "is damaged or truncated")


def test_a_truncated_bin(weights, tmp_path):
    src = publish(tmp_path / "src", weights, form="bin")
    file = src / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-5000])
    expect_error(src, tmp_path / "dst", file.name, "is damaged or truncated")


def test_an_index_that_names_a_missing_file(weights, tmp_path):
    src = publish(tmp_path / "src", weights, form="sharded")
    (src / "model-00001-of-00002.safetensors").unlink()
    expect_error(
        src, tmp_path / "dst", "model.safetensors.index.json names model-00001-of-00002.safetensors"
    )


def test_an_index_that_lies(weights, tmp_path):
    src = publish(tmp_path / "src", weights, form="sharded")
    index = src / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    key = next(iter(where))
    for change, part in (
        (
            {key: "model-00002-of-00002.safetensors"},
            f"{key} is in model-00001-of-00002.safetensors, the index",
        ),
        ({"extra": "model-00002-of-00002.safetensors"}, "extra is missing from model-00002"),
        ({key: "../src/model-00001-of-00002.safetensors"}, "is no plain file name"),
    ):
        index.write_text(json.dumps({"weight_map": where | change}))
        expect_error(src, tmp_path / "dst", part)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in where.items() if k != key}}))
    expect_error(src, tmp_path / "dst", f"{key} is in model-00001", "the index doesn't name it")
    index.write_text("{]")
    expect_error(src, tmp_path / "dst", "is no index of tensors")


def test_a_doubled_key(weights, tmp_path):
    src = publish(tmp_path / "src", weights)
    key = next(iter(weights))
    save_file({key: weights[key]}, src / "more.safetensors")
    expect_error(src, tmp_path / "dst", f"{key} is doubled: in model.safetensors and in more.safetensors")


@pytest.mark.parametrize("form", ["single", "bin"])
def test_a_key_too_many_and_a_key_too_few(weights, tmp_path, form):
    state = weights | {"model.transformer.wpe.weight": np.zeros((2, 2), np.float32)}
    src = publish(tmp_path / "many", state, form=form)
    expect_error(src, tmp_path / "dst", "(1 problems): unexpected model.transformer.wpe.weight")
    state = dict(weights)
    del state["model.transformer.blocks.2.ff_norm.weight"]
    src = publish(tmp_path / "few", state, form=form)
    expect_error(src, tmp_path / "dst", "(1 problems): missing model.transformer.blocks.2.ff_norm.weight")


def test_a_key_too_few_of_the_image_tokenizer(tmp_path):
    for key in ("quantize.power_vals", "decoder.conv_out.bias", "encoder.quant_conv.weight"):
        state = random_vq()
        del state[key]
        src = publish(tmp_path / key, state, {"model_type": "magvitv2"})
        expect_error(src, tmp_path / "dst", key)
    wrong = random_vq() | {"quantize.power_vals": np.arange(VQ.bits)}
    src = publish(tmp_path / "powers", wrong, {})
    expect_error(src, tmp_path / "dst", "quantize.power_vals isn't that of a 6-bit lookup-free quantiser")


def test_a_wrong_shape_and_a_wrong_dtype(weights, tmp_path):
    key, other = "model.transformer.ln_f.weight", "model.transformer.blocks.0.q_proj.weight"
    state = weights | {key: weights[key].astype(np.int32), other: weights[other][1:]}
    src = publish(tmp_path / "src", state)
    expect_error(
        src,
        tmp_path / "dst",
        "(2 problems)",
        f"{key} has dtype int32, expected one of float32, bfloat16, float16",
        f"{other} has shape (95, 96), expected (96, 96)",
    )
    mixed = weights | {key: weights[key].astype(np.float16)}
    src = publish(tmp_path / "mixed", mixed)
    expect_error(src, tmp_path / "dst", f"{key} has dtype float16, the others float32")
    from_torch(src, tmp_path / "dst", dtype="float32")
    assert inspect(tmp_path / "dst")["dtype"] == "float32"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("the code in a pickle was run",)


def test_a_pickle_with_code_in_it(weights, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs torch: bash launch/test.sh --all")
    monkeypatch.chdir(tmp_path)
    src = publish(tmp_path / "src", weights, form="bin")
    state = {key: torch.from_numpy(array) for key, array in weights.items()}
    torch.save(state | {"bomb": Bomb()}, src / "pytorch_model.bin")
    expect_error(src, tmp_path / "dst", "pytorch_model.bin is refused: its pickle holds more than tensors")
    (src / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    expect_error(src, tmp_path / "dst", "pytorch_model.bin is")
    torch.save({"model": state}, src / "pytorch_model.bin")
    expect_error(src, tmp_path / "dst", "'model' is a dict")


def test_a_bin_without_pytorch(weights, tmp_path, monkeypatch):
    src = publish(tmp_path / "src", weights, form="bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    expect_error(src, tmp_path / "dst", "needs PyTorch: pip install 'mmada_jax[torch]'")


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


def test_a_damaged_checkpoint(weights, tmp_path):
    from_torch(publish(tmp_path / "src", weights), tmp_path / "ours")
    (tmp_path / "ours" / FILES).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {FILES}; .* trust --src"):
        inspect(tmp_path / "ours")
    trust(tmp_path / "ours")
    files = [p for p in (tmp_path / "ours" / "params").rglob("*") if p.is_file()]
    data = max(files, key=lambda p: p.stat().st_size)
    whole = bytearray(data.read_bytes())
    whole[len(whole) // 3] ^= 4
    data.write_bytes(whole)
    expect_error(tmp_path / "ours", tmp_path / "back", data.name, "has changed", way="to-torch")
    with pytest.raises(ValueError, match=data.name):
        inspect(tmp_path / "ours")


@pytest.mark.parametrize(
    ("field", "value"), [("n_heads", 3), ("n_layers", 2), ("mlp_hidden_size", 100), ("embedding_size", 512)]
)
def test_a_checkpoint_whose_config_is_of_another_model(weights, tmp_path, field, value):
    from_torch(publish(tmp_path / "src", weights), tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    expect_error(tmp_path / "ours", tmp_path / "back", "error: ", way="to-torch")


def test_float16_is_too_small_for_some(weights, tmp_path):
    key = "model.transformer.blocks.1.ff_out.weight"
    state = weights | {key: weights[key] * np.float32(1e6)}
    src = publish(tmp_path / "src", state)
    expect_error(src, tmp_path / "dst", key, "beyond the range of float16", more=("--dtype", "float16"))


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_a_flipped_bit_of_an_exported_file_is_named(weights, tmp_path, form):
    from_torch(publish(tmp_path / "src", weights), tmp_path / "ours")
    total = sum(array.nbytes for array in weights.values())
    to_torch(tmp_path / "ours", tmp_path / "back", shard=total if form == "single" else total // 2)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) == 1 if form == "single" else len(files) > 1
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        expect_error(tmp_path / "back", tmp_path / "dst", f"{file.name} has changed", "fetch it again")
        with pytest.raises(ValueError, match=file.name):
            inspect(tmp_path / "back")
        file.write_bytes(whole)
    (tmp_path / "back" / "README.md").write_text("edited")  # of the weights alone there are hashes
    assert inspect(tmp_path / "back")["sha256"] == inspect(tmp_path / "src")["sha256"]
    (tmp_path / "back" / "manifest.sha256.json").write_text("{")
    expect_error(tmp_path / "back", tmp_path / "dst", "manifest.sha256.json")
    (tmp_path / "back" / "manifest.sha256.json").unlink()  # what others publish has none
    inspect(tmp_path / "back")


@pytest.mark.parametrize("module", [llada_keys, magvit_keys])
@pytest.mark.parametrize(
    "wrap",
    [
        "module.{}", "_orig_mod.{}", "base_model.model.{}", "model.module.{}",
        lambda key: key.replace(".conv", "._orig_mod.conv").replace("transformer", "_orig_mod.transformer"),
        lambda key: key.partition(".")[2],
    ],
    ids=["module", "compiled", "peft", "two", "inside", "without"],
)  # fmt: skip
def test_a_prefix_on_keys_is_named_with_an_example(weights, tmp_path, module, wrap):
    plain = weights if module is llada_keys else random_vq()
    there = [wrap(key) if callable(wrap) else wrap.format(key) for key in plain]
    state = dict(zip(there, plain.values(), strict=True))
    src = publish(tmp_path / "src", state, VALUES if module is llada_keys else {"model_type": "magvitv2"})
    with pytest.raises(ValueError, match=f"{len(state)} keys|missing") as error:
        open_folder(src)
    examples = [key for key in state if repr(key) in str(error.value)]
    assert examples and examples[0] not in plain, error.value
    assert str(src) in str(error.value)


def test_stray_tensors_beside_a_model_are_left_aside(weights, tmp_path, capsys):
    src = publish(tmp_path / "src", weights)
    save_file({"base_model.lora_A.weight": np.zeros(3, np.float32)}, src / "adapter_model.safetensors")
    (src / "optimizer.safetensors").write_bytes(b"damaged")
    assert inspect(src)["tensors"] == len(weights)
    error = capsys.readouterr().err
    assert "adapter_model.safetensors, optimizer.safetensors beside model.safetensors" in error
    # Parts without an index belong together.
    (src / "model.safetensors").rename(src / "model-1.safetensors")
    (src / "optimizer.safetensors").unlink()
    expect_error(src, tmp_path / "dst", "unexpected base_model.lora_A.weight")


def test_pointers_of_git_lfs_are_named(weights, tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 16031000000\n"
    for form in ("single", "sharded", "bin"):
        src = publish(tmp_path / form, weights, form=form)
        for file in sorted(src.iterdir()):
            whole = file.read_bytes()
            file.write_text(pointer)
            expect_error(src, tmp_path / "dst", file.name, "git lfs pull")
            file.write_bytes(whole)


def test_a_byte_order_mark_is_no_damage(weights, tmp_path):
    src = publish(tmp_path / "src", weights, form="sharded")
    sha256 = inspect(src)["sha256"]
    for name in ("config.json", "model.safetensors.index.json"):
        (src / name).write_text((src / name).read_text(), encoding="utf-8-sig")
    assert inspect(src)["sha256"] == sha256
    from_torch(src, tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert inspect(tmp_path / "ours")["sha256"] == sha256


def test_any_path_to_a_folder_will_do(weights, model_workdir, tmp_path, monkeypatch):
    src = publish(tmp_path / "src", weights)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/deep")
    (tmp_path / "model").symlink_to(model_workdir)
    monkeypatch.chdir(tmp_path / "elsewhere")
    # link/.. is elsewhere, as the system reads it.
    forms = ["../{}", "../{}/", "deep/../../{}", str(tmp_path) + "/./{}", str(tmp_path) + "/link/../../{}"]
    for i, form in enumerate(forms):
        assert call("from-torch", "--src", form.format("src"), "--dst", form.format(f"ours{i}")) is None
        assert call("to-torch", "--src", form.format(f"ours{i}"), "--dst", form.format(f"back{i}")) is None
        for name in ("src", f"ours{i}", f"back{i}"):
            assert inspect(form.format(name))["sha256"] == inspect(src)["sha256"], form
        assert inspect(form.format("model"))["kind"] == "workdir"
    assert inspect("../link/../../ours0")["sha256"] == inspect(src)["sha256"]
    assert MMaDA.load("../model/").max_text == MMaDA.load(model_workdir).max_text


def test_safetensors_come_before_a_stray_index_of_bins(weights, tmp_path):
    src = publish(tmp_path / "src", weights)
    (src / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    from_torch(src, tmp_path / "dst")
    (src / "model.safetensors").unlink()
    expect_error(src, tmp_path / "dst2", "names pytorch_model-1.bin (1 of 1 files), which is not there")
    for value in (1, None, "", ["x"]):
        (src / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": value}}))
        expect_error(src, tmp_path / "dst2", "pytorch_model.bin.index.json")


def test_folders_that_are_something_else(weights, tmp_path):
    src = publish(tmp_path / "src", weights)
    from_torch(src, tmp_path / "ours")
    dst = tmp_path / "dst"
    expect_error(tmp_path / "ours", dst, "is a checkpoint already; to-torch is the other direction")
    expect_error(src, dst, "is a Hugging Face folder already; from-torch is the other", way="to-torch")
    (tmp_path / "empty").mkdir()
    expect_error(tmp_path / "empty", dst, "no checkpoint and no Hugging Face folder", way="to-torch")
    expect_error(tmp_path / "nowhere", dst, "there is no such folder")
    for text, what in (("{", "is no JSON"), ("[1]", "expected an object")):
        (tmp_path / "empty" / "config.json").write_text(text)
        expect_error(tmp_path / "empty", dst, "config.json", what)
    expect_error(publish(tmp_path / "bare", weights, None), dst, "has no config.json")
    other = publish(tmp_path / "other", weights, VALUES | {"model_type": "llama"})
    expect_error(other, dst, "holds a model of type 'llama'; known: llada, mmada, magvitv2")
    vision = publish(tmp_path / "vq", random_vq(), {})
    expect_error(vision, dst, "only LLaDA can be given", more=("--add-image-vocab", 8))
    expect_error(src, dst, "has 64 codes, the model 128", more=("--image-tokenizer", vision))
    expect_error(src, dst, "holds no image tokenizer but a model", more=("--image-tokenizer", src))
    expect_error(vision, dst, "is an image tokenizer itself", more=("--image-tokenizer", vision))


# ---- PyTorch loads what is exported ----------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(model_workdir, tmp_path_factory):
    """A training workdir as a Hugging Face folder, its image tokenizer in it."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    to_torch(model_workdir, folder)
    return folder


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def close(ours, theirs, tolerance):
    """Relative error of all values together. (In bfloat16 each side is 1.8e-2 from float32's.)"""
    theirs = theirs.detach().float().numpy()
    assert ours.shape == theirs.shape
    assert np.linalg.norm(np.asarray(ours, np.float32) - theirs) < tolerance * np.linalg.norm(theirs)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_logits_of_the_exported_folder(weights, tmp_path, transformers, dtype, tolerance):
    import torch

    from_torch(publish(tmp_path / "src", weights), tmp_path / "ours", dtype=dtype)
    to_torch(tmp_path / "ours", tmp_path / "back")
    source = open_folder(tmp_path / "ours")
    assert source.dtype == dtype
    config = dataclasses.replace(source.config, dtype=dtype)
    params = lazy.in_memory(source.params)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab, (3, 20)).astype(np.int32)
    valid = np.arange(20) >= np.array([[0], [7], [2]])
    h = transformer.hidden_states(params, config, ids, valid)
    ours = np.asarray(transformer.unembed(params, config, h))
    for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM):
        model, loading = auto.from_pretrained(
            tmp_path / "back", trust_remote_code=True, output_loading_info=True
        )
        assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert next(model.parameters()).dtype == getattr(torch, dtype)
        with torch.inference_mode():
            theirs = model(torch.from_numpy(ids).long(), torch.from_numpy(valid).long()).logits
            pairs = torch.from_numpy(valid[:, None, :, None] & valid[:, None, None, :])
            biased = model(torch.from_numpy(ids).long(), attention_bias=pairs).logits
        close(ours[valid], theirs[torch.from_numpy(valid)], tolerance)
        close(ours[valid], biased[torch.from_numpy(valid)], tolerance)
    model(torch.from_numpy(ids).long()).logits.sum().backward()  # also after inference


# What PyTorch's own classes read of config.json, with the values that all published models share.
PUBLISHED = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "block_group_size": 1, "block_type": "llama", "embedding_dropout": 0.0, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mlp_ratio": 4, "multi_query_attention": None, "precision": "amp_bf16",
    "residual_dropout": 0.0, "rope": True, "rope_full_precision": True, "scale_logits": False,
    "use_cache": False, "weight_tying": False,
}  # fmt: skip
SIZES = {
    "d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "embedding_size",
    "max_sequence_length", "rope_theta", "rms_norm_eps",
}  # fmt: skip


def test_the_exported_config_has_all_fields_of_the_published_one(exported, weights, tmp_path):
    values = json.loads((exported / "config.json").read_text())
    assert {name: values.get(name, "missing") for name in PUBLISHED} == PUBLISHED
    assert {"mask_token_id", "eos_token_id", "pad_token_id", "codebook_size", *SIZES} <= values.keys()
    # Also of a model whose own config.json left fields to their defaults; what it says stays.
    from_torch(publish(tmp_path / "src", weights, VALUES | {"init_std": 0.01}), tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back")
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: values.get(name, "missing") for name in PUBLISHED} == PUBLISHED | {"init_std": 0.01}
    assert values.keys() >= SIZES


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_llada_with_one_kv_head_loads_too(tmp_path, transformers, caplog):
    values = {k: v for k, v in VALUES.items() if k not in ("n_kv_heads", "codebook_size")}
    values |= {"model_type": "llada", "multi_query_attention": True}
    table = llada_keys.key_table(llada_keys.config_from_hf(values))
    rng = np.random.default_rng(0)
    state = {k: rng.standard_normal(r.torch_shape).astype(np.float32) for k, r in table.items()}
    from_torch(publish(tmp_path / "src", state, values), tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back")
    model = transformers.AutoModel.from_pretrained(tmp_path / "back", trust_remote_code=True)
    assert model.config.model_type == "llada"
    assert model.config.n_kv_heads == 1
    assert "instantiate" not in caplog.text
    assert model.state_dict().keys() == state.keys()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_codes_and_pixels_of_the_exported_image_tokenizer(transformers, tmp_path):
    import torch

    settings, arrays = load_golden("magvit")
    config = magvit_keys.config_from_shapes(settings["state_dict_shapes"])
    state = golden_weights(settings) | magvit_keys.constants(config)
    from_torch(publish(tmp_path / "src", state, {}), tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back")
    model = transformers.AutoModel.from_pretrained(tmp_path / "back", trust_remote_code=True)
    source = open_folder(tmp_path / "back")
    params = lazy.in_memory(source.params)
    with torch.inference_mode():
        pixels = torch.from_numpy(arrays["pixels"])
        latents, codes = model.encoder(pixels), model.get_code(pixels)
        rebuilt = model.decode_code(codes)
    ours = vq.latents(params, source.config, arrays["pixels"].transpose(0, 2, 3, 1))
    close(np.asarray(ours).transpose(0, 3, 1, 2), latents, 1e-5)
    np.testing.assert_array_equal(vq.quantize(ours).reshape(codes.shape), codes)
    back = vq.decode(params, source.config, vq.quantize(ours))
    close(np.asarray(back).transpose(0, 3, 1, 2), rebuilt, 1e-5)
    np.testing.assert_allclose(rebuilt, arrays["reconstruction"], atol=1e-4)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_exported_tokenizer_renders_the_same_conversation(exported, transformers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    ours = open_folder(exported).tokenizer()
    turns = [
        {"role": "user", "content": " 7 + 2 "},
        {"role": "assistant", "content": "9"},
        {"role": "user", "content": "and 3?"},
    ]
    for messages in (turns[:1], turns):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == str(chat(messages))
        assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(chat(messages))


# ---- A workdir, its export, and the checkpoint made of that are the same model -----------------------


@pytest.fixture(scope="module")
def models(model_workdir, exported, tmp_path_factory):
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "ours"
    from_torch(exported, checkpoint)
    paths = {"workdir": model_workdir, "Hugging Face folder": exported, "checkpoint": checkpoint}
    return paths, {kind: MMaDA.load(path) for kind, path in paths.items()}


def test_all_three_do_the_same(models):
    paths, loaded = models
    assert {inspect(path)["kind"] for path in paths.values()} == set(paths)
    assert len({inspect(path)["sha256"] for path in paths.values()}) == 1
    first, *others = loaded.values()
    rule, prompts = ImageRule(steps=3, guidance=1.0), ["a handwritten seven", "a three and a five"]
    drawn = [d.codes for d in first.draw(prompts, rule, seed=3)]
    text = [t.text for t in first.generate(["7 + 2"], TextRule(steps=4, block=8), max_new=8)]
    for other in others:
        assert (other.vocab, other.grid, other.max_text) == (first.vocab, first.grid, first.max_text)
        assert other.defaults == first.defaults != Defaults()
        np.testing.assert_array_equal([d.codes for d in other.draw(prompts, rule, seed=3)], drawn)
        assert [t.text for t in other.generate(["7 + 2"], TextRule(steps=4, block=8), max_new=8)] == text


def test_inspect_tells_whether_the_vocabulary_fits(models, weights, tmp_path, capsys):
    for kind, path in models[0].items():
        report = inspect(path)
        assert report["vocabulary"]["ok"], report
        assert report["vocabulary"]["image_codes"] == 64
        assert (report["step"] is not None) == (kind == "workdir")
        assert report["image_tokenizer"]
    capsys.readouterr()
    src = publish(tmp_path / "src", weights)
    assert call("inspect", "--src", src, "--json") is None
    assert json.loads(capsys.readouterr().out)["vocabulary"]["problem"] == "there is no tokenizer.json"
    shutil.copy(models[0]["checkpoint"] / "tokenizer.json", src)
    assert call("inspect", "--src", src) is None
    out = capsys.readouterr().out
    assert "sha256" in out
    assert "382,368" in out


def test_a_tokenizer_of_another_model_is_a_warning_and_then_an_error(models, weights, tmp_path, capsys):
    src = publish(tmp_path / "src", weights)
    text = (models[0]["checkpoint"] / "tokenizer.json").read_text()
    (src / "tokenizer.json").write_text(text.replace("<|soi|>", "<|image|>"))
    from_torch(src, tmp_path / "ours")
    assert (
        "warning: the model can be converted but not used: the tokenizer isn't" in capsys.readouterr().err
    )
    assert not inspect(tmp_path / "ours")["vocabulary"]["ok"]
    with pytest.raises(ValueError, match=r"isn't LLaDA's: it has \d+ entries, expected 126349"):
        MMaDA.load(tmp_path / "ours")


def test_a_mesh_and_a_dtype_can_be_asked_for(models):
    paths, loaded = models
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    for kind, path in paths.items():
        model = MMaDA.load(path, mesh=mesh, dtype="bfloat16")
        axes = transformer.param_axes(model.config)
        want = sharding.tree_shardings(mesh, axes, model.params)
        for (name, leaf), place in zip(
            jax.tree.leaves_with_path(model.params), jax.tree.leaves(want), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), name
            assert leaf.dtype == "bfloat16"
        assert model.config.dtype == "bfloat16"
        whole = loaded[kind].params["blocks"]["q_DHK"]
        np.testing.assert_array_equal(
            np.asarray(model.params["blocks"]["q_DHK"]), np.asarray(whole).astype(ml_dtypes.bfloat16)
        )
    assert len(model.draw(["a handwritten seven"], ImageRule(steps=2))) == 1
    one = MMaDA.load(paths["checkpoint"], mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    rule = ImageRule(steps=3, guidance=1.0)
    np.testing.assert_array_equal(
        one.draw(["a handwritten two"], rule)[0].codes,
        loaded["checkpoint"].draw(["a handwritten two"], rule)[0].codes,
    )


def test_without_an_image_tokenizer_there_is_text_alone(models, tmp_path):
    shutil.copytree(models[0]["checkpoint"], tmp_path / "bare")
    vision = tmp_path / "vision"
    (tmp_path / "bare" / "image_tokenizer").rename(vision)
    model = MMaDA.load(tmp_path / "bare")
    assert len(model.generate(["7 + 2"], max_new=4)) == 1
    for call in (
        lambda: model.draw(["a handwritten two"]),
        lambda: model.answer([np.zeros((8, 16, 1), np.float32)], ["?"]),
    ):
        with pytest.raises(ValueError, match=r"without an image tokenizer .* image_tokenizer=FOLDER"):
            call()
    model = MMaDA.load(tmp_path / "bare", image_tokenizer=vision)
    assert len(model.draw(["a handwritten two"], ImageRule(steps=2))) == 1
    publish(tmp_path / "other", random_vq(dataclasses.replace(VQ, bits=5)), {})
    with pytest.raises(ValueError, match="has 32 codes, the model 64; they don't belong together"):
        MMaDA.load(tmp_path / "bare", image_tokenizer=tmp_path / "other")
    with pytest.raises(ValueError, match="isn't made of multiples of 2 pixels"):
        MMaDA.load(tmp_path / "bare", image_tokenizer=vision, image_size=(8, 15))
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        MMaDA.load(tmp_path / "bare")


# ---- Memory, and who reads what ----------------------------------------------------------------------

READ_HALF = """
import os, pathlib, sys
pid, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
import jax
jax.distributed.initialize(f"127.0.0.1:{port}", 2, pid)
from mmada_jax.devices import sharding
from mmada_jax.weights.folder import open_folder
source = open_folder(folder)
mesh = sharding.make_mesh(fsdp=2)
places = sharding.tree_shardings(mesh, source.axes, source.params)
def bytes_read():
    return int(next(l for l in open("/proc/self/io") if l.startswith("rchar")).split()[1])
before = bytes_read()
params = sharding.put_params(source.params, places)
read = bytes_read() - before
mine = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
print("READ", read, "MINE", mine, "ALL", source.nbytes, flush=True)
"""


def test_each_process_reads_only_its_own_shards(tmp_path, free_port):
    values = VALUES | {"d_model": 1024, "mlp_hidden_size": 1024, "n_heads": 8, "n_kv_heads": 8}
    rng = np.random.default_rng(0)
    table = llada_keys.key_table(llada_keys.config_from_hf(values))
    state = {k: rng.standard_normal(r.torch_shape).astype(np.float32) for k, r in table.items()}
    from_torch(publish(tmp_path / "src", state, values), tmp_path / "ours")
    environment = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", READ_HALF]
    processes = [
        subprocess.Popen(
            [*command, str(pid), str(free_port), tmp_path / "ours"],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for pid in range(2)
    ]
    for process in processes:
        line = next(x for x in process.communicate(timeout=120)[0].splitlines() if x.startswith("READ"))
        read, mine, everything = (int(x) for x in line.split()[1::2])
        assert mine < 0.51 * everything
        assert read < 1.05 * mine


def test_memory_does_not_grow_with_the_model(capfd):
    # The 8B-shaped run (README) may take 4 GB. 1/16 of it may take a 16th of that, beyond what a process
    # holds that has only imported everything.
    idle = subprocess.run(
        [sys.executable, "-c", "import mmada_jax.weights.convert; print(open('/proc/self/status').read())"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    idle_gb = int(idle.stdout.split("RssAnon:")[1].split()[0]) * 1024 / 1e9
    report = bench.main(["convert", "--shrink", "4"])
    assert report["equal"]
    assert report["gigabytes"] == pytest.approx(16.17 / 16, rel=0.01)
    for way in ("from-torch", "to-torch"):
        assert report[way]["peak_anonymous_gb"] < idle_gb + 4 / 16
    assert "RATIO" in capfd.readouterr().out
