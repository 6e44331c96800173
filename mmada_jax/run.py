"""What a workdir holds: the configuration of its run, and the loading of what was trained there."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax

from mmada_jax import config as config_lib
from mmada_jax import sharding, transformer, vq
from mmada_jax.checkpoint import newest_params, read_config
from mmada_jax.corrupt import Config as LossConfig
from mmada_jax.data import digits
from mmada_jax.data.pipeline import rows_per_task
from mmada_jax.data.tokenizer import TextTokenizer
from mmada_jax.optim import Config as OptimConfig
from mmada_jax.vocab import Vocab


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes; -1 takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Run:
    """What every training run has. `batch_size` counts global rows."""

    program: Literal["vq", "model"]
    steps: int
    batch_size: int
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    log_every: int = 50
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: Mesh = Mesh()

    def __post_init__(self):
        for name in ("steps", "batch_size", "save_every", "keep", "log_every", "accumulate"):
            if getattr(self, name, 1) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        chunk = getattr(self, "loss_chunk", None)
        if chunk is not None and chunk < 1:
            raise ValueError(f"loss_chunk is {chunk}; it must be at least 1, or None for all positions")


@dataclasses.dataclass(frozen=True)
class VQRun(Run):
    """Training of the image tokenizer; weights of its losses beside the reconstruction's 1."""

    preset: str = "digits"
    entropy: float = 0.1
    commitment: float = 0.1


@dataclasses.dataclass(frozen=True)
class ModelRun(Run):
    """Training of the model. `mixture` shares the rows among the tasks; `model` overrides fields of
    the preset; `image_tokenizer` is the workdir of a VQRun, relative to the run's own or absolute."""

    preset: str = "digits"
    data: Literal["digits", "none"] = "digits"
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    image_tokenizer: str = ""
    image_size: int = 0  # pixels of a side; the scans of digits have their own
    text_vocab: int = 384
    max_text: int = 256
    cond_dropout: float = 0.1
    mixture: dict[str, int] = dataclasses.field(default_factory=dict)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    loss_chunk: int | None = None  # positions of a device that have logits at a time
    accumulate: int = 1  # parts that a batch goes through the model in, one after the other


def parse(config: Mapping[str, Any]) -> VQRun | ModelRun:
    """A config mapping -> the frozen configuration of its program."""
    kinds = {"vq": VQRun, "model": ModelRun}
    name = config.get("program")
    if name not in kinds:
        raise ValueError(f"config.program is {name!r}; it must be one of {', '.join(kinds)}")
    return config_lib.from_dict(kinds[name], config)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a ModelRun amounts to: tokenizers, ids, architectures, and the shape of an image."""

    tokenizer: TextTokenizer
    vocab: Vocab
    model: transformer.Config
    vq: vq.Config
    grid: tuple[int, int]  # rows and columns of image tokens

    @property
    def n_image(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]


def plan(run: ModelRun, workdir: pathlib.Path, vq_config: vq.Config | None = None) -> Plan:
    """Resolves a run of the model, and raises where it can't work: unknown presets, a task mixture
    or a row length that doesn't fit, no image tokenizer. Nothing is computed or written.

    `vq_config` is given where the image tokenizer is yet to be trained."""
    rows_per_task(run.mixture, run.batch_size)
    if run.data == "none":
        raise ValueError(
            "config.data is 'none': this configuration describes a step without saying where its rows "
            "come from; launch/aot.py compiles it, training needs data='digits' and a preset to match"
        )
    vq_config = vq_config or vq_config_of(image_tokenizer_of(run, workdir))
    grid = (digits.HEIGHT // vq_config.downsampling, digits.WIDTH // vq_config.downsampling)
    saved = workdir / "tokenizer.json"
    if saved.is_file():
        tokenizer = TextTokenizer.load(saved)
    else:
        tokenizer = TextTokenizer.train(digits.corpus(), run.text_vocab)
    vocab = tokenizer.vocab(vq_config.codebook_size)
    model = model_of(run, vocab, grid[0] * grid[1])
    return Plan(tokenizer, vocab, model, vq_config, grid)


def model_of(run: ModelRun, vocab: Vocab, n_image: int) -> transformer.Config:
    """The architecture of a run: its preset, with the run's own values, for its vocabulary.

    Raises ValueError if rows with `n_image` image tokens are longer than it takes.
    """
    preset = dataclasses.asdict(preset_of(transformer.PRESETS, run.preset))
    values = preset | dict(run.model) | {"vocab": vocab.rows}
    model = config_lib.from_dict(transformer.Config, values, "model.")
    length = run.max_text + n_image + 3
    if length > model.max_len:
        raise ValueError(
            f"rows have {length} tokens (max_text {run.max_text} + {n_image} of the image + 3), the "
            f"model takes {model.max_len}; lower max_text or raise model.max_len"
        )
    return model


def image_tokenizer_of(run: ModelRun, workdir: str | pathlib.Path) -> pathlib.Path:
    """The workdir of a run's image tokenizer; the run's own needn't exist yet."""
    return pathlib.Path(os.path.normpath(pathlib.Path(workdir) / run.image_tokenizer))


def vq_config_of(workdir: str | pathlib.Path) -> vq.Config:
    """Architecture of the image tokenizer that a workdir holds."""
    try:
        config = read_config(workdir)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image tokenizer: {error}") from error
    if config.get("program") != "vq":
        raise ValueError(f"{workdir} holds no image tokenizer but a {config.get('program')!r} run")
    return preset_of(vq.PRESETS, config["preset"])


def load_vq(workdir: str | pathlib.Path) -> tuple[Any, vq.Config]:
    """The newest params of the image tokenizer in `workdir`, on one device, and its architecture."""
    config = vq_config_of(workdir)
    params, _ = newest_params(workdir)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return sharding.put_params(params, jax.tree.map(lambda _: place, params)), config


def preset_of(presets: Mapping[str, Any], name: str) -> Any:
    """The named preset; an unknown name is an error that lists the known ones."""
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(presets)}")
    return presets[name]
