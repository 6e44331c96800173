"""ml_collections.ConfigDict -> frozen dataclasses, once, at the door; and the config argument.

A config file lists its keys; a dataclass holds the types and the defaults. Whatever doesn't fit is
one error that names the key and the nearest known one, before anything is computed.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Builds the dataclass `cls` from a mapping (a ConfigDict or a plain dict), recursively.

    Raises ValueError for an unknown key (naming the nearest), a missing one, or a value of another
    type. An int is taken where a float is asked for, a list where a tuple is.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ValueError(unknown_key(f"{path}{key}", [f"{path}{name}" for name in fields]))
    missing = [
        f"{path}{f.name}"
        for f in fields.values()
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"config lacks {', '.join(missing)}")
    return cls(**{key: _convert(hints[key], value, f"{path}{key}") for key, value in values.items()})


def unknown_key(key: str, known: list[str]) -> str:
    """The error text for a key that nothing knows: names the nearest one and lists all."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown config key {key!r}{hint} Known: {', '.join(sorted(known))}"


def to_dict(config: Any) -> dict[str, Any]:
    """A frozen config dataclass -> plain JSON-able dict, the inverse of `from_dict`."""
    return dataclasses.asdict(config)


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """Reads the part after the colon of `--config FILE:ARG`.

    ARG is a comma-separated list: `key=value` sets a key, a bare word sets `preset` if it is one of
    `presets` and otherwise must name a boolean. `parse_arg("digits,smoke", presets=("digits",
    "8b"), preset="digits", smoke=False, phase=1)` -> {"preset": "digits", "smoke": True, "phase": 1}.
    """
    presets = defaults.pop("presets", ())
    out = dict(defaults)
    for part in filter(None, (p.strip() for p in (arg or "").split(","))):
        key, sep, text = part.partition("=")
        if not sep and key in presets:
            out["preset"] = key
        elif key not in defaults or (not sep and not isinstance(defaults[key], bool)):
            known = [*presets, *defaults]
            raise ValueError(unknown_key(part, known).replace("config key", "config argument"))
        elif not sep:
            out[key] = True
        else:
            out[key] = _convert(type(defaults[key]), _literal(text), key)
    return out


def parse_flags(argv: list[str]) -> list[str]:
    """`app.run`'s flags_parser for programs with a --config: what is wrong with it is one line."""
    from absl import flags

    try:
        return flags.FLAGS(argv)
    except flags.Error as error:  # what a config file raises is the end of a long text
        sys.exit("error: " + str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: "))
    except (AttributeError, KeyError) as error:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        sys.exit("error: unknown config key {}".format(str(error.args[0]).replace("\n", ". ")))


def _literal(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:  # plain all the way down: it goes into JSON
        return (
            {k: _convert(Any, v, f"{path}.{k}") for k, v in value.items()}
            if hasattr(value, "items")
            else value
        )
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kind = next(a for a in args if a is not type(None))
        return _convert(kind, value, path)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{path} is {value!r}; it must be one of {', '.join(map(repr, args))}")
        return value
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not hasattr(value, "items"):  # a ConfigDict is no Mapping
            raise ValueError(f"{path} is {value!r}; it must be a group of keys")
        return from_dict(kind, value, path + ".")
    if origin is tuple or kind is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{path} is {value!r}; it must be a list")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict or kind is dict:
        if not hasattr(value, "items"):  # a ConfigDict is no Mapping
            raise ValueError(f"{path} is {value!r}; it must be a group of keys")
        return {k: _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path} is {value!r}; it must be of type {kind.__name__}")
    return value
