"""Adapters that have become a part of the matrices, written out."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from mmada_jax.nets import int8


def merge(params, adapters, lora):
    """Params in which the adapters have become a part of the matrices. The sum is formed in float32.
    Matrices in 8 bits become plain ones, of the embedding's dtype."""
    dtype = params["embed_VD"].dtype
    blocks = {
        name: int8.value(w, dtype) if isinstance(w, Mapping) else w for name, w in params["blocks"].items()
    }
    for name, of in adapters.items():
        w = blocks[name]
        delta = jnp.einsum("NIR,NRO->NIO", of["a_NIR"], of["b_NRO"], precision="highest").reshape(w.shape)
        blocks[name] = (w.astype(jnp.float32) + np.float32(lora.scale) * delta).astype(w.dtype)
    return {**params, "blocks": blocks}
