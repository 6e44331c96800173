"""launch/prepare.py as a user runs it, on sources and image tokenizers that are made for tests."""

import io
import json
import os
import runpy
import subprocess
import sys

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from conftest import ROOT, xla_flags
from PIL import Image
from safetensors.numpy import save_file

from mmada_jax.data import sources
from mmada_jax.data.records import Record, unpack
from mmada_jax.nets import vq
from mmada_jax.weights import magvit_keys

PREPARE = str(ROOT / "launch" / "prepare.py")
VQ = vq.VQConfig(32, (1, 2), (1, 1), (1, 2), (1, 1), bits=6)


def encode(pixels, format="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def picture(i, rows=20, columns=24):
    return np.random.default_rng(i).integers(0, 256, (rows, columns, 3), np.uint8)


class Source:
    """Records in memory; an exception among them is raised when it is asked for. Counts what is read."""

    fingerprint, ignored = "f", {}

    def __init__(self, records):
        self.records, self.asked = records, []

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        self.asked.append(index)
        if isinstance(self.records[index], BaseException):
            raise self.records[index]
        return self.records[index]


def texts(n):
    return [Record(f"k{i}", texts=(f"text {i}",)) for i in range(n)]


def preparer(monkeypatch, capfd, tmp_path):
    """Runs the program, on `source` if one is given; (what it printed, the error it ended with)."""

    def call(*args, source=None, out=tmp_path / "out"):
        argv = [PREPARE, "--out", str(out), *map(str, args)]
        if source is not None:
            monkeypatch.setattr(sources, "open_source", lambda config: source)
            argv += ["--format", "jsonl", "--path", "somewhere"]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            runpy.run_path(PREPARE, run_name="__main__")
            error = None
        except SystemExit as exit:
            error = exit.code
        finally:
            printed.append(capfd.readouterr())
        return printed[-1].out, error

    printed = []
    return call


def shard(path):
    reader = ArrayRecordReader(str(path))
    assert reader.ok()
    return [unpack(data) for data in reader.read_all()]


def dataset(folder):
    return json.loads((folder / "dataset.json").read_text())


def everything(folder):
    """All records by dataset.json, whose counts must hold; nothing unfinished may lie beside them."""
    about, found = dataset(folder), []
    for name, count in about["shards"].items():
        found.append(shard(folder / name))
        assert len(found[-1]) == count
    assert sum(map(len, found)) == about["records"]
    assert sorted(p.name for p in folder.glob("*.array_record")) == sorted(about["shards"])
    assert not list(folder.glob("*.tmp"))
    return [record for records in found for record in records]


def keys(folder):
    return [record.key for record in everything(folder)]


def publish(folder, config):
    """A Hugging Face folder of a random image tokenizer."""
    rng = np.random.default_rng(0)
    state = {
        key: (0.1 * rng.standard_normal(rule.torch_shape)).astype(np.float32)
        for key, rule in magvit_keys.key_table(config).items()
    }
    folder.mkdir()
    save_file(state | magvit_keys.constants(config), folder / "model.safetensors")
    return folder


def published(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("tokenizer") / "rgb", VQ)


def run(code, *args, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(1)}
    command = [sys.executable, "-c", code, PREPARE, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)
