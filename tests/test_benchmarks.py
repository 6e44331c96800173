"""The benchmarks run, and those of accelerators where there is none, on jax, flax and numpy alone."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["benchmark_attention", "benchmark_step"])
def test_runs_on_a_cpu(name, tmp_path):
    command = [
        sys.executable,
        ROOT / f"launch/{name}.py",
        "--repeats",
        "2",
        "--json",
        tmp_path / "out.json",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "medians of 2" in run.stdout
    assert json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize("name", ["benchmark_attention", "benchmark_step"])
def test_needs_little(name):
    hidden = "grain chex ml_collections tensorflow_datasets PIL tokenizers safetensors tensorboardX"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden.split()!r})); sys.argv = ['x', '--help'];"
        f"sys.path.insert(0, 'launch'); import {name}; {name}.main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "medians" in run.stdout or "--repeats" in run.stdout


def test_the_input_is_measured_for_each_number_of_threads(tmp_path):
    command = [sys.executable, ROOT / "launch/benchmark_data.py", "--images", "20", "--seconds", "0.1"]
    command += ["--threads", "1", "2", "--json", tmp_path / "out.json"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert 20 <= report["kilobytes"] <= 40, "the size of photographs"
    for rates in report["images_per_second"].values():
        assert list(rates) == ["1", "2"]
        assert min(rates.values()) > 0
