"""The one answer to the question which model a folder holds, whoever wrote the folder.

A Hugging Face folder    config.json, *.safetensors or pytorch_model*.bin, tokenizer.json
A checkpoint             config.json (the same fields), params/ (Orbax), tokenizer.json
A training workdir       model.json (see `describe_model`), checkpoints/N, tokenizer.json

Each of them may hold the image tokenizer of its model as a folder `image_tokenizer`. `open_folder` makes
one ModelFolder of any of them, whose params are read piece by piece. Whoever loads, converts, inspects or
goes on training a model begins with a ModelFolder. Only what a workdir keeps of its image tokenizer is
written here.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mmada_jax import storage, whole
from mmada_jax.devices.distributed import together
from mmada_jax.files import read_json
from mmada_jax.nets import transformer, vq
from mmada_jax.tokens.tokenizer import TextTokenizer, read_tokenizer
from mmada_jax.tokens.vocab import Vocab
from mmada_jax.weights import adapters, hub, lazy, llada_keys, magvit_keys, older
from mmada_jax.weights.arrays import open_params, write_params
from mmada_jax.weights.checkpoint import newest_params
from mmada_jax.weights.lazy import DTYPES, refuse
from mmada_jax.weights.manifest import MANIFEST, find_damage, verify_manifest
from mmada_jax.weights.workdir import CONFIG, MODEL, check_files, write_files

IMAGE_TOKENIZER = "image_tokenizer"
GENERATION = "generation_config.json"
# Fields of ModelConfig that say how a model is computed. config.json of Hugging Face lacks them.
COMPUTED = ("dtype", "attention", "pad", "remat", "unroll")
_NEITHER = "is no workdir of a training run, no checkpoint and no Hugging Face folder"


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model in a folder.

    kind             "workdir", "checkpoint" or "Hugging Face folder"
    values           the fields of a config.json of Hugging Face
    params           a tree of Lazy arrays, or of shapes where the folder was opened without weights
    image_tokenizer  the folder of the model's image tokenizer, None for a model of text alone
    step             the step of a workdir whose params these are
    generation       how the model generates by default: fields of a generation_config.json
    adapter          the adapters that were trained there, which `params` contain already
    controls         the ids of control tokens by name, where a text model's own vocabulary has them under
                     other strings than ours
    """

    path: storage.Path
    kind: str
    model_type: str
    config: transformer.ModelConfig | vq.VQConfig
    values: dict[str, Any]
    params: dict[str, Any]
    image_tokenizer: storage.Path | None = None
    step: int | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapter: adapters.Adapter | None = None
    controls: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def is_image_tokenizer(self) -> bool:
        """Whether the folder holds an image tokenizer, and not a model."""
        return isinstance(self.config, vq.VQConfig)

    @property
    def dtype(self) -> str:
        """The dtype of the params."""
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
        keys = magvit_keys if self.is_image_tokenizer else llada_keys
        return lazy.tensors_of(self.params, keys.key_table(self.config), dtype)

    def tokenizer(self) -> TextTokenizer | None:
        """The text tokenizer, None if the folder has none."""
        path = self.path / "tokenizer.json"
        return TextTokenizer.load(path, self.controls) if path.is_file() else None


# ---- Opening -------------------------------------------------------------------------------------


def open_folder(
    path: storage.Name,
    dtype: str | None = None,
    add_image_vocab: int = 0,
    weights: bool = True,
    step: int | None = None,
) -> ModelFolder:
    """Opens a folder of any kind and checks all there is to check before an array is read.

    Tensors of PyTorch are cast to `dtype` and, with `add_image_vocab`, grown as they are read. The files
    of a checkpoint or a step are compared with their manifest. Without `weights` no array of a workdir or
    a checkpoint is opened, and `params` are shapes. `step` is an older step of a workdir. Raises
    FileNotFoundError or ValueError.
    """
    path = storage.resolved(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} {_NEITHER}: there is no such folder")
    if whole.is_unfinished(path):
        raise FileNotFoundError(
            f"{path} isn't complete: a conversion is writing it, or has ended before its end; give its "
            "command again"
        )
    check_files(path)
    values = read_json(path / CONFIG, dict) if (path / CONFIG).is_file() else {}
    is_workdir = "program" in values or (path / MODEL).is_file()
    if step is not None and not is_workdir:
        raise ValueError(
            f"{path} is no workdir of a training run and has no step {step}; leave the step out"
        )
    try:
        if is_workdir:
            source = _open_workdir(path, values, weights, step)
        elif (path / "params").is_dir():
            source = _open_checkpoint(path, values, weights)
        elif hub.holds_tensors(path):
            return _open_hugging_face(path, values, dtype, add_image_vocab)
        else:
            raise FileNotFoundError(
                f"{path} {_NEITHER}: it has no checkpoints/, no params/, no *.safetensors and no "
                "pytorch_model*.bin"
            )
        source.tensors()  # raises unless the params are those of the configuration
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    if dtype or add_image_vocab:
        raise ValueError(f"{path} is a {source.kind}, not a folder of PyTorch tensors")
    return source


