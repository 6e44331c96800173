"""What a person gives to a model -> lists, token ids and rules, all of it checked before any compute.

Nothing here has a model or knows a task: `model.model` lays out rows of what comes from here.
"""

import dataclasses
import difflib
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from mmada_jax.diffusion.rules import PRESETS, ImageRule, TextRule
from mmada_jax.tokens.layout import RowShape
from mmada_jax.tokens.tokenizer import TextTokenizer, chat
from mmada_jax.tokens.vocab import Vocab

Conversation = Sequence[Mapping[str, str]]
# A question of the user, a conversation, or token ids as they are.
Prompt = str | Conversation | np.ndarray
# One for all rows, or one for each, whose result then doesn't depend on the others.
Seed = int | Sequence[int]
Direction = Literal["left", "right", "up", "down"]
AnyRule = TypeVar("AnyRule", TextRule, ImageRule)


@dataclasses.dataclass(frozen=True)
class Defaults:
    """The rules and numbers for whatever a task isn't given. For a model in a folder its
    generation_config.json has them."""

    text: TextRule = dataclasses.field(default_factory=TextRule)
    image: ImageRule = dataclasses.field(default_factory=ImageRule)
    max_new: int = 512
    question: str = "Please describe this image in detail."

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Defaults":
        """From the fields of a generation_config.json that are known here; others are for other programs.

        Raises ValueError for values that can't be used."""
        given = {key: values.get(key) for key in cls().values()}
        most, question = given["max_new_tokens"], given["question"]
        try:
            text = rule_of(TextRule(), None, {"block": given["block_length"]})
            image = {"steps": given["image_steps"], "guidance": given["image_guidance"]}
            image = rule_of(ImageRule(), None, image)
            most = cls.max_new if most is None else _count(most)
        except ValueError as error:
            raise ValueError(f"generation_config.json: {error}") from error
        question = cls.question if question is None else question
        if not isinstance(question, str):
            raise ValueError(f"generation_config.json: question is {question!r}; it must be a text")
        return cls(text, image, most, question)

    def values(self) -> dict[str, Any]:
        """The fields of a generation_config.json."""
        return {
            "block_length": self.text.block,
            "max_new_tokens": self.max_new,
            "image_steps": self.image.steps,
            "image_guidance": self.image.guidance,
            "question": self.question,
        }


class Given(NamedTuple):
    """Prompts or pictures, and whether one was given by itself, not in a list."""

    items: list[Any]
    one: bool


def prompts(given: Any) -> Given:
    """One prompt, or many: a list of prompts, or ids [B, L]. Raises ValueError if there is none."""
    if isinstance(given, str | bytes | Mapping):
        return Given([given], True)
    if hasattr(given, "__array__"):
        values = np.asarray(given)
        if values.ndim == 0 or (values.dtype.kind in "iu" and values.ndim == 1):
            return Given([values], True)
        return _some(list(values) if values.dtype.kind in "iu" else values.tolist())
    items = _list(given, "prompt")
    if items and all(isinstance(item, Mapping) for item in items):
        return Given([items], True)
    return _some(items)


def pictures(given: Any) -> Given:
    """One picture (see `data.images.to_image`), or many: a list of them, or an array [B, I, J] or
    [B, I, J, C]. Raises ValueError if there is none."""
    if isinstance(given, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return Given([given], True)
    if hasattr(given, "__array__"):
        values = np.asarray(given)
        with_channels = values.ndim == 3 and values.shape[2] <= 4 and values.dtype != bool
        if values.ndim in (0, 2) or with_channels:
            return Given([values], True)
        return _some(list(values))
    return _some(_list(given, "picture"))


def together(**named: Given) -> tuple[list[list[Any]], bool]:
    """Lists of one length, and whether everything was given by itself. What was given by itself is
    repeated as often as the lists are long."""
    lengths = {name: len(given.items) for name, given in named.items() if not given.one}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"numbers differ: {lengths}; give one of each per row")
    n = next(iter(lengths.values()), 1)
    lists = [given.items * n if given.one else given.items for given in named.values()]
    return lists, not lengths


