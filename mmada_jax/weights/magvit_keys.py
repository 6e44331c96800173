"""MAGVIT-v2 <-> params: one strict key table, used in both directions."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmada_jax.config import from_dict
from mmada_jax.nets import vq
from mmada_jax.weights import lazy

MODEL_TYPE = "magvitv2"


def key_table(config: vq.VQConfig) -> dict[str, lazy.Rule]:
    """PyTorch key -> where the array lies in params and how its axes stand."""
    table: dict[str, lazy.Rule] = {}

    def conv(torch_name, path, inp, out, size=3):
        *module, leaf = path
        table[f"{torch_name}.weight"] = lazy.Rule(
            (*module, f"{leaf}_w"), (size, size, inp, out), (3, 2, 0, 1)
        )
        table[f"{torch_name}.bias"] = lazy.Rule((*module, f"{leaf}_b"), (out,))

    def norm(torch_name, path, features):
        *module, leaf = path
        table[f"{torch_name}.weight"] = lazy.Rule((*module, f"{leaf}_scale"), (features,))
        table[f"{torch_name}.bias"] = lazy.Rule((*module, f"{leaf}_bias"), (features,))

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


def params_from_torch(state: Mapping[str, np.ndarray], config: vq.VQConfig) -> dict[str, Any]:
    """State dict (numpy arrays) -> params in memory, as `params_of`; the buffers may be left out."""
    return lazy.in_memory(params_of(constants(config) | dict(state), config))


def params_to_torch(params: dict[str, Any], config: vq.VQConfig) -> dict[str, np.ndarray]:
    """Params -> PyTorch state dict of numpy arrays, with the quantiser's constant buffers."""
    return lazy.in_memory(lazy.tensors_of(params, key_table(config))) | constants(config)


def params_of(
    state: Mapping[str, Any], config: vq.VQConfig, dtype: np.dtype | None = None
) -> dict[str, Any]:
    """State dict -> params as Lazy arrays. The two constant buffers of the quantiser are checked and
    dropped. Raises on any key, shape or dtype amiss."""
    known = constants(config)
    wrong = [f"missing {key}" for key in known if key not in state]
    wrong += [
        f"{key} isn't that of a {config.bits}-bit lookup-free quantiser"
        for key, expected in known.items()
        if key in state and not np.array_equal(np.asarray(state[key], np.float64), expected)
    ]
    rest = {key: value for key, value in state.items() if key not in known}
    return lazy.params_of(rest, key_table(config), dtype, wrong)


def constants(config: vq.VQConfig) -> dict[str, np.ndarray]:
    """The buffers of the quantiser: the signs of every code, and the values of its bits."""
    powers_Z = 2 ** np.arange(config.bits - 1, -1, -1, dtype=np.int64)
    signs = (np.arange(config.codebook_size)[:, None] & powers_Z > 0) * 2.0 - 1
    return {"quantize.embedding": signs.astype(np.float32), "quantize.power_vals": powers_Z}


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> vq.VQConfig:
    """The architecture that a state dict is of: all of it can be read off the shapes of its tensors.

    Raises ValueError where that fails; `params_of` then checks every key and shape.
    """
    try:
        channels, pixel_channels = shapes["encoder.conv_in.weight"][:2]
        fields = {"channels": channels, "pixel_channels": pixel_channels}
        fields["bits"] = shapes["encoder.quant_conv.weight"][0]
        if not 1 <= fields["bits"] <= 24:
            raise ValueError(f"{fields['bits']} bits")
        for half, side in (("encoder", "down"), ("decoder", "up")):
            found = re.findall(
                rf"^{half}\.{side}\.(\d+)\.block\.(\d+)\.conv1\.weight$", "\n".join(shapes), re.M
            )
            levels = 1 + max(int(level) for level, _ in found)
            blocks = [sum(int(level) == at for level, _ in found) for at in range(levels)]
            widths = [shapes[f"{half}.{side}.{at}.block.0.conv1.weight"][0] for at in range(levels)]
            fields[f"{half}_mult"] = tuple(width // channels for width in widths)
            fields[f"{half}_blocks"] = tuple(blocks)
        return vq.VQConfig(**fields)
    except KeyError as error:
        hint = lazy.renamed(error.args, shapes)
        raise ValueError(
            f"these tensors are no MAGVIT-v2 tokenizer: missing {error.args[0]}{hint and ', '}{hint}"
        ) from error
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"these tensors are no MAGVIT-v2 tokenizer: {error!r}") from error


def config_to_hf(config: vq.VQConfig) -> dict[str, Any]:
    """The architecture as fields of config.json, which is what the exported modelling file reads."""
    return {"model_type": MODEL_TYPE, "architectures": ["MAGVITv2"], **dataclasses.asdict(config)}


def config_from_hf(values: Mapping[str, Any]) -> vq.VQConfig:
    """The inverse of `config_to_hf`; other fields are ignored. Raises ValueError for one that is wrong."""
    names = {field.name for field in dataclasses.fields(vq.VQConfig)}
    return from_dict(vq.VQConfig, {name: value for name, value in values.items() if name in names})
