"""A run of one's own data: a folder or a file of it is looked at, and what an image tokenizer and a model
need to know follows from what is found.

The result are configurations as `train.runs` has them; nothing here trains, and jax isn't needed.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from mmada_jax import config as config_lib
from mmada_jax import nearby, storage
from mmada_jax.data import images, records, sources
from mmada_jax.data.texts import sample_texts, text_of
from mmada_jax.nets import vq
from mmada_jax.ranges import Count, OnlyWith, Positive, Range, Ranged, Seed, Share
from mmada_jax.tokens.tokenizer import TextTokenizer

# Records that are looked at, and the share of them that a task needs at least. A row of a task is tried
# with one record after the other until one is for it, which must not take long.
LOOKED_AT, LEAST_SHARE = 512, 0.2
# The longer side over the shorter one from which pictures are padded, not cropped.
LONG = 1.3
NAME = "own"  # of the one source
# The shares of the tasks in a batch, where the data is for several.
SHARES = {"t2i": 1, "lm": 1, "lm_chat": 2, "mmu": 2}


class Size(NamedTuple):
    """A model, the longest sides and texts that it is meant for, and how long it is trained."""

    model: Mapping[str, int]
    side: int  # pixels
    max_text: int  # tokens
    text_vocab: int
    steps: int
    image_steps: int  # of the image tokenizer
    lr: float


_TINY = {"d_model": 128, "n_layers": 4, "n_heads": 4, "d_mlp": 384}
_SMALL = {"d_model": 384, "n_layers": 8, "n_heads": 6, "d_mlp": 1024}
_BASE = {"d_model": 768, "n_layers": 12, "n_heads": 12, "d_mlp": 2048}
SIZES = {
    "tiny": Size(_TINY, 32, 128, 512, 5000, 1000, 2.5e-3),
    "small": Size(_SMALL, 64, 256, 4096, 8000, 4000, 1e-3),
    "base": Size(_BASE, 128, 512, 16384, 30000, 15000, 5e-4),
}


@dataclasses.dataclass(frozen=True)
class OwnRun(Ranged):
    """Training on `data`, a folder or a file, which is absolute or below the folder that the program is
    called in; `held_out` likewise, for measures while training. `format` is one of the formats of sources;
    empty, it is told by the files.

    `size` says how large the model is: about 1, 15 or 100 million parameters. Steps, the pixels of a side
    and the ids of the text tokenizer follow from size and data where they are 0. `text_tokenizer` is a
    tokenizer.json; without it one is trained on the texts.
    """

    program: Literal["own"]
    data: str
    held_out: str = ""
    format: Literal["", *sources.FORMATS] = ""
    size: Literal[tuple(SIZES)] = "tiny"
    steps: Count = 0
    image_steps: Count = 0  # of the image tokenizer
    image_size: Annotated[int, Range(0, 512)] = 0
    text_vocab: Annotated[int, Range(0, 10_000_000)] = 0
    text_tokenizer: str = ""
    batch_size: Positive = 32
    seed: Seed = 0
    max_skipped: Share = 0.5  # share of records that may be unreadable
    data_may_change: bool = False  # whether a resumed run may have other data than before
    cache_dir: str = ""  # a folder of this machine that keeps what is read of a bucket
    cache_gib: Annotated[float, Range(0, 1_000_000, above=True), OnlyWith("cache_dir")] = 50.0


class Look(NamedTuple):
    """What records hold: the sides of their pictures (rows, columns), whether all of these are grey, and
    the number of records by what they have."""

    sides: Sequence[tuple[int, int]]
    grey: bool
    counts: Mapping[str, int]  # "caption" and "dialogue" with a picture; "turns" and "text" without
    captions: frozenset[str] = frozenset()  # all different ones

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that such records are for."""
        of = {"caption": ("t2i", "mmu"), "dialogue": ("mmu",), "turns": ("lm_chat",), "text": ("lm",)}
        least = max(1, LEAST_SHARE * sum(self.counts.values()))
        found = {task for what, n in self.counts.items() if n >= least for task in of[what]}
        return tuple(task for task in ("t2i", "lm", "lm_chat", "mmu") if task in found)