def prompt_ids(prompt: Any, tokenizer: TextTokenizer, vocab: Vocab) -> list[int]:
    """The ids of a question, a conversation, or ids as they are. Raises ValueError for anything else."""
    if hasattr(prompt, "__array__"):
        return _ids(np.asarray(prompt), vocab)
    if isinstance(prompt, str):
        return tokenizer.encode(chat(prompt))
    if (
        not isinstance(prompt, list | tuple)
        or not prompt
        or not all(isinstance(turn, Mapping) for turn in prompt)
    ):
        raise ValueError(
            f"a prompt is {_shown(prompt)}; it must be a text, a list of turns ({{'role', 'content'}}) or "
            "an array of token ids"
        )
    return tokenizer.encode(chat(prompt))


def caption_ids(caption: Any, tokenizer: TextTokenizer, vocab: Vocab) -> list[int]:
    """The ids of a caption, or ids as they are. Raises ValueError for anything else."""
    if hasattr(caption, "__array__"):
        return _ids(np.asarray(caption), vocab)
    if not isinstance(caption, str):
        raise ValueError(f"a caption is {_shown(caption)}; it must be a text or an array of token ids")
    return tokenizer.encode(caption)


def rule_of(default: AnyRule, rule: AnyRule | None, changes: Mapping[str, Any]) -> AnyRule:
    """`rule`, by default `default`, with these fields changed; None changes nothing. `decode` among them
    names a preset (`rules.PRESETS`), whose fields come first.

    Raises ValueError for a rule of another kind, a field that it lacks, a value out of range."""
    rule = default if rule is None else rule
    kind, changes = type(default), dict(changes)
    if (preset := changes.pop("decode", None)) is not None:
        known = PRESETS[default.modality]
        if preset not in known:
            raise ValueError(f"decode is {preset!r}; for {default.modality} it is {' or '.join(known)}")
        changes = known[preset] | {key: x for key, x in changes.items() if x is not None}
    if not isinstance(rule, kind):
        raise ValueError(
            f"the rule is {_shown(rule)}; give {kind.__name__}(...), or its fields by name, as in steps=12"
        )
    known = [field.name for field in dataclasses.fields(kind)]
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{kind.__name__} has no field {name!r}; {meant}")
    return dataclasses.replace(rule, **{key: x for key, x in changes.items() if x is not None})


def counts(max_new: int | Sequence[int], n: int) -> list[int]:
    """New tokens of each of `n` prompts. Raises ValueError unless it is one number, or one for each."""
    if np.ndim(max_new) == 0:
        return [_count(max_new)] * n
    if len(max_new) != n:
        raise ValueError(f"{len(max_new)} values of max_new for {n} prompts; give one, or one for each")
    return [_count(most) for most in max_new]


def image_grid(values: Mapping[str, Any], down: int, size: Any = None) -> tuple[int, int]:
    """Rows and columns of image tokens, each of which stands for `down` x `down` pixels.

    `size` is the image in pixels (rows and columns, or one number for both). Without it the grid is the
    one in `values` of a config.json, and if these don't say, the grid of 512 x 512 pixels."""
    if size is None:
        grid = values.get("image_grid", [512 // down, 512 // down])
        if not (isinstance(grid, list) and len(grid) == 2 and all(type(n) is int and n > 0 for n in grid)):
            raise ValueError(f"image_grid is {grid!r}, it must be rows and columns of tokens")
        return grid[0], grid[1]
    sides = list(size) if isinstance(size, Iterable) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, numbers.Integral) and side > 0 for side in sides):
        raise ValueError(f"image_size is {size!r}; it must be (rows, columns) in pixels")
    if any(side % down for side in sides):
        raise ValueError(f"image_size {size} isn't made of multiples of {down} pixels")
    return int(sides[0]) // down, int(sides[1]) // down


