"""Folders of PyTorch -> checkpoints of JAX, and back; a target is complete or not there at all."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mmada_jax import storage, whole
from mmada_jax.progress import progress
from mmada_jax.weights import adapters, hub, lazy, llada_keys, magvit_keys
from mmada_jax.weights.arrays import write_params
from mmada_jax.weights.folder import (
    GENERATION,
    IMAGE_TOKENIZER,
    ModelFolder,
    dtype_of,
    image_tokenizer_of,
    json_of,
    open_folder,
)
from mmada_jax.weights.inspect import vocabulary
from mmada_jax.weights.manifest import MANIFEST
from mmada_jax.weights.workdir import CONFIG, record_files

# What travels beside the weights. Code never does.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", GENERATION,
)  # fmt: skip


def from_torch(
    src: storage.Name,
    dst: storage.Name,
    dtype: str | None = None,
    add_image_vocab: int = 0,
    image_tokenizer: storage.Name | None = None,
    adapter: storage.Name | None = None,
) -> None:
    """Hugging Face folder -> checkpoint, with its tokenizer files and its image tokenizer.

    `image_tokenizer` is the folder of the image tokenizer, where `src` holds none. `adapter` is a folder of
    PEFT's, whose adapters become a part of the weights. Raises ValueError or OSError before anything is
    written if a source doesn't fit, `dst` isn't new or empty, or the disk is too small.
    """
    dst = _new(dst, src)
    source = open_folder(src, dtype, add_image_vocab)
    if source.kind != "Hugging Face folder":
        raise ValueError(f"{src} is a {source.kind} already; to-torch is the other direction")
    if adapter:
        if source.is_image_tokenizer:
            raise ValueError(f"{src} is an image tokenizer; adapters belong to models, leave --adapter out")
        found = adapters.read_peft(storage.resolved(adapter), source.config)
        adapters.warn_of_base(found, lambda: lazy.sha256(source.tensors()), source.path)
        source = dataclasses.replace(source, params=adapters.merged(source.params, found))
    nested = image_tokenizer_of(source, image_tokenizer)
    if not source.is_image_tokenizer and (problem := vocabulary(source)["problem"]):
        print(f"warning: the model can be converted but not used: {problem}", file=sys.stderr)
    with _target(dst, source, nested) as (folder, count):
        _write_checkpoint(folder, source, count)
        if nested:
            _write_checkpoint(folder / IMAGE_TOKENIZER, nested, count)


def to_torch(
    src: storage.Name,
    dst: storage.Name,
    dtype: str | None = None,
    image_tokenizer: storage.Name | None = None,
    shard: int = hub.SHARD,
) -> None:
    """Checkpoint or workdir -> Hugging Face folder that PyTorch loads, with its own modelling file.

    Raises as `from_torch` does.
    """
    dst = _new(dst, src)
    source = open_folder(src)
    if source.kind == "Hugging Face folder":
        raise ValueError(f"{src} is a Hugging Face folder already; from-torch is the other direction")
    nested = image_tokenizer_of(source, image_tokenizer)
    with _target(dst, source, nested, dtype_of(dtype)) as (folder, count):
        _write_hugging_face(folder, source, dtype_of(dtype), count, shard)
        if nested:
            _write_hugging_face(folder / IMAGE_TOKENIZER, nested, None, count, shard)


def to_peft(src: storage.Name, dst: storage.Name, base: str = "") -> None:
    """The adapters of a workdir -> a folder of PEFT's, for the model `base`: a name on the hub, or the
    folder that the exported base lies in. Raises as `from_torch` does, and ValueError for a folder without
    adapters."""
    dst = _new(dst, src)
    source = open_folder(src)
    if source.adapter is None:
        raise ValueError(f"{src} holds no adapters but a whole model; to-torch exports that")
    if base and storage.path(base).is_dir():
        of = open_folder(base)
        adapters.warn_of_base(source.adapter, lambda: lazy.sha256(of.tensors()), of.path)
    alone = dataclasses.replace(source, params=source.adapter.arrays)
    with _target(dst, alone, None) as (folder, count):
        adapters.write_peft(folder, source.adapter, base)
        count(alone.nbytes)


def _write_checkpoint(folder: storage.Path, source: ModelFolder, count: Callable[[int], Any]) -> None:
    folder.mkdir(exist_ok=True)
    write_params(folder / "params", source.params, source.axes, count)
    # These fields describe the files of PyTorch.
    values = {k: v for k, v in source.values.items() if k not in ("auto_map", "torch_dtype", "dtype")}
    if source.is_image_tokenizer:
        values |= magvit_keys.config_to_hf(source.config)
    _carry_files(source.path, folder)
    if source.controls and (tokenizer := source.tokenizer()):
        tokenizer.replace(folder)
    storage.write_whole(folder / CONFIG, json_of(values | {"dtype": source.dtype}))
    record_files(folder)


def _write_hugging_face(
    folder: storage.Path,
    source: ModelFolder,
    dtype: np.dtype | None,
    count: Callable[[int], Any],
    shard: int,
) -> None:
    folder.mkdir(exist_ok=True)
    tensors: dict[str, Any] = source.tensors(dtype)
    module = "modeling_mmada"
    classes = {
        "AutoConfig": "MMadaConfig",
        "AutoModel": "MMadaModelLM",
        "AutoModelForCausalLM": "MMadaModelLM",
    }
    if source.is_image_tokenizer:
        tensors |= magvit_keys.constants(source.config)
        module, classes = "modeling_magvitv2", {"AutoConfig": "MAGVITv2Config", "AutoModel": "MAGVITv2"}
    name = str(dtype or source.dtype)
    about = {"auto_map": {auto: f"{module}.{cls}" for auto, cls in classes.items()}, "dtype": name}
    values = source.values | {"architectures": [classes["AutoModel"]]}
    if not source.is_image_tokenizer:
        values = llada_keys.resolved(values, source.config)
    storage.write_whole(folder / CONFIG, json_of(values | about))
    code = (pathlib.Path(__file__).parent / f"{module}.py").read_text()
    # A model of LLaDA stays one: transformers compares this line with config.json.
    code = code.replace('model_type = "mmada"', f'model_type = "{source.model_type}"')
    (folder / f"{module}.py").write_text(code)
    _carry_files(source.path, folder)
    if tokenizer := source.tokenizer():
        tokenizer.export(folder)
    if not source.is_image_tokenizer and not (folder / GENERATION).is_file():
        told = _generation_defaults(values) | dict(source.generation)
        storage.write_whole(folder / GENERATION, json_of(told))
    hashes = hub.write_tensors(folder, tensors, count, shard)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": h} for name, h in hashes.items()}
    storage.write_whole(folder / MANIFEST, json_of({"files": files}))


def _generation_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """How the reference generates: text of 512 tokens in blocks of 128 with 256 steps, images in 15 steps
    with guidance 3.5."""
    ids = {k: values[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in values}
    text = {"max_new_tokens": 512, "block_length": 128, "steps": 256, "temperature": 0.0}
    image = {"image_steps": 15, "image_guidance": 3.5}
    return ids | text | {"remasking": "low_confidence"} | image


def _carry_files(src: storage.Path, dst: storage.Path) -> None:
    for name in _TOKENIZER_FILES:
        if (src / name).is_file():
            storage.write_whole(dst / name, (src / name).read_bytes())


def _new(dst: storage.Name, src: storage.Name) -> storage.Path:
    """The folder to write, resolved. Raises ValueError unless it is new or empty, and not in `src`."""
    dst, src = storage.resolved(dst), storage.resolved(src)
    storage.refuse_place(dst)
    whole.refuse_used(dst)
    if dst.is_relative_to(src):
        raise ValueError(f"{dst} lies in the source {src}; name a folder elsewhere")
    return dst


@contextlib.contextmanager
def _target(
    dst: storage.Path, source: ModelFolder, nested: ModelFolder | None, dtype: np.dtype | None = None
) -> Iterator[tuple[storage.Path, Callable[[int], Any]]]:
    """A folder to write into, which becomes `dst` when it is complete, and the count of bytes that are
    written, shown as a progress bar."""
    total = source.n_params * dtype.itemsize if dtype else source.nbytes
    total += nested.nbytes if nested else 0
    with (
        whole.written(dst, int(1.01 * total) + (1 << 20)) as folder,
        progress(dst.name, total) as bar,
    ):
        yield folder, bar.update
