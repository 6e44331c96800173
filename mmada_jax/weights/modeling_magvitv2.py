"""The MAGVIT-v2 image tokenizer in PyTorch: pixels to codes and back.

This file travels with exported checkpoints and needs nothing but torch and transformers:

    tokenizer = AutoModel.from_pretrained(folder, trust_remote_code=True)
    codes = tokenizer.get_code(pixels)         # [B, 3, 16h, 16w] in [-1, 1] -> [B, h * w]
    pixels = tokenizer.decode_code(codes)      # back, around [-1, 1]; pass (h, w) if not square
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class MAGVITv2Config(PretrainedConfig):
    """Level l of a half has `channels * mult[l]` channels; the defaults are the published ones."""

    model_type = "magvitv2"

    def __init__(
        self,
        channels=128,
        encoder_mult=(1, 2, 2, 4, 4),
        encoder_blocks=(4, 3, 4, 3, 4),
        decoder_mult=(1, 1, 2, 2, 4),
        decoder_blocks=(4, 4, 3, 4, 3),
        bits=13,
        pixel_channels=3,
        **kwargs,
    ):
        self.channels, self.bits, self.pixel_channels = channels, bits, pixel_channels
        self.encoder_mult, self.encoder_blocks = list(encoder_mult), list(encoder_blocks)
        self.decoder_mult, self.decoder_blocks = list(decoder_mult), list(decoder_blocks)
        super().__init__(**kwargs)


def norm(channels):
    """Group norm as everywhere in this model."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Norm, swish, convolution, twice, and a shortcut."""

    def __init__(self, inp, out):
        super().__init__()
        self.norm1, self.conv1 = norm(inp), nn.Conv2d(inp, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        if inp != out:
            self.nin_shortcut = nn.Conv2d(inp, out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """One head of attention over all positions."""

    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


def middle(width):
    """The blocks at the lowest resolution."""
    parts = {
        "block_1": ResBlock(width, width),
        "attn_1": AttnBlock(width),
        "block_2": ResBlock(width, width),
    }
    return nn.ModuleDict(parts)


class Encoder(nn.Module):
    """Pixels -> latents of `bits` channels."""

    def __init__(self, c):
        super().__init__()
        self.conv_in = nn.Conv2d(c.pixel_channels, c.channels, 3, padding=1)
        width, self.down = c.channels, nn.ModuleList()
        for level, (mult, blocks) in enumerate(zip(c.encoder_mult, c.encoder_blocks, strict=True)):
            parts = nn.ModuleDict({"block": nn.ModuleList()})
            for _ in range(blocks):
                parts["block"].append(ResBlock(width, c.channels * mult))
                width = c.channels * mult
            if level < len(c.encoder_mult) - 1:
                parts["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.down.append(parts)
        self.mid, self.norm_out = middle(width), norm(width)
        self.conv_out = nn.Conv2d(width, c.bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(c.bits, c.bits, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for parts in self.down:
            for block in parts["block"]:
                x = block(x)
            if "downsample" in parts:  # zeros to the right and below only
                x = parts["downsample"]["conv"](F.pad(x, (0, 1, 0, 1)))
        for name in ("block_1", "attn_1", "block_2"):
            x = self.mid[name](x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(x))))


class Decoder(nn.Module):
    """Signs of `bits` channels -> pixels."""

    def __init__(self, c):
        super().__init__()
        width = c.channels * c.decoder_mult[-1]
        self.post_quant_conv = nn.Conv2d(c.bits, c.bits, 1)
        self.conv_in = nn.Conv2d(c.bits, width, 3, padding=1)
        self.mid, levels = middle(width), []
        for level in reversed(range(len(c.decoder_mult))):
            parts = nn.ModuleDict({"block": nn.ModuleList()})
            for _ in range(c.decoder_blocks[level]):
                parts["block"].append(ResBlock(width, c.channels * c.decoder_mult[level]))
                width = c.channels * c.decoder_mult[level]
            if level:
                parts["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            levels.insert(0, parts)
        self.up, self.norm_out = nn.ModuleList(levels), norm(width)
        self.conv_out = nn.Conv2d(width, c.pixel_channels, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(self.post_quant_conv(z))
        for name in ("block_1", "attn_1", "block_2"):
            x = self.mid[name](x)
        for parts in reversed(self.up):
            for block in parts["block"]:
                x = block(x)
            if "upsample" in parts:
                x = parts["upsample"]["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """Lookup-free: a code is the signs of the channels, channel 0 the highest bit."""

    def __init__(self, bits):
        super().__init__()
        self.bits = bits
        self.register_buffer("power_vals", 2 ** torch.arange(bits - 1, -1, -1))
        signs = (torch.arange(2**bits)[:, None] & self.power_vals > 0).float() * 2 - 1
        self.register_buffer("embedding", signs)

    def forward(self, z):
        return ((z > 0).long() * self.power_vals[:, None, None]).sum(1)


class MAGVITv2(PreTrainedModel):
    """Encoder, quantiser and decoder under the state-dict keys of showlab/magvitv2."""

    config_class = MAGVITv2Config
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Quantizer(config.bits)
        self.post_init()

    def _init_weights(self, module):
        """Everything is in the checkpoint."""

    def get_code(self, pixel_values):
        """Pixels [B, C, I, J] in [-1, 1] -> codes [B, i * j], row-major."""
        return self.quantize(self.encoder(pixel_values)).flatten(1)

    def decode_code(self, codes, shape=None):
        """Codes [B, n] -> pixels [B, C, I, J]; `shape` are rows and columns, a square if not given."""
        side = round(codes.shape[1] ** 0.5)
        z = self.quantize.embedding[codes].to(self.decoder.conv_in.weight.dtype)
        return self.decoder(z.transpose(1, 2).reshape(len(codes), -1, *(shape or (side, side))))

    def forward(self, pixel_values):
        """Pixels -> reconstructed pixels."""
        codes = self.quantize(self.encoder(pixel_values))
        return self.decode_code(codes.flatten(1), codes.shape[1:])
