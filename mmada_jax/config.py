"""Configurations: config files, their argument, overrides, and the frozen dataclasses that result.

The dataclasses hold the types, the ranges and the defaults of all fields. A config file lists the values
that differ from the defaults. A value that doesn't fit is an error before anything is computed. The error
names the whole path, the value and the nearest known key.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import os
import pathlib
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Annotated, Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from mmada_jax.ranges import FieldsOf, hints, problems

T = TypeVar("T")


class TypedText(str):
    """A value as it was typed on the command line. `from_dict` reads the value as the type of its field."""

    __slots__ = ()


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Builds the dataclass `cls` from a mapping (a ConfigDict or a plain dict), recursively.

    An int is accepted for a float, and a list is accepted for a tuple. Raises ValueError for an unknown key
    (the error names the nearest known key), a missing key, a value of another type, or a number out of its
    range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            known = [f"{path}{name}" for name in fields]
            raise ValueError(unknown_key(f"{path}{key}", known, _paths(cls, path), _first_leaf(value)))
    missing = [
        f"{path}{f.name}"
        for f in fields.values()
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"config lacks {', '.join(missing)}")
    kinds = hints(cls)
    read = {key: _convert(kinds[key], value, f"{path}{key}") for key, value in values.items()}
    try:
        return cls(**read)
    except ValueError as error:  # of fields that don't fit each other
        raise ValueError(f"{path.rstrip('.')}: {error}" if path else str(error)) from error


def unknown_key(key: str, known: list[str], deeper: Iterable[str] = (), below: str = "") -> str:
    """The error text for an unknown key. The text names the nearest key and lists all known keys.

    The nearest key is one of `known`, or a key of the same name among the keys `deeper`. `below` is the
    rest of the path if a value was set in a group of that key.
    """
    whole = f"{key}{below}"
    name = whole.rpartition(".")[2]
    near = [f"{one}{below}" for one in difflib.get_close_matches(key, known, n=1, cutoff=0.5)]
    same = [other for other in deeper if other.rpartition(".")[2] == name]
    nearest = difflib.get_close_matches(whole, same, n=1, cutoff=0) or near
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ";"
    return f"unknown config key {whole!r}{hint} Known: {', '.join(sorted(known))}"


def _first_leaf(value: Any) -> str:
    """The path below a group to the first value in the group. The path is empty if `value` is no group."""
    path = ""
    while hasattr(value, "items") and value:
        key, value = next(iter(value.items()))
        path += f".{key}"
    return path


def _paths(cls: type, path: str) -> Iterator[str]:
    """The paths of all fields below a dataclass, without the keys of dicts, which users choose freely."""
    for name, kind in hints(cls).items():
        yield f"{path}{name}"
        for mark in getattr(kind, "__metadata__", ()):
            if isinstance(mark, FieldsOf):
                yield from (f"{path}{name}.{key}" for key in mark.names)
        if dataclasses.is_dataclass(kind):
            yield from _paths(kind, f"{path}{name}.")


def to_dict(config: Any) -> dict[str, Any]:
    """A frozen config dataclass -> plain JSON-able dict, the inverse of `from_dict`."""
    return dataclasses.asdict(config)


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """Reads the part after the colon of `--config FILE:ARG`.

    ARG is a list of words with commas between them. `key=value` sets a key. A bare word sets `preset` if it
    is one of `presets`, and `form` if it is one of `forms`. Any other bare word must name a boolean.
    `parse_arg("digits,smoke", presets=("digits", "8b"), preset="digits", forms=("fast", "smoke"), form="",
    phase=1)` -> {"preset": "digits", "form": "smoke", "phase": 1}. Raises ValueError for two forms.
    """
    presets, forms = defaults.pop("presets", ()), defaults.pop("forms", ())
    out = dict(defaults)
    for part in filter(None, (p.strip() for p in (arg or "").split(","))):
        key, sep, text = part.partition("=")
        if not sep and key in presets:
            out["preset"] = key
        elif not sep and key in forms:
            if out["form"] not in (defaults["form"], key):
                raise ValueError(f"config argument {arg!r} names {out['form']} and {key}; choose one")
            out["form"] = key
        elif key not in defaults or key == "form" or (not sep and not isinstance(defaults[key], bool)):
            known = [*presets, *forms, *defaults]
            raise ValueError(unknown_key(part, known).replace("config key", "config argument"))
        elif not sep:
            out[key] = True
        else:
            out[key] = _convert(type(defaults[key]), _literal(text), key)
    return out


def load_config(source: str, overrides: Mapping[str, str] = types.MappingProxyType({})) -> ConfigDict:
    """The ConfigDict that `source` describes: get_config() of FILE, or get_config(ARG) for FILE:ARG.

    Each of `overrides` becomes a TypedText at its key. The file needn't list the key or its groups. Raises
    ValueError or OSError if the file describes no configuration.
    """
    path, colon, arg = source.partition(":")
    make = getattr(load_module(path), "get_config", None)
    if make is None:
        raise ValueError(f"{path} has no get_config(arg); see configs/pretrain.py for one")
    args = [arg] if colon else []
    try:
        inspect.signature(make).bind(*args)
    except TypeError:
        takes = f"no argument; leave out :{arg}" if colon else f"an argument; name it as {path}:ARG"
        raise ValueError(f"get_config of {path} takes {takes}") from None
    config = make(*args)
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config of {path} returns {config!r}; it must be a ConfigDict")
    override(config, overrides)
    return config


def override(config: ConfigDict, overrides: Mapping[str, str]) -> None:
    """Puts a TypedText at each key of `overrides` into a ConfigDict."""
    with config.unlocked(), config.ignore_type():
        for key, text in overrides.items():
            set_key(config, key, TypedText(text))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags of a user's own program, which uses absl's flags. The flag `config` is made by
    ml_collections' DEFINE_config_file. As in mmada, any field of the configuration can be overridden.

    Returns the arguments that are no flags."""
    from absl import flags

    rest, overrides = split_overrides(argv)
    sys.argv = rest  # ml_collections looks for overrides there, and knows only the fields that are listed
    rest = flags.FLAGS(rest)
    override(flags.FLAGS["config"].value, overrides)
    return rest


