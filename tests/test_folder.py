"""Every folder that can't be opened is refused by a line that names why; any path to one will do."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, golden_weights, load_golden, xla_flags
from folders import VALUES, VQ, call, expect_error, publish, random_vq
from safetensors.numpy import save_file

from mmada_jax.serve.api import MMaDA
from mmada_jax.weights import llada_keys, magvit_keys
from mmada_jax.weights.checkpoint import trust
from mmada_jax.weights.convert import from_torch, to_torch
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.inspect import inspect
from mmada_jax.weights.workdir import FILES


@pytest.fixture(scope="module")
def weights():
    return golden_weights(load_golden("backbone_gqa")[0])


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
