"""Searches of mmada sweep: spaces, what is drawn and proposed, options that don't fit, the plot."""

import importlib.util
import io
import json
import math
import types

import numpy as np
import pytest
from PIL import Image

from configs import pretrain, vq
from mmada_jax.programs import command
from mmada_jax.train import sweep, tables, tune
from mmada_jax.train.sweep import Space as s

BASE = {"program": "vq", "steps": 9, "batch_size": 8, "seed": 0, "optim": {"lr": 0.1, "name": "muon"}}
SPACE = {
    "optim.lr": s.log_uniform(1e-4, 1e-1),
    "optim.floor": s.uniform(0.0, 0.5),
    "batch_size": s.integer(4, 9),
    "optim.name": s.choice(["muon", "adamw"]),
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        f"from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({BASE!r})\n"
        "def get_space(s): return {'optim.lr': s.log_uniform(1e-4, 1e-1), 'seed': s.choice([1, 2])}\n"
        "def get_hyper(h): return h.sweep('seed', [1, 2])\n"
    )
    return path


def call(config, *flags):
    """What `mmada sweep` prints and how it ends."""
    words = ["sweep", "--config", str(config), "--workdir", str(config.parent / "sweep"), *flags]
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert not (config.parent / "sweep").exists()
    return ended.value.code


def trials(tmp_path, outcomes):
    """Trials with (overrides, status, rows)."""
    planned = sweep.plan(BASE, [overrides for overrides, *_ in outcomes], tmp_path, ["x"], {})
    for trial, (_, status, rows) in zip(planned, outcomes, strict=True):
        trial.note(status)
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in rows]
        (trial.folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return planned


# ---- Spaces --------------------------------------------------------------------------------------


def test_what_is_drawn_fits_and_is_spread():
    drawn = sweep.draw_sweep(SPACE, 300, seed=0)
    lr, floor, size, name = ([settings[key] for settings in drawn] for key in SPACE)
    assert 1e-4 <= min(lr) < 2e-4 and 5e-2 < max(lr) <= 1e-1
    assert abs(np.mean(np.log10(lr)) + 2.5) < 0.15
    assert 0 <= min(floor) < 0.02 and 0.48 < max(floor) <= 0.5
    assert set(size) == {4, 5, 6, 7, 8, 9} and all(type(value) is int for value in size)
    assert set(name) == {"muon", "adamw"}
    assert all(len(f"{value:g}".replace(".", "").lstrip("0")) <= 8 for value in lr)  # folders are named so


def test_more_trials_begin_with_the_same_and_seeds_differ():
    assert sweep.draw_sweep(SPACE, 9, seed=1)[:4] == sweep.draw_sweep(SPACE, 4, seed=1)
    assert sweep.draw_sweep(SPACE, 4, seed=1) != sweep.draw_sweep(SPACE, 4, seed=2)
    small = {"seed": s.integer(1, 3), "optim.name": s.choice(["muon", "adamw"])}
    assert len({tuple(settings.values()) for settings in sweep.draw_sweep(small, 6, seed=0)}) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: s.uniform(1, 1), r"uniform\(1, 1\): the ends must be finite, and the first the lower"),
        (lambda: s.log_uniform(0, 1), r"log_uniform\(0, 1\): the ends must be above 0, finite"),
        (lambda: s.integer(1, 2.5), r"integer\(1, 2.5\): the ends must be integers, finite"),
        (lambda: s.uniform(0, math.nan), "the ends must be finite"),
        (lambda: s.choice([]), r"choice\(\[\]\): it needs values"),
        (lambda: s.choice([1, 1]), "each of them once"),
    ],
)
def test_what_is_no_domain(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("space", "count", "message"),
    [
        ({"optim.rl": s.uniform(0, 1)}, 1, r"unknown config key 'optim.rl'; did you mean 'optim.lr'\?"),
        ({"steps": s.integer(0, 5)}, 1, r"get_space \(steps=0\): steps is 0; it must be at least 1"),
        (
            {"optim.name": s.choice(["muon", "adamv"])},
            1,
            r"get_space \(optim.name=adamv\): .*must be one of",
        ),
        ({"batch_size": s.integer(1, 5)}, 1, "leave out --config.batch_size"),
        (
            {"seed": s.integer(1, 2), "optim.name": s.choice(["muon", "adamw"])},
            5,
            "only 4 different settings",
        ),
    ],
)
def test_a_space_is_checked_before_anything_runs(space, count, message):
    if (
        message is None
    ):  # 1 and 5 fit; what is drawn between doesn't, and is found when the trials are planned
        drawn = sweep.draw_sweep(space, 2, 0)
        with pytest.raises(ValueError, match="must be of type int"):
            sweep.plan(BASE, drawn, None, [], {})
        return
    with pytest.raises(ValueError, match=message):
        sweep.check_space(BASE, space, {"batch_size": 8}, count)


