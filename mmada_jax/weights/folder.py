"""Folders that hold a model, whoever wrote them, and the ways between them.

A Hugging Face folder    config.json, *.safetensors or pytorch_model*.bin, tokenizer.json
A checkpoint             config.json (the same fields), params/ (Orbax), tokenizer.json
A training workdir       config.json (that of the run), checkpoints/N, tokenizer.json

The first two may hold the image tokenizer of the model as a folder `image_tokenizer`. `open_folder`
makes one Source of any of them, with params that are read piece by piece; `from_torch`, `to_torch`
and `inspect` stand on it, and so does loading a model to use it.
"""

import contextlib
import dataclasses
import errno
import fcntl
import glob
import itertools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mmada_jax.data import digits
from mmada_jax.disk import is_full, refuse_place, resolved
from mmada_jax.files import read_json
from mmada_jax.nets import transformer, vq
from mmada_jax.tokens.tokenizer import TextTokenizer
from mmada_jax.train import runs
from mmada_jax.train.metrics import Progress
from mmada_jax.weights import hub, lazy, llada_keys, magvit_keys
from mmada_jax.weights.arrays import open_params, write_params
from mmada_jax.weights.checkpoint import newest_params
from mmada_jax.weights.lazy import DTYPES, refuse
from mmada_jax.weights.manifest import MANIFEST, find_damage, verify_manifest
from mmada_jax.weights.workdir import check_files, record_files

_LOCK = "lock"
IMAGE_TOKENIZER = "image_tokenizer"
GENERATION = "generation_config.json"
# What travels beside the weights. Code never does.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", GENERATION,
)  # fmt: skip
_NEITHER = "is no workdir of a training run, no checkpoint and no Hugging Face folder"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model in a folder. `params` is a tree of Lazy arrays, `values` the fields of its config.json
    as Hugging Face has them, `generation` those of its generation_config.json, `step` that of a workdir."""

    path: pathlib.Path
    kind: str
    model_type: str
    config: transformer.Config | vq.Config
    values: dict[str, Any]
    params: dict[str, Any]
    image_tokenizer: pathlib.Path | None = None
    step: int | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_image_tokenizer(self) -> bool:
        """Whether this is an image tokenizer, and not a model."""
        return isinstance(self.config, vq.Config)

    @property
    def dtype(self) -> str:
        """That of the params."""
        return str(next(leaf.dtype for _, leaf in lazy.leaves(self.params)))

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for _, leaf in lazy.leaves(self.params))

    @property
    def nbytes(self) -> int:
        """Bytes of the params."""
        return sum(leaf.nbytes for _, leaf in lazy.leaves(self.params))

    @property
    def axes(self) -> Any:
        """The logical axis names of the params, None for an image tokenizer."""
        return None if self.is_image_tokenizer else transformer.param_axes(self.config)

    def tensors(self, dtype: np.dtype | None = None) -> dict[str, lazy.Lazy]:
        """The params as PyTorch has them, without an image tokenizer's constant buffers."""
        module = magvit_keys if self.is_image_tokenizer else llada_keys
        return lazy.tensors_of(self.params, module.key_table(self.config), dtype)

    def tokenizer(self) -> TextTokenizer | None:
        """The text tokenizer, None if the folder has none."""
        path = self.path / "tokenizer.json"
        return TextTokenizer.load(path) if path.is_file() else None


def open_folder(
    path: str | pathlib.Path,
    dtype: str | None = None,
    add_image_vocab: int = 0,
    weights: bool = True,
    step: int | None = None,
) -> Source:
    """Opens a folder of any kind and checks all there is to check before an array is read.

    Tensors of PyTorch are cast to `dtype` and, with `add_image_vocab`, grown as they are read. The
    files of a checkpoint are compared with their manifest. Without `weights` nothing is read of those of
    a workdir, and `params` are their shapes. `step` is an older one of a workdir. Raises FileNotFoundError
    or ValueError.
    """
    path = resolved(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} {_NEITHER}: there is no such folder")
    check_files(path)
    values = read_json(path / "config.json", dict) if (path / "config.json").is_file() else {}
    if step is not None and "program" not in values:
        raise ValueError(
            f"{path} is no workdir of a training run and has no step {step}; leave the step out"
        )
    try:
        if "program" in values or (path / "params").is_dir():
            source = (
                _open_workdir(path, values, weights, step)
                if "program" in values
                else _open_checkpoint(path, values)
            )
            source.tensors()  # raises unless the params are those of the configuration
        elif hub.holds_tensors(path):
            return _open_hugging_face(path, values, dtype, add_image_vocab)
        else:
            raise FileNotFoundError(
                f"{path} {_NEITHER}: it has no checkpoints/, no params/, no *.safetensors and no "
                "pytorch_model*.bin"
            )
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    if dtype or add_image_vocab:
        raise ValueError(f"{path} is a {source.kind}, not a folder of PyTorch tensors")
    return source


