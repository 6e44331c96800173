"""The numbers that the fields of a dataclass may hold: declared with the types, checked when one is made.

    @dataclasses.dataclass(frozen=True)
    class Config(Ranged):
        lr: Annotated[float, Range(0, 100)] = 5e-5
        warmup: Count = 5000
        model: Annotated[dict[str, Any], FieldsOf(transformer.ModelConfig)] = ...

An upper limit is far beyond all values in use. It makes a slip of the keyboard an error at the start,
instead of a run that never ends. How texts and mappings become dataclasses is in config.py.
"""

import dataclasses
import functools
import numbers
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`. `above` excludes `low`, `below` excludes `high`. `also` is a number
    outside of the range with a meaning of its own. NaN is in no range."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    also: float | None = None

    def __contains__(self, value: float) -> bool:
        low = self.low < value if self.above else self.low <= value
        high = value < self.high if self.below else value <= self.high
        return (low and high) or (self.also is not None and value == self.also)

    def __str__(self) -> str:
        also = "" if self.also is None else f", or {self.also}"
        if (self.low, self.high) == (0, 1):
            return (
                "a share from 0 to 1"
                + (", not 0" if self.above else ", not 1" if self.below else "")
                + also
            )
        low = "positive" if self.above and not self.low else (
            f"more than {_short(self.low)}" if self.above else f"at least {_short(self.low)}")  # fmt: skip
        return f"{low} and {'less than' if self.below else 'at most'} {_short(self.high)}{also}"


@dataclasses.dataclass(frozen=True)
class FieldsOf:
    """Marks a dict whose keys are names of fields of the dataclass `of`. If not all fields are allowed,
    `only` names those that are, and `why` is the reason in errors."""

    of: type
    only: tuple[str, ...] = ()
    why: str = ""

    @property
    def names(self) -> list[str]:
        """The keys that are allowed."""
        return list(self.only or (f.name for f in dataclasses.fields(self.of)))


@dataclasses.dataclass(frozen=True)
class OnlyWith:
    """Marks a field that has an effect only if another `field` has one of these `values`; by default any
    value but 0, None, False or an empty one."""

    field: str
    values: tuple[Any, ...] = ()


# Rows, steps, tokens and the like.
LARGEST = 100_000_000
Positive = Annotated[int, Range(1, LARGEST)]
Count = Annotated[int, Range(0, LARGEST)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0, 1e9)]
Seed = Annotated[int, Range(0, 2**31 - 1)]


class Ranged:
    """A dataclass that checks its numbers when it is made. A subclass with a __post_init__ of its own calls
    this one first."""

    def __post_init__(self):
        for name, kind in hints(type(self)).items():
            for problem in problems(kind, getattr(self, name), name):
                raise ValueError(problem)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields by their names, `Annotated` with its marks included."""
    found = typing.get_type_hints(cls, include_extras=True)
    return {f.name: found[f.name] for f in dataclasses.fields(cls)}


def problems(kind: Any, value: Any, path: str) -> Iterator[str]:
    """A line for each number in `value` that is out of its range or of another type.

    `kind` is the type of the field, `path` its name in the lines. The types of other values aren't
    checked.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        fields = next((m for m in args[1:] if isinstance(m, FieldsOf)), None)
        limits = next((m for m in args[1:] if isinstance(m, Range)), None)
        if fields and isinstance(value, Mapping):
            known = hints(fields.of)
            for key, part in value.items():
                if key in fields.names:
                    yield from problems(known[key], part, f"{path}.{key}")
                else:
                    why = f"; {fields.why}" if fields.why else ""
                    yield f"unknown config key {path}.{key}{why}; known: {', '.join(sorted(fields.names))}"
        elif limits and args[0] in (int, float):
            number = numbers.Integral if args[0] is int else numbers.Real
            if isinstance(value, bool) or not isinstance(value, number):
                yield f"{path} is {value!r}; it must be of type {args[0].__name__}"
            elif value not in limits:
                yield f"{path} is {value!r}; it must be {limits}"
        else:
            yield from problems(args[0], value, path)
    elif origin in (typing.Union, types.UnionType):
        if value is not None or type(None) not in args:
            yield from problems(next(a for a in args if a is not type(None)), value, path)
    elif origin is tuple and isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from problems(args[0], part, f"{path}[{i}]")
    elif origin is dict and isinstance(value, Mapping):
        for key, part in value.items():
            yield from problems(args[1], part, f"{path}.{key}")


def without_effect(config: Any, path: str = "") -> Iterator[str]:
    """A line for every field below `config` that was changed and has no effect (see OnlyWith)."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}{field.name}"
        for mark in getattr(hints(type(config))[field.name], "__metadata__", ()):
            if isinstance(mark, OnlyWith) and value != field.default:
                other = getattr(config, mark.field)
                if other not in mark.values if mark.values else not other:
                    needed = " or ".join(map(repr, mark.values)) or "set"
                    why = f"{path}{mark.field} is {other!r}, not {needed}"
                    yield f"{name} is {value!r}, which has no effect: {why}"
        for where, part in _dataclasses(value, name):
            yield from without_effect(part, f"{where}.")


def warn_without_effect(config: Any) -> None:
    """Prints the lines of `without_effect` on stderr."""
    for line in without_effect(config):
        print(f"warning: {line}", file=sys.stderr, flush=True)


def _dataclasses(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _dataclasses(part, f"{path}.{key}")


def _short(number: float) -> str:
    return f"{int(number):,}" if abs(number) < 1e9 and number == int(number) else f"{number:g}"
