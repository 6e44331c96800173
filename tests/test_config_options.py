"""Every field of a configuration as an option of a program."""

import dataclasses
import functools
import json
import operator
import os
import subprocess
import sys
import types
import typing
from typing import Annotated, Literal

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from mmada_jax import config
from mmada_jax.ranges import FieldsOf, Range, hints
from mmada_jax.train import runs
from mmada_jax.train.rl.run import RLRun


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
DRAWING = {"layout": "t2i", "data": {"path": "x"}, "rewards": {"digit": 1.0}, "groups": 2}
LEARNS = {"program": "rl", "init": "x", "iterations": 1, "tasks": {"drawing": DRAWING}}


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


# Fields of a text rule that say nothing without another one.
NEEDS = {
    "relax": ("threshold", "0.9"), "leap": ("threshold", "0.9"),
    "verify": ("threshold", "0.9"),
    "window": ("cache", "dual"), "refresh": ("cache", "dual"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (runs.ModelRun, SHORT),
        (runs.VQRun, {"program": "vq", "steps": 1, "batch_size": 1}),
        (RLRun, LEARNS),
    ],
)
def test_every_field_can_be_typed(cls, base):
    tried = set()
    for path, kind in paths_of(cls):
        if path.startswith("tasks.new."):
            path = path.replace("tasks.new.", "tasks.drawing.")
        text, value = example(kind)
        words = {"remat": "full", "schedule": "pow2", "targets": "q_proj+ff_out"}
        if path.endswith(tuple(words)):
            text = value = words[path.split(".")[-1]]
        values = ConfigDict(base)
        with values.ignore_type():
            group, _, name = path.rpartition(".")
            if group.endswith(".text") and name in NEEDS:
                other, other_text = NEEDS[name]
                config.set_key(values, f"{group}.{other}", config.TypedText(other_text))
            config.set_key(values, path, config.TypedText(text))
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


def test_a_program_with_flags_of_its_own_overrides_any_field():
    code = (
        "import sys\nfrom ml_collections import config_flags\nfrom mmada_jax.config import parse_flags\n"
        "config = config_flags.DEFINE_config_file('config', None, '')\n"
        "print(parse_flags(sys.argv)[1:], config.value.data.lm.more.path, config.value.steps)\n"
    )
    argv = [
        "--config",
        "configs/pretrain.py:digits,smoke",
        "--config.data.lm.more.path=x",
        "a",
        "--config.steps=7",
    ]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['a'] x 7\n", done.stderr


def test_a_file_that_is_changed_at_once_is_read_anew(tmp_path):
    path = tmp_path / "config.py"
    for steps in (3, 4):
        path.write_text(f"def get_config(arg):\n    return {{'steps': {steps}}}\n")
        os.utime(path, (0, 0))
        assert config.load_module(str(path)).get_config(None) == {"steps": steps}
    assert [file.name for file in tmp_path.iterdir()] == ["config.py"]


# The forms of each preset. `smoke` changes values of other forms, also back to defaults.
PRESETS = {
    "vq.py:digits": ["digits", "digits,full", "digits,fast", "digits,smoke"],
    "pretrain.py:digits": ["digits", "digits,full", "digits,fast"],
    "pretrain.py:8b": ["8b,phase=1", "8b,phase=2", "8b,phase=3"],
    "cot.py:digits": ["digits", "digits,full", "digits,fast"],
    "cot.py:8b": ["8b,phase=1", "8b,phase=2"],
    "totals.py:short": ["short", "long", "short,smoke"],
    "pages.py:pages": ["pages", "pages,smoke"],
    "unigrpo.py:digits": ["digits", "digits,full", "digits,fast"],
    "unigrpo.py:totals": ["totals"],
    "unigrpo.py:8b": ["8b"],
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_list_nothing_that_is_a_default(preset):
    # A key repeats a default if in no form of the preset it makes a difference.
    listed, needed = set(), set()
    for arg in PRESETS[preset]:
        values = config.load_config(f"{ROOT}/configs/{preset.partition(':')[0]}:{arg}").to_dict()
        parse = functools.partial(config.from_dict, RLRun) if values["program"] == "rl" else runs.parse
        whole = parse(values)
        for path in keys_of(values):
            listed.add(path)
            *groups, key = path.split(".")
            group = functools.reduce(operator.getitem, groups, values)
            value = group.pop(key)
            try:
                if parse(values) != whole:
                    needed.add(path)
            except ValueError:
                needed.add(path)
            group[key] = value
    assert listed == needed, f"{preset} lists defaults: {sorted(listed - needed)}"


def keys_of(values, path=""):
    """The paths of all keys, those of groups too."""
    for key, value in list(values.items()):
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{path}{key}.")
