"""LLaDA and MMaDA state dicts <-> params: one strict key table, used in both directions."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmada_jax import convert
from mmada_jax.transformer import Config


def key_table(config: Config) -> dict[str, convert.Rule]:
    """PyTorch key -> where the array lies in params and how its axes stand."""
    D, H, G, K, F = config.d_model, config.n_heads, config.n_kv_heads, config.d_head, config.d_mlp
    table = {
        "model.transformer.wte.weight": convert.Rule(("embed_VD",), (config.vocab, D)),
        "model.transformer.ln_f.weight": convert.Rule(("norm_D",), (D,)),
        "model.transformer.ff_out.weight": convert.Rule(("head_DV",), (D, config.vocab), (1, 0)),
    }
    # The PyTorch layout is [out, in]; `merged` names the axes of ours that make up `out` and `in`.
    block = {
        "attn_norm": ("attn_norm_D", (D,), None, None),
        "q_proj": ("q_DHK", (D, H, K), (D, H * K), (1, 0)),
        "k_proj": ("k_DGK", (D, G, K), (D, G * K), (1, 0)),
        "v_proj": ("v_DGK", (D, G, K), (D, G * K), (1, 0)),
        "attn_out": ("o_HKD", (H, K, D), (H * K, D), (1, 0)),
        "ff_norm": ("mlp_norm_D", (D,), None, None),
        "ff_proj": ("gate_DF", (D, F), None, (1, 0)),
        "up_proj": ("up_DF", (D, F), None, (1, 0)),
        "ff_out": ("down_FD", (F, D), None, (1, 0)),
    }
    for layer in range(config.n_layers):
        for name, (ours, shape, merged, order) in block.items():
            table[f"model.transformer.blocks.{layer}.{name}.weight"] = convert.Rule(
                ("blocks", ours), shape, order, merged, layer
            )
    return table


def params_from_torch(state: Mapping[str, np.ndarray], config: Config) -> dict[str, Any]:
    """PyTorch state dict (numpy arrays) -> params, same dtype. Raises on any key or shape amiss."""
    return convert.from_torch(state, key_table(config))


def params_to_torch(params: dict[str, Any], config: Config) -> dict[str, np.ndarray]:
    """Params -> PyTorch state dict of numpy arrays."""
    return convert.to_torch(params, key_table(config))
