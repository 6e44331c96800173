"""The command `mmada`: help, words that mean nothing, endings; what all programs share."""

import importlib
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import typing

import pytest

from launch import bench
from mmada_jax.programs import command, convert, prepare, process
from mmada_jax.programs.command import PROGRAMS

ROOT = pathlib.Path(__file__).parent.parent
OURS = [name for name, (module, _) in PROGRAMS.items() if module.startswith("mmada_jax.")]


def mmada(*words, **settings):
    """The command in a process of its own."""
    call = [sys.executable, "-m", "mmada_jax.programs.command", *map(str, words)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, **settings)


def test_help_lists_all_programs(capsys):
    command.main(["--help"])
    shown = capsys.readouterr().out
    for name, (module, what) in PROGRAMS.items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", shown, re.M)
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert "\ndef main(argv" in path.read_text(), path


def test_help_imports_nothing_that_takes_time():
    # What a program computes with is imported when it computes.
    modules_of = {name: module for name, (module, _) in PROGRAMS.items() if name != "bench"}
    modules_of |= {f"bench {name}": f"launch.benchmarks.{name}" for name in bench.BENCHMARKS}
    calls = [words.split() for words in modules_of]
    code = f"""
import contextlib, io, json, sys
from mmada_jax.programs import command
before = set(sys.modules)
ended = {{}}
for words in {calls!r}:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            command.main([*words, "--help"])
        except SystemExit as exit:
            ended[" ".join(words)] = exit.code, shown.getvalue()
print(json.dumps([ended, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ended, modules = json.loads(run.stdout)
    heavy = {"absl", "flax", "grain", "jax", "ml_collections", "numpy", "optax", "orbax", "PIL", "sklearn"}
    assert not (loaded := heavy & set(modules)), loaded
    assert set(ended) == set(modules_of)
    for name, (code, shown) in ended.items():
        doc = importlib.import_module(modules_of[name]).__doc__
        assert code == 0
        assert shown.startswith(f"usage: mmada {name} ")
        assert doc.splitlines()[0] in shown


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "error: unknown program 'trian'; did you mean 'train'? Known: "),
        (["xyz"], "error: unknown program 'xyz'; Known: "),
        (
            ["train", "--confg=x"],
            "error: unknown option --confg; did you mean --config? (mmada train --help)",
        ),
        (["convert", "inspect", "--scr", "x"], "error: unknown option --scr; did you mean --src?"),
        (["prepare", "--format", "zip"], "error: argument --format: invalid choice: 'zip'"),
        (["train", "--workdir", "x"], "error: the following arguments are required: --config"),
        (["sample"], "error: the following arguments are required: "),
    ],
)
def test_what_means_nothing_is_one_line(words, line, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(words)
    printed = capsys.readouterr()
    assert exit.value.code == 2
    assert printed.err.startswith(line) and printed.err.count("\n") == 1
    assert not printed.out


def test_a_value_may_begin_with_a_dash():
    parser = process.Parser()
    parser.add_argument("--metric")
    parser.add_argument("-m", "--many", nargs="+")
    parser.add_argument("--yes", action="store_true")
    read = parser.parse_args(["--yes", "--metric", "-loss", "-m", "a", "b"])
    assert (read.metric, read.many, read.yes) == ("-loss", ["a", "b"], True)
    assert parser.parse_args(["--metric=-loss"]).metric == "-loss"
    assert parser.parse_args(["--metric", "x", "-m", "a"]).metric == "x"


def test_no_program_is_no_success(capsys):
    with pytest.raises(SystemExit) as exit:
        command.main([])
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: mmada PROGRAM")


CONFIG = (
    "from ml_collections import ConfigDict\ndef get_config({}): return ConfigDict({{'program': 'vq'}})\n"
)


@pytest.mark.parametrize(
    ("text", "named", "message"),
    [
        (None, "", "there is no config file "),
        ("", "", " has no get_config(arg); "),
        ("def get_config(): return 3", "", " returns 3; it must be a ConfigDict"),
        (CONFIG.format(""), ":x", " takes no argument; leave out :x"),
        (CONFIG.format("arg"), "", " takes an argument; name it as "),
    ],
)
def test_files_that_describe_nothing(text, named, message, tmp_path, monkeypatch):
    path = tmp_path / "own.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as exit:
        command.main(["train", "--config", f"{path}{named}", "--workdir", str(tmp_path / "run")])
    assert str(exit.value).startswith("error: ") and message in str(exit.value)
    assert "\n" not in str(exit.value)


def test_options_know_what_the_library_knows():
    from launch import quickstart, quickstart_stages
    from mmada_jax.data import digits, images, sources
    from mmada_jax.nets.transformer import PRESETS
    from mmada_jax.train.aot import RL
    from mmada_jax.train.rl.unigrpo import MASKINGS
    from mmada_jax.weights.lazy import DTYPES

    assert set(prepare.FORMATS) == set(sources.FORMATS) - {"arrayrecord", "digits", "totals"}
    assert typing.get_args(images.Resize) == prepare.RESIZE
    assert tuple(DTYPES) == convert.DTYPES
    assert set(RL) <= set(importlib.import_module("mmada_jax.programs.aot").STEPS)
    assert (bench.SPLITS, bench.MASKINGS) == (digits.SPLITS, MASKINGS)
    assert set(bench.PRESETS) < set(PRESETS)
    assert {"default", *quickstart.FORMS} == set(quickstart_stages.FORMS)


def test_the_package_installs_the_command(monkeypatch):
    import types

    told = {}
    setuptools = types.SimpleNamespace(setup=lambda **settings: told.update(settings),
                                       find_packages=lambda **_: [])  # fmt: skip
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    exec((ROOT / "setup.py").read_text(), {"__name__": "setup"})
    (script,) = told["entry_points"]["console_scripts"]
    name, _, target = script.partition(" = ")
    module, _, function = target.partition(":")
    assert name == "mmada"
    assert getattr(importlib.import_module(module), function) is command.main


@pytest.mark.parametrize("name", OURS)
def test_launch_calls_the_same_programs(name):
    run = [sys.executable, ROOT / f"launch/{name}.py", "--help"]
    shown = subprocess.run(run, cwd="/", capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"usage: mmada {name} ")


ENDINGS = """
import os, sys
from mmada_jax.programs.process import ending
with ending():
    raise {}
