"""Sweeps whose trials lie in a bucket, by both engines, with a program that trains nothing."""

import csv
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

import pytest
from buckets import BUCKET, environment, skip_without_server
from conftest import ROOT, xla_flags

from mmada_jax import storage

skip_without_server()
BASE = {"program": "vq", "steps": 4, "batch_size": 8, "seed": 0, "optim": {"lr": 0.1, "name": "muon"}}
FAKE = """
import json, sys
from mmada_jax import storage
args = dict(arg.removeprefix("--").partition("=")[::2] for arg in sys.argv if arg.startswith("--config."))
workdir = storage.path(sys.argv[sys.argv.index("--workdir") + 1])
lr = float(args["config.optim.lr"])
before = (workdir / "metrics.jsonl").read_text() if (workdir / "metrics.jsonl").is_file() else ""
print("this is", workdir)
if lr > 1 and not before:
    storage.write_whole(workdir / "metrics.jsonl", json.dumps({"step": 2, "loss": lr}) + chr(10))
    sys.exit("error: as if the machine had failed")
rows = [json.dumps({"step": step, "loss": lr / step}) for step in range(1, 5)]
storage.write_whole(workdir / "metrics.jsonl", chr(10).join(rows) + chr(10))
"""


ENGINES = [
    "plain",
    pytest.param("ray", marks=[
        pytest.mark.slow, pytest.mark.cluster,
        pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_trials_run_and_go_on_in_a_bucket(engine, proxy, tmp_path):
    workdir = storage.path(f"gs://{BUCKET}/{tmp_path.name}")
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config(arg): return ConfigDict({BASE!r})\n"
        "def get_hyper(h): return h.sweep('optim.lr', [0.1, 0.2, 2.0])\n"
    )
    words = [ROOT / "launch/sweep.py", "--config", f"{tmp_path}/config.py:some", "--workdir", workdir]
    words += ["--program", tmp_path / "fake.py", "--engine", engine, "--parallel", "2"]
    known = environment(proxy, PYTHONPATH=str(ROOT), XLA_FLAGS=xla_flags(1))

    def run():
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=known, cwd=tmp_path, capture_output=True, text=True)

    first = run()
    assert first.returncode == 1, first.stdout + first.stderr
    assert "failed" in first.stdout and "2 of 3 trials are done" in first.stdout
    second = run()
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 of 3 trials are done already" in second.stdout and "continues at step 2" in second.stdout
    rows = list(csv.DictReader((workdir / "results.csv").read_text().splitlines()))
    assert [row["loss"] for row in rows] == ["0.025", "0.05", "0.5"]
    assert all(row["status"] == "done" for row in rows)
    assert {path.name for path in workdir.iterdir() if not path.name.startswith("trial-")} >= {
        "results.csv", "results.md", "results.png"}  # fmt: skip
    (log,) = (path for path in workdir.rglob("log.txt") if "trial-002" in str(path))
    assert log.read_text().count("this is") == 2 and "as if the machine had failed" in log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.py", "fake.py"]
    assert not list(pathlib.Path(tempfile.gettempdir()).glob("mmada_jax-*.log"))
