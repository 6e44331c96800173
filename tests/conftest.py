"""Strict promotion and eight fake devices for every test; the goldens' loader."""

import json
import os
import pathlib

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDENS = pathlib.Path(os.environ.get("MMADA_GOLDENS", pathlib.Path(__file__).parent / "goldens"))


def load_golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """NAME.json and the arrays of NAME.npz."""
    settings = json.loads((GOLDENS / f"{name}.json").read_text())
    arrays = GOLDENS / f"{name}.npz"
    return settings, dict(np.load(arrays)) if arrays.exists() else {}


def golden_weights(settings: dict) -> dict[str, np.ndarray]:
    """The random PyTorch state dict that the goldens were made with (see goldens/README.md)."""
    rng = np.random.default_rng(settings["weights"]["seed"])
    state = {}
    for key in sorted(settings["state_dict_shapes"]):
        w = rng.standard_normal(settings["state_dict_shapes"][key]).astype(np.float32)
        is_norm = key.endswith("norm.weight") or "ln_f" in key or (
            "norm" in key and key.endswith("weight"))  # fmt: skip
        state[key] = 1 + np.float32(0.1) * w if is_norm else w * np.float32(settings["weights"]["scale"])
    return state
