"""Adapters on the disk: merged with their base as it is read, and exchanged with PEFT.

A workdir that trains adapters holds nothing of their base but its path and hash. PEFT's form is a folder
with adapter_config.json and adapter_model.safetensors. What adapters compute is in `nets.lora`.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mmada_jax import storage
from mmada_jax.files import read_json
from mmada_jax.nets import int8, transformer
from mmada_jax.nets import lora as nets
from mmada_jax.nets.lora import MATRICES, LoraConfig
from mmada_jax.storage import write_whole
from mmada_jax.weights import hub, lazy

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base.json"  # of ours beside them: the hash of the base
# Fields of PEFT's configuration that change what an adapter computes, and their values that are known.
_KNOWN = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False, None), "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []), "rank_pattern": (None, {}), "alpha_pattern": (None, {}),
    "layers_to_transform": (None,), "layer_replication": (None,), "lora_bias": (False, None),
    "use_rslora": (False, True, None), "trainable_token_indices": (None,), "target_parameters": (None, []),
}  # fmt: skip


class Adapter(NamedTuple):
    """Adapters of a model: how they are meant, a tree of arrays, and the hash of their base's weights,
    empty where nobody has noted it."""

    lora: LoraConfig
    arrays: Mapping[str, Mapping[str, Any]]
    base_sha256: str = ""


def describe(lora: LoraConfig, base: storage.Path, sha256: str, workdir: storage.Path) -> dict[str, Any]:
    """What the model.json of a workdir says of its adapters: their fields, the path of their base as seen
    from the workdir, and the hash of its weights."""
    fields = {"rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets}
    return fields | {"base": storage.relative_to(base, workdir), "base_sha256": sha256}


def read_lora(about: Mapping[str, Any]) -> LoraConfig:
    """The fields of adapters that `describe` has written."""
    return LoraConfig(about["rank"], about["alpha"], about["targets"])


def check_base(sha256: str, about: Mapping[str, Any], path: storage.Path) -> None:
    """Raises ValueError if adapters, about which `about` tells, belong to other weights than those with
    this hash in `path`."""
    if sha256 != about["base_sha256"]:
        raise ValueError(
            f"the adapters belong to another base than the model in {path}: its weights have the sha256 "
            f"{sha256[:16]}, theirs have {about['base_sha256'][:16]}; put back the model that they were "
            "trained beside"
        )


def warn_of_base(adapter: Adapter, sha256: Callable[[], str], path: storage.Path) -> None:
    """Warns of adapters that were trained beside other weights than those in `path`, whose hash is
    `sha256`. They may be the same ones in another dtype, so it is no error."""
    if adapter.base_sha256 and sha256() != adapter.base_sha256:
        print(
            f"warning: the adapters were trained beside other weights than those in {path} (sha256 "
            f"{adapter.base_sha256[:16]}), unless these are the same ones in another dtype",
            file=sys.stderr,
        )


def merged(params: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Params, a tree of Lazy arrays, in which the adapters have become a part of the matrices as soon as
    these are read. The sums are formed in float32."""
    blocks = dict(params["blocks"])
    for name, of in adapter.arrays.items():
        blocks[name] = _with_delta(name, blocks[name], of, np.float32(adapter.lora.scale))
    return {**params, "blocks": blocks}


def _with_delta(name, base, of, scale):
    inputs = 1 + int8.INPUTS[name]  # axes of the layers and of the inputs
    R = of["a_NIR"].shape[2]

    def read(index):
        w = np.asarray(base[index])
        # Both factors are cut before the product: a piece of a matrix is small, the matrix needn't be.
        a_NIR, b_NRO = (np.asarray(of[part][index[0]], np.float32) for part in ("a_NIR", "b_NRO"))
        n = len(a_NIR)
        a = a_NIR.reshape(n, *base.shape[1:inputs], R)[(slice(None), *index[1:inputs])]
        b = b_NRO.reshape(n, R, *base.shape[inputs:])[(slice(None), slice(None), *index[inputs:])]
        delta = np.matmul(a.reshape(n, -1, R), b.reshape(n, R, -1)).reshape(w.shape)
        return (w.astype(np.float32) + scale * delta).astype(w.dtype)

    return lazy.Lazy(base.shape, base.dtype, read)