def load_module(path: str) -> types.ModuleType:
    """Runs a Python file and returns its module. Raises FileNotFoundError if there is no such file, and
    ValueError if its name doesn't end in .py."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no config file {path!r}; name one like configs/pretrain.py")
    if not path.endswith(".py"):
        raise ValueError(f"{path} is no Python file; a config file is one like configs/pretrain.py")
    # Python's import takes old bytecode for a file that was changed within a second and kept its length.
    module = types.ModuleType("config_file")
    module.__file__ = path
    exec(compile(pathlib.Path(path).read_bytes(), path, "exec"), module.__dict__)
    return module


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Splits arguments into other arguments and overrides of the configuration (key -> text).

    Overrides are written like absl's flags. They begin with one or two dashes. The value stands behind = or
    is the next argument. An override without a value is true, and the prefix `no` makes it false.
    """
    rest, overrides, i = [], {}, 0
    while i < len(argv):
        arg = argv[i]
        i += 1
        if arg == "--":
            return [*rest, *argv[i - 1 :]], overrides
        name, equals, text = arg.lstrip("-").partition("=")
        if not arg.startswith("-") or not name.startswith(("config.", "noconfig.")):
            rest.append(arg)
            continue
        key = name.partition(".")[2]
        if name.startswith("no"):
            text = "false"
        elif not equals:
            text = "true"
            if i < len(argv) and not argv[i].startswith("-"):
                text = argv[i]
                i += 1
        overrides.pop(key, None)  # the last override of a key counts, at the place where it stands
        overrides[key] = text
    return rest, overrides


