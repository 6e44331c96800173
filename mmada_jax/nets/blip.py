"""BLIP's encoders (arXiv 2201.12086) with the head of ImageReward (arXiv 2304.05977): how well people would
like a picture for a prompt.

A vision transformer reads the picture, and a BERT whose layers also attend to the picture reads the prompt;
the state of its first token goes through a few linear layers without activations. Shape letters: B rows, I
and J pixels, C channels, S positions of the picture, T of the text, D width, H heads, K width of a head, F
width of the MLP. The first axis of a block's params counts the blocks. Everything is computed in float32.
The published file is read by `weights.blip_keys`.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.ranges import Positive, Range, Ranged

Width = Annotated[int, Range(1, 1_000_000)]
# Rewards have mean 0 and deviation 1 on the data that ImageReward was trained on.
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
MAX_TEXT = 35  # tokens of a prompt; further ones are cut off


@dataclasses.dataclass(frozen=True)
class BlipConfig(Ranged):
    """Architecture: first of the vision transformer, then of the text encoder. `head` are the widths of the
    linear layers after it."""

    image_size: Annotated[int, Range(1, 65536)] = 224
    patch: Annotated[int, Range(1, 65536)] = 16
    d_vision: Width = 1024
    n_vision_layers: Annotated[int, Range(1, 10_000)] = 24
    n_vision_heads: Annotated[int, Range(1, 10_000)] = 16
    d_vision_mlp: Width = 4096
    vocab: Positive = 30524
    max_positions: Annotated[int, Range(1, 1_000_000)] = 512
    d_text: Width = 768
    n_text_layers: Annotated[int, Range(1, 10_000)] = 12
    n_text_heads: Annotated[int, Range(1, 10_000)] = 12
    d_text_mlp: Width = 3072
    head: tuple[Width, ...] = (1024, 128, 64, 16, 1)

    @property
    def n_patches(self) -> int:
        """Number of patches of a picture."""
        return (self.image_size // self.patch) ** 2


def rewards(
    params: dict[str, Any],
    config: BlipConfig,
    pixels_BIJC: jax.Array,
    tokens_BT: jax.Array,
    valid_BT: jax.Array,
) -> jax.Array:
    """Pixels as CLIP's `preprocess` gives them, and prompts with their validity -> rewards [B], about 0 in
    the mean, of deviation 1."""
    seen_BSD = image_states(params["vision"], config, pixels_BIJC)
    h_BD = text_states(params["text"], config, tokens_BT, valid_BT, seen_BSD)[:, 0]
    for number in range(len(config.head)):
        layer = params["head"][f"layer_{number}"]
        h_BD = h_BD @ layer["w_DF"] + layer["bias_F"][None]
    return (h_BD[:, 0] - np.float32(MEAN)) / np.float32(DEVIATION)


def image_states(params: dict[str, Any], config: BlipConfig, pixels_BIJC: jax.Array) -> jax.Array:
    """The states of a picture's patches, behind that of the picture as a whole, [B, S, D]."""
    B, n = len(pixels_BIJC), config.image_size // config.patch
    patches = pixels_BIJC.reshape(B, n, config.patch, n, config.patch, 3).transpose(0, 1, 3, 2, 4, 5)
    h_BSD = jnp.einsum(
        "BSijC,ijCD->BSD", patches.reshape(B, n * n, *patches.shape[3:]), params["patch_ijCD"]
    )
    first = jnp.broadcast_to(params["class_11D"], (B, 1, config.d_vision))
    h_BSD = jnp.concatenate([first, h_BSD + params["patch_bias_D"][None, None]], axis=1)
    h_BSD = h_BSD + params["position_1SD"][:, : h_BSD.shape[1]]

    def block(h_BSD, p):
        x = _norm(h_BSD, p, "attn_norm", 1e-6)
        qkv = jnp.einsum("BSD,DnHK->nBSHK", x, p["qkv_DnHK"]) + p["qkv_bias_nHK"][:, None, None]
        h_BSD = h_BSD + _attend(*qkv, p, "o")
        return h_BSD + _mlp(_norm(h_BSD, p, "mlp_norm", 1e-6), p), None

    return _norm(jax.lax.scan(block, h_BSD, params["blocks"])[0], params, "norm", 1e-6)


def text_states(
    params: dict[str, Any],
    config: BlipConfig,
    tokens_BT: jax.Array,
    valid_BT: jax.Array,
    seen_BSD: jax.Array,
) -> jax.Array:
    """The states of a text [B, T, D] whose layers attend to the text where it is valid, then to a picture's
    states, all of them."""
    h_BTD = params["embed_VD"][tokens_BT] + params["position_TD"][None, : tokens_BT.shape[1]]
    h_BTD = _norm(h_BTD, params, "norm", 1e-12)

    def heads(x, p, name):
        return jnp.einsum("BTD,DHK->BTHK", x, p[f"{name}_DHK"]) + p[f"{name}_bias_HK"][None, None]

    def block(h_BTD, p):
        q, k, v = (heads(h_BTD, p, name) for name in "qkv")
        h_BTD = _norm(h_BTD + _attend(q, k, v, p, "o", valid_BT), p, "attn_norm", 1e-12)
        q, k, v = (heads(x, p, f"cross_{n}") for x, n in ((h_BTD, "q"), (seen_BSD, "k"), (seen_BSD, "v")))
        h_BTD = _norm(h_BTD + _attend(q, k, v, p, "cross_o"), p, "cross_norm", 1e-12)
        return _norm(h_BTD + _mlp(h_BTD, p), p, "mlp_norm", 1e-12), None

    return jax.lax.scan(block, h_BTD, params["blocks"])[0]


def _attend(q, k, v, p, name, valid_BT=None):
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q, k) * np.float32(q.shape[-1] ** -0.5)
    if valid_BT is not None:
        scores_BHTS = jnp.where(valid_BT[:, None, None], scores_BHTS, -jnp.inf)
    x = jnp.einsum("BHTS,BSHK->BTHK", jax.nn.softmax(scores_BHTS, axis=-1), v)
    return jnp.einsum("BTHK,HKD->BTD", x, p[f"{name}_HKD"]) + p[f"{name}_bias_D"][None, None]


def _mlp(x, p):
    x = jax.nn.gelu(x @ p["up_DF"] + p["up_bias_F"][None, None], approximate=False)
    return x @ p["down_FD"] + p["down_bias_D"][None, None]


def _norm(x, p, name, eps):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + np.float32(eps))
    return x * p[f"{name}_scale_D"][None, None] + p[f"{name}_bias_D"][None, None]
