"""Params whose matrices become 8 bits as they are read; see `nets.int8`."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mmada_jax.nets import int8
from mmada_jax.weights.lazy import Lazy


def rest_dtype(base_dtype: str) -> str:
    """What all but the matrices of the base of adapters is held in."""
    return "bfloat16" if base_dtype == "int8" else base_dtype


def in_8_bits(params: Mapping[str, Any], dtype: Any = None) -> dict[str, Any]:
    """A tree of Lazy arrays with the matrices of the layers in 8 bits, all else in `dtype`, by default as
    it is. A piece of a matrix is made of whole layers, since a scale is that of all inputs."""
    kept = {name: part for name, part in params.items() if name != "blocks"}
    blocks = {}
    for name, w in params["blocks"].items():
        if name in int8.INPUTS:
            blocks[name] = {part: _part(w, name, part) for part in ("int8", "scale")}
        else:
            blocks[name] = _cast(w, dtype)
    return held_in(kept, dtype) | {"blocks": blocks}


def held_in(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """A tree of Lazy arrays in `dtype`."""
    return jax.tree.map(lambda w: _cast(w, dtype), params)


def _part(w, name, part):
    def read(index):
        return int8.quantize(np.asarray(w[index[0]]), name)[part][(slice(None), *index[1:])]

    shape = int8.shapes({name: jax.ShapeDtypeStruct(w.shape, np.float32)})[name][part]
    return Lazy(shape.shape, np.dtype(shape.dtype), read)


def _cast(w, dtype):
    dtype = np.dtype(dtype or w.dtype)
    return Lazy(tuple(w.shape), dtype, lambda index: np.asarray(w[index]).astype(dtype, copy=False))
