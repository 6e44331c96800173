"""Records made of rows of any format. A row is a mapping from the names of columns to values."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmada_jax import files
from mmada_jax.data.records import LeftOut, Record, without_image_tag
from mmada_jax.data.sources.paths import MAX_IMAGE, below, read_file
from mmada_jax.data.sources.source import SourceConfig

# Role of a turn, and the role that we give it. ShareGPT's data sets name the models that answered.
_ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
_TEXTS, _IMAGES = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")


class Columns(NamedTuple):
    """The possible names of each field in a row. The first name that the row has counts. A row must have
    all names in `asked`."""

    image: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


def choose_columns(config: SourceConfig, known: Sequence[str] | None, where: str, **usual: str) -> Columns:
    """The columns that the config names, or the usual columns. `known` are the columns that all rows
    have, or None if rows may differ."""
    asked = {field: getattr(config, field) for field in ("image", "text", "turns", "short")}
    columns = {field: (name,) for field, name in asked.items() if name}
    asked = tuple(filter(None, asked.values()))
    for field, names in usual.items():
        there = [name for name in names.split() if known is None or name in known]
        columns.setdefault(field, tuple(there if known is None else there[:1]))
    if known is not None:
        check_columns(asked, known, where)
        if not any(columns.values()):
            raise ValueError(f"{where} has none of the usual columns; name one of: {', '.join(known)}")
    return Columns(**columns, asked=asked)


def check_columns(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises ValueError if one of `names` isn't among the `known` names."""
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; it has: {', '.join(known)}")


def make_record(
    key: str, row: Mapping[str, Any], columns: Columns, folder: str = "", image: bytes | None = None
) -> Record:
    """The record of a row. Paths of images are below `folder`. Raises ValueError if the row holds none."""
    check_columns(columns.asked, list(row), "the row")
    fields = {field: _first(row, *getattr(columns, field)) for field in ("text", "turns", "short")}
    if image is None:
        images = (one_of(row.get(name)) for name in columns.image)
        image = _image(next((found for found in images if found is not None), None), folder)
    texts = [fields["text"]] if isinstance(fields["text"], str) else fields["text"] or []
    short = fields["short"] or ""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in [*texts, short]):
        raise ValueError(f"text must be a string or a list of them, not {texts!r:.80} and {short!r:.80}")
    if image is not None:
        texts, short = [without_image_tag(text) for text in texts], without_image_tag(short)
    texts = tuple(text for text in texts if text.strip())
    turns, names_image = _turns(fields["turns"], image is not None)
    if not texts and not turns and (columns.text or columns.turns):
        names = " or ".join(columns.text + columns.turns)
        raise ValueError(f"there is nothing under {names}; the row has: {', '.join(row)}")
    lacks_image = names_image and image is None
    return Record(key, image, texts=texts, turns=turns, short=short, lacks_image=lacks_image)


def one_of(value: Any) -> Any:
    """The image in a list of one image, or None for an empty list. Values that are no lists aren't changed.

    Raises LeftOut for a list of several images, since a record has one image.
    """
    while isinstance(value, list | tuple | np.ndarray) or _is_struct_of_lists(value):
        items = _items(value) if isinstance(value, Mapping) else value
        if len(items) > 1:
            raise LeftOut("several images", f"there is a list of {len(items)} images; a record has one")
        value = items[0] if len(items) else None
    if isinstance(value, Mapping) and not any(value.values()):
        return None
    return None if isinstance(value, str) and not value else value


def _turns(value: Any, has_image: bool) -> tuple[tuple[Mapping[str, str], ...], bool]:
    """The turns as {role, content}, made of {from, value} or {role, content}, without the tags that mark
    the place of an image; and whether there was such a tag."""
    turns, names_image = [], False
    for number, turn in enumerate(_items(value)):
        turn = files.parse_json(turn, f"turn {number}") if isinstance(turn, str) else turn
        turn = turn if isinstance(turn, Mapping) else {}
        role, content = _first(turn, "role", "from"), _first(turn, "content", "value")
        role = role.strip().lower() if isinstance(role, str) else role
        if role not in _ROLES or not isinstance(content, str | list | Mapping):
            raise ValueError(
                f"turn {number} has role {role!r} and content {content!r:.80}; expected one of "
                f"{', '.join(_ROLES)} and a string"
            )
        role = _ROLES[role]
        content = content if isinstance(content, str) else "".join(_parts(number, content))
        # An answer without an image keeps the tags, which may be a part of some markup.
        if has_image or role != "assistant":
            kept = without_image_tag(content)
            names_image |= kept != content
            if role == "system" and content and not kept:
                continue
            content = kept
        turns.append({"role": role, "content": content})
    return tuple(turns), names_image


def _parts(number: int, content: Any) -> Iterable[str]:
    """The texts of a turn whose content is a list of parts, such as {"type": "text", "text": "..."}."""
    for part in _items(content):
        part = {"text": part} if isinstance(part, str) else part
        kind = (part.get("type") or "text") if isinstance(part, Mapping) else None
        if kind in _TEXTS and isinstance(part.get("text"), str):
            yield part["text"]
        elif kind in _IMAGES:
            yield "<image>"
        else:
            raise ValueError(f"turn {number} has a part {part!r:.80}; parts of text and images are known")


def _items(value: Any) -> Sequence:
    """The items of a list. The list may also be JSON in a string, or a dict of lists by name, as Hugging
    Face and TFDS store a Sequence: {"role": [...], "content": [...]}."""
    if isinstance(value, str):
        value = files.parse_json(value, f"the text {value[:40]!r}") if value.strip() else []
    if _is_struct_of_lists(value):
        lists = {name: items for name, items in value.items() if items is not None}
        if len({len(items) for items in lists.values()}) > 1:
            sizes = ", ".join(f"{len(items)} under {name}" for name, items in lists.items())
            raise ValueError(f"lists that belong together have different lengths: {sizes}")
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError(f"expected a list, found {value!r:.80}")
    return value or ()


def _is_struct_of_lists(value: Any) -> bool:
    values = [item for item in value.values() if item is not None] if isinstance(value, Mapping) else []
    return bool(values) and all(isinstance(item, list | tuple) for item in values)


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _image(value: Any, folder: str) -> bytes | None:
    """The bytes of an image file. `value` is these bytes, a path below `folder`, or a dict with either."""
    if isinstance(value, Mapping):
        if not (found := value.get("bytes") or value.get("path")):
            raise ValueError(f"an image is given by {', '.join(map(str, value))}, not by its bytes or path")
        value = found
    if isinstance(value, str):
        return read_file(below(folder, value))
    if value is not None and not (isinstance(value, bytes) and 0 < len(value) <= MAX_IMAGE):
        raise ValueError(f"an image is a path or up to {MAX_IMAGE} bytes, not {type(value).__name__}")
    return value
