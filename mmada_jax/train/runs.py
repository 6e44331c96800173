"""The configurations of runs of the image tokenizer and of the model, and what follows from them.

A run is a frozen dataclass; its plan has the tokenizers, ids and architectures that follow from it.
Nothing here trains, and the configuration of reinforcement learning is in `train.rl`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax

from mmada_jax import config as config_lib
from mmada_jax import storage
from mmada_jax.data import digits, records, sources
from mmada_jax.data.pipeline import Shape, open_sources, rows_per_task
from mmada_jax.data.texts import sample_texts
from mmada_jax.devices import sharding
from mmada_jax.diffusion.corrupt import LossConfig
from mmada_jax.files import read_json
from mmada_jax.nets import lora, transformer, vq
from mmada_jax.nets.lora import LoraConfig
from mmada_jax.ranges import Count, FieldsOf, OnlyWith, Positive, Range, Ranged, Seed, Share, Weight
from mmada_jax.tokens import layout
from mmada_jax.tokens.layout import RowShape
from mmada_jax.tokens.tokenizer import TextTokenizer
from mmada_jax.tokens.vocab import LLADA, Vocab
from mmada_jax.train.optim import OptimConfig
from mmada_jax.weights import adapters, lazy, older
from mmada_jax.weights.folder import (
    IMAGE_TOKENIZER,
    ModelFolder,
    describe_image_tokenizer,
    describe_model,
    image_tokenizer_of,
    keep_image_tokenizer,
    open_folder,
    open_image_tokenizer,
)
from mmada_jax.weights.workdir import CONFIG, MODEL, claim_workdir, has_step, newest_step, read_config


@dataclasses.dataclass(frozen=True)
class Mesh(Ranged):
    """Sizes of the mesh axes; -1 takes what is left."""

    data: Annotated[int, Range(1, 1_000_000, also=-1)] = 1
    fsdp: Annotated[int, Range(1, 1_000_000, also=-1)] = -1
    tensor: Annotated[int, Range(1, 1_000_000, also=-1)] = 1


@dataclasses.dataclass(frozen=True)
class Run(Ranged):
    """The fields of every training run. `batch_size` counts the rows of all processes together.

    Each of `load_workers` processes loads by `load_threads` threads; without workers the run's own process
    does. 0 threads are as many as the records need (`pipeline.threads_of`). What is read of a bucket is
    kept in `cache_dir`, a folder of this machine, if there is one, up to `cache_gib` GiB.
    """

    program: Literal["vq", "model"]
    steps: Positive
    batch_size: Positive
    seed: Seed = 0
    save_every: Positive = 1000
    keep: Positive = 2
    log_every: Positive = 50
    load_threads: Annotated[int, Range(0, 1024)] = 0
    load_workers: Annotated[int, Range(0, 1024)] = 0
    cache_dir: str = ""
    cache_gib: Annotated[float, Range(0, 1_000_000, above=True), OnlyWith("cache_dir")] = 50.0
    max_skipped: Share = 0.01  # share of records that may be unreadable
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True)
class VQRun(Run):
    """Training of the image tokenizer, on pictures from the sources in `data`, on canvases of digits if
    that is empty.

    The architecture is the preset's with the fields in `model`, or that of the image tokenizer in the
    folder `init`, from which the run then starts. Pictures are resized to `image_size` pixels.

    The reconstruction weighs 1; `entropy` and `commitment` weigh these losses. `adversarial` weighs the
    loss by a discriminator, which is trained beside it; both begin at step `adversarial_start`.
    `perceptual` weighs the distance by LPIPS, whose network is in the folder `lpips`. With `average` what
    is trained is followed by a mean of that decay, and the mean is the image tokenizer that the run
    leaves. Every `eval_every` steps `eval_rows` held-out pictures are rebuilt and compared, and
    the first `samples` of them shown; where the folder `inception` has its network, the Frechet distance
    of the two is among the values. Paths are as in a ModelRun.
    """

    preset: str = "digits"
    init: str = ""
    model: Annotated[dict[str, Any], FieldsOf(vq.VQConfig)] = dataclasses.field(default_factory=dict)
    image_size: Annotated[int, Range(0, 65536)] = 0  # pixels of a side; the canvases have their own
    entropy: Weight = 0.1
    commitment: Weight = 0.1
    adversarial: Weight = 0.0
    adversarial_start: Annotated[Count, OnlyWith("adversarial")] = 0
    perceptual: Weight = 0.0
    lpips: Annotated[str, OnlyWith("perceptual")] = ""
    average: Annotated[float, Range(0, 1, below=True)] = 0.0
    data_root: str = ""
    data: dict[str, sources.SourceConfig] = dataclasses.field(default_factory=dict)
    held_out: dict[str, sources.SourceConfig] = dataclasses.field(default_factory=dict)
    data_may_change: bool = False  # whether a resumed run may have other data than before
    eval_every: Count = 0
    eval_rows: Annotated[Positive, OnlyWith("eval_every")] = 64
    samples: Annotated[Count, OnlyWith("eval_every")] = 8
    inception: Annotated[str, OnlyWith("eval_every")] = ""


@dataclasses.dataclass(frozen=True)
class ModelRun(Run):
    """Training of the model.

    `init` is the workdir of an earlier stage, or a checkpoint, to start from; if empty, params are
    random. `model` overrides fields of the preset. `image_tokenizer` is the workdir of a VQRun or another
    folder with an image tokenizer; the run's workdir gets a copy. `text_tokenizer` is a tokenizer.json or
    its folder; if empty, the one of `init` is taken. These three paths are relative to the run's workdir,
    or absolute. Without `init` and `text_tokenizer` a text tokenizer of `text_vocab` ids is trained on
    the texts of a sample of the run's own rows.

    `mixture` shares the rows of a batch among the tasks. `data` names the sources of each task,
    `held_out` the sources of the evaluation; their paths are below `data_root` (itself relative to the
    workdir, or absolute). Every `eval_every` steps `eval_rows` held-out rows are scored, and `samples`
    generations of each kind are saved, with answers decoded in blocks of `answer_block` tokens; 0 is
    never.

    With `lora` only adapters of that rank are trained, beside the weights of the model in `init`, which
    stay as they are and are held in `base_dtype`. The workdir then holds the adapters alone.
    """

    preset: str = "digits"
    init: str = ""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    base_dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    model: Annotated[dict[str, Any], FieldsOf(transformer.ModelConfig)] = dataclasses.field(
        default_factory=dict
    )
    image_tokenizer: str = ""
    text_tokenizer: str = ""
    image_size: Annotated[int, Range(0, 65536)] = 0  # pixels of a side; the scans of digits have their own
    text_vocab: Annotated[int, Range(0, 10_000_000)] = 0
    max_text: Annotated[int, Range(1, 1_000_000)] = 256
    cond_dropout: Share = 0.1
    cut_long: bool = False
    think_prompt: str = records.THINK_PROMPT
    think_draw_prompt: str = records.THINK_DRAW_PROMPT
    mixture: dict[str, Count] = dataclasses.field(default_factory=dict)
    data_root: str = ""
    data: dict[str, dict[str, sources.SourceConfig]] = dataclasses.field(default_factory=dict)
    held_out: dict[str, dict[str, sources.SourceConfig]] = dataclasses.field(default_factory=dict)
    data_may_change: bool = False  # whether a resumed run may have other data than before
    eval_every: Count = 0
    eval_rows: Annotated[Positive, OnlyWith("eval_every")] = 64
    samples: Annotated[Count, OnlyWith("eval_every")] = 8
    answer_block: Positive = 32
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    loss_chunk: Positive | None = None  # positions of a device that have logits at a time
    accumulate: Positive = 1  # parts that a batch goes through the model in, one after the other


def parse(config: Mapping[str, Any]) -> VQRun | ModelRun:
    """A config mapping -> the frozen configuration of its program."""
    kinds = {"vq": VQRun, "model": ModelRun}
    name = config.get("program")
    if name not in kinds:
        raise ValueError(f"config.program is {name!r}; it must be one of {', '.join(kinds)}")
    return config_lib.from_dict(kinds[name], config)


def same_in_all(run: Any, workdir: storage.Path) -> dict[str, Any]:
    """What must be the same in all processes of a run when it begins."""
    return {
        "config": config_lib.to_dict(run),
        "workdir": str(workdir.absolute()),
        "newest step": newest_step(workdir).name if has_step(workdir) else None,
        "devices": jax.local_device_count(),
        "kind of device": jax.local_devices()[0].device_kind,
    }


def check_rows(run: VQRun | ModelRun, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if the rows of a batch can't be spread over the devices."""
    shards = sharding.row_parts(mesh)
    sizes = {"batch_size": run.accumulate if isinstance(run, ModelRun) else 1}
    if isinstance(run, ModelRun) and run.eval_every:
        sizes["eval_rows"] = 1
    for name, parts in sizes.items():
        size, unit = getattr(run, name), shards * parts
        if size % unit:
            accumulated = f" times the {parts} parts of `accumulate`" if parts > 1 else ""
            raise ValueError(
                f"{name} {size} is not divisible by the {shards} data shards{accumulated} of "
                f"mesh {dict(mesh.shape)}; the next that is: {-(-size // unit) * unit}"
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What follows from a ModelRun and the folders that it names: tokenizers, ids, architectures, the
    shape of an image."""

    tokenizer: TextTokenizer | None  # None only where `foresee` assumes LLaDA's
    vocab: Vocab
    model: transformer.ModelConfig
    vq: vq.VQConfig
    grid: tuple[int, int]  # rows and columns of image tokens
    max_text: int
    start: ModelFolder | None = None
    adapter: Mapping[str, Any] | None = None  # what model.json says of adapters that are trained

    @property
    def shape(self) -> Shape:
        """The shape of a row."""
        down, (i, j) = self.vq.downsampling, self.grid
        return Shape(self.max_text, i * j, (i * down, j * down, self.vq.pixel_channels))


def plan(
    run: ModelRun, workdir: storage.Path, vq_config: vq.VQConfig | None = None, start: bool = False
) -> Plan:
    """Resolves a run of the model, and raises where it can't work: unknown presets, a task mixture
    or a row length that doesn't fit, no image tokenizer. Nothing is computed or written.

    `vq_config` is given where the image tokenizer is yet to be trained. `start` says that a run
    without checkpoints begins: what it starts from is opened, and must fit."""
    for name in ("mixture", "data", "held_out"):
        known = [f"{name}.{task}" for task in layout.TASKS]
        for task in getattr(run, name):
            if task not in layout.TASKS:
                raise ValueError(config_lib.unknown_key(f"{name}.{task}", known))
    rows_per_task(run.mixture, run.batch_size)
    if not run.data:
        raise ValueError(
            "config.data is empty: this configuration describes a step without saying where its rows "
            "come from; mmada aot compiles it, training needs a source for every task"
        )
    vq_config = vq_config or open_image_tokenizer(image_tokenizer_path(run, workdir), weights=False).config
    grid = grid_of(run, vq_config)
    begin = open_start(relative(run.init, workdir)) if start and run.init else None
    tokenizer = _text_tokenizer(run, workdir, begin)
    vocab = tokenizer.vocab(vq_config.codebook_size, begin and begin.config.vocab)
    model = model_of(run, vocab, grid)
    if begin:
        _check_same(begin.config, model, relative(run.init, workdir))
    if not run.lora.rank:
        return Plan(tokenizer, vocab, model, vq_config, grid, run.max_text, begin)
    lora.check(model, run.lora)
    if not begin:
        raise ValueError(
            f"lora.rank is {run.lora.rank} and config.init is empty; adapters stand beside the weights of "
            "a model: name it there"
        )
    adapter = describe_adapter(run.lora, begin, workdir)
    return Plan(tokenizer, vocab, model, vq_config, grid, run.max_text, begin, adapter)


def held_base(config: transformer.ModelConfig, base_dtype: str) -> transformer.ModelConfig:
    """The architecture of the frozen base of adapters: its matrices in 8 bits, if `base_dtype` says so."""
    return dataclasses.replace(config, weights="int8" if base_dtype == "int8" else "plain")


def describe_adapter(of: LoraConfig, base: ModelFolder, workdir: storage.Path) -> dict[str, Any]:
    """What the model.json of a workdir says of its adapters. Raises ValueError if those that are there
    belong to another base."""
    sha256 = lazy.sha256(base.tensors())
    if has_step(workdir):
        adapters.check_base(sha256, read_json(workdir / MODEL, dict)["adapter"], base.path)
    return adapters.describe(of, base.path, sha256, storage.resolved(workdir))


def foresee(run: ModelRun, workdir: storage.Path) -> Plan:
    """The plan of a run whose files needn't be there, to compile its steps.

    Tokenizers, and the model to start from, are read if they are there. If they aren't, the preset
    "llada-8b" means the published ones: LLaDA's vocabulary and MAGVIT-v2. For any other preset missing
    files are an error, as in `plan`."""
    published = run.preset == "llada-8b"
    folder, init = image_tokenizer_path(run, workdir), relative(run.init, workdir)
    if not run.image_tokenizer:
        codec = vq.PRESETS["digits"]  # mmada train trains it
    elif published and not folder.exists():
        codec = vq.PRESETS["magvitv2"]
    else:
        codec = open_image_tokenizer(folder, weights=False).config
    begin, tokenizer, vocab = None, None, LLADA
    if run.init and (init.exists() or not published):
        begin = open_start(init, weights=False)
    texts = run.text_tokenizer and relative(run.text_tokenizer, workdir).exists()
    if begin or texts or not published:
        tokenizer = _text_tokenizer(run, workdir, begin)
        vocab = tokenizer.vocab(codec.codebook_size, begin and begin.config.vocab)
    grid = grid_of(run, codec)
    model = model_of(run, vocab, grid)
    if begin:
        _check_same(begin.config, model, init)
    return Plan(tokenizer, vocab, model, codec, grid, run.max_text, begin)


def grid_of(run: ModelRun | VQRun, vq_config: vq.VQConfig) -> tuple[int, int]:
    """Rows and columns of image tokens."""
    down = vq_config.downsampling
    I, J = (run.image_size, run.image_size) if run.image_size else (digits.HEIGHT, digits.WIDTH)
    if I % down or J % down:
        raise ValueError(
            f"image_size {run.image_size} isn't a multiple of the image tokenizer's {down} pixels; "
            f"choose {run.image_size - run.image_size % down or down}"
        )
    return I // down, J // down


def _text_tokenizer(run: ModelRun, workdir: storage.Path, start: ModelFolder | None) -> TextTokenizer:
    saved = workdir / "tokenizer.json"
    if has_step(workdir):
        return TextTokenizer.load(saved)
    if run.text_tokenizer:
        path = relative(run.text_tokenizer, workdir)
        return TextTokenizer.load(path / "tokenizer.json" if path.is_dir() else path)
    if start:
        return TextTokenizer.load(start.path / "tokenizer.json", start.controls)
    if run.text_vocab:
        tasks = [task for task, weight in run.mixture.items() if weight]
        opened = open_sources(
            run.data, tasks, str(relative(run.data_root, workdir)) if run.data_root else ""
        )
        texts = sample_texts(run.data, opened, run.think_prompt, run.think_draw_prompt)
        return TextTokenizer.train(texts, run.text_vocab)
    raise ValueError(
        "there is no text tokenizer: config.init is empty, and so are config.text_tokenizer and "
        "config.text_vocab; name a tokenizer.json, or a checkpoint to start from"
    )


def open_start(path: storage.Path, weights: bool = True) -> ModelFolder:
    """Opens and verifies a model to start from; without `weights` only its description.

    Raises FileNotFoundError or ValueError if `path` holds no model, or one that isn't ours."""
    try:
        source = open_folder(path, weights=weights)
        ours = source.kind != "Hugging Face folder" and not source.is_image_tokenizer
    except FileNotFoundError:
        if has_step(path) or (path / "config.json").is_file():
            raise
        ours = False
    if not ours:
        raise FileNotFoundError(
            f"config.init: {path} is no workdir of a model and no checkpoint of one; a Hugging Face folder "
            "becomes one by mmada convert from-torch"
        )
    return source


def _check_same(old: transformer.ModelConfig, new: transformer.ModelConfig, path: storage.Path) -> None:
    shapes = [jax.tree.map(lambda x: x.shape, transformer.param_shapes(c)) for c in (old, new)]
    fields = [f for f in ("rope_theta", "norm_eps") if getattr(old, f) != getattr(new, f)]
    if shapes[0] != shapes[1] or fields:
        fields += [
            f.name
            for f in dataclasses.fields(old)
            if f.name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_mlp", "vocab")
            and getattr(old, f.name) != getattr(new, f.name)
        ]
        what = ", ".join(f"{f} {getattr(old, f)!r} there and {getattr(new, f)!r} here" for f in fields)
        raise ValueError(f"config.init: {path} holds another model ({what}); change preset or model")


def model_of(run: ModelRun, vocab: Vocab, grid: tuple[int, int]) -> transformer.ModelConfig:
    """The architecture of a run: its preset, with the run's own values, for its vocabulary.

    Raises ValueError if rows with an image of `grid` tokens are longer than it takes.
    """
    preset = dataclasses.asdict(preset_of(transformer.PRESETS, run.preset))
    values = preset | dict(run.model) | {"vocab": vocab.rows}
    model = config_lib.from_dict(transformer.ModelConfig, values, "model.")
    rows = RowShape(run.max_text, grid[0] * grid[1])
    if rows.length > model.max_len:
        raise ValueError(
            f"rows have {rows.length} tokens (max_text {run.max_text} + {rows.n_image} of the image + 3), "
            f"the model takes {model.max_len}; lower max_text or raise model.max_len"
        )
    return model


def relative(path: str, workdir: storage.Name) -> storage.Path:
    """A path of a configuration: relative to the run's workdir, or absolute."""
    return storage.resolved(storage.join(workdir, path))


def image_tokenizer_path(run: ModelRun, workdir: storage.Name) -> storage.Path:
    """The folder of a run's image tokenizer. A run that goes on has it in its workdir, a new run has it
    where the configuration says, and there it needn't exist yet."""
    kept = storage.resolved(workdir) / IMAGE_TOKENIZER
    return kept if has_step(workdir) and kept.is_dir() else relative(run.image_tokenizer, workdir)


def describe(run: VQRun | ModelRun, what: Plan | vq.VQConfig) -> dict[str, Any]:
    """The model.json of a run's workdir; `what` is as `check_run` gives it."""
    if isinstance(what, vq.VQConfig):
        return describe_image_tokenizer(what)
    formats = {source.format for of_task in run.data.values() for source in of_task.values()}
    # What is asked about a picture by default is a question that training has asked.
    generation = {"question": records.INSTRUCTIONS[0]} if run.data.get("mmu") else {}
    generation = digits.GENERATION if "digits" in formats else generation
    about = describe_model(what.model, what.vocab, what.grid, run.max_text, generation)
    return about | ({"adapter": dict(what.adapter)} if what.adapter else {})


def describe_older(workdir: storage.Path) -> list[storage.Path]:
    """Writes the model.json of a workdir of a model from before there was one, and a copy of the model's
    image tokenizer into it. Returns the files that were written."""
    values = read_config(workdir) if (workdir / CONFIG).is_file() else {}
    if (workdir / MODEL).is_file():
        return []
    if values.get("program") == "model":
        run = parse(values)
        images = open_image_tokenizer(image_tokenizer_path(run, workdir))
        about = describe(run, plan(run, workdir))
    elif older.describes_rl(values):
        images = image_tokenizer_of(open_folder(workdir, weights=False))
        about = older.describe(workdir, values) | {"image_tokenizer": images and IMAGE_TOKENIZER}
    else:
        return []
    if images:
        keep_image_tokenizer(workdir, images)
    alone = {key: value for key, value in values.items() if key not in older.DESCRIPTION}
    claim_workdir(workdir, alone, model=about)
    return [workdir / MODEL]


def preset_of(presets: Mapping[str, Any], name: str) -> Any:
    """The named preset; an unknown name is an error that lists the known ones."""
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(presets)}")
    return presets[name]
