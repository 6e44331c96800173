"""(path, its range, its base, how one lies in a field) of all numbers in a field of this type."""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import types
import typing
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from ml_collections import ConfigDict

import mmada_jax
from mmada_jax import config
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.ranges import FieldsOf, OnlyWith, Range, Ranged, hints, without_effect
from mmada_jax.train import runs
from mmada_jax.train.rl.run import RLRun


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 4
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = Inner()
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    path: str | None = None
    fast: bool = False
    extra: Any = None


FULL = {
    "steps": 3,
    "inner": {"width": 8, "rate": 1},
    "kind": "b",
    "sizes": [5, 6, 7],
    "weights": {"x": 2},
    "path": "here",
    "fast": True,
    "extra": [1, "two"],
}


@pytest.mark.parametrize("wrap", [dict, ConfigDict])
def test_every_kind_of_field_is_read(wrap):
    read = config.from_dict(Outer, wrap(FULL))
    expected = Outer(3, Inner(8, 1.0), "b", (5, 6, 7), {"x": 2.0}, "here", True, read.extra)
    assert read == expected
    assert list(read.extra) == [1, "two"]
    assert isinstance(read.inner.rate, float) and isinstance(read.weights["x"], float)


def test_numbers_of_numpy_are_plain_ones():
    typed = {"steps": np.int64(3), "seed": np.uint8(2), "optim": {"lr": np.float32(0.5)}}
    read = config.from_dict(runs.ModelRun, {"program": "model", "batch_size": np.int16(1), **typed})
    assert (read.steps, read.seed, read.optim.lr) == (3, 2, 0.5)
    json.dumps(config.to_dict(read))


def test_there_and_back_through_json():
    read = config.from_dict(Outer, FULL)
    assert config.from_dict(Outer, json.loads(json.dumps(config.to_dict(read)))) == read


def test_what_may_be_anything_is_plain():
    @dataclasses.dataclass(frozen=True)
    class Free:
        settings: dict[str, Any]

    made = config.from_dict(Free, ConfigDict({"settings": {"a": {"b": {"c": 1}}}}))
    assert json.loads(json.dumps(made.settings)) == {"a": {"b": {"c": 1}}}


def test_defaults_are_those_of_the_dataclass():
    assert config.from_dict(Outer, {"steps": 1}) == Outer(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, "unknown config key 'stepz'; did you mean 'steps'"),
        ({"inner": {"widht": 1}}, "'inner.widht'; did you mean 'inner.width'"),
        ({"qqqqqqqq": 1}, "'qqqqqqqq'; Known: extra, fast"),
        ({"steps": 1.5}, "steps is 1.5; it must be of type int"),
        ({"steps": True}, "steps is True; it must be of type int"),
        ({"steps": None}, "steps is None"),
        ({"fast": 1}, "fast is 1; it must be of type bool"),
        ({"inner": {"rate": "1"}}, "inner.rate is '1'; it must be of type float"),
        ({"inner": {"rate": True}}, "inner.rate is True"),
        ({"inner": 3}, "inner is 3; it must be a group of keys"),
        ({"kind": "c"}, "kind is 'c'; it must be one of 'a', 'b'"),
        ({"sizes": 3}, "sizes is 3; it must be a list"),
        ({"sizes": [1, "2"]}, r"sizes\[1\] is '2'"),
        ({"weights": {"x": "y"}}, "weights.x is 'y'"),
        ({"path": 3}, "path is 3; it must be of type str"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        config.from_dict(Outer, FULL | change)


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match="config lacks steps"):
        config.from_dict(Outer, {"fast": True})


def parse(arg):
    return config.parse_arg(
        arg, presets=("digits", "8b"), preset="digits", forms=("full", "fast"), form="", smoke=False,
        phase=1, rate=0.5, name="n",
    )  # fmt: skip


def test_config_arguments():
    plain = {"preset": "digits", "form": "", "smoke": False, "phase": 1, "rate": 0.5, "name": "n"}
    assert parse(None) == parse("") == plain
    assert parse("8b, smoke") == plain | {"preset": "8b", "smoke": True}
    assert parse("phase=3,rate=1,name=x") == plain | {"phase": 3, "rate": 1.0, "name": "x"}
    assert parse("smoke=true") == plain | {"smoke": True}
    assert parse("smoke,smoke=false") == plain
    assert parse("digits,fast") == parse("fast,fast") == plain | {"form": "fast"}


