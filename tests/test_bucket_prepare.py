"""Data prepared into a bucket has the bytes of data prepared on a disk, whatever happened on the way."""

import io
import pathlib
import subprocess
import sys
import tarfile
import tempfile

import pytest
from buckets import environment, skip_without_server, upload
from conftest import ROOT, xla_flags
from prepare_run import encode, picture, published

from mmada_jax import storage
from mmada_jax.data import sources
from mmada_jax.model import prepare as module
from mmada_jax.model.prepare import prepare
from mmada_jax.weights.manifest import hash_of

skip_without_server()
tokenizer = pytest.fixture(scope="module")(published)
SETTINGS = {"records_per_shard": 8, "image_size": 64, "shuffle": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with a tar of pictures with captions."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for i in range(20):
            for suffix, data in (("png", encode(picture(i))), ("txt", b"caption %d" % i)):
                member = tarfile.TarInfo(f"{i:05}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def content(out):
    """Name -> hash of all that a user may use; the source's path differs."""
    found = {name: hash_of(file.path) for name, file in storage.files_below(out).items()}
    return {name: x for name, x in found.items() if name not in ("prepare.lock", "dataset.json")}


def test_data_go_from_a_bucket_into_a_bucket_and_survive_a_kill(
    proxy, folder, pictures, tokenizer, tmp_path, monkeypatch
):
    config = sources.SourceConfig(str(pictures / "pictures.tar"), "webdataset")
    report, _ = prepare(config, tmp_path / "out", image_tokenizer=tokenizer, **SETTINGS)
    there = sources.SourceConfig(
        str(upload(pictures, f"{folder.name}/data") / "pictures.tar"), "webdataset"
    )
    at = str(upload(pathlib.Path(tokenizer), f"{folder.name}/tokenizer"))

    # Killed when the second shard is written and not yet uploaded.
    put, left = storage.put, [None]

    def killed(file, where):
        if not left:
            raise SystemExit
        left.pop()
        put(file, where)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put", killed)
        with pytest.raises(SystemExit):
            prepare(there, folder / "out", image_tokenizer=at, **SETTINGS)
    assert len(list((folder / "out").glob("*.array_record"))) == 1
    assert not (folder / "out/dataset.json").exists()

    writes = []
    monkeypatch.setattr(
        module, "array_record", lambda path, write=module.array_record: writes.append(path) or write(path)
    )
    again, _ = prepare(there, str(folder / "out"), image_tokenizer=at, **SETTINGS)
    assert [path.name for path in writes] == sorted(again["shards"])[1:]
    assert content(folder / "out") == content(tmp_path / "out")
    assert again | {"source": 0} == report | {"source": 0}
    assert again["source"]["fingerprint"] == report["source"]["fingerprint"]
    assert not list((tmp_path / "temporary").iterdir())

    opened = [sources.open_source(sources.SourceConfig(str(out / "out"))) for out in (tmp_path, folder)]
    assert all(repr(opened[0][i]) == repr(opened[1][i]) for i in range(len(opened[0])))


def test_an_upload_that_is_refused_is_one_line_and_keeps_what_is_finished(
    proxy, folder, pictures, tmp_path
):
    config = sources.SourceConfig(str(pictures / "pictures.tar"), "webdataset")
    seen = []

    def fails(request):
        if request.method == "POST" and len(seen) > 8:
            return 403
        seen.append(request)
        return None

    proxy.fails = fails
    with pytest.raises(OSError, match=r"Forbidden|permission is denied") as error:
        prepare(config, folder / "out", records_per_shard=2)
    assert "\n" not in str(error.value)
    proxy.fails = lambda request: None
    report, _ = prepare(config, folder / "out", records_per_shard=2)
    assert report["records"] == 20


@pytest.mark.slow
@pytest.mark.cluster
def test_workers_of_ray_write_the_same_into_a_bucket(proxy, folder, pictures, tokenizer, tmp_path):
    pytest.importorskip("ray")
    config = sources.SourceConfig(str(pictures / "pictures.tar"), "webdataset")
    prepare(config, tmp_path / "out", image_tokenizer=tokenizer, **SETTINGS)
    given = SETTINGS | {"format": "webdataset", "path": config.path, "image_tokenizer": tokenizer}
    given |= {"out": folder / "out", "engine": "ray"}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    known = environment(proxy, PYTHONPATH=str(ROOT), XLA_FLAGS=xla_flags(1))
    command = [sys.executable, str(ROOT / "launch" / "prepare.py"), *words]
    done = subprocess.run(command, env=known, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert content(folder / "out") == content(tmp_path / "out")