def test_what_only_lies_between_the_ends_is_found_when_trials_are_planned(tmp_path):
    space = {"steps": s.uniform(1, 5)}
    sweep.check_space(BASE, space, {}, 2)
    with pytest.raises(ValueError, match="must be of type int"):
        sweep.plan(BASE, sweep.draw_sweep(space, 2, 0), tmp_path, [], {})


@pytest.mark.parametrize("config", [pretrain, vq])
def test_the_spaces_of_the_configs_fit_them(config, tmp_path):
    space = config.get_space(s)
    for arg in ("digits", "digits,smoke", "digits,full", "digits,fast"):
        values = config.get_config(arg).to_dict()
        sweep.check_space(values, space, {}, 5)
        assert len(sweep.plan(values, sweep.draw_sweep(space, 5, 0), tmp_path, ["x"], {})) == 5


@pytest.mark.parametrize(
    "source", ["", "def get_space(s): return {}", "def get_space(s): return {'seed': 1}"]
)
def test_files_without_a_space(source, tmp_path):
    (tmp_path / "config.py").write_text(source)
    with pytest.raises(ValueError, match=r"has no get_space|must be a dict from config keys"):
        sweep.get_space(str(tmp_path / "config.py"))


def test_settings_are_read_back_as_they_were(tmp_path):
    space = {"optim.lr": s.choice([1, 0.5]), "batch_size": s.integer(4, 9), "optim.floor": s.uniform(0, 1)}
    drawn = sweep.draw_sweep(space, 5, seed=3)
    planned = trials(tmp_path, [(settings, "running", []) for settings in drawn])
    (tmp_path / "trial-005-x").mkdir()  # a sweep was killed before it wrote what it is
    read = sweep.begun(tmp_path, space)
    assert [trial.folder for trial in sweep.plan(BASE, read, tmp_path, ["x"], {})] == [
        trial.folder for trial in planned
    ]
    assert not (tmp_path / "trial-005-x").exists()
    with pytest.raises(
        ValueError, match=r"trial-000-.* holds a trial outside of get_space \(.* isn't from"
    ):
        sweep.begun(tmp_path, space | {"batch_size": s.integer(20, 30)})
    planned[1].folder.rename(tmp_path / "else")
    with pytest.raises(ValueError, match="lacks trial-001; put it back"):
        sweep.begun(tmp_path, space)


# ---- Optuna --------------------------------------------------------------------------------------


def test_proposals_depend_on_seed_number_and_results_alone(tmp_path):
    pytest.importorskip("optuna")
    outcomes = []
    for n in range(14):
        known = trials(tmp_path / str(n), outcomes)
        settings = tune.propose(SPACE, known, "loss", seed=0)
        assert settings == tune.propose(SPACE, known, "loss", seed=0)
        assert list(settings) == list(SPACE)
        loss = abs(math.log10(settings["optim.lr"]) + 3)
        kinds = [("done", [(9, loss)]), ("stopped early", [(3, None)]), ("failed", []), ("running", [])]
        outcomes.append((settings, *kinds[0 if n < 10 or n % 2 else n // 2 % 4]))
    # The first ten are random, and later ones near the best.
    assert np.std([math.log10(of["optim.lr"]) for of, *_ in outcomes[:10]]) > 0.5
    known = trials(tmp_path / "all", outcomes)
    nearer = [tune.propose(SPACE, known, "loss", seed=seed)["optim.lr"] for seed in range(8)]
    further = [tune.propose(SPACE, known, "-loss", seed=seed)["optim.lr"] for seed in range(8)]
    assert np.mean([abs(math.log10(lr) + 3) for lr in nearer]) < np.mean(
        [abs(math.log10(lr) + 3) for lr in further]
    )
    assert tune.propose(SPACE, known, "loss", seed=1) != tune.propose(SPACE, known, "loss", seed=2)


def test_no_settings_are_proposed_twice(tmp_path):
    pytest.importorskip("optuna")
    space, outcomes = {"seed": s.integer(1, 3), "optim.name": s.choice(["muon", "adamw"])}, []
    for n in range(6):
        known = trials(tmp_path / str(n), outcomes)
        outcomes.append((tune.propose(space, known, "loss", seed=5), "done", [(9, n)]))
    assert len({tuple(settings.values()) for settings, *_ in outcomes}) == 6


# ---- Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--search=random",), "--search random needs --trials N"),
        (("--trials=2",), "--trials is for --search"),
        (("--search=random", "--trials=2", "--seed=-1"), "--seed is -1; it must be at least 0"),
        (("--search=optuna", "--trials=2", "--commands"), "choose --search random"),
        (("--stop=asha",), "--stop is for Ray; add --engine ray"),
        (("--resources=CPU=1",), "--resources is for Ray"),
        (("--grace=2",), "--grace is for --stop asha"),
    ],
)
def test_options_that_mean_nothing(config, flags, message):
    assert message in call(config, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stop=asha", "--grace=10"), "--grace is 10; it must be from 1 to the 9 steps of a trial"),
        (("--stop=asha", "--reduction=1"), "--reduction is 1.0; it must be above 1"),
        (("--resources=CPU=0",), "--resources has 'CPU=0'; write kinds and counts above 0"),
        (("--resources=4",), "--resources has '4'"),
    ],
)
def test_options_of_ray_are_checked_before_it_starts(config, flags, message, monkeypatch):
    monkeypatch.setattr(tune, "require", lambda **libraries: None)
    assert message in call(config, "--engine=ray", *flags)


