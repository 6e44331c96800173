"""What it costs to read a bucket: requests, seconds, room on a disk. And what happens without an answer."""

import collections
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from buckets import environment, put, skip_without_server
from data_files import (
    Counted,
    fresh_cache,
    write_codes,
    write_images,
    write_lines,
    write_prepared,
    write_shard,
    write_tar,
)

from mmada_jax import bucket as bucket_lib
from mmada_jax import nearby, outages, storage
from mmada_jax.data import pipeline
from mmada_jax.data.records import Record
from mmada_jax.data.sources import SourceConfig, open_source

skip_without_server()
MB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path, proxy):
    with fresh_cache(tmp_path / "cache"):
        yield tmp_path / "cache/mmada_jax/bucket"
    proxy.fails, proxy.delay = lambda request: None, 0.0


@pytest.fixture(autouse=True)
def up(tmp_path):
    """What `put` uploads."""
    (tmp_path / "up").mkdir()


def opened_twice(config, proxy):
    """A source as it is opened first, and as a program that is started again opens it."""
    with Counted(proxy) as first:
        source = open_source(config)
    nearby._facts.clear()
    with Counted(proxy) as second:
        again = open_source(config)
    assert again.fingerprint == source.fingerprint
    return again, first, second


# ---- Requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["folder", "glob"])
def test_a_record_of_a_shard_is_one_request(by, tmp_path, folder, proxy):
    write_prepared(tmp_path / "up", (8, 8, 8))
    put(tmp_path, folder)
    path = str(folder) if by == "folder" else f"{folder}/*.array_record"
    source, first, second = opened_twice(SourceConfig(path), proxy)
    # dataset.json; the beginning, the footer (the end is in the beginning of small files); one record.
    assert len(first.reads) == (by == "folder") + 2 * 3 + 1
    assert len(second.reads) == (by == "folder") + 3 + 1
    assert first.others == second.others == (3 if by == "folder" else 1)
    with Counted(proxy) as reading:
        for i in range(24):
            source[i]
    assert (len(reading.reads), reading.others) == (24, 0)


def test_the_end_of_a_large_shard_is_one_request_more(tmp_path, folder, proxy):
    record = Record("r", np.random.default_rng(0).bytes(MB))
    write_shard(tmp_path / "up/x.array_record", [record])
    put(tmp_path, folder)
    _, first, second = opened_twice(SourceConfig(f"{folder}/x.array_record"), proxy)
    assert (len(first.reads), len(second.reads), second.others) == (4, 2, 1)


def test_a_tar_is_scanned_in_large_steps_and_once(tmp_path, folder, proxy):
    noise = np.random.default_rng(0)
    members = []
    for i in range(200):
        members += [(f"{i:04}.png", noise.bytes(100_000)), (f"{i:04}.txt", b"t")]
    write_tar(tmp_path / "up/x.tar", members)
    size = (tmp_path / "up/x.tar").stat().st_size
    put(tmp_path, folder)
    source, first, second = opened_twice(SourceConfig(f"{folder}/x.tar", "webdataset"), proxy)
    tried = 2  # the text and the image of the record that is tried
    assert size > 20e6 and len(first.reads) - tried <= size // (8 * MB) + 3
    assert (len(second.reads), second.others) == (tried, 1)
    with Counted(proxy) as reading:
        source[100]
    assert (len(reading.reads), reading.others) == (2, 0)


def test_lines_are_found_in_large_steps_and_once(tmp_path, folder, proxy):
    write_lines(tmp_path / "up/x.jsonl", [{"text": "x" * 100_000} for _ in range(200)])
    put(tmp_path, folder)
    source, first, second = opened_twice(SourceConfig(f"{folder}/x.jsonl", "jsonl"), proxy)
    assert len(first.reads) <= 2 + 2 + 1  # 20 MB; the beginning and the end; one line
    assert (len(second.reads), second.others) == (1, 1)
    with Counted(proxy) as reading:
        source[100]
    assert (len(reading.reads), reading.others) == (1, 0)


def test_a_row_group_is_a_few_requests(tmp_path, folder, proxy):
    text = [np.random.default_rng(i).bytes(20_000).hex() for i in range(100)]
    table = pa.table({"text": text, "other": text, "more": text})
    pq.write_table(table, tmp_path / "up/x.parquet", row_group_size=25)
    put(tmp_path, folder)
    source, first, second = opened_twice(SourceConfig(f"{folder}/x.parquet", "parquet"), proxy)
    assert len(first.reads) <= 2 + 2 + 2 and len(second.reads) <= 2 + 2 and second.others == 1
    with Counted(proxy) as reading:
        for i in range(100):
            source[i]
    assert len(reading.reads) <= 2 * 3 and reading.others == 0  # one group was tried at the start


def test_folders_of_images_are_listed_once(tmp_path, folder, proxy):
    for name in ("cat", "dog", "dog/deep/er"):
        write_images(tmp_path / "up" / name, 5)
    put(tmp_path, folder)
    source, first, second = opened_twice(SourceConfig(str(folder), "imagefolder"), proxy)
    assert len(first.reads) == len(second.reads) == 1 and first.others == second.others <= 4
    with Counted(proxy) as reading:
        source[1]
    assert (len(reading.reads), reading.others) == (1, 0)


def test_many_files_are_asked_for_side_by_side(tmp_path, folder, proxy):
    for i in range(32):
        write_shard(tmp_path / f"up/{i:02}.array_record", [Record("r", texts=("t",))])
    put(tmp_path, folder)
    proxy.delay = 0.1
    began = time.monotonic()
    assert len(open_source(SourceConfig(f"{folder}/{{00..31}}.array_record"))) == 32
    assert time.monotonic() - began < 32 * 3 * 0.1 / 3  # one after the other: 9.6 seconds