def _open_hugging_face(path, values, dtype, add_image_vocab) -> Source:
    if (path / MANIFEST).is_file():
        refuse(find_damage(path), f"{path} isn't as it was exported; fetch it again (or remove {MANIFEST}, "
               "if the weights were changed on purpose)")  # fmt: skip
    state = hub.read_tensors(path)
    target = _dtype(dtype)
    nested, told = _beside(path)
    if values.get("model_type") in llada_keys.MODEL_TYPES:
        config = llada_keys.config_from_hf(values)
        params = lazy.params_of(state, llada_keys.key_table(config), target)
        if add_image_vocab:
            values = llada_keys.grown_config(values, add_image_vocab)
            config = llada_keys.config_from_hf(values)
            params = llada_keys.grow(params, add_image_vocab)
        kind, model_type = "Hugging Face folder", values["model_type"]
        return Source(path, kind, model_type, config, values, params, nested, generation=told)
    vision = any(key.endswith("encoder.quant_conv.weight") for key in state)
    if vision or values.get("model_type") == magvit_keys.MODEL_TYPE:
        if add_image_vocab:
            raise ValueError(
                f"{path} holds an image tokenizer; only LLaDA can be given an image vocabulary"
            )
        config = magvit_keys.config_from_shapes({key: tensor.shape for key, tensor in state.items()})
        params = magvit_keys.params_of(state, config, target)
        return Source(path, "Hugging Face folder", magvit_keys.MODEL_TYPE, config, values, params)
    if not values:
        raise FileNotFoundError(f"{path} has no config.json, which says what model its tensors are of")
    raise ValueError(
        f"{path} holds a model of type {values.get('model_type')!r}; known: "
        f"{', '.join((*llada_keys.MODEL_TYPES, magvit_keys.MODEL_TYPE))} (config.json says it)"
    )


def _open_checkpoint(path, values) -> Source:
    verify_manifest(path / "params")
    params = open_params(path / "params")
    if values.get("model_type") == magvit_keys.MODEL_TYPE:
        return Source(
            path, "checkpoint", magvit_keys.MODEL_TYPE, magvit_keys.config_from_hf(values), values, params
        )
    config, (nested, told) = llada_keys.config_from_hf(values), _beside(path)
    return Source(path, "checkpoint", values["model_type"], config, values, params, nested, generation=told)


def _beside(path: pathlib.Path) -> tuple[pathlib.Path | None, dict[str, Any]]:
    """What lies beside the weights of a model: its image tokenizer, and how it generates."""
    nested, told = path / IMAGE_TOKENIZER, path / GENERATION
    return nested if nested.is_dir() else None, read_json(told, dict) if told.is_file() else {}


def _open_workdir(path, values, weights, step) -> Source:
    if values["program"] == "rl":
        try:
            model, dtype = values["architecture"], values["architecture"]["dtype"]
            nested = _vision_of(path, values) if model["codebook_size"] else None
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / 'config.json'} is damaged: it lacks {error}") from error
        config = llada_keys.config_from_hf(model, dtype=dtype)
        params = transformer.param_shapes(config)
        if weights:
            params, step = newest_params(path, step)
        told = values.get("generation", {}) | _beside(path)[1]
        return Source(path, "workdir", model["model_type"], config, model, params, nested, step, told)
    parsed = runs.parse(values)
    params, step = newest_params(path, step)
    if isinstance(parsed, runs.VQRun):
        config = runs.preset_of(vq.PRESETS, parsed.preset)
        values = magvit_keys.config_to_hf(config)
        return Source(path, "workdir", magvit_keys.MODEL_TYPE, config, values, params, None, step)
    plan = runs.plan(parsed, path)
    values = llada_keys.config_to_hf(plan.model, plan.vocab, plan.grid, parsed.max_text)
    nested = runs.image_tokenizer_of(parsed, path)
    formats = {source.format for of_task in parsed.data.values() for source in of_task.values()}
    told = (digits.GENERATION if "digits" in formats else {}) | _beside(path)[1]
    return Source(path, "workdir", values["model_type"], plan.model, values, params, nested, step, told)


def _vision_of(path: pathlib.Path, values: Mapping[str, Any]) -> pathlib.Path:
    """Where the image tokenizer of a workdir of RL is, by these `values`: there itself or, in those of
    older versions, where its configuration has it. It isn't opened."""
    while not (path / IMAGE_TOKENIZER).is_dir() and "program" in values:
        if values["image_tokenizer"]:
            return runs.relative(values["image_tokenizer"], path)
        begun = runs.relative(values["init"], path)
        if not (begun / "config.json").is_file():
            break  # it has moved: there is nothing to be found
        path, values = begun, runs.read_config(begun)
    return path / IMAGE_TOKENIZER


