"""The transformer of LLaDA and MMaDA: bidirectional, RoPE, RMSNorm, gated SiLU MLP.

Shape letters: B rows, L positions, D model width, H query heads, G key/value heads, K head width,
F MLP width, V vocabulary rows, N layers.

Outside this file params are a plain nested dict of arrays:

    embed_VD  blocks/{attn_norm_D q_DHK k_DGK v_DGK o_HKD mlp_norm_D gate_DF up_DF down_FD}
    norm_D  head_DV

where every array of blocks has the layers N as its first axis. A model whose head is tied to its
embedding has no head_DV.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mmada_jax.devices import sharding
from mmada_jax.devices.sharding import REST
from mmada_jax.kernels.attention import attention
from mmada_jax.nets import cache, int8
from mmada_jax.nets.cache import Cache
from mmada_jax.nets.products import products, widen
from mmada_jax.nets.rope import rope, rope_table
from mmada_jax.ranges import Positive, Range, Ranged

# What a layer can keep for the backward pass: q, k and v (after RoPE); the output of attention; the
# residual stream between attention and MLP; gate and up of the MLP. The stream between the layers is
# always kept. In order of what they cost and save.
KEEPABLE = ("attention", "middle", "qkv", "mlp")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Ranged):
    """Architecture. `dtype` is that of the computation; params are created in float32."""

    d_model: Annotated[int, Range(1, 1_000_000)] = 4096
    n_layers: Annotated[int, Range(1, 10_000)] = 32
    n_heads: Annotated[int, Range(1, 100_000)] = 32
    n_kv_heads: Annotated[int, Range(1, 100_000)] = 32
    d_mlp: Annotated[int, Range(1, 10_000_000)] = 12288
    vocab: Positive = 134656
    max_len: Positive = 4096
    rope_theta: Annotated[float, Range(0, 1e12, above=True)] = 500000.0
    norm_eps: Annotated[float, Range(0, 1, above=True)] = 1e-5
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "plain", "cpu", "xla", "cudnn", "tpu"] = "auto"
    pad: Literal["hard", "soft"] = "hard"  # soft: the additive bias that the reference trains with
    # What the backward pass recomputes: "none", nothing; "full", each layer from its input; else what
    # isn't named, as "attention+qkv" (names of KEEPABLE).
    remat: str = "none"
    unroll: Annotated[int, Range(1, 10_000)] = 1  # layers per iteration of the scan; n_layers unrolls it
    weights: Literal["plain", "int8"] = "plain"  # how the matrices of the layers are held
    tied: bool = False  # the head is the embedding, as in iLLaDA

    def __post_init__(self):
        super().__post_init__()
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"d_model={self.d_model} must divide by n_heads={self.n_heads}, and that by "
                f"n_kv_heads={self.n_kv_heads}"
            )
        if self.d_model // self.n_heads % 2:
            raise ValueError(f"RoPE needs an even head width, not {self.d_model // self.n_heads}")
        if unknown := set(self.kept) - set(KEEPABLE):
            raise ValueError(
                f"remat {self.remat!r} names {', '.join(sorted(unknown))}; it must be 'none', 'full', "
                f"or some of {', '.join(KEEPABLE)} joined by +"
            )

    @property
    def d_head(self) -> int:
        """K, the width of one head."""
        return self.d_model // self.n_heads

    @property
    def kept(self) -> tuple[str, ...]:
        """The named values that a layer keeps for its backward pass, if it recomputes any."""
        return () if self.remat in ("none", "full") else tuple(self.remat.split("+"))


# Vocabulary sizes of `digits` and `tiny` are set by their users.
PRESETS = {
    "llada-8b": ModelConfig(remat="full"),
    # Sizes as published (arXiv 2606.25331); the base of its RoPE isn't, and is taken to be LLaDA's.
    "illada-8b": ModelConfig(n_kv_heads=8, d_mlp=14336, vocab=155136, max_len=8192, remat="full",
                             tied=True),
    "tiny": ModelConfig(d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, d_mlp=160, vocab=640,
                   max_len=256, dtype="float32"),
    "digits": ModelConfig(d_model=128, n_layers=4, n_heads=4, n_kv_heads=4, d_mlp=384, vocab=256,
                     max_len=128, dtype="float32", unroll=4),
}  # fmt: skip


def param_count(config: ModelConfig) -> int:
    """Parameters of the model."""
    return sum(x.size for x in jax.tree.leaves(param_shapes(config)))


def forward_flops(config: ModelConfig, rows: int, length: int, logits: int | None = None) -> int:
    """Operations of a forward pass over rows of `length` tokens, two per multiply-add, with so many
    `logits` at its end (all ids at all positions by default). Training takes three times as many."""
    logits = rows * length * config.vocab if logits is None else logits
    blocks = param_shapes(dataclasses.replace(config, weights="plain"))["blocks"]
    weights = sum(x.size for name, x in blocks.items() if not name.endswith("norm_D"))
    attention = 2 * length * config.d_model * config.n_layers  # queries with keys, and with values
    return 2 * (rows * length * (weights + attention) + logits * config.d_model)


def init_params(key: jax.Array, config: ModelConfig) -> dict[str, Any]:
    """Random params, float32: truncated normal at 3 deviations, std 1/sqrt(width), outputs of
    layer i further divided by sqrt(2(i+1)), norms 1 (the "mitchell" scheme of OLMo and LLaDA). Raises
    ValueError for weights in 8 bits, which aren't trained."""
    if config.weights != "plain":
        raise ValueError(f"weights are {config.weights!r}; only 'plain' ones are trained")
    row = jnp.zeros((1, 1), jnp.int32)  # Flax makes params on the way through the model
    # No mesh could split this row. The code of one layer is compiled in a third of the time of four.
    config = dataclasses.replace(config, attention="plain", unroll=1)
    return _Transformer(config).init(key, row, row == 0, None)["params"]


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """The params tree as ShapeDtypeStructs; nothing is computed."""
    plain = dataclasses.replace(config, weights="plain")
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), plain))
    return shapes if config.weights == "plain" else shapes | {"blocks": int8.shapes(shapes["blocks"])}


