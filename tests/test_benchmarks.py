"""The benchmarks: they run, on jax, flax and numpy alone where accelerators have no more; their timing."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from launch import bench
from launch.benchmarks import timing

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["attention", "step"])
def test_runs_on_a_cpu_and_needs_little(name, tmp_path):
    hidden = "grain chex ml_collections tensorflow_datasets PIL tokenizers safetensors tensorboardX"
    out = tmp_path / "out.json"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden.split()!r}));"
        f"from launch import bench; bench.main([{name!r}, '--repeats', '2', '--json', {str(out)!r}])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "medians of 2" in run.stdout
    assert json.loads(out.read_text())


def test_the_input_is_measured_for_each_number_of_threads(tmp_path, capsys):
    report = bench.main(["data", "--images", "20", "--seconds", "0.1", "--threads", "1", "2",
                         "--json", str(tmp_path / "out.json")])  # fmt: skip
    assert 20 <= report["kilobytes"] <= 40, "the size of photographs"
    for rates in report["images_per_second"].values():
        assert list(rates) == [1, 2]
        assert min(rates.values()) > 0
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["images_per_second"]["tars"].keys() == {"1", "2"}
    assert "images/s   1 threads   2 threads" in capsys.readouterr().out


def test_an_iteration_is_timed_with_each_cache(model_workdir, capsys):
    report = bench.main(["rollouts", "--init", str(model_workdir), "--prompts", "1", "--new", "8",
                         "--caches", "none", "dual", "--repeats", "2"])  # fmt: skip
    assert report["rows"] == 8
    for of in report["ms"].values():
        assert 0 < of["rollout"]["median"] < of["iteration"]["median"]
    assert report["off"]["none"] == 0 < report["off"]["dual"]
    assert "cache dual" in capsys.readouterr().out


def test_every_name_is_a_file_and_the_other_way_round():
    shared = {"__init__", "timing", "cases", "decode_report", "serving"}
    files = {path.stem for path in (ROOT / "launch/benchmarks").glob("*.py")} - shared
    assert files == set(bench.BENCHMARKS)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["atention"], "error: unknown benchmark 'atention'; did you mean 'attention'?"),
        ([], "error: unknown benchmark ''; Known: twin, "),
        (["data", "--thread", "2"], "error: unknown option --thread; did you mean --threads?"),
        (["attention", "--repeats", "1"], "error: argument --repeats: 1 is too few; at least 2"),
    ],
)
def test_what_means_nothing_is_one_line(words, line, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(words)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith(line) and error.count("\n") == 1


def test_turns_alternate_and_are_timed_apart(monkeypatch):
    called = []
    runs = {"a": lambda: called.append("a"), "b": lambda: (called.append("b"), time.sleep(0.02))}
    times = timing.take_turns(runs, repeats=4, warm_up=2)
    assert "".join(called) == "aabb" + "baabbaab"
    assert times["b"]["low"] >= 0.02 > times["a"]["high"]
    assert all(of["low"] <= of["median"] <= of["high"] for of in times.values())
    assert times["b"]["cpu"] < 0.02  # it slept
    assert timing.as_text(timing.in_ms({"x": timing.quartiles([0.002])})["x"]) == "2.0 (2.0 - 2.0)"