def set_key(config: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Sets the value at `key`, a path with dots, in nested dicts or a ConfigDict. Makes missing groups."""
    *groups, name = key.split(".")
    if not all((*groups, name)):
        raise ValueError(f"{key!r} is no config key; name one like optim.lr")
    for i, group in enumerate(groups):
        if isinstance(config.get(group), TypedText) and isinstance(_literal(config[group]), dict):
            config[group] = _literal(config[group])
        if config.get(group) is None:
            config[group] = {}
        config = config[group]
        if not hasattr(config, "items"):
            place = ".".join(groups[: i + 1])
            raise ValueError(f"unknown config key {key!r}; {place} is no group of keys")
    config[name] = value


def _literal(text: str) -> Any:
    """The value that a text spells in Python, or the text if it spells none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return str(text)


def _read(kind: Any, text: TypedText) -> Any:
    """The typed text as a value of the type `kind`. Another value means that the text doesn't spell one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is str:
        return str(text)
    if origin is typing.Literal:
        return next((value for value in args if str(value) == text), str(text))
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        return words.get(text.lower(), str(text))
    value = _literal(text)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is tuple or origin is tuple:
        if isinstance(value, str):
            return tuple(part.strip() for part in text.split(",") if part.strip())
        return value if isinstance(value, tuple | list) else (value,)
    return value


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if hasattr(value, "items") and not _is_group(kind):
        raise ValueError(f"unknown config key {path + _first_leaf(value)!r}; {path} is no group of keys")
    if origin is Annotated:
        fields = next((mark for mark in args[1:] if isinstance(mark, FieldsOf)), None)
        converted = _convert_fields(fields, value, path) if fields else _convert(args[0], value, path)
        for problem in problems(kind, converted, path):
            raise ValueError(problem)
        return converted
    if origin in (typing.Union, types.UnionType):
        none = value is None or (isinstance(value, TypedText) and value.lower() in ("none", "null"))
        if none and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if isinstance(value, TypedText):
        value = _read(kind, value)
    if isinstance(value, np.generic):
        value = value.item()
    if kind is Any:  # JSON needs plain values at every depth
        return (
            {k: _convert(Any, v, f"{path}.{k}") for k, v in value.items()}
            if hasattr(value, "items")
            else value
        )
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{path} is {value!r}; it must be one of {', '.join(map(repr, args))}")
        return value
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, _group(value, path), path + ".")
    if origin is tuple or kind is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{path} is {value!r}; it must be a list")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict or kind is dict:
        return {k: _convert(args[1], v, f"{path}.{k}") for k, v in _group(value, path).items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= sys.float_info.max else math.inf if value > 0 else -math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path} is {value!r}; it must be of type {kind.__name__}")
    return value


def _is_group(kind: Any) -> bool:
    """Whether a field of this type may hold keys."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Annotated, typing.Union, types.UnionType):
        return any(_is_group(arg) for arg in (args[:1] if origin is Annotated else args))
    return dict in (kind, origin) or kind is Any or dataclasses.is_dataclass(kind)


def _convert_fields(fields: FieldsOf, value: Any, path: str) -> dict[str, Any]:
    """Values of some fields of a dataclass, by the names of the fields."""
    value = _group(_literal(value) if isinstance(value, TypedText) else value, path)
    for key in value:
        if key not in fields.names:
            known = [f"{path}.{name}" for name in fields.names]
            text = unknown_key(f"{path}.{key}", known, below=_first_leaf(value[key]))
            raise ValueError(f"{text} ({fields.why})" if fields.why else text)
    kinds = hints(fields.of)
    return {key: _convert(kinds[key], v, f"{path}.{key}") for key, v in value.items()}


def _group(value: Any, path: str) -> Mapping[str, Any]:
    if not hasattr(value, "items"):  # a ConfigDict is no Mapping
        raise ValueError(f"{path} is {value!r}; it must be a group of keys")
    return value
