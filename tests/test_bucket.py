"""Paths of gs:// behave as those of a disk do, as far as there is a meaning; what fails is told in one
line."""

import contextlib
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys
import time

import pytest
from buckets import BUCKET, skip_without_server

from mmada_jax import lease, storage
from mmada_jax.bucket import Bucket
from mmada_jax.lease import Lease

skip_without_server()


@pytest.fixture
def folder(proxy, request):
    where = storage.path(f"gs://{BUCKET}/{request.node.name[:40]}")
    yield where
    proxy.fails, proxy.delay = lambda request: None, 0.0
    where.rmtree()


@pytest.fixture(params=["disk", "bucket"])
def either(request, tmp_path, proxy):
    return tmp_path if request.param == "disk" else storage.path(f"gs://{BUCKET}/{tmp_path.name}")


def test_names_are_those_of_pathlib():
    ours, theirs = Bucket("gs://b/x/y.tar"), pathlib.PurePosixPath("/b/x/y.tar")
    for name in ("name", "stem", "suffix"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert str(ours.parent) == "gs://b/x" and ours.parent.parent.parent == Bucket("gs://b")
    assert str(ours / "../z") == "gs://b/x/z" and str(ours.with_suffix(".json")) == "gs://b/x/y.json"
    assert os.fspath(ours) == str(ours) and ours.absolute() is ours
    assert ours.is_relative_to(Bucket("gs://b/x")) and not ours.is_relative_to(pathlib.Path("/b/x"))
    assert str(ours.relative_to(Bucket("gs://b"))) == "x/y.tar"
    assert pickle.loads(pickle.dumps(ours)) == ours and len({ours, Bucket("gs://b/x/./y.tar")}) == 1


def test_joining():
    base = storage.path("gs://b/runs/a")
    assert str(storage.join(base, "../c")) == "gs://b/runs/c"
    assert str(storage.join(base, "gs://d/e")) == "gs://d/e"
    assert storage.join(base, "/local") == pathlib.Path("/local")
    assert str(storage.join("/local", "gs://d/e")) == "gs://d/e"
    for where, folder in (
        ("gs://b/x/y", "gs://b/z"),
        ("gs://c/x", "gs://b/z"),
        ("/x/y", "/x/z"),
        ("gs://b/x", "/x"),
    ):
        where, folder = storage.path(where), storage.path(folder)
        assert storage.resolved(storage.join(folder, storage.relative_to(where, folder))) == where


def test_files_are_written_listed_and_removed(either):
    assert not either.is_dir() or not list(either.iterdir())
    for name, data in {"a.txt": b"1", "b/c.txt": b"22", "b/d/e.json": b"333", "ü #?%/é": b""}.items():
        storage.write_whole(either / name, data)
    assert {n: f.size for n, f in storage.files_below(either).items()} == {
        "a.txt": 1, "b/c.txt": 2, "b/d/e.json": 3, "ü #?%/é": 0}  # fmt: skip
    assert sorted(p.name for p in either.iterdir()) == ["a.txt", "b", "ü #?%"]
    assert [p.name for p in either.glob("*.txt")] == ["a.txt"]
    assert sorted(p.name for p in either.rglob("*.txt")) == ["a.txt", "c.txt"]
    assert (either / "b").is_dir() and not (either / "b").is_file() and (either / "a.txt").is_file()
    assert (either / "b/d/e.json").stat().st_size == 3 and (either / "ü #?%/é").read_bytes() == b""
    assert storage.read_range(either / "b/d/e.json", 1, 5) == b"33"
    assert storage.read_range(either / "a.txt", 5, 5) == b""
    with storage.open_file(either / "b/c.txt") as file:
        assert (file.read(1), file.seek(0), file.read()) == (b"2", 0, b"22")
    (either / "a.txt").unlink()
    (either / "a.txt").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (either / "a.txt").read_bytes()
    storage.rmtree(either / "b")
    assert not (either / "b").exists()


def test_listings_of_several_pages(folder, monkeypatch):
    for i in range(12):
        for name in (f"{i:03}", f"d{i:03}/a"):
            (folder / name).write_bytes(b"x")
    page = Bucket._page
    monkeypatch.setattr(Bucket, "_page", lambda self, **of: page(self, **({"maxResults": 5} | of)))
    assert [entry.path.name for entry in folder.list()] == [
        *(f"{i:03}" for i in range(12)), *(f"d{i:03}" for i in range(12))]  # fmt: skip
    assert len(storage.files_below(folder)) == 24 and folder.is_dir()


def test_what_fails_while_it_is_written_isn_t_there(either):
    def write():
        with storage.writing(either / "x") as file:
            file.write(b"1" * 100)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    if isinstance(either, Bucket):
        assert not (either / "x").exists()
    with storage.writing(either / "y") as file:
        file.write(b"1" * (1 << 20))
        file.write(b"2")
    assert (either / "y").stat().st_size == (1 << 20) + 1


def test_a_file_grows(either):
    file = storage.Growing(either / "f", lambda: [b"begin\n"], pause=0.0)
    for i in range(5):
        file.add(b"%d\n" % i)
    file.flush()
    assert (either / "f").read_bytes() == b"begin\n0\n1\n2\n3\n4\n" and not file.waiting
    empty = storage.Growing(either / "e", lambda: [])
    empty.flush()
    assert (either / "e").read_bytes() == b""


def test_an_object_is_written_seldom_and_what_is_refused_is_kept(folder, proxy):
    file = storage.Growing(folder / "f", lambda: [], pause=60.0)
    before = len(proxy.requests)
    for i in range(50):
        file.add(b"%02d" % i)
        time.sleep(0.001)
    assert len([r for r in proxy.requests[before:] if r.method == "POST"]) <= 1
    proxy.fails = lambda request: 403 if request.method == "POST" else None
    with pytest.raises(OSError, match="permission is denied"):
        file.flush()
    assert file.waiting
    proxy.fails = lambda request: None
    file.flush()
    assert (folder / "f").read_bytes() == b"".join(b"%02d" % i for i in range(50))


FAULTS = {
    401: "permission",
    403: "permission",
    404: "no such",
    429: "so many requests",
    503: r"can't serve it now \(503\)",
}


@pytest.mark.parametrize("status", FAULTS)
def test_an_error_names_the_object_and_the_remedy(folder, proxy, status, monkeypatch):
    import gcsfs.retry

    sleep = gcsfs.retry.asyncio.sleep
    monkeypatch.setattr(gcsfs.retry.asyncio, "sleep", lambda seconds: sleep(seconds / 100))
    proxy.fails = lambda request: status
    before = len(proxy.requests)
    with pytest.raises(OSError, match=FAULTS[status]) as error:
        (folder / "x").read_bytes()
    assert str(folder / "x") in str(error.value) and "\n" not in str(error.value)
    assert error.value.errno  # as an error of a disk has
    assert len(proxy.requests) - before == (6 if status in (429, 503) else 1)
    if status != 404:
        with pytest.raises(OSError, match=FAULTS[status]):
            folder.is_dir()


def test_a_fault_that_passes_is_survived(folder, proxy):
    left = [503, 429]
    proxy.fails = lambda request: left.pop() if left else None
    storage.write_whole(folder / "x", b"1")
    assert (folder / "x").read_bytes() == b"1" and not left


@pytest.mark.slow
def test_a_dead_server_is_an_error_within_a_minute(tmp_path):
    from buckets import free_port, variables

    began = time.monotonic()
    code = "from mmada_jax import storage; print(storage.path('gs://b/x').exists())"
    done = subprocess.run(
        [sys.executable, "-c", f"try:\n    {code}\nexcept OSError as e:\n    print(e)"],
        env=os.environ | variables(free_port()), capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert "gs://b/x: the storage can't be reached" in done.stdout and not done.stderr
    assert time.monotonic() - began < 60 and not list(tmp_path.iterdir())


# ---- Leases --------------------------------------------------------------------------------------


def test_a_lease_has_one_owner(folder):
    with storage.locked(folder / ".lock", "it is taken"):
        with pytest.raises(ValueError, match=rf"it is taken \(taken by process {os.getpid()} on"):
            storage.locked(folder / ".lock", "it is taken").__enter__()
        with pytest.raises(ValueError, match="it is taken"):
            storage.refuse_locked(folder / ".lock", "it is taken")
    storage.refuse_locked(folder / ".lock", "it is taken")
    assert not (folder / ".lock").exists()


def hold(where):
    Lease(storage.path(where), "a process", "busy", print)
    os._exit(0)  # without giving it back, as a process that is killed


def test_a_lease_whose_process_has_gone_is_free_at_once(folder):
    process = multiprocessing.get_context("spawn").Process(target=hold, args=[str(folder / ".lock")])
    process.start()
    process.join()
    assert (folder / ".lock").exists()
    began = time.monotonic()
    with storage.locked(folder / ".lock", "it is taken"):
        assert time.monotonic() - began < 5


@pytest.fixture
def hurry(monkeypatch):
    """Renewed every 0.2 seconds, and free after 1.5."""
    monkeypatch.setattr(lease, "RENEW", 0.2)
    monkeypatch.setattr(lease, "EXPIRE", 1.5)


def test_the_lease_of_another_machine_is_free_when_nobody_renews_it(folder, hurry, monkeypatch, capsys):
    monkeypatch.setattr(lease, "_machine", lambda: ("other", "boot", "space"))
    theirs = Lease(folder / ".lock", "another run", "busy", print)
    monkeypatch.undo()
    monkeypatch.setattr(lease, "RENEW", 0.2)
    monkeypatch.setattr(lease, "EXPIRE", 1.5)
    with pytest.raises(ValueError, match="it is taken"), storage.locked(folder / ".lock", "it is taken"):
        pass
    theirs._ended.set()  # as if the machine had gone
    theirs._thread.join()
    with storage.locked(folder / ".lock", "it is taken") as mine:
        assert not mine.lost
    assert "was taken by another run" in capsys.readouterr().err


def test_a_lease_that_another_process_took_is_lost(folder, hurry):
    with storage.locked(folder / ".lock", "it is taken") as mine:
        assert mine.path.write_if(b"{}", mine._generation) or True
        (folder / ".lock").write_bytes(b"{}")
        for _ in range(50):
            if mine.lost:
                break
            time.sleep(0.1)
        assert mine.lost
    assert (folder / ".lock").read_bytes() == b"{}"  # it isn't ours to remove


def test_of_many_one_takes_the_lease(folder):
    import concurrent.futures

    def take(_):
        with contextlib.suppress(ValueError):
            return Lease(folder / ".lock", "one of many", "busy", print)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        taken = [one for one in pool.map(take, range(8)) if one]
    assert len(taken) == 1
    taken[0].release()