# ---- Speed ---------------------------------------------------------------------------------------


def test_a_bucket_gets_more_threads():
    assert [pipeline.threads_of(0, where) for where in (False, True)] == [2, 16]
    assert [pipeline.threads_of(5, where) for where in (False, True)] == [5, 5]


def test_a_hundred_records_a_second_come_over_a_distance(tmp_path, folder, proxy):
    write_codes(tmp_path / "up")
    put(tmp_path, folder)
    source = open_source(SourceConfig(f"{folder}/*.array_record"))

    def load(step):
        return [source[(step * 8 + i) * 7 % len(source)] for i in range(8)]

    proxy.delay = 0.04
    rates = []
    for _ in range(3):  # other programs may take the processor for a while
        began, threads = time.monotonic(), pipeline.threads_of(0, source.from_bucket)
        read = sum(map(len, pipeline.iterate(load, 0, 50, threads)))
        rates.append(read / (time.monotonic() - began))
        if rates[-1] >= 100:
            break
    assert max(rates) >= 100


# ---- A bucket that doesn't answer ------------------------------------------------------------------


@pytest.fixture
def hurry(monkeypatch):
    """A tenth of the patience."""
    monkeypatch.setattr(bucket_lib, "PATIENCE", 3)


@pytest.fixture
def two(tmp_path, folder):
    """A source of shards and one of images."""
    write_codes(tmp_path / "up")
    write_images(tmp_path / "up/images", 5)
    write_lines(tmp_path / "up/x.jsonl", [{"image": f"images/{i}.png", "text": "t"} for i in range(5)])
    put(tmp_path, folder)
    return [
        open_source(SourceConfig(f"{folder}/*.array_record")),
        open_source(SourceConfig(f"{folder}/x.jsonl", "jsonl")),
    ]


@pytest.mark.parametrize("fault", [503, "silence"])
def test_a_read_without_an_answer_ends(fault, two, proxy, hurry):
    if fault == "silence":
        proxy.delay = 30
    else:
        proxy.fails = lambda request: fault
    for source in two:
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"no answer within|can't serve it now") as error:
            source[1]
        assert time.monotonic() - began < 8 and "\n" not in str(error.value)
        assert storage.is_outage(error.value) and "gs://bkt/" in str(error.value)
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"no answer within|can't serve it now"):
            source[2]
        assert time.monotonic() - began < 2 and outages.unanswered.is_set()
        outages.unanswered.clear()
    proxy.fails, proxy.delay = lambda request: None, 0.0
    assert [source[1].key for source in two] == ["r1", "x.jsonl:2"]


@pytest.mark.slow
def test_a_program_without_an_answer_ends_within_a_minute(two, proxy, tmp_path):
    code = """
import sys, time
from mmada_jax.data.sources import SourceConfig, open_source
source = open_source(SourceConfig(sys.argv[1]))
print("opened", flush=True)
input()
try:
    source[3]
except ValueError as error:
    print(error)
"""
    words = [sys.executable, "-c", code, two[0].path]
    with subprocess.Popen(
        words, env=environment(proxy), text=True, cwd=tmp_path,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as program:  # fmt: skip
        assert program.stdout.readline() == "opened\n"
        proxy.delay, began = 1000.0, time.monotonic()
        said, errors = program.communicate("\n", timeout=120)
    # The library itself would ask for a quarter of an hour, and keeps no program from its end.
    assert "there was no answer within 50 s" in said and said.count("\n") == 1 and not errors
    assert program.returncode == 0 and time.monotonic() - began < 75


def test_what_is_refused_is_told_at_once(two, proxy):
    for status, why in ((403, "permission is denied"), (404, "no such object")):
        proxy.fails = lambda request, status=status: status
        for source in two:
            with pytest.raises(ValueError, match=why) as error:
                source[1]
            assert "\n" not in str(error.value) and storage.is_outage(error.value) == (status == 403)


def test_a_shard_that_cannot_be_opened_is_not_called_empty(two, proxy):
    proxy.fails = lambda request: 403 if request.reads else None
    with pytest.raises(OSError, match="permission is denied"):
        open_source(SourceConfig(two[0].path))


def test_a_short_outage_is_waited_for(two, proxy):
    failing = [503] * 2
    proxy.fails = lambda request: failing.pop() if failing else None
    for source in two:
        failing[:] = [503] * 2
        source[1]
        assert not failing


class Rows(pipeline.Turns):
    """Keys of records."""

    def __init__(self, source):
        self.data, self.opened = {"t2i": {"x": SourceConfig(weight=1.0)}}, {"t2i": {"x": source}}
        self.rows, self.seed = {"t2i": 4}, 0

    def _make(self, task, config, record, rng):
        return record.key


def test_an_object_that_cannot_be_read_is_counted_and_an_outage_ends_the_run(two, proxy):
    rows = Rows(two[1])
    proxy.fails = lambda request: 403 if "images%2F3.png" in request.target else None
    skipped = collections.Counter()
    made = [rows.made(step, None, skipped) for step in range(5)]
    assert all(len(row) == 4 and "x.jsonl:4" not in row for row in made)
    assert skipped == {"t2i.x: unreadable": skipped.total()} and skipped.total() >= 4
    count = pipeline.Skipped(0.01)
    with pytest.raises(ValueError, match=r"couldn't be read, more than max_skipped"):
        count.count({"t2i.x: unreadable": 11}, 20)
    proxy.fails = lambda request: 403
    before = len(proxy.requests)
    with pytest.raises(ValueError, match=r"config.data.t2i.x: 3 records, .* permission is denied"):
        rows.made(9, None, skipped)
    assert len(proxy.requests) - before == 3
