"""Copies on this machine of what is read of a bucket: when they are made, used, thrown away and doubted."""

import concurrent.futures
import os
import pathlib
import resource

import pytest
from buckets import put, skip_without_server
from data_files import Counted, N, fresh_cache, write_codes, write_lines

from mmada_jax import nearby, storage
from mmada_jax.data.records import pack
from mmada_jax.data.sources import SourceConfig, open_source

skip_without_server()


@pytest.fixture(autouse=True)
def cache(tmp_path, proxy):
    with fresh_cache(tmp_path / "cache"):
        yield tmp_path / "cache/mmada_jax/bucket"
    proxy.fails, proxy.delay = lambda request: None, 0.0


@pytest.fixture(autouse=True)
def up(tmp_path):
    """What `put` uploads."""
    (tmp_path / "up").mkdir()


@pytest.fixture
def kept(tmp_path):
    """A folder for whole objects, with room for 1,000 bytes."""
    nearby.use(str(tmp_path / "kept"), 1000 / 2**30)
    return tmp_path / "kept"


def objects(folder, *sizes):
    paths = [folder / f"{i}" for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(bytes([len(path.name) + size % 200]) * size)
    return [str(path) for path in paths]


def room(kept):
    return sum(file.stat().st_size for file in kept.iterdir() if file.name != "size")


def later(kept, seconds):
    """Makes all copies older."""
    for file in kept.glob("*.copy"):
        about = file.stat()
        os.utime(file, (about.st_mtime - seconds, about.st_mtime - seconds))


def test_objects_are_fetched_once(folder, kept, proxy):
    paths = objects(folder, 100, 90)
    with Counted(proxy) as first:
        near = [nearby.nearest(path) for path in paths]
    for a, b in zip(near, paths, strict=True):
        assert pathlib.Path(a).read_bytes() == storage.path(b).read_bytes()
    assert all(path.startswith(str(kept)) for path in near) and len(first.reads) == 2
    nearby._facts.clear()  # as another process
    with Counted(proxy) as second:
        assert [nearby.nearest(path) for path in paths] == near
    assert not second.reads


def test_the_limit_holds_and_what_is_used_least_recently_goes(folder, kept):
    paths = objects(folder, *[100] * 15)
    for path in paths[:10]:
        assert nearby.nearest(path) != path
        later(kept, 10)
    assert room(kept) == 1000
    assert nearby.nearest(paths[10]) == paths[10]  # what was used within the hour stays
    nearby._full.clear()
    later(kept, nearby.IN_USE)
    assert nearby.nearest(paths[0]) != paths[0]  # so that it is used again
    near = nearby.nearest(paths[11])
    assert near != paths[11] and room(kept) <= 1000
    assert not copy_of(paths[1]).exists() and copy_of(paths[0]).exists()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in range(5):
            later(kept, nearby.IN_USE)
            nearby._full.clear()
            list(pool.map(nearby.nearest, paths))
            assert room(kept) <= 1000


def copy_of(path):
    return nearby._copy(path, nearby.facts(path), "whole")


def test_what_is_too_large_is_read_by_ranges(folder, kept):
    (path,) = objects(folder, 200)
    assert nearby.nearest(path) == path and not kept.exists()


def test_a_copy_that_is_cut_off_and_an_object_that_changes_are_fetched_anew(folder, kept):
    (path,) = objects(folder, 100)
    near = nearby.nearest(path)
    os.truncate(near, 50)
    assert len(pathlib.Path(nearby.nearest(path)).read_bytes()) == 100
    storage.path(path).write_bytes(b"new")
    nearby.look(storage.path(path))
    assert nearby.nearest(path) != near and pathlib.Path(nearby.nearest(path)).read_bytes() == b"new"


def test_a_copy_of_an_index_that_is_damaged_is_made_anew(tmp_path, folder, cache, proxy):
    write_lines(tmp_path / "up/x.jsonl", [{"text": f"{i}"} for i in range(N)])
    put(tmp_path, folder)
    config = SourceConfig(f"{folder}/x.jsonl", "jsonl")
    expected = [pack(r) for r in open_source(config)]
    for file in cache.glob("*.copy"):
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    assert [pack(r) for r in open_source(config)] == expected
    for file in cache.glob("*.copy"):
        os.truncate(file, 10)
    assert [pack(r) for r in open_source(config)] == expected


def test_a_shard_whose_copy_is_damaged_is_fetched_anew(tmp_path, folder, kept):
    os.environ[nearby.GIB] = "1"
    write_codes(tmp_path / "up")
    put(tmp_path, folder)
    config = SourceConfig(f"{folder}/0.array_record")
    source = open_source(config)
    expected = [pack(source[i]) for i in range(len(source))]
    copy = copy_of(f"{folder}/0.array_record")
    whole = copy.read_bytes()
    for at in (len(whole) // 2, len(whole) - 10):
        copy.write_bytes(whole[:at] + bytes(20) + whole[at + 20 :])
        fresh = open_source(config)
        assert [pack(fresh[i]) for i in range(len(fresh))] == expected
    copy.unlink()
    assert pack(source[3]) == expected[3]


@pytest.mark.parametrize("how", ["no folder", "full disk"])
def test_without_room_on_the_disk_nothing_is_kept(how, tmp_path, folder, kept):
    os.environ[nearby.GIB] = "1"
    write_codes(tmp_path / "up")
    put(tmp_path, folder)
    config, before = SourceConfig(f"{folder}/*.array_record"), resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "no folder":
        kept.write_text("a file is in its place")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # of any file
    try:
        source = open_source(config)
        keys = [source[i].key for i in (0, 150)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert keys == ["r0", "r50"] and not list(tmp_path.glob("kept/*.copy"))


def test_a_folder_of_a_bucket_is_no_place_for_copies():
    for folder, gib in (("gs://b/cache", 1.0), ("cache", 0.0)):
        with pytest.raises(ValueError, match="name a folder of this machine and some room") as error:
            nearby.use(folder, gib)
        assert "\n" not in str(error.value)