def configurations(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None, str]:
    """The configurations of the model and, where the data has pictures, of the image tokenizer; and a line
    that says what was seen and what becomes of it.

    Raises ValueError or OSError for data that can't be opened, and for data without a use."""
    run = config_lib.from_dict(OwnRun, config)
    nearby.use(run.cache_dir, run.cache_gib)
    size, source = SIZES[run.size], source_of(run.data, run.format)
    try:
        opened = sources.open_source(sources.SourceConfig(**source))
    except (ValueError, OSError) as error:
        raise type(error)(f"config.data: {error}") from error
    if sources.codes_of(opened):
        raise ValueError(
            f"config.data: {run.data} has the codes of an image tokenizer, and this run trains its own; "
            "name the pictures themselves, or write a configuration that names both, as configs/pretrain.py"
        )
    seen = look(opened)
    side, codec, image_tokenizer, n_image = 0, "digits", None, 32
    if seen.sides:
        source |= {"resize": resize_of(seen.sides)}
        side = run.image_size or int(min(*np.median(seen.sides, axis=0), size.side))
        codec = "small" if side <= 64 else "medium" if side <= 128 else "magvitv2"
        down = vq.PRESETS[codec].downsampling
        side = side if run.image_size else max(2 * down, side - side % down)
        n_image = (side // down) ** 2
        image_tokenizer = _image_tokenizer(run, size, source, codec, side, seen.grey)
    data = {task: {NAME: source} for task in seen.tasks}
    lengths, tokenizer = _text_lengths(run, size, data, opened)
    # Rows of conversations alone reach over the place of the image too.
    of_slot = {task: n - (n_image + 3) * (task == "lm_chat") for task, n in lengths.items()}
    longest = max((int(n.max()) for n in of_slot.values()), default=16)
    max_text = min(size.max_text, max(16, -(-longest // 8) * 8))
    for task, n in of_slot.items():
        if np.mean(n > max_text) > 0.5:
            raise ValueError(
                f"config.data: most texts of {run.data} are too long for a model of size {run.size}: a "
                f"median of {int(np.median(n))} tokens, it takes {max_text} ({task}); take a larger "
                "config.size, or shorten them"
            )
    too_long = max((float(np.mean(n > max_text)) for n in of_slot.values()), default=0.0)
    model = _model(run, size, data, side, max_text, max_text + n_image + 3)
    model |= {"text_tokenizer": tokenizer} if run.text_tokenizer else {"text_vocab": tokenizer}
    return model, image_tokenizer, _told(run, opened, seen, side, n_image, model, too_long)


def resize_of(sides: Sequence[tuple[int, int]]) -> images.Resize:
    """How pictures of such sides become squares: long ones would lose what lies at their ends."""
    rows, columns = np.median(sides, axis=0) if len(sides) else (1, 1)
    return "pad" if max(rows, columns) > LONG * min(rows, columns) else "crop"


def source_of(path: str, format: str = "", key: str = "config.data") -> dict[str, Any]:
    """The fields of a source of the data at a path; the format is told by the files if it isn't given.
    Errors begin with `key`. Raises FileNotFoundError if there is nothing, ValueError if no format is known
    by such files."""
    if not path:
        raise ValueError(f"{key} is empty; name a folder or a file: --{key}=PATH")
    where = storage.path(path).expanduser().absolute()
    if not where.exists():
        raise FileNotFoundError(f"{key}: {storage.nothing_at(where)}")
    if set("{}") & set(str(where)):
        raise ValueError(f"{key}: {where} has braces, which name several files; rename it")
    source = {"path": shlex.quote(str(where))}
    if format:
        return source | {"format": format}
    if where.is_file():
        kinds = {".jsonl": "jsonl", ".json": "llava", ".parquet": "parquet", ".tar": "webdataset"}
        if where.suffix not in kinds:
            raise ValueError(
                f"{key}: {where} ends with {where.suffix or 'no suffix'!r}; known are "
                f"{', '.join(kinds)}, and folders; or say config.format"
            )
        return source | {"format": kinds[where.suffix]}
    names = sorted(path.name for path in where.iterdir())
    if "metadata.jsonl" in names:  # Hugging Face's folders of images
        path = source_of(str(where / "metadata.jsonl"))["path"]
        return {"path": path, "format": "jsonl", "image": "file_name"}
    if "dataset.json" in names:
        return source | {"format": "arrayrecord"}
    if "features.json" in names:
        return source | {"format": "tfds"}
    for suffix, kind in ((".parquet", "parquet"), (".tar", "webdataset"), (".jsonl", "jsonl")):
        files = [str(where / name) for name in names if name.endswith(suffix)]
        if files:
            return {"path": " ".join(source_of(file, kind)["path"] for file in files), "format": kind}
    return source | {"format": "imagefolder"}


def look(opened: sources.Source) -> Look:
    """What some records of a source hold, at equal distances. Those that can't be read are passed over:
    training counts them. Raises ValueError if none has a use."""
    sides, grey, captions = [], True, set()
    counts, first = dict.fromkeys(("caption", "dialogue", "turns", "text"), 0), None
    for key in _looked_at(opened):
        try:
            record = opened[key]
            key = record.key
            if record.image is not None:
                picture = images.to_image(record.image)
                sides.append(picture.size[::-1])
                grey = grey and _is_grey(picture)
        except ValueError as error:
            first = first or f"record {key!r}: {error}"
            continue
        has_picture = record.image is not None
        if record.turns and not record.lacks_image:
            counts["dialogue" if has_picture else "turns"] += 1
        elif record.texts:
            counts["caption" if has_picture else "text"] += 1
            captions |= {*record.texts} if has_picture else set()
    if not any(counts.values()):
        why = first or "they have no texts"
        raise ValueError(f"config.data: none of the records that were tried can be used; the first: {why}")
    return Look(sides, grey and bool(sides), counts, frozenset(captions))


def _looked_at(opened):
    """The numbers of the records that are looked at, at equal distances."""
    return np.unique(np.linspace(0, len(opened) - 1, LOOKED_AT).astype(int)).tolist()


def _is_grey(picture):
    pixels = np.asarray(picture)
    return bool((pixels == pixels[..., :1]).all())


def _text_lengths(run, size, data, opened):
    """The tokens that texts take in a row, of the records that were looked at, by task; and the tokenizer:
    its path, or the number of ids of the one that will be trained."""
    configs = {task: {NAME: sources.SourceConfig(**of_task[NAME])} for task, of_task in data.items()}
    if run.text_tokenizer:
        path = storage.path(run.text_tokenizer).expanduser().absolute()
        path = path / "tokenizer.json" if path.is_dir() else path
        tokenizer, told = TextTokenizer.load(path), str(path)
    else:
        told = run.text_vocab or size.text_vocab
        opened_of = {task: {NAME: opened} for task in data}
        prompts = records.THINK_PROMPT, records.THINK_DRAW_PROMPT
        tokenizer = TextTokenizer.train(sample_texts(configs, opened_of, *prompts), told)
    found, rng = {}, np.random.default_rng(0)
    asked = [len(tokenizer.encode(text)) for text in records.INSTRUCTIONS]
    for task, of_task in configs.items():
        if task == "lm":  # cut to the length of the rows
            continue
        lengths = []
        for index in _looked_at(opened):
            try:
                record = opened[index]
                text = text_of(task, of_task[NAME], record, rng, "", "")
            except ValueError:
                continue
            # Whichever instruction is drawn for a caption; and the task and the end.
            spare = max(asked) - min(asked) if task == "mmu" and not record.turns else 0
            lengths.append(len(tokenizer.encode(text)) + spare + 2)
        found[task] = np.array(lengths or [0])
    return found, told


def _shared(run):
    names = ("max_skipped", "data_may_change", "cache_dir", "cache_gib")
    return {name: getattr(run, name) for name in names}


def _image_tokenizer(run, size, source, codec, side, grey):
    steps = run.image_steps or size.image_steps
    config = {
        "program": "vq", "preset": codec, "image_size": side, "seed": run.seed, "steps": steps,
        "batch_size": run.batch_size, "save_every": max(1, steps // 4), **_shared(run),
        "data": {NAME: source},
        "optim": {"lr": 3e-3, "warmup": 20, "floor": 0.01, "b2": 0.99, "weight_decay": 0.0},
    }  # fmt: skip
    if grey:
        config["model"] = {"pixel_channels": 1}
    if run.held_out:
        config["held_out"] = {NAME: source | source_of(run.held_out, run.format, "config.held_out")}
        config["eval_every"] = max(1, steps // 4)
    return config


def _model(run, size, data, side, max_text, length):
    steps, layers = run.steps or size.steps, size.model["n_layers"]
    config = {
        "program": "model", "seed": run.seed, "steps": steps, "batch_size": run.batch_size,
        "model": {
            **size.model, "n_kv_heads": size.model["n_heads"], "max_len": -(-length // 64) * 64,
            "unroll": layers if layers <= 4 else 1,
        },
        "image_size": side, "max_text": max_text, **_shared(run),
        "save_every": max(1, steps // 5), "answer_block": 8,
        # What a picture shows is learned slower than drawing it.
        "mixture": {task: SHARES[task] * (task in data) for task in SHARES} | {"r2i": 0},
        "data": data,
        "optim": {"name": "muon", "lr": size.lr, "warmup": 30, "floor": 0.05, "b2": 0.99},
        # An answer has few tokens, a picture many.
        "loss": {"lm": 1.0, "lm_chat": 3.0, "mmu": 3.0, "eps": 0.3},
    }  # fmt: skip
    if run.held_out:
        config["held_out"] = {
            task: {NAME: of_task[NAME] | source_of(run.held_out, run.format, "config.held_out")}
            for task, of_task in data.items()
        }
        config["eval_every"] = max(1, steps // 5)
    return config


def _told(run, opened, seen, side, n_image, model, too_long):
    """What is said at the start."""
    left_out = ", ".join(f"{reason} {n:,}" for reason, n in getattr(opened, "ignored", {}).items())
    line = f"{run.data}: {len(opened):,} records" + (f" (left out: {left_out})" if left_out else "")
    if seen.sides:
        low, high = np.min(seen.sides, axis=0), np.max(seen.sides, axis=0)
        sizes = f"{low[0]}x{low[1]}" + (f" to {high[0]}x{high[1]}" if (low != high).any() else "")
        line += (
            f", {'grey' if seen.grey else 'coloured'} pictures of {sizes} pixels -> {side}x{side} in "
            f"{n_image} codes"
        )
    tasks = ", ".join(seen.tasks)
    texts = f"texts of up to {model['max_text']} tokens"
    texts += f" ({too_long:.0%} are longer)" if too_long else ""
    if len(seen.captions) == 1:
        texts += f", {next(iter(seen.captions))!r} for every picture"
    if not seen.sides:
        texts += "; rows have a place for pictures, so the image tokenizer of the digits stands in"
    return f"{line}; tasks {tasks}; {texts}; {model['steps']:,} steps"