def test_without_the_extra_one_line_says_what_to_install(config, monkeypatch):
    found = importlib.util.find_spec
    gone = ("ray", "optuna")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in gone else found(name, *a)
    )
    install = ": pip install 'mmada_jax[cluster]'"
    assert call(config, "--engine=ray") == f"error: --engine ray needs Ray{install}"
    assert call(config, "--search=optuna", "--trials=2") == f"error: --search optuna needs Optuna{install}"


def test_random_trials_are_listed(config, capsys):
    words = ["sweep", "--config", str(config), "--workdir", str(config.parent / "sweep")]
    command.main([*words, "--search=random", "--trials=3", "--commands", "--seed=4"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(
        "--config.optim.lr=" in line and "--config.seed=" in line for line in lines
    )


def test_what_a_trial_gets(monkeypatch):
    ray = pytest.importorskip("ray")
    hosts = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 4.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: hosts)
    assert tune.share({}, True, 2) == {"CPU": 4, "GPU": 1}
    assert tune.share({}, True, 4) == {"CPU": 2, "GPU": 0.5}
    assert tune.share({}, False, 4) == {"CPU": 8, "GPU": 2}
    asked = tune.parse_resources("CPU=3, GPU=0.5")
    assert tune.share(asked, True, 2) == {"CPU": 3, "GPU": 0.5}
    with pytest.raises(
        ValueError, match="a trial gets 9 CPU by --resources; the largest host has 8; lower it"
    ):
        tune.share({"CPU": 9}, True, 1)


# ---- The plot ------------------------------------------------------------------------------------


def test_the_plot_has_what_there_is(tmp_path):
    lines = [
        ({"optim.lr": 0.001, "optim.name": "muon"}, "done", [(1, 3.0), (9, 1.0)]),
        ({"optim.lr": 0.05, "optim.name": "adamw"}, "stopped early", [(1, 4.0), (3, None)]),
        ({"optim.lr": 0.1, "optim.name": "muon"}, "waiting", []),
    ]
    planned = trials(tmp_path, lines)
    assert tables.plot(tmp_path, planned, "loss") == ""
    with Image.open(io.BytesIO((tmp_path / "results.png").read_bytes())) as image:
        assert image.width > 600 and image.height > 600
    (tmp_path / "results.png").unlink()
    assert "no trial has a finite 'los' yet" in tables.plot(tmp_path, planned, "los")
    assert not (tmp_path / "results.png").exists()


def test_one_line_says_why_there_is_no_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(tables.importlib, "util", types.SimpleNamespace(find_spec=lambda name: None))
    assert (
        tables.plot(tmp_path, [], "loss") == "results.png needs matplotlib: pip install 'mmada_jax[digits]'"
    )


@pytest.mark.parametrize(
    ("column", "heights", "labels"),
    [
        ([1, 3, 2], [0, 1, 0.5], ["1", "2", "3"]),
        ([0.001, 0.1, 0.01], [0, 1, 0.5], ["0.001", "0.01", "0.1"]),
        (["a", "b", "a"], [0, 1, 0], ["a", "b"]),
        ([True, False], [0, 1], ["True", "False"]),
        ([5.0, 5.0], [0.5, 0.5], ["5"]),
        ([0, 0.01, 0.02, 1], [0, 0.01, 0.02, 1], ["0", "1"]),
        (list(range(101)), [n / 100 for n in range(101)], ["0", "25", "50", "75", "100"]),
    ],
)
def test_a_scale_spreads_values_and_its_labels_dont_cover_each_other(column, heights, labels):
    places, ticks = tables.scale(column)
    np.testing.assert_allclose(places, heights, atol=1e-9)
    assert [label for _, label in ticks] == labels
