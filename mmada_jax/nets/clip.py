"""CLIP (arXiv 2103.00020): a vision and a text transformer whose features lie in one space.

Shape letters: B rows, I and J pixels, C channels, S positions, D width, H heads, K width of a head, F
width of the MLP, P width of the shared features. Params are a plain nested dict, and the first axis of a
block's params counts the blocks. Everything is computed in float32. Reading a checkpoint is the task of
`weights.clip`, scoring images of the reward `clip`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmada_jax.data.images import to_image
from mmada_jax.ranges import Positive, Range, Ranged

# Mean and standard deviation of each channel of the pixels, in [0, 1], that CLIP was trained on.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Tower(Ranged):
    """The transformer of one modality."""

    d_model: Annotated[int, Range(1, 1_000_000)]
    n_layers: Annotated[int, Range(1, 10_000)]
    n_heads: Annotated[int, Range(1, 100_000)]
    d_mlp: Annotated[int, Range(1, 10_000_000)]
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_eps: Annotated[float, Range(0, 1, above=True)] = 1e-5

    def __post_init__(self):
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of n_heads={self.n_heads}; change one of them"
            )


@dataclasses.dataclass(frozen=True)
class ClipConfig(Ranged):
    """Architecture. The state at the first token `eos` gives the features of a text; with None it is the
    state at the largest id."""

    vision: Tower
    text: Tower
    d_features: Annotated[int, Range(1, 1_000_000)]
    image_size: Annotated[int, Range(1, 65536)]
    patch: Annotated[int, Range(1, 65536)]
    vocab: Positive
    max_text: Annotated[int, Range(1, 1_000_000)]
    eos: Annotated[int, Range(0, 2**31 - 1)] | None

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch={self.patch}")

    @property
    def n_patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch) ** 2


def preprocess(images: Sequence[Any], size: int) -> np.ndarray:
    """Pictures -> float32 [B, size, size, 3], like CLIPProcessor of the library transformers: the shorter
    side is resized to `size` (bicubic), the middle is cropped, channels are normalised. A picture has any
    form that `to_image` takes."""
    out = np.empty((len(images), size, size, 3), np.float32)
    for i, image in enumerate(images):
        image = to_image(image)
        short = min(image.size)
        columns, rows = (size if side == short else int(size * side / short) for side in image.size)
        image = image.resize((columns, rows), Image.Resampling.BICUBIC)
        left, top = (columns - size) // 2, (rows - size) // 2
        out[i] = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return (out - np.float32(MEAN)) / np.float32(DEVIATION)


def image_features(params: dict[str, Any], config: ClipConfig, pixels_BIJC: jax.Array) -> jax.Array:
    """Preprocessed pixels [B, size, size, 3] -> features [B, P], whose length isn't 1 yet."""
    p, B, n = params["vision"], pixels_BIJC.shape[0], config.image_size // config.patch
    patches = pixels_BIJC.reshape(B, n, config.patch, n, config.patch, 3).transpose(0, 1, 3, 2, 4, 5)
    h_BSD = jnp.einsum("BSijC,ijCD->BSD", patches.reshape(B, n * n, *patches.shape[3:]), p["patch_ijCD"])
    first = jnp.broadcast_to(p["class_D"], (B, 1, config.vision.d_model))
    h_BSD = jnp.concatenate([first, h_BSD], axis=1) + p["position_SD"][None]
    h_BSD = _norm(h_BSD, p["pre_scale_D"], p["pre_bias_D"], config.vision.norm_eps)
    h_BD = _blocks(p["blocks"], config.vision, h_BSD, causal=False)[:, 0]
    return _norm(h_BD, p["norm_scale_D"], p["norm_bias_D"], config.vision.norm_eps) @ p["project_DP"]


def text_features(params: dict[str, Any], config: ClipConfig, tokens_BS: jax.Array) -> jax.Array:
    """Tokens int32 [B, S], S at most max_text -> features [B, P], whose length isn't 1 yet. Tokens after
    the first end of text have no effect, since attention is causal."""
    p, S = params["text"], tokens_BS.shape[1]
    h_BSD = p["embed_VD"][tokens_BS] + p["position_SD"][None, :S]
    h_BSD = _blocks(p["blocks"], config.text, h_BSD, causal=True)
    # The features are read at the first end of text. Published configurations name a wrong id for it; in
    # these models (`eos` None) the end of text is the largest id, which argmax finds.
    end_B = jnp.argmax(tokens_BS if config.eos is None else tokens_BS == config.eos, axis=1)
    h_BD = jnp.take_along_axis(h_BSD, end_B[:, None, None], axis=1)[:, 0]
    return _norm(h_BD, p["norm_scale_D"], p["norm_bias_D"], config.text.norm_eps) @ p["project_DP"]


def normalise(features_BP: jax.Array) -> jax.Array:
    """Features scaled to length 1. Their products are cosines, and cosines times exp(params["scale"]) are
    CLIP's logits."""
    return features_BP / jnp.linalg.norm(features_BP, axis=-1, keepdims=True)


def _blocks(params: dict[str, Any], tower: Tower, h_BSD: jax.Array, causal: bool) -> jax.Array:
    S, K = h_BSD.shape[1], tower.d_model // tower.n_heads
    seen_ST = np.tril(np.ones((S, S), bool)) if causal else np.ones((S, S), bool)

    def block(h_BSD, p):
        x = _norm(h_BSD, p["attn_norm_scale_D"], p["attn_norm_bias_D"], tower.norm_eps)
        q, k, v = (
            jnp.einsum("BSD,DHK->BSHK", x, p[f"{n}_DHK"]) + p[f"{n}_bias_HK"][None, None] for n in "qkv"
        )
        scores_BHST = jnp.einsum("BSHK,BTHK->BHST", q, k) * np.float32(K**-0.5)
        scores_BHST = jnp.where(seen_ST[None, None], scores_BHST, -jnp.inf)
        x = jnp.einsum("BHST,BTHK->BSHK", jax.nn.softmax(scores_BHST, axis=-1), v)
        h_BSD = h_BSD + jnp.einsum("BSHK,HKD->BSD", x, p["o_HKD"]) + p["o_bias_D"][None, None]
        x = _norm(h_BSD, p["mlp_norm_scale_D"], p["mlp_norm_bias_D"], tower.norm_eps)
        x = x @ p["up_DF"] + p["up_bias_F"][None, None]
        x = x * jax.nn.sigmoid(np.float32(1.702) * x) if tower.activation == "quick_gelu" else (
            jax.nn.gelu(x, approximate=False))  # fmt: skip
        return h_BSD + x @ p["down_FD"] + p["down_bias_D"][None, None], None

    return jax.lax.scan(block, h_BSD, params)[0]


def _norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + np.float32(eps))
    lead = (1,) * (x.ndim - 1)
    return x * scale_D.reshape(*lead, -1) + bias_D.reshape(*lead, -1)
