"""Networks that judge pictures, from folders of PyTorch tensors: LPIPS and the Inception of FID.

One strict key table for each. What the published files hold beside the weights that are used (classifiers,
counters) is known by name and left out.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax import storage
from mmada_jax.nets import inception, lpips
from mmada_jax.weights import hub, lazy

# Numbers of the convolutions of VGG16 among its layers, as torchvision counts them.
_VGG = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_UNUSED = r"classifier\..*|lins\..*|fc\..*|AuxLogits\..*|.*num_batches_tracked"
_NORM_EPS = 1e-3


def load_lpips(folder: storage.Name) -> dict[str, Any]:
    """The params of `nets.lpips`, Lazy, of a folder with VGG16 and the heads of LPIPS 0.1: the state dict
    of the package lpips, or that of torchvision's VGG16 with these heads. Raises FileNotFoundError, or
    ValueError for all that doesn't fit."""
    state, wrong = {}, []
    for key, tensor in _read(folder).items():
        constant = {"scaling_layer.shift": lpips.SHIFT, "scaling_layer.scale": lpips.SCALE}.get(key)
        if constant is None:
            state[re.sub(r"^net\.slice\d\.", "features.", key)] = tensor
        elif not np.allclose(np.ravel(tensor), constant):
            wrong.append(f"{key} isn't {constant}")
    return _params_of(state, lpips_table(), folder, wrong)


def lpips_table() -> dict[str, lazy.Rule]:
    """PyTorch key -> where the array lies in params of `nets.lpips`."""
    table, inputs = {}, 3
    for stage, (widths, numbers) in enumerate(zip(lpips.STAGES, _VGG, strict=True)):
        for conv, (width, number) in enumerate(zip(widths, numbers, strict=True)):
            path = (f"stage_{stage}", f"conv_{conv}")
            table[f"features.{number}.weight"] = _weight(path, (3, 3, inputs, width))
            table[f"features.{number}.bias"] = lazy.Rule((*path, "b_D"), (width,))
            inputs = width
        head = lazy.Rule((f"stage_{stage}", "head_1C11"), (1, inputs, 1, 1))
        table[f"lin{stage}.model.1.weight"] = head
    return table


def load_inception(folder: storage.Name) -> dict[str, Any]:
    """The params of `nets.inception`, arrays of the host, of a folder with the weights that FID is computed
    by. Their keys are those of torchvision's Inception v3. Raises as `load_lpips` does."""
    theirs = lazy.in_memory(_params_of(_read(folder), inception_table(), folder))
    params = {}
    for name, of in theirs.items():
        if not np.all(of["var_D"] >= 0):
            raise ValueError(f"{folder}: {name}.bn.running_var has values below 0; fetch the file again")
        scale_D = of["scale_D"] / np.sqrt(of["var_D"] + np.float32(_NORM_EPS))
        params[name] = {"w_ijCD": of["w_ijCD"] * scale_D, "b_D": of["bias_D"] - of["mean_D"] * scale_D}
    return params


def inception_table() -> dict[str, lazy.Rule]:
    """PyTorch key -> where the array lies in a tree of convolutions and their normalisations."""
    table = {}

    def note(name, x, outputs, kernel=(1, 1), stride=1, padding="SAME"):
        shape = (*kernel, x.shape[-1], outputs)
        table[f"{name}.conv.weight"] = _weight((name,), shape)
        for theirs, ours in (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"),
                             ("running_var", "var")):  # fmt: skip
            table[f"{name}.bn.{theirs}"] = lazy.Rule((name, f"{ours}_D"), (outputs,))
        return inception.convolve(x, jnp.zeros(shape), stride, padding)

    side = inception.SIDE
    jax.eval_shape(
        lambda x: inception.network(note, x), jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    )
    return table


def _weight(path, shape):
    return lazy.Rule((*path, "w_ijCD"), shape, (3, 2, 0, 1))


def _read(folder) -> dict[str, Any]:
    folder = storage.path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; docs/own_data.md says what belongs there")
    return {key: x for key, x in hub.read_tensors(folder).items() if not re.fullmatch(_UNUSED, key)}


def _params_of(state: Mapping[str, Any], table, folder, wrong=()):
    wrong = [*wrong, *(f"{key} has values that aren't finite" for key, x in state.items()
                       if not np.isfinite(np.asarray(x, np.float32)).all())]  # fmt: skip
    try:
        return lazy.params_of(state, table, np.dtype(np.float32), wrong)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
