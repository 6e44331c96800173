"""LPIPS (arXiv 1801.03924): how different two pictures look, by the activations of VGG16 in them.

Shape letters: B pictures, I and J rows and columns of pixels, C channels. Params are a nested dict,
{"stage_0": {"conv_0": {"w_ijCD", "b_D"}, ..., "head_1C11"}, ...}. Everything is computed in float32. A
folder with the published weights is read by `weights.judge_keys`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Channels of the convolutions of 3 x 3 pixels; between stages the resolution is halved.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# What VGG16 was trained on: mean and deviation of the channels, of pixels in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LEAST = 2 ** (len(STAGES) - 1)  # pixels of a side: the last stage has one then


def distance(params: dict[str, Any], a_BIJC: jax.Array, b_BIJC: jax.Array) -> jax.Array:
    """The distance of each picture from another one [B], of pixels in [-1, 1]; 0 for equal ones. A single
    channel is taken for grey. Raises ValueError for pictures with fewer than LEAST pixels on a side."""
    if min(a_BIJC.shape[1:3]) < LEAST:
        raise ValueError(
            f"LPIPS needs pictures of at least {LEAST} pixels on each side, not {a_BIJC.shape[1:3]}"
        )
    B = len(a_BIJC)
    x = jnp.concatenate([a_BIJC, b_BIJC])
    shift, scale = (np.float32(of).reshape(1, 1, 1, 3) for of in (SHIFT, SCALE))
    x = (x - shift) / scale
    total_B = jnp.zeros(B)
    for number, widths in enumerate(STAGES):
        stage = params[f"stage_{number}"]
        if number:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for conv in range(len(widths)):
            x = jax.nn.relu(_conv(stage[f"conv_{conv}"], x))
        # The small number keeps the gradient finite where all channels of a place are 0.
        length = jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + np.float32(1e-20))
        unit = x / (length + np.float32(1e-10))
        head_C = stage["head_1C11"].reshape(-1)
        total_B += jnp.mean(jnp.einsum("BIJC,C->BIJ", (unit[:B] - unit[B:]) ** 2, head_C), axis=(1, 2))
    return total_B


def _conv(of, x):
    letters = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(x, of["w_ijCD"], (1, 1), "SAME", dimension_numbers=letters)
    return out + of["b_D"][None, None, None]