def held_shapes(config: ModelConfig) -> dict[str, Any]:
    """The same as a model that only computes holds it: in `config.dtype`, but for what is in 8 bits."""

    def in_8_bits(x):
        return isinstance(x, dict) and "int8" in x

    def hold(x):
        return x if in_8_bits(x) else jax.ShapeDtypeStruct(x.shape, config.dtype)

    return jax.tree.map(hold, param_shapes(config), is_leaf=in_8_bits)


def param_axes(config: ModelConfig) -> dict[str, Any]:
    """The params tree with the logical axis names of each array in its place."""
    blocks = {name: ("layers", *axes) for name, axes in _BLOCK_AXES.items()}
    outer = {name: axes for name, axes in _OUTER_AXES.items() if not (config.tied and name == "head_DV")}
    return {"blocks": int8.axes(blocks) if config.weights == "int8" else blocks, **outer}


def hidden_states(
    params: dict[str, Any],
    config: ModelConfig,
    tokens_BL: jax.Array,
    valid_BL: jax.Array,
    positions_BL: jax.Array | None = None,
) -> jax.Array:
    """Token ids and their validity -> final hidden states [B, L, D] in `config.dtype`.

    `positions` are those of RoPE, below `max_len`, by default 0..L-1, padding counted. Beside the params
    there may be adapters, as `lora.beside` puts them there.
    """
    return _Transformer(config).apply(_variables(params), tokens_BL, valid_BL, positions_BL)


def _variables(params):
    """What Flax takes: the params, and the adapters of the blocks."""
    variables = {"params": {name: part for name, part in params.items() if name != "lora"}}
    return variables | ({"lora": {"blocks": params["lora"]}} if "lora" in params else {})


