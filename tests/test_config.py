import dataclasses
import json
from typing import Any, Literal

import pytest
from ml_collections import ConfigDict

from mmada_jax import config, run


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
        arg, presets=("digits", "8b"), preset="digits", smoke=False, phase=1, rate=0.5, name="n"
    )


def test_config_arguments():
    plain = {"preset": "digits", "smoke": False, "phase": 1, "rate": 0.5, "name": "n"}
    assert parse(None) == parse("") == plain
    assert parse("8b, smoke") == plain | {"preset": "8b", "smoke": True}
    assert parse("phase=3,rate=1,name=x") == plain | {"phase": 3, "rate": 1.0, "name": "x"}
    assert parse("smoke=true") == plain | {"smoke": True}
    assert parse("smoke,smoke=false") == plain


@pytest.mark.parametrize("arg", ["phase", "smok", "8b=1", "presets=8b", "phase=x", "smoke=3"])
def test_wrong_arguments_are_errors(arg):
    with pytest.raises(ValueError, match=arg.split("=")[0]):
        parse(arg)


def test_a_misspelt_argument_names_the_nearest():
    with pytest.raises(ValueError, match="unknown config argument 'smok'; did you mean 'smoke'"):
        parse("smok")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_rows": 0}, "eval_rows is 0; it must be at least 1"),
        ({"eval_every": -1}, "eval_every is -1; it can't be negative"),
        ({"max_skipped": 1.5}, "max_skipped is 1.5; it must be a share"),
    ],
)
def test_numbers_that_a_run_can_not_mean(values, message):
    with pytest.raises(ValueError, match=message):
        run.parse({"program": "model", "steps": 1, "batch_size": 1} | values)
