"""Folders of models for the tests: small ones of PyTorch, and calls of launch/convert.py."""

import json
import runpy
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, load_golden
from safetensors.numpy import save_file

from mmada_jax.nets import vq
from mmada_jax.weights import llada_keys, magvit_keys

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
