"""Matrices that are held in 8 bits, symmetric, with a scale for each output: W = int8 * scale.

Such a matrix is a dict {"int8", "scale"} in the place of its array. The scale has the axes of the matrix,
of which those of the inputs have the size 1. The matrices are read where all weights are (`value`), and
have no gradients: they are for inference, and for the frozen base of adapters.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The matrices, and how many of their axes are inputs; the axis of layers comes before these.
INPUTS = {"q_DHK": 1, "k_DGK": 1, "v_DGK": 1, "o_HKD": 2, "gate_DF": 1, "up_DF": 1, "down_FD": 1}


def value(w: Any, dtype: Any) -> jax.Array:
    """A weight in the dtype of the computation, whether it is held in 8 bits or not."""
    if not isinstance(w, Mapping):
        return w.astype(dtype)
    return (w["int8"].astype(jnp.float32) * w["scale"]).astype(dtype)


def quantize(w: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Layers of a matrix, [N, ...], in 8 bits: the largest of each output becomes 127. On the host."""
    w = np.asarray(w, np.float32)
    axes = tuple(range(1, 1 + INPUTS[name]))
    scale = np.abs(w).max(axis=axes, keepdims=True) / np.float32(127)
    # An output whose weights are all 0 has any scale.
    rounded = np.round(w / np.where(scale > 0, scale, 1)).astype(np.int8)
    return {"int8": rounded, "scale": scale.astype(np.float32)}


def shapes(blocks: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The shapes of blocks whose matrices are in 8 bits, of those where they aren't."""
    return {name: _shape(name, x) if name in INPUTS else x for name, x in blocks.items()}


def _shape(name, x):
    inputs = INPUTS[name]
    scale = (x.shape[0], *(1,) * inputs, *x.shape[1 + inputs :])
    return {
        "int8": jax.ShapeDtypeStruct(x.shape, np.int8),
        "scale": jax.ShapeDtypeStruct(scale, np.float32),
    }


def axes(blocks: Mapping[str, tuple]) -> dict[str, Any]:
    """The same of their logical axis names."""
    return {name: _axes(name, x) if name in INPUTS else x for name, x in blocks.items()}


def _axes(name, of):
    inputs = INPUTS[name]
    return {"int8": of, "scale": (of[0], *(None,) * inputs, *of[1 + inputs :])}
