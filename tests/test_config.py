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
NEEDED["nets.clip.Config"] = {
    "vision": NEEDED["nets.clip.Tower"], "text": NEEDED["nets.clip.Tower"], "d_features": 8,
    "image_size": 8, "patch": 4, "vocab": 9, "max_text": 7, "eos": None,
}  # fmt: skip
ODD = (float("nan"), float("inf"), -float("inf"), -1, -1.0, 0, 0.0, 1e30, 10**9, 2**60, "1", True, [1])


def all_dataclasses():
    found = {}
    for module in pkgutil.walk_packages(mmada_jax.__path__, "mmada_jax."):
        if "modeling" not in module.name:
            for name, cls in vars(importlib.import_module(module.name)).items():
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
        if found and (cls.__name__ == "Config" or cls.__name__.endswith(("Rule", "Run"))):
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


# ---- The command line ------------------------------------------------------------------------------


@pytest.fixture
def command_line(tmp_path):
    """(configuration, arguments) -> the ConfigDict with the overrides, and the arguments that are none."""

    def call(values, *arguments):
        path = tmp_path / "own.py"
        path.write_text(
            f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({values!r})"
        )
        left, overrides = config.split_overrides(list(arguments))
        return config.load_config(str(path), overrides), left

    return call


SHORT = {"program": "model", "steps": 1, "batch_size": 1, "data": {"lm": {"words": {"path": "a.txt"}}}}


def paths_of(cls, path=""):
    """(path, type) of every field below a dataclass, those in dicts under made-up names."""
    for name, kind in hints(cls).items():
        at = f"{path}{name}"
        marks = getattr(kind, "__metadata__", ())
        fields = next((mark for mark in marks if isinstance(mark, FieldsOf)), None)
        if typing.get_origin(kind) is Annotated and typing.get_origin(typing.get_args(kind)[0]) is dict:
            kind = typing.get_args(kind)[0]
        while typing.get_origin(kind) is dict and not fields:
            at, kind = f"{at}.new", typing.get_args(kind)[1]
        if fields:
            yield from ((f"{at}.{key}", hints(fields.of)[key]) for key in fields.names)
        elif dataclasses.is_dataclass(kind):
            yield from paths_of(kind, f"{at}.")
        else:
            yield at, kind