def hidden_block(
    params: dict[str, Any],
    config: ModelConfig,
    tokens_BQ: jax.Array,
    place_BQ: jax.Array,
    valid_BQ: jax.Array,
    past: Cache | None = None,
    seen_BP: jax.Array | None = None,
    shadows: int = 0,
) -> tuple[jax.Array, Cache]:
    """A part of each row, at the places [B, Q] below `max_len` -> its final hidden states [B, Q, D], and
    the keys and values of its tokens.

    The tokens attend to each other where they are valid, and to the places of the rows in the cache
    `past` that are `seen` [B, P]; none of these may be a place of the part. Without `past` the part is all
    that there is of a row. The last `shadows` of the tokens are seen by no other token; each of them sees
    all that the others see but the token at its own place (WINO, arXiv 2507.18578). For inference. Raises
    ValueError for soft padding.
    """
    if config.pad == "soft":
        raise ValueError("steps that compute a part of a row need pad='hard'; this model's is 'soft'")
    network = _Transformer(config, stores=True, shadows=shadows)
    return network.apply(_variables(params), tokens_BQ, valid_BQ, place_BQ, past, seen_BP)


def head(params: Mapping[str, Any]) -> jax.Array:
    """The matrix [D, V] that makes logits of hidden states."""
    return params["head_DV"] if "head_DV" in params else params["embed_VD"].T


