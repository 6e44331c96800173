"""Rows of any format -> records: which of their values is what, and what isn't a record."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mmada_jax.data.records import Record
from mmada_jax.data.sources.paths import MAX_IMAGE, below, read_file
from mmada_jax.data.sources.source import Config

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class Columns(NamedTuple):
    """The names under which a row may have each field, the first that is there; `asked` must be there."""

    image: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


def choose(config: Config, known: Sequence[str] | None, where: str, **usual: str) -> Columns:
    """The columns that the config names, else the usual ones; `known` are those that all rows have."""
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
    """Raises ValueError if a name isn't among the known ones."""
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; it has: {', '.join(known)}")


def make_record(
    key: str, row: Mapping[str, Any], columns: Columns, folder: str = "", image: bytes | None = None
) -> Record:
    """A record from a row; paths of images are below `folder`. Raises ValueError for what isn't one."""
    check_columns(columns.asked, list(row), "the row")
    fields = dict.fromkeys(("image", "text", "turns", "short"))
    for field in fields:
        present = (row[name] for name in getattr(columns, field) if row.get(name) is not None)
        fields[field] = next(present, None)
    image = _image(fields["image"], folder) if image is None else image
    texts = [fields["text"]] if isinstance(fields["text"], str) else fields["text"] or []
    short = fields["short"] or ""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in [*texts, short]):
        raise ValueError(f"text must be a string or a list of them, not {texts!r:.80} and {short!r:.80}")
    texts = tuple(text for text in texts if text.strip())
    turns = _turns(fields["turns"] or (), image is not None)
    if not texts and not turns and (columns.text or columns.turns):
        names = " or ".join(columns.text + columns.turns)
        raise ValueError(f"there is nothing under {names}; the row has: {', '.join(row)}")
    return Record(key, image, texts=texts, turns=turns, short=short)


def _turns(value: Any, has_image: bool) -> tuple[Mapping[str, str], ...]:
    """{from, value} or {role, content} -> {role, content}; without the place of the image."""
    turns = []
    for turn in value:
        turn = turn if isinstance(turn, Mapping) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(
                f"turn {len(turns)} has role {role!r} and content {content!r:.80}; expected one of "
                f"{', '.join(_ROLES)} and a string"
            )
        if has_image and _ROLES[role] == "user" and all(t["role"] != "user" for t in turns):
            content = content.replace("<image>\n", "").replace("\n<image>", "")
        turns.append({"role": _ROLES[role], "content": content})
    return tuple(turns)


def _image(value: Any, folder: str) -> bytes | None:
    """An image's file from its bytes, its path below `folder`, or a dict of either."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return read_file(below(folder, value))
    if value is not None and not (isinstance(value, bytes) and 0 < len(value) <= MAX_IMAGE):
        raise ValueError(f"an image is a path or up to {MAX_IMAGE} bytes, not {type(value).__name__}")
    return value
