"""MAGVIT-v2 state dicts <-> params: one strict key table, used in both directions."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmada_jax import convert
from mmada_jax.vq import Config


def key_table(config: Config) -> dict[str, convert.Rule]:
    """PyTorch key -> where the array lies in params and how its axes stand."""
    table: dict[str, convert.Rule] = {}

    def conv(torch_name, path, inp, out, size=3):
        *module, leaf = path
        table[f"{torch_name}.weight"] = convert.Rule(
            (*module, f"{leaf}_w"), (size, size, inp, out), (3, 2, 0, 1)
        )
        table[f"{torch_name}.bias"] = convert.Rule((*module, f"{leaf}_b"), (out,))

    def norm(torch_name, path, features):
        *module, leaf = path
        table[f"{torch_name}.weight"] = convert.Rule((*module, f"{leaf}_scale"), (features,))
        table[f"{torch_name}.bias"] = convert.Rule((*module, f"{leaf}_bias"), (features,))

    def res(torch_name, path, inp, out):
        norm(f"{torch_name}.norm1", (*path, "norm1"), inp)
        conv(f"{torch_name}.conv1", (*path, "conv1"), inp, out)
        norm(f"{torch_name}.norm2", (*path, "norm2"), out)
        conv(f"{torch_name}.conv2", (*path, "conv2"), out, out)
        if inp != out:
            conv(f"{torch_name}.nin_shortcut", (*path, "nin_shortcut"), inp, out, size=1)

    def mid(half, features):
        for i in (1, 2):
            res(f"{half}.mid.block_{i}", (half, f"mid_block_{i}"), features, features)
        norm(f"{half}.mid.attn_1.norm", (half, "mid_attn_1", "norm"), features)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{half}.mid.attn_1.{name}", (half, "mid_attn_1", name), features, features, 1)

    levels = len(config.encoder_mult)
    width = config.channels
    conv("encoder.conv_in", ("encoder", "conv_in"), config.pixel_channels, width)
    for level in range(levels):
        out = config.channels * config.encoder_mult[level]
        for block in range(config.encoder_blocks[level]):
            name = f"encoder.down.{level}.block.{block}"
            res(name, ("encoder", f"down_{level}_block_{block}"), width, out)
            width = out
        if level < levels - 1:
            name = f"encoder.down.{level}.downsample.conv"
            conv(name, ("encoder", f"down_{level}_downsample"), width, width)
    mid("encoder", width)
    norm("encoder.norm_out", ("encoder", "norm_out"), width)
    conv("encoder.conv_out", ("encoder", "conv_out"), width, config.bits)
    conv("encoder.quant_conv", ("encoder", "quant_conv"), config.bits, config.bits, size=1)

    width = config.channels * config.decoder_mult[-1]
    conv("decoder.post_quant_conv", ("decoder", "post_quant_conv"), config.bits, config.bits, 1)
    conv("decoder.conv_in", ("decoder", "conv_in"), config.bits, width)
    mid("decoder", width)
    for level in reversed(range(levels)):
        out = config.channels * config.decoder_mult[level]
        for block in range(config.decoder_blocks[level]):
            name = f"decoder.up.{level}.block.{block}"
            res(name, ("decoder", f"up_{level}_block_{block}"), width, out)
            width = out
        if level:
            name = f"decoder.up.{level}.upsample.conv"
            conv(name, ("decoder", f"up_{level}_upsample"), width, width)
    norm("decoder.norm_out", ("decoder", "norm_out"), width)
    conv("decoder.conv_out", ("decoder", "conv_out"), width, config.pixel_channels)
    return table


def params_from_torch(state: Mapping[str, np.ndarray], config: Config) -> dict[str, Any]:
    """PyTorch state dict (numpy arrays) -> params. The two constant buffers of the quantiser are
    checked and dropped. Raises on any key or shape amiss."""
    constants = _constants(config)
    for key, expected in constants.items():
        if key in state and not np.array_equal(np.asarray(state[key]), expected):
            raise ValueError(f"{key} isn't that of a {config.bits}-bit lookup-free quantiser")
    rest = {key: value for key, value in state.items() if key not in constants}
    return convert.from_torch(rest, key_table(config))


def params_to_torch(params: dict[str, Any], config: Config) -> dict[str, np.ndarray]:
    """Params -> PyTorch state dict of numpy arrays, with the quantiser's constant buffers."""
    return convert.to_torch(params, key_table(config)) | _constants(config)


def _constants(config: Config) -> dict[str, np.ndarray]:
    powers_Z = 2 ** np.arange(config.bits - 1, -1, -1, dtype=np.int64)
    signs = (np.arange(config.codebook_size)[:, None] & powers_Z > 0) * 2.0 - 1
    return {"quantize.embedding": signs.astype(np.float32), "quantize.power_vals": powers_Z}
