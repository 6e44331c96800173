"""The network of the Frechet inception distance (arXiv 1706.08500): Inception v3 as it was published for
TensorFlow, up to the 2048 features of a picture.

It differs from the usual Inception v3 in its pooling: a mean at the border is that of the places that are
there, and the last block takes the largest value in the place of a mean. Shape letters: B pictures, I and J
rows and columns of pixels, C channels. Params are {name of a convolution: {"w_ijCD", "b_D"}}, with the
normalisation a part of them. Everything is computed in float32. A folder with the published weights is
read by `weights.judge_keys`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299  # pixels that a picture is resized to
FEATURES = 2048
# (name, pixels, number of outputs, size of the kernel, stride, "SAME" or "VALID") -> pixels
Conv = Callable[..., jax.Array]


def features(params: dict[str, Any], pixels_BIJC: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> features [B, 2048]. A single channel is taken for grey."""

    def conv(name, x, outputs, kernel=(1, 1), stride=1, padding="SAME"):
        del outputs, kernel  # the weights have them
        out = convolve(x, params[name]["w_ijCD"], stride, padding)
        return jax.nn.relu(out + params[name]["b_D"][None, None, None])

    B = len(pixels_BIJC)
    x = jax.image.resize(pixels_BIJC, (B, SIDE, SIDE, pixels_BIJC.shape[3]), "linear", antialias=False)
    return jnp.mean(network(conv, jnp.broadcast_to(x, (B, SIDE, SIDE, 3))), axis=(1, 2))


def convolve(x_BIJC: jax.Array, w_ijCD: jax.Array, stride: int, padding: str) -> jax.Array:
    """A convolution without its bias."""
    return jax.lax.conv_general_dilated(
        x_BIJC, w_ijCD, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )  # fmt: skip


def network(conv: Conv, x: jax.Array) -> jax.Array:
    """Pixels [B, 299, 299, 3] -> [B, 8, 8, 2048]. What a convolution is, `conv` says: it computes, or
    writes down which ones there are."""
    x = conv("Conv2d_1a_3x3", x, 32, (3, 3), 2, "VALID")
    x = conv("Conv2d_2a_3x3", x, 32, (3, 3), 1, "VALID")
    x = conv("Conv2d_2b_3x3", x, 64, (3, 3))
    x = conv("Conv2d_3b_1x1", _largest(x, 2), 80, (1, 1), 1, "VALID")
    x = conv("Conv2d_4a_3x3", x, 192, (3, 3), 1, "VALID")
    x = _largest(x, 2)
    for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = _squares(conv, name, x, pooled)
    x = _join(
        conv("Mixed_6a.branch3x3", x, 384, (3, 3), 2, "VALID"),
        _doubled(conv, "Mixed_6a", x, stride=2, padding="VALID"),
        _largest(x, 2),
    )
    for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = _strips(conv, name, x, width)
    y = conv("Mixed_7a.branch7x7x3_1", x, 192)
    y = conv("Mixed_7a.branch7x7x3_2", y, 192, (1, 7))
    y = conv("Mixed_7a.branch7x7x3_3", y, 192, (7, 1))
    x = _join(
        conv("Mixed_7a.branch3x3_2", conv("Mixed_7a.branch3x3_1", x, 192), 320, (3, 3), 2, "VALID"),
        conv("Mixed_7a.branch7x7x3_4", y, 192, (3, 3), 2, "VALID"),
        _largest(x, 2),
    )
    x = _forks(conv, "Mixed_7b", x, _mean)
    return _forks(conv, "Mixed_7c", x, lambda x: _largest(x, 1))


def _squares(conv, name, x, pooled):
    return _join(
        conv(f"{name}.branch1x1", x, 64),
        conv(f"{name}.branch5x5_2", conv(f"{name}.branch5x5_1", x, 48), 64, (5, 5)),
        _doubled(conv, name, x),
        conv(f"{name}.branch_pool", _mean(x), pooled),
    )


def _doubled(conv, name, x, stride=1, padding="SAME"):
    """Two convolutions of 3 x 3 pixels, behind one of a pixel."""
    y = conv(f"{name}.branch3x3dbl_2", conv(f"{name}.branch3x3dbl_1", x, 64), 96, (3, 3))
    return conv(f"{name}.branch3x3dbl_3", y, 96, (3, 3), stride, padding)


def _strips(conv, name, x, width):
    y = conv(f"{name}.branch7x7_2", conv(f"{name}.branch7x7_1", x, width), width, (1, 7))
    z = conv(f"{name}.branch7x7dbl_1", x, width)
    for number, kernel in ((2, (7, 1)), (3, (1, 7)), (4, (7, 1))):
        z = conv(f"{name}.branch7x7dbl_{number}", z, width, kernel)
    return _join(
        conv(f"{name}.branch1x1", x, 192),
        conv(f"{name}.branch7x7_3", y, 192, (7, 1)),
        conv(f"{name}.branch7x7dbl_5", z, 192, (1, 7)),
        conv(f"{name}.branch_pool", _mean(x), 192),
    )


def _forks(conv, name, x, pool):
    y = conv(f"{name}.branch3x3_1", x, 384)
    z = conv(f"{name}.branch3x3dbl_2", conv(f"{name}.branch3x3dbl_1", x, 448), 384, (3, 3))
    return _join(
        conv(f"{name}.branch1x1", x, 320),
        conv(f"{name}.branch3x3_2a", y, 384, (1, 3)),
        conv(f"{name}.branch3x3_2b", y, 384, (3, 1)),
        conv(f"{name}.branch3x3dbl_3a", z, 384, (1, 3)),
        conv(f"{name}.branch3x3dbl_3b", z, 384, (3, 1)),
        conv(f"{name}.branch_pool", pool(x), 192),
    )


def _join(*parts):
    return jnp.concatenate(parts, axis=-1)


def _largest(x, stride):
    """The largest of 3 x 3 pixels; at a stride of 1 the picture keeps its size."""
    padding = "VALID" if stride > 1 else "SAME"
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _mean(x):
    """The mean of those of 3 x 3 pixels that are within the picture."""

    def total(x):
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(np.ones((1, *x.shape[1:3], 1), np.float32))