def open_image_tokenizer(path: storage.Name, weights: bool = True) -> ModelFolder:
    """Opens the folder of an image tokenizer. Raises FileNotFoundError if there is none, ValueError if the
    folder holds a model."""
    try:
        source = open_folder(path, weights=weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image tokenizer: {error}") from error
    if not source.is_image_tokenizer:
        raise ValueError(
            f"{path} holds no image tokenizer but a model of type {source.model_type!r}; name the folder "
            "of the one that goes with it"
        )
    return source


def image_tokenizer_of(source: ModelFolder, given: storage.Name | None = None) -> ModelFolder | None:
    """The image tokenizer that goes with a model: in the folder `given`, by default the model's own.

    Raises ValueError if the folder holds something else, or an image tokenizer with another number of
    codes.
    """
    if source.is_image_tokenizer:
        if given:
            raise ValueError(f"{source.path} is an image tokenizer itself; leave --image-tokenizer out")
        return None
    path = given or source.image_tokenizer
    if path is None:
        return None
    try:
        nested = open_image_tokenizer(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the image tokenizer of the model in {source.path} isn't there: {error}; name its folder "
            "(image_tokenizer), or put it there"
        ) from error
    codes = source.values.get("codebook_size") or 0
    if nested.config.codebook_size != codes:
        raise ValueError(
            f"the image tokenizer in {path} has {nested.config.codebook_size} codes, the model {codes}; "
            "they don't belong together"
        )
    return nested


def _open_hugging_face(path, values, dtype, add_image_vocab) -> ModelFolder:
    if (path / MANIFEST).is_file():
        refuse(find_damage(path), f"{path} isn't as it was exported; fetch it again (or remove {MANIFEST}, "
               "if the weights were changed on purpose)")  # fmt: skip
    state = hub.read_tensors(path)
    target = dtype_of(dtype)
    if values.get("model_type") in llada_keys.MODEL_TYPES:
        config = llada_keys.config_from_hf(values)
        params = llada_keys.params_of(state, config, target)
        # A model with image codes has the ids of MMaDA, whatever its fields say of some.
        controls = {} if values.get("codebook_size") else llada_keys.control_ids(values)
        source = ModelFolder(
            path, "Hugging Face folder", values["model_type"], config, values, params, _nested(path),
            generation=_generation(path), controls=controls,
        )  # fmt: skip
        return _with_image_vocab(source, add_image_vocab) if add_image_vocab else source
    # The published image tokenizer has a config.json that says nothing of it.
    vision = any(key.endswith("encoder.quant_conv.weight") for key in state)
    if vision or values.get("model_type") == magvit_keys.MODEL_TYPE:
        if add_image_vocab:
            raise ValueError(
                f"{path} holds an image tokenizer; only LLaDA can be given an image vocabulary"
            )
        config = magvit_keys.config_from_shapes({key: tensor.shape for key, tensor in state.items()})
        params = magvit_keys.params_of(state, config, target)
        return ModelFolder(path, "Hugging Face folder", magvit_keys.MODEL_TYPE, config, values, params)
    if not values:
        raise FileNotFoundError(f"{path} has no config.json, which says what model its tensors are of")
    raise ValueError(
        f"{path} holds a model of type {values.get('model_type')!r}; known: "
        f"{', '.join((*llada_keys.MODEL_TYPES, magvit_keys.MODEL_TYPE))} (config.json says it)"
    )


def _with_image_vocab(source: ModelFolder, codes: int) -> ModelFolder:
    """A text model with rows for so many image codes, behind the ids of its tokenizer."""
    tokenizer, rows = source.tokenizer(), source.config.vocab
    if tokenizer and (given := read_tokenizer(source.path / "tokenizer.json").get_vocab_size()) > rows:
        raise ValueError(
            f"the tokenizer has {given} entries, the embedding {rows} rows; they don't belong together"
        )
    controls = max(0, len(tokenizer) - rows) if tokenizer else 0
    values = llada_keys.grown_config(source.values, codes, controls)
    return dataclasses.replace(
        source,
        model_type=values["model_type"],
        values=values,
        config=llada_keys.config_from_hf(values),
        params=llada_keys.grow(source.params, codes + controls),
    )


def _open_checkpoint(path, values, weights) -> ModelFolder:
    is_vq = values.get("model_type") == magvit_keys.MODEL_TYPE
    config = magvit_keys.config_from_hf(values) if is_vq else llada_keys.config_from_hf(values)
    if weights:
        verify_manifest(path / "params")
        params = open_params(path / "params")
    else:
        params = _shapes_of(config)
    nested, told = (None, {}) if is_vq else (_nested(path), _generation(path))
    return ModelFolder(
        path, "checkpoint", values["model_type"], config, values, params, nested, generation=told
    )


def _open_workdir(path, values, weights, step) -> ModelFolder:
    try:
        is_older = not (path / MODEL).is_file()
        about = older.describe(path, values) if is_older else read_json(path / MODEL, dict)
        fields, computed, told = about["config"], about["computed"], about["generation"]
        is_vq = fields["model_type"] == magvit_keys.MODEL_TYPE
        config = (
            magvit_keys.config_from_hf(fields) if is_vq else llada_keys.config_from_hf(fields, **computed)
        )
        nested = about["image_tokenizer"] and storage.resolved(storage.join(path, about["image_tokenizer"]))
    except (KeyError, TypeError, AttributeError) as error:
        name = CONFIG if is_older else MODEL
        raise ValueError(f"{path / name} is damaged: {error!r}") from error
    params, adapter = _shapes_of(config), None
    if weights:
        params, step = newest_params(path, step)
        if is_vq:  # beside these there may be what only training needs
            params = {half: params[half] for half in ("encoder", "decoder")}
        elif about.get("adapter"):
            of_lora, sha256 = adapters.read_lora(about["adapter"]), about["adapter"]["base_sha256"]
            adapter = adapters.Adapter(of_lora, params, sha256)
            params = adapters.merged(_open_base(path, about["adapter"]).params, adapter)
    told = told | ({} if is_vq else _generation(path))
    return ModelFolder(
        path, "workdir", fields["model_type"], config, fields, params, nested, step, told, adapter
    )


def open_adapters(base: ModelFolder, folders: Mapping[str, storage.Name]) -> dict[str, adapters.Adapter]:
    """The adapters in workdirs and in PEFT's folders, by name, that stand beside the model `base`. Raises
    FileNotFoundError, or ValueError for what doesn't fit, as adapters of another base."""
    opened, sha256 = {}, functools.cache(lambda: lazy.sha256(base.tensors()))
    for name, folder in folders.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{name!r} is no name of an adapter; give it a text")
        path = storage.resolved(folder)
        if base.is_image_tokenizer or base.adapter:
            raise ValueError(f"{base.path} is no model that adapters can stand beside; name their base")
        if not (path / MODEL).is_file():
            opened[name] = adapters.read_peft(path, base.config)
            adapters.warn_of_base(opened[name], sha256, base.path)
            continue
        check_files(path)
        about = read_json(path / MODEL, dict).get("adapter")
        if not about:
            raise ValueError(f"{path} holds no adapters but a whole model")
        adapters.check_base(sha256(), about, base.path)
        arrays = lazy.in_memory(newest_params(path)[0])
        opened[name] = adapters.Adapter(adapters.read_lora(about), arrays, about["base_sha256"])
    return opened


def _open_base(workdir: storage.Path, about: Mapping[str, Any]) -> ModelFolder:
    """The model beside which the adapters of a workdir were trained."""
    path = storage.resolved(storage.join(workdir, about["base"]))
    try:
        base = open_folder(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{workdir} holds adapters alone, and their base isn't where it was: {error}; put it back"
        ) from error
    adapters.check_base(lazy.sha256(base.tensors()), about, path)
    return base


def _nested(path: storage.Path) -> storage.Path | None:
    """The image tokenizer beside the weights of a model."""
    return folder if (folder := path / IMAGE_TOKENIZER).is_dir() else None


def _generation(path: storage.Path) -> dict[str, Any]:
    """What the generation_config.json beside the weights of a model says."""
    return read_json(path / GENERATION, dict) if (path / GENERATION).is_file() else {}


def _shapes_of(config: transformer.ModelConfig | vq.VQConfig) -> dict[str, Any]:
    """The params of an architecture as shapes; nothing is computed."""
    if isinstance(config, transformer.ModelConfig):
        return transformer.param_shapes(config)
    return jax.eval_shape(functools.partial(vq.init_params, config=config), jax.random.key(0))


def dtype_of(name: str | None) -> np.dtype | None:
    """The dtype of a name as people type it, None for None. Raises ValueError for an unknown name."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


# ---- What a workdir says of its model ------------------------------------------------------------


def describe_model(
    config: transformer.ModelConfig,
    vocab: Vocab,
    grid: tuple[int, int],
    max_text: int,
    generation: Mapping[str, Any],
    draws: bool = True,
) -> dict[str, Any]:
    """The model.json of a workdir with a model.

    config           the fields of a config.json of Hugging Face, and `image_grid` and `max_text`
    computed         how the run computes it: the fields COMPUTED of transformer.ModelConfig
    generation       how it generates by default, as a generation_config.json says it
    image_tokenizer  the folder of its image tokenizer within the workdir, null unless it `draws`
    """
    return {
        "config": llada_keys.config_to_hf(config, vocab, grid, max_text),
        "computed": {name: getattr(config, name) for name in COMPUTED},
        "generation": dict(generation),
        "image_tokenizer": IMAGE_TOKENIZER if draws else None,
    }


def describe_image_tokenizer(config: vq.VQConfig) -> dict[str, Any]:
    """The model.json of a workdir with an image tokenizer; see `describe_model`."""
    fields = magvit_keys.config_to_hf(config)
    return {"config": fields, "computed": {}, "generation": {}, "image_tokenizer": None}


def keep_image_tokenizer(workdir: storage.Path, source: ModelFolder) -> None:
    """Copies an image tokenizer into a workdir, which then needs nothing of the folder that it came from.
    The copy is there whole or not at all. All processes of a run call this, and the first one writes.

    Raises ValueError if the workdir holds another image tokenizer."""
    folder = storage.resolved(workdir) / IMAGE_TOKENIZER
    if source.path == folder:
        return
    with together("looking for the image tokenizer of the workdir") as same:
        # All processes look before the first one writes: what is opened is verified by all together.
        # In a bucket its config.json comes last.
        same["image tokenizer of the workdir"] = kept = (folder / CONFIG).is_file()
    with together("keeping the image tokenizer"):
        if kept:
            if lazy.sha256(open_image_tokenizer(folder).tensors()) != lazy.sha256(source.tensors()):
                raise ValueError(
                    f"{folder} is another image tokenizer than the one in {source.path}; choose an empty "
                    "workdir, or remove it"
                )
        elif jax.process_index() == 0:
            values = source.values | magvit_keys.config_to_hf(source.config)
            write_image_tokenizer(folder, values, source.params)


def write_image_tokenizer(folder: storage.Path, values: Mapping[str, Any], params: Any) -> None:
    """Writes an image tokenizer as a checkpoint, whole or not at all; one process does.

    values  the fields of its config.json
    params  a tree of Lazy arrays
    """
    # A folder of a bucket can't be renamed. There the object that readers look for comes last.
    in_place = storage.in_bucket(folder)
    unfinished = folder if in_place else folder.with_name(f".{folder.name}.unfinished")
    storage.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed
    unfinished.mkdir(parents=True)
    write_params(unfinished / "params", params, None)
    write_files(unfinished, {CONFIG: json_of(values)})
    if not in_place:
        unfinished.rename(folder)


def json_of(values: Mapping[str, Any]) -> str:
    """An object as JSON that people can read."""
    return json.dumps(dict(values), indent=2) + "\n"
