"""Folders of PyTorch -> checkpoints of JAX, and back; a target is complete or not there at all."""

import contextlib
import dataclasses
import errno
import fcntl
import glob
import itertools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mmada_jax import storage
from mmada_jax.bucket import Bucket
from mmada_jax.progress import progress
from mmada_jax.storage import is_full
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
from mmada_jax.weights.workdir import CONFIG, UNFINISHED, record_files

_LOCK = "lock"
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
    unfinished = storage.in_bucket(dst) and (dst / UNFINISHED).is_file()
    if storage.has_files(dst) and not unfinished:
        raise ValueError(f"{dst} is there already and not an empty folder; name another one")
    if dst.is_relative_to(src):
        raise ValueError(f"{dst} lies in the source {src}; name a folder elsewhere")
    if not storage.in_bucket(dst) and dst.is_mount():
        raise ValueError(f"{dst} is a mount point and can't be replaced; name a folder in it")
    return dst


@contextlib.contextmanager
def _target(
    dst: storage.Path, source: ModelFolder, nested: ModelFolder | None, dtype: np.dtype | None = None
) -> Iterator[tuple[storage.Path, Callable[[int], Any]]]:
    """A folder to write into and the count of bytes that are written, shown as a progress bar.

    The folder lies beside `dst`. It is renamed to `dst` if all goes well, and removed if not. In a bucket
    it is `dst` itself, with a lease in it as long as it isn't complete."""
    total = source.n_params * dtype.itemsize if dtype else source.nbytes
    total += nested.nbytes if nested else 0
    if isinstance(dst, Bucket):
        with storage.locked(dst / UNFINISHED, f"another conversion is writing {dst}"):
            dst.rmtree(keep=(dst / UNFINISHED,))  # left by a conversion that was killed
            try:
                with progress(dst.name, total) as bar:
                    yield dst, bar.update
            except BaseException:
                storage.rmtree(dst, ignore_errors=True)
                raise
        return
    made = [parent for parent in dst.parents if not parent.exists()]
    dst.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(dst)
    free, needed = shutil.disk_usage(dst.parent).free, int(1.01 * total) + (1 << 20)
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the disk is too full: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            str(dst.parent),
        )
    unfinished, lock = _claim(dst)
    try:
        folder = unfinished / "folder"
        folder.mkdir()
        with progress(dst.name, total) as bar:
            yield folder, bar.update
        _new(dst, unfinished)  # nobody else may have made it by now
        folder.rename(dst)
    except Exception as error:  # an error of a library may have any type
        if is_full(error):
            text = f"the disk is full, nothing was written ({str(error)[:200]})"
            raise OSError(errno.ENOSPC, text, str(dst)) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)
        for parent in made:
            with contextlib.suppress(OSError):  # it isn't empty
                parent.rmdir()


def _claim(dst: storage.Path) -> tuple[storage.Path, int]:
    """A new folder beside `dst`, and a file in it that is locked as long as it is open.

    A lock ends with its process, however the process ends. The number of a process doesn't tell whether
    it lives: in a container the next process has the same number.
    """
    for again in itertools.count():
        suffix = f"-{again}" if again else ""
        unfinished = dst.with_name(f".{dst.name}.unfinished-{os.getpid()}{suffix}")
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # or cleared before it was locked
            unfinished.mkdir()
            lock = os.open(unfinished / _LOCK, os.O_RDWR | os.O_CREAT)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(unfinished / _LOCK)):
                    return unfinished, lock
            os.close(lock)


def _clear_leftovers(dst: storage.Path) -> None:
    """Removes what conversions to `dst` have left that were killed: nobody holds their locks."""
    for left in dst.parent.glob(f".{glob.escape(dst.name)}.unfinished-*"):
        with contextlib.suppress(OSError):  # its process lives, or has just cleared it away
            lock = os.open(left / _LOCK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)