"""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        ("ValueError('no')", 1, "error: no\n"),
        ("OSError('no')", 1, "error: no\n"),
        ("KeyboardInterrupt", 128 + signal.SIGINT, "stopped by Ctrl-C before there was anything to save\n"),
    ],
)
def test_endings_are_one_line(error, status, line):
    call = [sys.executable, "-c", ENDINGS.format(error)]
    run = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (status, line)


def test_errors_of_ours_have_a_traceback(monkeypatch):
    with pytest.raises(KeyError), process.ending():
        raise KeyError("bug")
    monkeypatch.setenv("MMADA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no"), process.ending():
        raise ValueError("no")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_what_a_step_frees_is_kept():
    code = """
import ctypes, resource, numpy as np
from mmada_jax.programs.process import start_jax
# With huge pages an array has few faults, and those of other threads would count as much.
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        np.ones(2**23)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without = faults()
start_jax()
np.ones(2**23)
print(without, faults())
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    without, kept = map(int, run.stdout.split())
    assert kept < without / 100, (without, kept)


# `bench prepare` times processes of its own, which need the devices.
COMPUTING = ["quickstart", "train", "rl", *(f"bench {n}" for n in bench.BENCHMARKS if n != "prepare")]


@pytest.mark.parametrize("name", COMPUTING)
def test_programs_that_compute_keep_what_they_free(name, tmp_path, monkeypatch):
    from launch import quickstart

    told, options = [], ["--workdir", str(tmp_path)]
    monkeypatch.setattr(process, "_tell_malloc", told.append)
    monkeypatch.setattr(quickstart, "keep_programs", lambda: None)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    computes = {
        "quickstart": "launch.quickstart_stages.complete",
        "train": "mmada_jax.train.supervised.train",
        "rl": "mmada_jax.train.rl.loop.train",
    }.get(name, f"launch.benchmarks.{name.partition(' ')[2]}.measure")
    if name in ("train", "rl"):
        options += ["--config", {"train": "configs/vq.py:digits", "rl": "configs/unigrpo.py:digits"}[name]]
        options[-1] = str(ROOT / options[-1])
    if name.startswith("bench"):
        options = {
            "bench own": ["--model", "x", "--test", "y"], "bench load": ["--model", "x"],
            "bench digits": ["--model", "x"],
        }.get(name, [])  # fmt: skip
        monkeypatch.setattr(computes.replace(".measure", ".as_text"), str)
    began = []
    monkeypatch.setattr(computes, lambda *_: began.append(len(told)))
    command.main([*name.split(), *options])
    assert began == [1] and len(told) == 1, "told once, before what computes, and kept on a CPU"


def test_scripts_leave_the_platform_and_the_allocator_to_the_user():
    for path in (ROOT / "launch").glob("*.sh"):
        assert "JAX_PLATFORMS" not in path.read_text(), path
        assert "GLIBC_TUNABLES" not in path.read_text(), path
