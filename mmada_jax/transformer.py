"""The transformer of LLaDA and MMaDA: bidirectional, RoPE, RMSNorm, gated SiLU MLP, untied head.

Shape letters: B rows, L positions, D model width, H query heads, G key/value heads, K head width,
F MLP width, V vocabulary rows, N layers.

Outside this file params are a plain nested dict of arrays:

    embed_VD  blocks/{attn_norm_D q_DHK k_DGK v_DGK o_HKD mlp_norm_D gate_DF up_DF down_FD}
    norm_D  head_DV

where every array of blocks has the layers N as its first axis.
"""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmada_jax import sharding
from mmada_jax.attention import attention


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture. `dtype` is that of the computation; params are created in float32."""

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32
    d_mlp: int = 12288
    vocab: int = 134656
    max_len: int = 4096
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "plain", "xla", "cudnn"] = "auto"
    pad: Literal["hard", "soft"] = "hard"  # soft: the additive bias that the reference trains with
    remat: Literal["none", "full"] = "none"
    unroll: int = 1  # layers per iteration of the scan; n_layers unrolls it

    def __post_init__(self):
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"d_model={self.d_model} must divide by n_heads={self.n_heads}, and that by "
                f"n_kv_heads={self.n_kv_heads}"
            )
        if self.d_model // self.n_heads % 2:
            raise ValueError(f"RoPE needs an even head width, not {self.d_model // self.n_heads}")

    @property
    def d_head(self) -> int:
        """K, the width of one head."""
        return self.d_model // self.n_heads


# Vocabulary sizes of `digits` and `tiny` are set by their users.
PRESETS = {
    "llada-8b": Config(remat="full"),
    "tiny": Config(d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, d_mlp=160, vocab=640,
                   max_len=256, dtype="float32"),
    "digits": Config(d_model=128, n_layers=4, n_heads=4, n_kv_heads=4, d_mlp=384, vocab=256,
                     max_len=128, dtype="float32", unroll=4),
}  # fmt: skip


def param_count(config: Config) -> int:
    """Parameters of the model."""
    return sum(x.size for x in jax.tree.leaves(param_shapes(config)))


def init_params(key: jax.Array, config: Config) -> dict[str, Any]:
    """Random params, float32: truncated normal at 3 deviations, std 1/sqrt(width), outputs of
    layer i further divided by sqrt(2(i+1)), norms 1 (the "mitchell" scheme of OLMo and LLaDA)."""
    row = jnp.zeros((1, 1), jnp.int32)
    return _Transformer(config).init(key, row, row == 0, row)["params"]


def param_shapes(config: Config) -> dict[str, Any]:
    """The params tree as ShapeDtypeStructs; nothing is computed."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config))


def param_axes(config: Config) -> dict[str, Any]:
    """The params tree with the logical axis names of each array in its place."""
    blocks = {name: ("layers", *axes) for name, axes in _BLOCK_AXES.items()}
    return {"blocks": blocks, **_OUTER_AXES}


def hidden_states(
    params: dict[str, Any],
    config: Config,
    tokens_BL: jax.Array,
    valid_BL: jax.Array,
    positions_BL: jax.Array | None = None,
) -> jax.Array:
    """Token ids and their validity -> final hidden states [B, L, D] in `config.dtype`.

    `positions` are those of RoPE, by default 0..L-1, padding counted.
    """
    if positions_BL is None:
        positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    return _Transformer(config).apply({"params": params}, tokens_BL, valid_BL, positions_BL)


def unembed(
    params: dict[str, Any], config: Config, h_D: jax.Array, first: int = 0, size: int | None = None
) -> jax.Array:
    """Hidden states [..., D] -> float32 logits over the ids [first, first + size).

    No shift: the logits at a position predict the token at that position.
    """
    head_DV = _use(params["head_DV"], "head_DV", config)
    if size is not None:
        head_DV = head_DV[:, first : first + size]
    return jnp.einsum("...D,DV->...V", h_D, head_DV, preferred_element_type=jnp.float32)


def rms_norm(x_D: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) in float32, cast back, then scaled in x's dtype, as the reference does."""
    x32_D = x_D.astype(jnp.float32)
    norm_D = x32_D * jax.lax.rsqrt(jnp.mean(x32_D**2, axis=-1, keepdims=True) + eps)
    scale_D = jnp.expand_dims(scale_D, range(x_D.ndim - 1))
    return norm_D.astype(x_D.dtype) * scale_D.astype(x_D.dtype)