# ---- Conversion ----------------------------------------------------------------------------------


def from_torch(
    src: str | pathlib.Path,
    dst: str | pathlib.Path,
    dtype: str | None = None,
    add_image_vocab: int = 0,
    image_tokenizer: str | pathlib.Path | None = None,
) -> None:
    """Hugging Face folder -> checkpoint, with its tokenizer files and its image tokenizer.

    `image_tokenizer` names a folder of that, where `src` has none of its own. Raises before anything
    is written if a source doesn't fit, `dst` isn't new or empty, or the disk is too small.
    """
    dst = _new(dst, src)
    source = open_folder(src, dtype, add_image_vocab)
    if source.kind != "Hugging Face folder":
        raise ValueError(f"{src} is a {source.kind} already; to-torch is the other direction")
    nested = image_tokenizer_of(source, image_tokenizer)
    if not source.is_image_tokenizer and (problem := _vocabulary(source)["problem"]):
        print(f"warning: the model can be converted but not used: {problem}", file=sys.stderr)
    with _target(dst, source, nested) as (folder, progress):
        _write_checkpoint(folder, source, progress)
        if nested:
            _write_checkpoint(folder / IMAGE_TOKENIZER, nested, progress)


def to_torch(
    src: str | pathlib.Path,
    dst: str | pathlib.Path,
    dtype: str | None = None,
    image_tokenizer: str | pathlib.Path | None = None,
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
    with _target(dst, source, nested, _dtype(dtype)) as (folder, progress):
        _write_hugging_face(folder, source, _dtype(dtype), progress, shard)
        if nested:
            _write_hugging_face(folder / IMAGE_TOKENIZER, nested, None, progress, shard)


def inspect(src: str | pathlib.Path) -> dict[str, Any]:
    """What a folder holds: kind, model type, parameters, dtype, hash, and whether its vocabulary fits.

    `sha256` is that of the parameters as PyTorch lays them out, in the order of PyTorch's keys, so
    that it is the same before and after a conversion. Of a training workdir `state_sha256` is that of
    parameters and optimizer state of the step, whatever mesh wrote them: runs that agree to here have it
    in common.
    """
    source = open_folder(src)
    report = {
        "path": str(source.path),
        "kind": source.kind,
        "step": source.step,
        "model_type": source.model_type,
        "parameters": source.n_params,
        "tensors": len(source.tensors()),
        "dtype": source.dtype,
        "bytes": source.nbytes,
        "vocabulary": None if source.is_image_tokenizer else _vocabulary(source),
        "image_tokenizer": str(source.image_tokenizer) if source.image_tokenizer else None,
    }
    with Progress("hashing", source.nbytes) as progress:
        report["sha256"] = lazy.sha256(source.tensors(), progress)
    if source.step is not None:
        folder = source.path / "checkpoints" / str(source.step)
        verify_manifest(folder, "opt_state")
        state = {part: open_params(folder / part) for part in ("params", "opt_state")}
        arrays = {".".join(path): array for path, array in lazy.leaves(state)}
        with Progress("hashing all", sum(array.nbytes for array in arrays.values())) as progress:
            report["state_sha256"] = lazy.sha256(arrays, progress)
    return report


def _vocabulary(source: Source) -> dict[str, Any]:
    """Whether the tokenizer, the image codes and the rows of the embedding fit together."""
    rows, codes = source.config.vocab, source.values.get("codebook_size") or 0
    report = {"rows": rows, "image_codes": codes, "tokenizer": None, "image_offset": None, "ok": False}
    tokenizer = source.tokenizer()
    if tokenizer is None:
        return report | {"problem": "there is no tokenizer.json"}
    report |= {"tokenizer": len(tokenizer), "image_offset": len(tokenizer)}
    try:
        tokenizer.vocab(codes, rows)
    except ValueError as error:
        return report | {"problem": str(error)}
    return report | {"ok": True, "problem": None}


def _write_checkpoint(folder: pathlib.Path, source: Source, progress: Callable[[int], None]) -> None:
    folder.mkdir(exist_ok=True)
    values = {k: v for k, v in source.values.items() if k not in ("auto_map", "torch_dtype", "dtype")}
    if source.is_image_tokenizer:
        values |= magvit_keys.config_to_hf(source.config)
    _write_json(folder / "config.json", values | {"dtype": source.dtype})
    _carry_files(source.path, folder)
    record_files(folder)
    write_params(folder / "params", source.params, source.axes, progress)


def write_image_tokenizer(folder: pathlib.Path, config: vq.Config, params: Any) -> None:
    """Writes an image tokenizer in memory as a checkpoint, whole or not at all; one process does."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir()
    _write_json(unfinished / "config.json", magvit_keys.config_to_hf(config) | {"dtype": "float32"})
    record_files(unfinished)
    write_params(unfinished / "params", lazy.lazy(params), None)
    unfinished.rename(folder)


def _write_hugging_face(
    folder: pathlib.Path,
    source: Source,
    dtype: np.dtype | None,
    progress: Callable[[int], None],
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
    _write_json(folder / "config.json", values | about)
    code = (pathlib.Path(__file__).parent / f"{module}.py").read_text()
    # A model of LLaDA stays one: transformers compares this line with config.json.
    code = code.replace('model_type = "mmada"', f'model_type = "{source.model_type}"')
    (folder / f"{module}.py").write_text(code)
    _carry_files(source.path, folder)
    if tokenizer := source.tokenizer():
        tokenizer.export(folder)
    if not source.is_image_tokenizer and not (folder / GENERATION).is_file():
        _write_json(folder / GENERATION, _generation_defaults(values) | dict(source.generation))
    hashes = hub.write_tensors(folder, tensors, progress, shard)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": h} for name, h in hashes.items()}
    _write_json(folder / MANIFEST, {"files": files})


def _generation_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's settings: text of 512 tokens in blocks of 128 by 256 steps, images in 15 steps
    with guidance 3.5."""
    ids = {k: values[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in values}
    text = {"max_new_tokens": 512, "block_length": 128, "steps": 256, "temperature": 0.0}
    image = {"image_steps": 15, "image_guidance": 3.5}
    return ids | text | {"remasking": "low_confidence"} | image


def _carry_files(src: pathlib.Path, dst: pathlib.Path) -> None:
    for name in _TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)


def image_tokenizer_of(source: Source, given: str | pathlib.Path | None = None) -> Source | None:
    """The image tokenizer that goes with a model: that in the folder `given`, or else its own.

    Raises ValueError if there is something else, or one with another number of codes.
    """
    if source.is_image_tokenizer:
        if given:
            raise ValueError(f"{source.path} is an image tokenizer itself; leave --image-tokenizer out")
        return None
    path = given or source.image_tokenizer
    if path is None:
        return None
    try:
        nested = open_folder(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the image tokenizer of the model in {source.path} isn't there: {error}; name its folder "
            "(image_tokenizer), or put it there"
        ) from error
    if not nested.is_image_tokenizer:
        raise ValueError(f"{path} holds no image tokenizer but a model of type {nested.model_type!r}")
    codes = source.values.get("codebook_size") or 0
    if nested.config.codebook_size != codes:
        raise ValueError(
            f"the image tokenizer in {path} has {nested.config.codebook_size} codes, the model {codes}; "
            "they don't belong together"
        )
    return nested


def _new(dst: str | pathlib.Path, src: str | pathlib.Path) -> pathlib.Path:
    """The folder to write, resolved; raises ValueError unless it is new or empty, and not in `src`."""
    dst, src = resolved(dst), resolved(src)
    refuse_place(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst} is there already and not an empty folder; name another one")
    if dst.is_relative_to(src):
        raise ValueError(f"{dst} lies in the source {src}; name a folder elsewhere")
    if dst.is_mount():
        raise ValueError(f"{dst} is a mount point and can't be replaced; name a folder in it")
    return dst


@contextlib.contextmanager
def _target(
    dst: pathlib.Path, source: Source, nested: Source | None, dtype: np.dtype | None = None
) -> Iterator[tuple[pathlib.Path, Progress]]:
    """A folder to write into, beside `dst` and renamed to it if all goes well, and a progress bar."""
    total = source.n_params * dtype.itemsize if dtype else source.nbytes
    total += nested.nbytes if nested else 0
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
        with Progress(dst.name, total) as progress:
            yield folder, progress
        _new(dst, unfinished)  # nobody else may have made it by now
        folder.rename(dst)
    except Exception as error:  # that of a library may have any type
        if is_full(error):
            text = f"the disk is full, nothing was written ({str(error)[:200]})"
            raise OSError(errno.ENOSPC, text, str(dst)) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.close(lock)
        for parent in made:
            with contextlib.suppress(OSError):  # it holds something
                parent.rmdir()


def _claim(dst: pathlib.Path) -> tuple[pathlib.Path, int]:
    """A new folder beside `dst`, and a file in it that is locked as long as it is open.

    A lock ends with its process, however that ends. A process number says nothing: in a container the
    next process has the same one.
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


def _clear_leftovers(dst: pathlib.Path) -> None:
    """Removes what conversions to `dst` have left that were killed: nobody holds their locks."""
    for left in dst.parent.glob(f".{glob.escape(dst.name)}.unfinished-*"):
        with contextlib.suppress(OSError):  # its process lives, or has just cleared it away
            lock = os.open(left / _LOCK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


def _dtype(name: str | None) -> np.dtype | None:
    if name is not None and name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(values), indent=2) + "\n")