@pytest.mark.parametrize(
    "arg", ["phase", "smok", "8b=1", "presets=8b", "phase=x", "smoke=3", "fas", "form=fast"]
)
def test_wrong_arguments_are_errors(arg):
    with pytest.raises(ValueError, match=arg.split("=")[0]):
        parse(arg)


def test_one_form_excludes_another():
    with pytest.raises(ValueError, match="argument 'full,fast' names full and fast; choose one"):
        parse("full,fast")


def test_a_misspelt_argument_names_the_nearest():
    with pytest.raises(ValueError, match="unknown config argument 'smok'; did you mean 'smoke'"):
        parse("smok")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_rows": 0}, "eval_rows is 0; it must be at least 1"),
        ({"eval_every": -1}, "eval_every is -1; it must be at least 0 and at most 100,000,000"),
        ({"max_skipped": 1.5}, "max_skipped is 1.5; it must be a share"),
    ],
)
def test_numbers_that_a_run_can_not_mean(values, message):
    with pytest.raises(ValueError, match=message):
        runs.parse({"program": "model", "steps": 1, "batch_size": 1} | values)


# ---- Ranges ----------------------------------------------------------------------------------------

NEEDED = {
    "train.runs.Run": {"program": "model", "steps": 1, "batch_size": 1},
    "train.own.OwnRun": {"program": "own", "data": "x"},
    "train.runs.VQRun": {"program": "vq", "steps": 1, "batch_size": 1},
    "train.runs.ModelRun": {"program": "model", "steps": 1, "batch_size": 1},
    "train.rl.prompts.PromptsConfig": {"path": "x"},
    "train.rl.run.Task": {
        "layout": "t2i",
        "data": {"path": "x"},
        "rewards": {"digit": 1.0},
        "groups": 2,
    },
    "nets.clip.Tower": {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_mlp": 8},
}
NEEDED["train.rl.run.RLRun"] = {
    "program": "rl", "init": "x", "iterations": 1, "tasks": {"drawing": NEEDED["train.rl.run.Task"]},
}  # fmt: skip
NEEDED["nets.clip.ClipConfig"] = {
    "vision": NEEDED["nets.clip.Tower"], "text": NEEDED["nets.clip.Tower"], "d_features": 8,
    "image_size": 8, "patch": 4, "vocab": 9, "max_text": 7, "eos": None,
}  # fmt: skip
ODD = (float("nan"), float("inf"), -float("inf"), -1, -1.0, 0, 0.0, 1e30, 10**9, 2**60, "1", True, [1])


# What some modules stand on, and isn't installed everywhere.
EXTRAS = ("fastapi", "gradio", "lm_eval", "lmms_eval", "prometheus_client", "starlette")


def all_dataclasses():
    found = {}
    for module in pkgutil.walk_packages(mmada_jax.__path__, "mmada_jax."):
        if "modeling" not in module.name:
            try:
                members = vars(importlib.import_module(module.name))
            except ModuleNotFoundError as error:
                if error.name not in EXTRAS:
                    raise
                continue
            for name, cls in members.items():
                if inspect.isclass(cls) and dataclasses.is_dataclass(cls):
                    full = f"{cls.__module__}.{cls.__name__}"
                    if full.startswith("mmada_jax.") and name == cls.__name__:
                        found[full.removeprefix("mmada_jax.")] = cls
    return found


ALL = all_dataclasses()


def numbers_of(kind, name):
    """(path, its range, its base, how one lies in a field) of all numbers in a field of this type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in (int, float):
        yield name, None, kind, lambda value: value
    elif origin is Annotated:
        for mark in args[1:]:
            if isinstance(mark, FieldsOf):
                for key in mark.names:
                    for path, limits, base, wrap in numbers_of(hints(mark.of)[key], f"{name}.{key}"):
                        yield path, limits, base, lambda value, key=key, wrap=wrap: {key: wrap(value)}
        limits = next((mark for mark in args[1:] if isinstance(mark, Range)), None)
        for path, inner, base, wrap in numbers_of(args[0], name):
            yield path, limits or inner, base, wrap
    elif origin in (typing.Union, types.UnionType):
        for arg in args:
            yield from numbers_of(arg, name)
    elif origin is tuple:
        for path, limits, base, wrap in numbers_of(args[0], f"{name}[0]"):
            yield path, limits, base, lambda value, wrap=wrap: (wrap(value),)
    elif origin is dict:
        for path, limits, base, wrap in numbers_of(args[1], f"{name}.x"):
            yield path, limits, base, lambda value, wrap=wrap: {"x": wrap(value)}


def test_every_number_that_a_configuration_can_reach_has_a_range():
    def below(kind):
        if inspect.isclass(kind) and dataclasses.is_dataclass(kind):
            yield kind
            for inner in hints(kind).values():
                yield from below(inner)
        for arg in typing.get_args(kind):
            yield from below(arg)

    for root in (runs.VQRun, runs.ModelRun, RLRun, TextRule, ImageRule):
        for cls in below(root):
            assert issubclass(cls, Ranged), cls
    for name, cls in ALL.items():
        found = [n for field, kind in hints(cls).items() for n in numbers_of(kind, field)]
        if found and cls.__name__.endswith(("Config", "Rule", "Run")):
            assert issubclass(cls, Ranged) or name == "weights.lazy.Rule", name
        if issubclass(cls, Ranged):
            assert all(limits for _, limits, *_ in found), f"{name} has numbers without ranges: {found}"


@pytest.mark.parametrize("name", [name for name, cls in ALL.items() if issubclass(cls, Ranged)])
def test_odd_numbers_are_refused_by_name(name):
    cls, needed = ALL[name], NEEDED.get(name, {})
    made = config.from_dict(cls, needed)
    tried = 0
    for field, kind in hints(cls).items():
        for path, limits, base, wrap in numbers_of(kind, field):
            for value in ODD:
                number = isinstance(value, int if base is int else (int, float)) and value is not True
                if number and value in limits:
                    continue
                said = rf"{re.escape(path)} is .*; it must be"
                with pytest.raises(ValueError, match="^" + said):
                    dataclasses.replace(made, **{field: wrap(value)})
                with pytest.raises(ValueError, match=rf"^a\.b\.{said}"):
                    config.from_dict(cls, needed | {field: wrap(value)}, "a.b.")
                tried += 1
    assert tried


def test_ranges_say_what_they_take():
    for limits, inside, outside, text in (
        (Range(0, 1), (0, 1, 0.5), (-1e-9, 1.1), "a share from 0 to 1"),
        (Range(0, 1, above=True), (1e-9, 1), (0,), "a share from 0 to 1, not 0"),
        (Range(0, 1, below=True), (0, 0.99), (1,), "a share from 0 to 1, not 1"),
        (Range(1, 1e6, above=True, also=0), (0, 2), (1, 0.5), "more than 1 and at most 1,000,000, or 0"),
        (Range(1, 10**8), (1, 10**8), (0, 10**8 + 1), "at least 1 and at most 100,000,000"),
        (Range(0, 1e12, above=True), (1e12,), (0, 1e13), "positive and at most 1e+12"),
    ):
        assert all(value in limits for value in inside)
        assert not any(value in limits for value in (*outside, float("nan"), float("inf")))
        assert str(limits) == text


def test_what_fields_mean_together_is_named_with_its_path():
    task = NEEDED["train.rl.run.Task"] | {"update_groups": 3}
    with pytest.raises(ValueError, match=r"^tasks\.drawing: groups is 2 and update_groups 3"):
        config.from_dict(RLRun, NEEDED["train.rl.run.RLRun"] | {"tasks": {"drawing": task}})


def test_options_without_effect_are_named():
    values = {"program": "model", "steps": 1, "batch_size": 1, "eval_rows": 8, "optim": {"spike_window": 9}}
    said = list(without_effect(config.from_dict(runs.ModelRun, values)))
    assert said == [
        "optim.spike_window is 9, which has no effect: optim.spike is 0.0, not set",
        "eval_rows is 8, which has no effect: eval_every is 0, not set",
    ]
    values |= {"eval_every": 1, "optim": {"spike_window": 9, "spike": 2.0}}
    assert not list(without_effect(config.from_dict(runs.ModelRun, values)))
    deep = config.from_dict(RLRun, NEEDED["train.rl.run.RLRun"] | {"objective": {"trace_next": 9}})
    assert list(without_effect(deep)) == [
        "objective.trace_next is 9, which has no effect: objective.masking is 'unigrpo', not 'trace'"
    ]
    for name, cls in ALL.items():  # a mark names a field that there is
        for kind in hints(cls).values():
            for mark in getattr(kind, "__metadata__", ()):
                if isinstance(mark, OnlyWith):
                    assert mark.field in hints(cls), name
