"""What needs no bucket: which paths there are, and what is said without the extra."""

import pathlib
import sys

import pytest
from conftest import ROOT
from programs import Program

from mmada_jax import bucket, storage


@pytest.mark.parametrize("name", ["s3://b/x", "file:///x", "hf://b/x", "gs:/b/x", "https://b/x", "s3:/b"])
def test_other_storages_are_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="can't be read or written") as error:
        storage.path(name)
    assert "\n" not in str(error.value) and name in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gs://", "gs:///x/..", "gs://b\n"])
def test_a_path_without_a_bucket_is_refused(name):
    with pytest.raises(ValueError, match="names no bucket"):
        storage.path(name)


@pytest.fixture
def without_gcsfs(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    bucket.connect.cache_clear()
    yield
    bucket.connect.cache_clear()


def test_without_the_extra_a_path_of_a_bucket_says_what_to_install(without_gcsfs, tmp_path):
    with pytest.raises(ImportError, match=r"pip install 'mmada_jax\[gcp\]'"):
        storage.path("gs://b/x")
    assert storage.path(tmp_path) == tmp_path


PROGRAMS = {
    "train": ["--config", "configs/pretrain.py:digits,smoke", "--workdir", "{}"],
    "rl": ["--config", "configs/unigrpo.py:digits,smoke", "--workdir", "{}"],
    "sweep": ["--config", "configs/pretrain.py:digits,smoke", "--workdir", "{}"],
    "sample": ["text", "1+1", "--model", "{}"],
    "convert": ["inspect", "--src", "{}"],
    "prepare": ["--format", "jsonl", "--path", "{}/x.jsonl", "--out", "{}"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_refuses_other_storages_in_one_line(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.format("s3://b/x", "s3://b/x") for word in PROGRAMS[program]]
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    with Program([ROOT / f"launch/{program}.py", *words]) as process:
        out = process.communicate()[0]
    assert process.returncode and "can't be read or written" in out
    assert len(out.strip().splitlines()) == 1, out
    assert not list(pathlib.Path(tmp_path).iterdir())
