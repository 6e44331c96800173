"""Prompts for a policy, with the answers that rewards compare its responses with.

digits          `path` says which: text_cot (`3+1+4+8`), vqa_sum (two scans and `add them`), t2i_one (`a
                handwritten seven`)
totals          `count` long sums of the `path`'s numbers of rounds (data/totals.py), as `1` or `1-3`; the
                answer is the last total
jsonl           one object in a line: "prompt", "answer", and for image understanding "image", a file
                beside the JSON lines or in a folder there. <image> in a prompt is removed: the picture
                comes first.
reasoning_gym   `count` problems of the task `path` of the package reasoning-gym, drawn by `seed` with the
                task's own `settings`. The reward reasoning_gym judges them.

Nothing here is tokenised or scored.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from mmada_jax import files, nearby, storage
from mmada_jax.data import digits, images, totals
from mmada_jax.data.records import without_image_tag
from mmada_jax.data.sources.paths import below, read_file
from mmada_jax.data.sources.rows import one_of
from mmada_jax.ranges import Range, Ranged, Seed
from mmada_jax.tokens.tokenizer import split_thought
from mmada_jax.train.rl.rewards.functions import ReasoningGym

DIGITS = ("text_cot", "vqa_sum", "t2i_one")


@dataclasses.dataclass(frozen=True)
class PromptsConfig(Ranged):
    """The source of prompts. `path` is a file (jsonl), the name of a task (reasoning_gym), numbers of
    rounds (totals, as in its data) or a kind of question about the digits in `split`: train, validation or
    test, and for text_cot also prompts, which are sums that no explained example contains. Of totals and
    of reasoning-gym there are `count` prompts."""

    path: str
    format: Literal["digits", "jsonl", "reasoning_gym", "totals"] = "jsonl"
    split: str = "train"
    count: Annotated[int, Range(1, 10_000_000)] = 1000
    seed: Seed = 0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


class Prompt(NamedTuple):
    """A question, its answer (for reasoning-gym the entry of the problem), and the image that it is about:
    pixels [I, J, C], an image or the path of a file."""

    text: str
    answer: str | Mapping[str, Any]
    image: np.ndarray | Image.Image | storage.Path | None = None


def open_prompts(config: PromptsConfig, root: storage.Name = "") -> Sequence[Prompt]:
    """All prompts of a source. A relative path is below `root`.

    Raises FileNotFoundError or ValueError, naming the line, where a prompt, an answer or an image is
    missing.
    """
    if config.format == "digits":
        return _of_digits(config)
    if config.format == "totals":
        records = totals.open_records(config.path, config.split)
        turns = [records[i].turns for i in range(min(config.count, len(records)))]
        return [Prompt(ask["content"], split_thought(says["content"])[1]) for ask, says in turns]
    if config.format == "reasoning_gym":
        task = ReasoningGym(config.path, config.seed, config.settings)
        problems = [task.problem(i) for i in range(config.count)]
        task.close()
        return [Prompt(question, entry) for question, _, entry in problems]
    path = storage.join(root, config.path)
    if not path.exists():
        raise FileNotFoundError(f"no prompts at {path}; name a file with a JSON object a line")
    prompts = []
    # Only a line feed ends a line of JSON; splitlines() would also split at U+2028 within a text.
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        if line.strip():
            row = files.parse_json(line, f"{path}, line {number}", dict)
            with _named(f"{path}, line {number}"):
                prompts.append((number, _of_row(row, path.parent)))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    lines = {str(prompt.image): number for number, prompt in reversed(prompts) if prompt.image is not None}

    def check(name: str) -> None:
        with _named(f"{path}, line {lines[name]}"):
            _check_image(storage.path(name))

    nearby.each(check, reversed(lines))
    return [prompt for _, prompt in prompts]


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Errors begin with the place of a prompt."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place}: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def _of_row(row: Mapping[str, Any], folder: storage.Path) -> Prompt:
    """The prompt of one line, its image below `folder`. Raises ValueError or OSError where it isn't one."""
    for name in ("prompt", "answer"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{name!r} is {value!r:.80}; every row needs a prompt and an answer that are texts with "
                "something in them"
            )
    text = without_image_tag(row["prompt"])
    if not text:
        raise ValueError("'prompt' asks nothing but <image>; every row needs a text")
    name = one_of(row.get("image") or row.get("images"))
    if name is None:
        return Prompt(text, row["answer"])
    if not isinstance(name, str):
        raise ValueError(f"'image' is {name!r:.80}; name a file")
    return Prompt(text, row["answer"], storage.path(below(str(folder), name)))


def _check_image(image: storage.Path) -> None:
    """Raises ValueError or OSError for a file that isn't there or whose header says that it is no image."""
    missing = f"it names the image {image}, which isn't there"
    if not storage.in_bucket(image) and not image.is_file():
        known = f"it names the image {image}, which is no regular file"
        raise FileNotFoundError(known if image.exists() else missing)
    try:
        data = load_image(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(missing) from error
    try:
        images.check_image(data)
    except ValueError as error:
        raise ValueError(f"{image}: {error}" if isinstance(data, bytes) else str(error)) from error


def load_image(path: storage.Path) -> storage.Path | bytes:
    """A file of this machine, or the bytes of an object, which come from its copy here if it is kept."""
    return read_file(str(path)) if storage.in_bucket(path) else path


def _of_digits(config: PromptsConfig) -> list[Prompt]:
    if config.path == "text_cot":
        chains = digits.chains(config.split)
        return [Prompt(digits.addition(*chain), str(sum(chain))) for chain in chains]
    if config.path == "t2i_one":
        digits.load(config.split)  # raises ValueError if there is no such split
        return [Prompt(digits.caption(digit), str(digit)) for digit in range(10)]
    if config.path == "vqa_sum":
        scans = digits.load(config.split)
        pairs = np.random.default_rng(3).integers(len(scans.labels), size=(4096, 2))
        return [
            Prompt(digits.ASK_SUM, str(scans.labels[pair].sum()), digits.canvas(*scans.pixels[pair]))
            for pair in pairs
        ]
    raise ValueError(f"unknown prompts {config.path!r} about digits; known: {', '.join(DIGITS)}")