def example(kind, limits=None):
    """(text, value) that a field of this type takes."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        limits = next((mark for mark in args[1:] if isinstance(mark, Range)), None)
        return example(args[0], limits)
    if origin in (typing.Union, types.UnionType):
        return example(next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        return str(args[0]), args[0]
    if origin is tuple:
        text, value = example(args[0])
        return f"({text}, {text})", (value, value)
    if kind is bool:
        return "true", True
    if kind is int:
        return ("2", 2) if 2 in limits else ("1", 1)
    if kind is float:
        return ("0.5", 0.5) if 0.5 in limits else ("2", 2.0)
    return ("7", "7") if kind is str else ("7", 7)


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (runs.ModelRun, SHORT),
        (runs.VQRun, {"program": "vq", "steps": 1, "batch_size": 1}),
        (RLRun, NEEDED["train.rl.run.RLRun"]),
    ],
)
def test_every_field_can_be_typed(cls, base):
    tried = set()
    for path, kind in paths_of(cls):
        if path.startswith("tasks.new."):
            path = path.replace("tasks.new.", "tasks.drawing.")
        text, value = example(kind)
        if path.endswith(("remat", "schedule")):
            text = value = "full" if path.endswith("remat") else "pow2"
        values = ConfigDict(base)
        with values.ignore_type():
            config.set_key(values, path, config.Text(text))
            at = config.from_dict(cls, values)
        for name in path.split("."):
            at = at[name] if isinstance(at, dict) else getattr(at, name)
        assert at == value and type(at) is type(value), path
        tried.add(path.rpartition(".")[2])
    assert {"lr", "fsdp", "seed"} <= tried


def test_what_is_typed_is_read_as_the_field_has_it(command_line):
    value, left = command_line(
        SHORT, "--config.steps=1e2", "other", "--config.think_prompt", "5", "--config.cut_long",
        "--noconfig.data_may_change", "--config.loss_chunk=none", "--config.model={'n_layers': 3}",
        "--config.model.n_heads=2", "--config.data.lm.more.path=b.txt", "--config.data.lm.words.text=7",
        "--config.optim.lr=1", "--config.mixture={'lm': 4}", "--config.optim.lr=2e-3", "--config.init=None",
    )  # fmt: skip
    assert left == ["other"]
    made = runs.parse(value)
    assert (made.steps, made.think_prompt, made.cut_long, made.loss_chunk) == (100, "5", True, None)
    assert made.model == {"n_layers": 3, "n_heads": 2}
    assert made.data["lm"]["more"].path == "b.txt" and made.data["lm"]["words"].text == "7"
    assert (made.optim.lr, made.mixture, made.init) == (0.002, {"lm": 4}, "None")
    assert not made.data_may_change
    assert json.loads(json.dumps(config.to_dict(made))) == config.to_dict(made)
    assert config.from_dict(runs.ModelRun, json.loads(json.dumps(config.to_dict(made)))) == made


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("optim.rl=1", "unknown config key 'optim.rl'; did you mean 'optim.lr'"),
        ("lr=1", "unknown config key 'lr'; did you mean 'optim.lr'"),
        ("optm.lr=1", "unknown config key 'optm.lr'; did you mean 'optim.lr'"),
        ("lss.eps=1", "unknown config key 'lss.eps'; did you mean 'loss.eps'"),
        ("dota.lm.words.path=x", "key 'dota.lm.words.path'; did you mean 'data.lm.words.path'"),
        ("model.n_layer.x=1", "key 'model.n_layer.x'; did you mean 'model.n_layers.x'"),
        ("optim.clip.x=1", "unknown config key 'optim.clip.x'; optim.clip is no group of keys"),
        ("init.path.x=1", "unknown config key 'init.path.x'; init is no group of keys"),
        ("mesh.data.x=1", "unknown config key 'mesh.data.x'; mesh.data is no group of keys"),
        ("optim.lr=1" + "0" * 400, "optim.lr is inf; it must be at least 0"),
        ("n_layers=1", "unknown config key 'n_layers'; did you mean 'model.n_layers'"),
        (
            "data.lm.words.pth=x",
            "unknown config key 'data.lm.words.pth'; did you mean 'data.lm.words.path'",
        ),
        ("model.n_layer=1", "unknown config key 'model.n_layer'; did you mean 'model.n_layers'"),
        ("steps.x=1", "unknown config key 'steps.x'; steps is no group of keys"),
        ("steps=1.5", "steps is 1.5; it must be of type int"),
        ("steps=many", "steps is 'many'; it must be of type int"),
        ("steps=nan", "steps is nan; it must be of type int"),
        ("steps=1e9", "steps is 1000000000; it must be at least 1 and at most 100,000,000"),
        (
            "model.n_layers=1152921504606846976",
            "model.n_layers is 1152921504606846976; it must be at least 1",
        ),
        ("optim.lr=nan", "optim.lr is nan; it must be at least 0"),
        ("optim.lr=-1", "optim.lr is -1.0; it must be at least 0"),
        ("optim.name=sgd", "optim.name is 'sgd'; it must be one of 'adamw', 'muon'"),
        ("cut_long=maybe", "cut_long is 'maybe'; it must be of type bool"),
        ("optim=3", "optim is 3; it must be a group of keys"),
        ("data.lm.words.weight=inf", "data.lm.words.weight is inf"),
        ("optim..lr=1", "'optim..lr' is no config key"),
    ],
)
def test_what_can_not_be_typed_is_one_line_with_its_path(command_line, option, message):
    with pytest.raises((ValueError, SystemExit)) as error:
        runs.parse(command_line(SHORT, f"--config.{option}")[0])
    assert message in str(error.value) and "\n" not in str(error.value)