def text_length(values: Mapping[str, Any], given: Any = None) -> int:
    """Tokens of the text slot: the number given, by default the one in `values` of a config.json, else
    512."""
    max_text = values.get("max_text", 512) if given is None else given
    if type(max_text) is not int or max_text < 1:
        raise ValueError(f"max_text is {max_text!r}, it must be a number of tokens")
    return max_text


def check_row(max_text: int, grid: tuple[int, int], down: int, limit: int) -> None:
    """Raises ValueError if rows with an image of `grid` tokens, which stand for `down` x `down` pixels
    each, are longer than the `limit` tokens that a model takes."""
    rows, columns = grid
    length = RowShape(max_text, rows * columns).length
    if length > limit:
        raise ValueError(
            f"rows with an image have {length} tokens: {max_text} of text, "
            f"{rows} x {columns} of an image of {rows * down} x {columns * down} pixels, and 3; the model "
            f"takes {limit}. Load it with the image_size and the max_text that it was trained with "
            "(--image-size, --max-text)"
        )


class Beyond(NamedTuple):
    """How an image is extended beyond an edge. Its tokens are moved by `shift` (rows, columns): the
    tokens next to the edge are kept, and the new half takes the place of the tokens farthest from it,
    which are `hidden`."""

    shift: tuple[int, int]
    hidden_ij: np.ndarray

    def join(self, old_Bij: np.ndarray, drawn_Bij: np.ndarray) -> np.ndarray:
        """One longer image: the tokens that were moved out of the row, and the image that was drawn with
        the other tokens in view."""
        axis = 2 if self.shift[1] else 1
        half = -self.shift[axis - 1]
        rest_Bij = np.split(old_Bij, [half], axis)[half < 0]
        return np.concatenate([rest_Bij, drawn_Bij][:: 1 if half > 0 else -1], axis)


def beyond(direction: Direction, grid: tuple[int, int]) -> Beyond:
    """How images of `grid` (rows and columns) tokens are extended by half. If a side has an odd number of
    tokens, the smaller half is drawn.

    Raises ValueError for an unknown direction, and for a side of one token."""
    known = {"right": (1, -1), "left": (1, 1), "down": (0, -1), "up": (0, 1)}
    if direction not in known:
        raise ValueError(f"unknown direction {direction!r}; known: {', '.join(known)}")
    axis, way = known[direction]
    half = grid[axis] // 2
    if not half:
        raise ValueError(
            f"an image of {grid[0]} x {grid[1]} tokens has no half to extend it {direction} by"
        )
    hidden_ij = np.zeros(grid, bool)
    np.moveaxis(hidden_ij, axis, 0)[slice(half) if way > 0 else slice(-half, None)] = True
    return Beyond((way * half, 0) if axis == 0 else (0, way * half), hidden_ij)


def _ids(values: np.ndarray, vocab: Vocab) -> list[int]:
    if values.ndim != 1 or values.dtype.kind not in "iu" or not values.size:
        raise ValueError(
            f"a prompt of ids has shape {values.shape} of {values.dtype}; it must be one row of integers"
        )
    wrong = values[(values < 0) | (values >= vocab.rows)]
    if wrong.size:
        raise ValueError(
            f"token id {wrong[0]} is outside of the vocabulary, which ends at {vocab.rows - 1}"
        )
    if vocab.mask in values:
        raise ValueError("a prompt of ids holds the mask, which stands for what is to be generated")
    return values.tolist()


def _count(value: Any) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"max_new is {value!r}; it must be a number of tokens, at least 1")
    return int(value)


def _list(given: Any, what: str) -> list[Any]:
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise ValueError(f"{type(given).__name__} is no {what}, and no list of them")
    return list(given)


def _some(items: list[Any]) -> Given:
    if not items:
        raise ValueError("there is nothing to do: give at least one prompt or image")
    return Given(items, False)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
