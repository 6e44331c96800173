"""MAGVIT-v2 image tokenizer: a convolutional encoder and decoder around lookup-free quantisation.

Shape letters: B images, I and J rows and columns of pixels, i and j rows and columns of tokens, C
channels, Z bits of a code. A code is the signs of Z latent channels, and channel 0 is its highest bit
(MAGVIT-v2, arXiv 2310.05737). Params are a plain nested dict; weights of convolutions are [height, width,
in, out]. Training is in `train.pictures`, running it on many images in `model.vision`.
"""

import dataclasses
import math
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.ranges import Range, Ranged

GROUPS = 32  # groups of channels that share a mean and a variance in normalisation
# An entry for one level: a factor of the channels, or a number of residual blocks.
Level = Annotated[int, Range(1, 1000)]


@dataclasses.dataclass(frozen=True)
class VQConfig(Ranged):
    """Architecture. Level l has `channels * mult[l]` channels and half the resolution of level l - 1."""

    channels: Annotated[int, Range(1, 100_000)] = 128
    encoder_mult: tuple[Level, ...] = (1, 2, 2, 4, 4)
    encoder_blocks: tuple[Level, ...] = (4, 3, 4, 3, 4)
    decoder_mult: tuple[Level, ...] = (1, 1, 2, 2, 4)
    decoder_blocks: tuple[Level, ...] = (4, 4, 3, 4, 3)
    bits: Annotated[int, Range(1, 24)] = 13
    pixel_channels: Annotated[int, Range(1, 1000)] = 3

    def __post_init__(self):
        super().__post_init__()
        levels = {len(x) for x in (self.encoder_mult, self.encoder_blocks, self.decoder_mult,
                                   self.decoder_blocks)}  # fmt: skip
        if len(levels) != 1 or self.channels % GROUPS:
            raise ValueError(
                f"encoder and decoder need the same number of levels (got {sorted(levels)}) and "
                f"channels={self.channels} must be a multiple of {GROUPS}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels of a token along one side."""
        return 2 ** (len(self.encoder_mult) - 1)

    @property
    def codebook_size(self) -> int:
        """The number of different codes."""
        return 2**self.bits


PRESETS = {
    # 256 and 512 pixels, as published.
    "magvitv2": VQConfig(),
    # 64 to 128 pixels.
    "medium": VQConfig(
        channels=64, encoder_mult=(1, 2, 2, 4), encoder_blocks=(2, 2, 2, 2), decoder_mult=(1, 2, 2, 4),
        decoder_blocks=(2, 2, 2, 2), bits=12,
    ),
    # 16 to 64 pixels.
    "small": VQConfig(
        channels=32, encoder_mult=(1, 2, 2), encoder_blocks=(1, 1, 1), decoder_mult=(1, 2, 2),
        decoder_blocks=(1, 1, 1), bits=10,
    ),
    "digits": VQConfig(
        channels=32, encoder_mult=(1, 2), encoder_blocks=(1, 1), decoder_mult=(1, 2),
        decoder_blocks=(1, 1), bits=6, pixel_channels=1,
    ),
}  # fmt: skip


def init_params(key: jax.Array, config: VQConfig) -> dict[str, Any]:
    """Random params {"encoder": ..., "decoder": ...}, float32."""
    side = config.downsampling
    encoder, decoder = jax.random.split(key)
    pixels = jnp.zeros((1, side, side, config.pixel_channels))
    return {
        "encoder": _Encoder(config).init(encoder, pixels)["params"],
        "decoder": _Decoder(config).init(decoder, jnp.zeros((1, 1, 1, config.bits)))["params"],
    }


def latents(params: dict[str, Any], config: VQConfig, pixels_BIJC: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> latents [B, i, j, Z], whose signs are the bits of the codes. Raises ValueError
    for pixels of a shape that doesn't fit."""
    _, I, J, C = pixels_BIJC.shape
    if I % config.downsampling or J % config.downsampling or config.pixel_channels != C:
        raise ValueError(
            f"an image of {I}x{J} pixels and {C} channels doesn't fit this tokenizer: it takes "
            f"{config.pixel_channels} channels and sides divisible by {config.downsampling}"
        )
    return _Encoder(config).apply({"params": params["encoder"]}, pixels_BIJC)


def quantize(z_BijZ: jax.Array) -> jax.Array:
    """Latents -> codes int32 [B, i, j]: a bit is 1 where z > 0 (so z = 0 gives 0), and channel 0 is the
    highest bit."""
    powers_Z = 2 ** np.arange(z_BijZ.shape[-1] - 1, -1, -1, dtype=np.int32)
    return jnp.einsum("...Z,Z->...", (z_BijZ > 0).astype(jnp.int32), powers_Z)


def dequantize(codes_Bij: jax.Array, bits: int) -> jax.Array:
    """Codes [...] -> float32 [..., Z]: -1 where a bit is 0, 1 where it is 1."""
    bits_BijZ = jnp.stack([(codes_Bij >> z) & 1 for z in reversed(range(bits))], axis=-1)
    return (2 * bits_BijZ - 1).astype(jnp.float32)


def encode(params: dict[str, Any], config: VQConfig, pixels_BIJC: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> codes int32 [B, i, j]. A row of tokens has them row by row."""
    return quantize(latents(params, config, pixels_BIJC))


def decode(params: dict[str, Any], config: VQConfig, codes_Bij: jax.Array) -> jax.Array:
    """Codes [B, i, j] -> pixels [B, I, J, C], roughly in [-1, 1]; they aren't clipped."""
    z_BijZ = dequantize(codes_Bij, config.bits)
    return _Decoder(config).apply({"params": params["decoder"]}, z_BijZ)


class Rebuilt(NamedTuple):
    """What becomes of pictures in training: the terms of the loss by name, the pictures as they are
    decoded, and their codes."""

    terms: dict[str, jax.Array]
    pixels_BIJC: jax.Array
    codes_Bij: jax.Array


def rebuild(
    params: dict[str, Any], config: VQConfig, pixels_BIJC: jax.Array, temperature: float = 1.0
) -> Rebuilt:
    """Encodes and decodes pictures in a way that has gradients. The terms are those of MAGVIT-v2 (arXiv
    2310.05737), each a scalar:

    reconstruction   mean squared error of the pixels; its gradient passes the quantiser unchanged
    commitment       mean squared distance between the latents and their signs
    entropy          H(bits | latent) - H(bits) in nats per bit

    with p(bit = 1) = sigmoid(4 z / temperature), the softmax of -(z - sign)^2 / temperature over the signs.
    The entropy of a code is taken as the sum over its bits, as in lookup-free quantisation with bits in
    groups.
    """
    z_BijZ = latents(params, config, pixels_BIJC)
    codes_Bij = quantize(z_BijZ)
    q_BijZ = dequantize(codes_Bij, config.bits)
    straight_BijZ = z_BijZ + jax.lax.stop_gradient(q_BijZ - z_BijZ)
    out_BIJC = _Decoder(config).apply({"params": params["decoder"]}, straight_BijZ)

    def entropy(logit):
        # -p log p - (1 - p) log(1 - p). With log_sigmoid the gradient is finite where p rounds to 0 or 1.
        p = jax.nn.sigmoid(logit)
        return -p * jax.nn.log_sigmoid(logit) - (1 - p) * jax.nn.log_sigmoid(-logit)

    logit_BijZ = 4 * z_BijZ / temperature
    mean_Z = jnp.clip(jnp.mean(jax.nn.sigmoid(logit_BijZ), axis=(0, 1, 2)), 1e-6, 1 - 1e-6)
    codebook_Z = entropy(jnp.log(mean_Z) - jnp.log1p(-mean_Z))
    terms = {
        "reconstruction": jnp.mean((out_BIJC - pixels_BIJC) ** 2),
        "commitment": jnp.mean((z_BijZ - jax.lax.stop_gradient(q_BijZ)) ** 2),
        "entropy": jnp.mean(entropy(logit_BijZ)) - jnp.mean(codebook_Z),
    }
    return Rebuilt(terms, out_BIJC, codes_Bij)


def init_discriminator(key: jax.Array, config: VQConfig) -> dict[str, Any]:
    """Random params of the network that tells rebuilt pictures from real ones, float32."""
    side = 2 * config.downsampling
    return _Discriminator(config).init(key, jnp.zeros((1, side, side, config.pixel_channels)))["params"]


def realness(params: dict[str, Any], config: VQConfig, pixels_BIJC: jax.Array) -> jax.Array:
    """How real the discriminator holds each patch of a picture to be, [B, patches]; the objective of
    training is above 1 for real ones and below -1 for rebuilt ones (hinge loss)."""
    return _Discriminator(config).apply({"params": params}, pixels_BIJC)


def to_uint8(pixels_BIJC: Any) -> np.ndarray:
    """Pixels roughly in [-1, 1] -> uint8: clipped, and rounded down, as the reference does."""
    unit = np.clip((np.asarray(pixels_BIJC, np.float32) + 1) / 2, 0, 1)
    return (unit * 255).astype(np.uint8)


def _conv(module, name, x_BIJC, features, size=3, stride=1, padding="SAME"):
    fan_in = size * size * x_BIJC.shape[-1]
    shape = (size, size, x_BIJC.shape[-1], features)
    w = module.param(f"{name}_w", nn.initializers.normal(1 / math.sqrt(fan_in)), shape)
    b = module.param(f"{name}_b", nn.initializers.zeros, (features,))
    out = jax.lax.conv_general_dilated(
        x_BIJC, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out + b[None, None, None]


def _norm(module, name, x_BIJC):
    B, I, J, C = x_BIJC.shape
    scale_C = module.param(f"{name}_scale", nn.initializers.ones, (C,))
    bias_C = module.param(f"{name}_bias", nn.initializers.zeros, (C,))
    x = x_BIJC.reshape(B, I * J, GROUPS, C // GROUPS)
    mean = jnp.mean(x, axis=(1, 3), keepdims=True)
    var = jnp.mean((x - mean) ** 2, axis=(1, 3), keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(var + np.float32(1e-6))
    return x.reshape(B, I, J, C) * scale_C[None, None, None] + bias_C[None, None, None]


class _ResBlock(nn.Module):
    """Twice normalisation, swish and convolution, beside a shortcut: a convolution of 1 x 1 pixels where
    the number of channels changes, else the input itself."""

    features: int

    @nn.compact
    def __call__(self, x_BIJC):
        h = _conv(self, "conv1", jax.nn.silu(_norm(self, "norm1", x_BIJC)), self.features)
        h = _conv(self, "conv2", jax.nn.silu(_norm(self, "norm2", h)), self.features)
        if x_BIJC.shape[-1] != self.features:
            x_BIJC = _conv(self, "nin_shortcut", x_BIJC, self.features, size=1)
        return x_BIJC + h


class _AttnBlock(nn.Module):
    """One head of attention over all positions, with a residual."""

    @nn.compact
    def __call__(self, x_BIJC):
        B, I, J, C = x_BIJC.shape
        h = _norm(self, "norm", x_BIJC)
        q, k, v = (_conv(self, n, h, C, size=1).reshape(B, I * J, C) for n in "qkv")
        p = jax.nn.softmax(jnp.einsum("BSC,BTC->BST", q, k) * np.float32(C**-0.5), axis=-1)
        h = jnp.einsum("BST,BTC->BSC", p, v).reshape(B, I, J, C)
        return x_BIJC + _conv(self, "proj_out", h, C, size=1)


class _Encoder(nn.Module):
    """Pixels [B, I, J, 3] -> latents [B, i, j, Z]."""

    config: VQConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = _conv(self, "conv_in", x, c.channels)
        for level, (mult, blocks) in enumerate(zip(c.encoder_mult, c.encoder_blocks, strict=True)):
            for block in range(blocks):
                x = _ResBlock(c.channels * mult, name=f"down_{level}_block_{block}")(x)
            if level < len(c.encoder_mult) - 1:
                # The reference pads with zeros to the right and below only, before the stride of 2.
                pad = ((0, 1), (0, 1))
                x = _conv(self, f"down_{level}_downsample", x, x.shape[-1], stride=2, padding=pad)
        x = _ResBlock(x.shape[-1], name="mid_block_1")(x)
        x = _AttnBlock(name="mid_attn_1")(x)
        x = _ResBlock(x.shape[-1], name="mid_block_2")(x)
        x = _conv(self, "conv_out", jax.nn.silu(_norm(self, "norm_out", x)), c.bits)
        return _conv(self, "quant_conv", x, c.bits, size=1)


class _Decoder(nn.Module):
    """Signs [B, i, j, Z] -> pixels [B, I, J, 3]."""

    config: VQConfig

    @nn.compact
    def __call__(self, z):
        c = self.config
        levels = len(c.decoder_mult)
        x = _conv(self, "post_quant_conv", z, c.bits, size=1)
        x = _conv(self, "conv_in", x, c.channels * c.decoder_mult[-1])
        x = _ResBlock(x.shape[-1], name="mid_block_1")(x)
        x = _AttnBlock(name="mid_attn_1")(x)
        x = _ResBlock(x.shape[-1], name="mid_block_2")(x)
        for level in reversed(range(levels)):
            for block in range(c.decoder_blocks[level]):
                features = c.channels * c.decoder_mult[level]
                x = _ResBlock(features, name=f"up_{level}_block_{block}")(x)
            if level:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(self, f"up_{level}_upsample", x, x.shape[-1])
        x = jax.nn.silu(_norm(self, "norm_out", x))
        return _conv(self, "conv_out", x, c.pixel_channels)


class _Discriminator(nn.Module):
    """Pixels [B, I, J, C] -> a number for each patch [B, patches], by convolutions of stride 2 (PatchGAN,
    arXiv 1611.07004): as many as there are levels of the encoder, and at most three."""

    config: VQConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        for level in range(min(3, max(1, len(c.encoder_mult) - 1))):
            x = _conv(self, f"level_{level}", x, c.channels * 2**level, size=4, stride=2)
            x = jax.nn.leaky_relu(_norm(self, f"norm_{level}", x) if level else x, 0.2)
        return _conv(self, "conv_out", x, 1, size=3).reshape(len(x), -1)