def rope_table(positions_BL: jax.Array, d_head: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of RoPE's angles, each [B, L, 1, K/2] float32. One table serves all layers."""
    half = d_head // 2
    freq_k = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BL1k = positions_BL[:, :, None, None].astype(jnp.float32) * freq_k[None, None, None]
    return jnp.cos(angle_BL1k), jnp.sin(angle_BL1k)


def rope(x_BLHK: jax.Array, cos_BL1k: jax.Array, sin_BL1k: jax.Array) -> jax.Array:
    """Rotates the two halves of each head (not interleaved pairs) by position, in float32."""
    a_BLHk, b_BLHk = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    rotated = (a_BLHk * cos_BL1k - b_BLHk * sin_BL1k, b_BLHk * cos_BL1k + a_BLHk * sin_BL1k)
    return jnp.concatenate(rotated, axis=-1).astype(x_BLHK.dtype)


_BLOCK_AXES = {
    "attn_norm_D": (None,),
    "q_DHK": ("embed", "heads", "head_dim"),
    "k_DGK": ("embed", "kv_heads", "head_dim"),
    "v_DGK": ("embed", "kv_heads", "head_dim"),
    "o_HKD": ("heads", "head_dim", "embed"),
    "mlp_norm_D": (None,),
    "gate_DF": ("embed", "mlp"),
    "up_DF": ("embed", "mlp"),
    "down_FD": ("mlp", "embed"),
}


_OUTER_AXES = {"embed_VD": ("vocab", "embed"), "norm_D": (None,), "head_DV": ("embed", "vocab")}


def _use(w: jax.Array, name: str, config: Config) -> jax.Array:
    """A weight as its reader wants it: in the dtype of the computation, gathered along embed."""
    return sharding.constrain(w.astype(config.dtype), *(_BLOCK_AXES | _OUTER_AXES)[name])


class _Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x_BLD, layer, valid_BL, cos_BL1k, sin_BL1k):
        c = self.config
        width = 1 / math.sqrt(c.d_model)
        # Mitchell: what a layer writes to the residual stream shrinks with depth.
        depth = jax.lax.rsqrt(2.0 * (layer + 1))

        def weight(name, shape, std):
            return _use(self.param(name, _truncated_normal(std), shape), name, c)

        def norm(name, x):
            return rms_norm(x, self.param(name, nn.initializers.ones, (c.d_model,)), c.norm_eps)

        h_BLD = norm("attn_norm_D", x_BLD)
        heads, kv_heads = (c.d_model, c.n_heads, c.d_head), (c.d_model, c.n_kv_heads, c.d_head)
        q_BLHK = jnp.einsum("BLD,DHK->BLHK", h_BLD, weight("q_DHK", heads, width))
        k_BLGK = jnp.einsum("BLD,DGK->BLGK", h_BLD, weight("k_DGK", kv_heads, width))
        v_BLGK = jnp.einsum("BLD,DGK->BLGK", h_BLD, weight("v_DGK", kv_heads, width))
        att_BLHK = attention(
            rope(q_BLHK, cos_BL1k, sin_BL1k),
            rope(k_BLGK, cos_BL1k, sin_BL1k),
            v_BLGK,
            valid_BL,
            implementation=c.attention,
            soft=c.pad == "soft",
        )
        o_HKD = weight("o_HKD", (c.n_heads, c.d_head, c.d_model), width * depth)
        x_BLD += jnp.einsum("BLHK,HKD->BLD", att_BLHK, o_HKD)

        h_BLD = norm("mlp_norm_D", x_BLD)
        gate_BLF = jnp.einsum("BLD,DF->BLF", h_BLD, weight("gate_DF", (c.d_model, c.d_mlp), width))
        up_BLF = jnp.einsum("BLD,DF->BLF", h_BLD, weight("up_DF", (c.d_model, c.d_mlp), width))
        down_FD = weight("down_FD", (c.d_mlp, c.d_model), depth / math.sqrt(c.d_mlp))
        x_BLD += jnp.einsum("BLF,FD->BLD", jax.nn.silu(gate_BLF) * up_BLF, down_FD)
        return sharding.constrain(x_BLD, "batch", "length", "embed"), None


class _Transformer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens_BL, valid_BL, positions_BL):
        c = self.config
        init = _truncated_normal(c.d_model**-0.5)
        embed_VD = _use(self.param("embed_VD", init, (c.vocab, c.d_model)), "embed_VD", c)
        self.param("head_DV", init, (c.d_model, c.vocab))  # read by unembed, where it is wanted
        x_BLD = sharding.constrain(embed_VD[tokens_BL], "batch", "length", "embed")
        blocks = nn.scan(
            nn.remat(_Block, prevent_cse=False) if c.remat == "full" else _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.n_layers,
            unroll=c.unroll,
        )
        layers_N = jnp.arange(c.n_layers, dtype=jnp.float32)
        cos_sin = rope_table(positions_BL, c.d_head, c.rope_theta)
        x_BLD, _ = blocks(c, name="blocks")(x_BLD, layers_N, valid_BL, *cos_sin)
        return rms_norm(x_BLD, self.param("norm_D", nn.initializers.ones, (c.d_model,)), c.norm_eps)


def _truncated_normal(std):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.truncated_normal(key, -3, 3, shape, dtype) * std

    return init