# ---- PEFT ----------------------------------------------------------------------------------------


def write_peft(folder: storage.Path, adapter: Adapter, base: str) -> None:
    """Writes adapters as PEFT reads them, for the model `base`, a path or a name on the hub."""
    from safetensors.numpy import save

    lora, tensors = adapter.lora, {}
    for target, name in zip(lora.matrices, lora.names, strict=True):
        of = {key: np.asarray(x, np.float32) for key, x in adapter.arrays[name].items()}
        for layer, (a_IR, b_RO) in enumerate(zip(of["a_NIR"], of["b_NRO"], strict=True)):
            for part, x in (("A", a_IR), ("B", b_RO)):  # theirs are [out, in]
                tensors[_key(layer, target, part)] = np.ascontiguousarray(x.T)
    # Their list of names would also match the head, which is called ff_out too.
    pattern = rf".*\.blocks\.\d+\.({'|'.join(lora.matrices)})"
    config = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": lora.rank, "lora_alpha": lora.alpha,
        "target_modules": pattern, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "use_rslora": False, "use_dora": False,
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "task_type": None,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    write_whole(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_whole(folder / BASE, json.dumps({"sha256": adapter.base_sha256}) + "\n")


def read_peft(folder: storage.Path, config: transformer.ModelConfig) -> Adapter:
    """The adapters of a folder of PEFT's for a model of that architecture. Raises FileNotFoundError if
    there are none, ValueError for what isn't known or doesn't fit."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; an adapter of PEFT's has it")
    about = read_json(folder / CONFIG, dict, keys=("r", "lora_alpha"))
    wrong = [
        f"{name} is {about[name]!r}, which isn't known"
        for name, known in _KNOWN.items()
        if name in about and about[name] not in known
    ]
    lazy.refuse(wrong, f"{folder / CONFIG} describes adapters that can't be read")
    R, alpha = about["r"], about["lora_alpha"]
    if type(R) is not int or type(alpha) not in (int, float) or R < 1 or not alpha > 0:
        raise ValueError(
            f"{folder / CONFIG} has r={R!r} and lora_alpha={alpha!r}; both must be positive numbers"
        )
    tensors = {key: np.asarray(x) for key, x in hub.read_tensors_of(folder / WEIGHTS).items()}
    targets = "+".join(target for target in MATRICES if _key(0, target, "A") in tensors)
    lora = LoraConfig(R, alpha * (R**0.5 if about.get("use_rslora") else 1), targets or "+".join(MATRICES))
    shapes = {
        _key(layer, target, part): (R, size) if part == "A" else (size, R)
        for target, name in zip(lora.matrices, lora.names, strict=True)
        for part, size in zip("AB", nets.sizes(config, name), strict=True)
        for layer in range(config.n_layers)
    }
    wrong = [f"missing {key}" for key in shapes if key not in tensors]
    wrong += [f"unexpected {key}" for key in tensors if key not in shapes]
    wrong += [
        f"{key} has shape {tensors[key].shape}, expected {shape}"
        for key, shape in shapes.items()
        if key in tensors and tensors[key].shape != shape
    ]
    for key, x in tensors.items():
        if np.dtype(x.dtype) not in lazy.DTYPES.values():
            wrong.append(f"{key} has dtype {x.dtype}, expected one of {', '.join(lazy.DTYPES)}")
        elif not np.isfinite(np.asarray(x, np.float32)).all():
            wrong.append(f"{key} has values that aren't finite")
    lazy.refuse(wrong, f"the tensors of {folder / WEIGHTS} don't fit the model")
    layers = range(config.n_layers)
    arrays = {
        name: {
            "a_NIR": np.stack([tensors[_key(layer, target, "A")].T for layer in layers]),
            "b_NRO": np.stack([tensors[_key(layer, target, "B")].T for layer in layers]),
        }
        for target, name in zip(lora.matrices, lora.names, strict=True)
    }
    noted = str(read_json(folder / BASE, dict).get("sha256", "")) if (folder / BASE).is_file() else ""
    return Adapter(lora, arrays, noted)


def _key(layer: int, target: str, part: str) -> str:
    return f"base_model.model.model.transformer.blocks.{layer}.{target}.lora_{part}.weight"