def unembed(
    params: dict[str, Any],
    config: ModelConfig,
    h_D: jax.Array,
    first: int = 0,
    size: int | None = None,
) -> jax.Array:
    """Hidden states [..., D] -> float32 logits over the ids [first, first + size).

    No shift: the logits at a position predict the token at that position.
    """
    head_DV = _use(head(params), "head_DV", config)
    if size is not None:
        head_DV = head_DV[:, first : first + size]
    return jnp.einsum("...D,DV->...V", h_D, head_DV, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Network:
    """Params with their architecture: trunk and head in one object, as `diffusion.denoise` takes them."""

    params: dict[str, Any]
    config: ModelConfig

    def hidden_states(self, tokens_BL: jax.Array, valid_BL: jax.Array) -> jax.Array:
        """See the function of that name."""
        return hidden_states(self.params, self.config, tokens_BL, valid_BL)

    def hidden_block(
        self,
        tokens_BQ: jax.Array,
        place_BQ: jax.Array,
        valid_BQ: jax.Array,
        past: Cache | None = None,
        seen_BP: jax.Array | None = None,
        shadows: int = 0,
    ) -> tuple[jax.Array, Cache]:
        """See the function of that name."""
        of_part = tokens_BQ, place_BQ, valid_BQ
        return hidden_block(self.params, self.config, *of_part, past, seen_BP, shadows)

    def empty_cache(self, rows: int, length: int) -> Cache:
        """Room for the keys and values of so many rows of `length` places."""
        c = self.config
        return cache.empty(c.n_layers, rows, c.n_kv_heads, length, c.d_head, c.dtype)

    def unembed(self, h_BLD: jax.Array, first: int = 0, size: int | None = None) -> jax.Array:
        """See the function of that name."""
        return unembed(self.params, self.config, h_BLD, first, size)


def rms_norm(x_D: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) in float32, cast back, then scaled in x's dtype, as the reference does."""
    x32_D = x_D.astype(jnp.float32)
    norm_D = x32_D * jax.lax.rsqrt(jnp.mean(x32_D**2, axis=-1, keepdims=True) + eps)
    scale_D = jnp.expand_dims(scale_D, range(x_D.ndim - 1))
    return norm_D.astype(x_D.dtype) * scale_D.astype(x_D.dtype)


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


def _use(w: jax.Array, name: str, config: ModelConfig, heads_merged: bool = False) -> jax.Array:
    """A weight as its reader wants it: in the dtype of the computation, gathered along embed.

    With `heads_merged` the axes of the heads and their width become one, before the gather: nothing
    that is whole has to be moved for it.
    """
    axes, w = (_BLOCK_AXES | _OUTER_AXES)[name], int8.value(w, config.dtype)
    if heads_merged:
        at = axes.index("head_dim")
        axes = axes[:at] + axes[at + 1 :]
        w = w.reshape(*w.shape[: at - 1], -1, *w.shape[at + 1 :])
        w = jax.lax.optimization_barrier(w)  # or XLA does it after the gather
    return sharding.constrain(w, *axes)


class _Block(nn.Module):
    config: ModelConfig
    stores: bool = False  # also returns keys and values

    @nn.compact
    def __call__(self, x_BLD, layer, past, valid_BL, cos_B1LK, sin_B1LK, seen_BP, shadow_BST):
        c = self.config
        width = 1 / math.sqrt(c.d_model)
        # Mitchell: what a layer writes to the residual stream shrinks with depth.
        depth = jax.lax.rsqrt(2.0 * (layer + 1))

        def weight(name, shape, std, heads_merged=False):
            w = self.param(name, _truncated_normal(std), shape)
            return _use(w, name, c, heads_merged)

        def adapt(name, x, y, letters="BLR,RO->BLO", *heads, of_x="BLI"):
            """The outputs `y` of a matrix for the inputs `x`, with those of its adapter."""
            if not self.has_variable("lora", name):
                return y
            of, scale = self.get_variable("lora", name), self.get_variable("lora", "scale_N")
            low_BLR = jnp.einsum(f"{of_x},IR->BLR", x, of["a_NIR"].astype(c.dtype))
            b_RO = of["b_NRO"].astype(c.dtype)
            more = jnp.einsum(letters, low_BLR, b_RO.reshape(len(b_RO), *heads) if heads else b_RO)
            return y + more * scale.astype(c.dtype)

        def norm(name, x):
            return rms_norm(x, self.param(name, nn.initializers.ones, (c.d_model,)), c.norm_eps)

        # Queries and keys are formed head by head, v and the MLP's values as their readers want them,
        # M all heads side by side: a transpose is a pass over memory.
        h_BLD = norm("attn_norm_D", x_BLD)
        heads, kv_heads = (c.d_model, c.n_heads, c.d_head), (c.d_model, c.n_kv_heads, c.d_head)
        q_BHLK, k_BGLK, v_BLM = products(
            h_BLD,
            ("BLD,DHK->BHLK", weight("q_DHK", heads, width)),
            ("BLD,DGK->BGLK", weight("k_DGK", kv_heads, width)),
            ("BLD,DM->BLM", weight("v_DGK", kv_heads, width, heads_merged=True)),
            join=not self.stores,
        )
        q_BHLK = adapt("q_DHK", h_BLD, q_BHLK, "BLR,RHK->BHLK", *heads[1:])
        k_BGLK = adapt("k_DGK", h_BLD, k_BGLK, "BLR,RGK->BGLK", *kv_heads[1:])
        v_BLM = adapt("v_DGK", h_BLD, v_BLM)
        k_BGLK = checkpoint_name(rope(k_BGLK, cos_B1LK, sin_B1LK), "qkv")
        q_BHLK = checkpoint_name(rope(q_BHLK, cos_B1LK, sin_B1LK), "qkv")
        v_BLM = checkpoint_name(v_BLM, "qkv")
        attend = functools.partial(
            attention,
            implementation=c.attention,
            soft=c.pad == "soft",
            past=past and (*past, seen_BP),
        )
        if shadow_BST is None:
            att_BLM = attend(q_BHLK, k_BGLK, v_BLM, valid_BL)
        else:
            n = shadow_BST.shape[1]
            seen_BQM = attend(q_BHLK[:, :, :-n], k_BGLK[:, :, :-n], v_BLM[:, :-n], valid_BL[:, :-n])
            of_shadows = q_BHLK[:, :, -n:], k_BGLK, v_BLM, shadow_BST, valid_BL[:, -n:]
            att_BLM = jnp.concatenate([seen_BQM, attend(*of_shadows)], axis=1)
        o_MD = weight("o_HKD", (c.n_heads, c.d_head, c.d_model), width * depth, heads_merged=True)
        x_BLD += adapt("o_HKD", att_BLM, products(att_BLM, ("BLM,MD->BLD", o_MD))[0])
        x_BLD = checkpoint_name(sharding.constrain(x_BLD, "batch", "length", "embed"), "middle")

        h_BLD = norm("mlp_norm_D", x_BLD)
        gate_DF = weight("gate_DF", (c.d_model, c.d_mlp), width)
        up_DF = weight("up_DF", (c.d_model, c.d_mlp), width)
        if sharding.platform() == "cpu":
            gate, up = products(
                h_BLD, ("BLD,DF->BLF", gate_DF), ("BLD,DF->BLF", up_DF), join=not self.stores
            )
        else:
            gate, up = widen(h_BLD, gate_DF), widen(h_BLD, up_DF)
        of_act = "BLF" if sharding.platform() == "cpu" else "FBL"
        letters = f"BLR,RF->{of_act}"
        gate, up = adapt("gate_DF", h_BLD, gate, letters), adapt("up_DF", h_BLD, up, letters)
        down_FD = weight("down_FD", (c.d_mlp, c.d_model), depth / math.sqrt(c.d_mlp))
        act = jax.nn.silu(checkpoint_name(gate, "mlp")) * checkpoint_name(up, "mlp")
        if sharding.platform() == "cpu":
            down_BLD = products(act, ("BLF,FD->BLD", down_FD))[0]
        else:
            down_BLD = jnp.einsum("FBL,FD->BLD", act, down_FD)
        x_BLD += adapt("down_FD", act, down_BLD, of_x=of_act.replace("F", "I"))
        kept = Cache(k_BGLK, cache.by_head(v_BLM, c.n_kv_heads)) if self.stores else None
        return sharding.constrain(x_BLD, "batch", "length", "embed"), kept


class _Transformer(nn.Module):
    config: ModelConfig
    stores: bool = False
    shadows: int = 0

    @nn.compact
    def __call__(self, tokens_BL, valid_BL, positions_BL, past=None, seen_BP=None):
        c = self.config
        init = _truncated_normal(c.d_model**-0.5)
        embed_VD = self.param("embed_VD", init, (c.vocab, c.d_model)).astype(c.dtype)
        if not c.tied:
            self.param("head_DV", init, (c.d_model, c.vocab))  # read by unembed, where it is wanted
        # Every device looks up its part of each vector for all rows, and the parts are exchanged: to
        # gather the table would move many times as much.
        x_BLD = sharding.constrain(embed_VD[tokens_BL], "all_rows", "length", "embed", rules=REST)
        x_BLD = sharding.constrain(x_BLD, "batch", "length", "embed")
        policy = jax.checkpoint_policies.save_only_these_names(*c.kept)
        blocks = nn.scan(
            _Block if c.remat == "none" else nn.remat(_Block, prevent_cse=False, policy=policy),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, *(nn.broadcast,) * 5),
            length=c.n_layers,
            unroll=c.unroll,
        )
        layers_N = jnp.arange(c.n_layers, dtype=jnp.float32)
        if positions_BL is None:
            cos_sin = (x[None, None] for x in rope_table(tokens_BL.shape[1], c.d_head, c.rope_theta))
        else:
            table = rope_table(c.max_len, c.d_head, c.rope_theta)
            cos_sin = (jnp.take(x, positions_BL, axis=0)[:, None] for x in table)
        blocks = blocks(c, self.stores, name="blocks")
        shadow_BST = _seen_by_shadows(positions_BL, valid_BL, self.shadows) if self.shadows else None
        x_BLD, kept = blocks(x_BLD, layers_N, past, valid_BL, *cos_sin, seen_BP, shadow_BST)
        h_BLD = rms_norm(x_BLD, self.param("norm_D", nn.initializers.ones, (c.d_model,)), c.norm_eps)
        return (h_BLD, kept) if self.stores else h_BLD


def _seen_by_shadows(place_BT, valid_BT, shadows):
    """Which of all T tokens each of the last S sees: the tokens at other places, and itself."""
    T = place_BT.shape[1]
    elsewhere_BST = place_BT[:, None, :] != place_BT[:, T - shadows :, None]
    is_shadow_T = np.arange(T) >= T - shadows
    itself_ST = np.eye(T, dtype=bool)[T - shadows :]
    return valid_BT[:, None] & ((elsewhere_BST & ~is_shadow_T[None, None]) | itself_ST[None])


def _truncated_normal(std):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.truncated_normal(key, -3, 3, shape, dtype) * std

    return init
