"""Every format comes back as it was written, to threads and processes too; nothing bad goes unnoticed."""

import concurrent.futures
import dataclasses
import hashlib
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import (
    N,
    picture,
    talk,
    write_images,
    write_lines,
    write_prepared,
    write_shard,
    write_tar,
)

from mmada_jax.data import digits, sources
from mmada_jax.data.records import Record, pack
from mmada_jax.data.sources import FORMATS, SourceConfig, open_source


@pytest.fixture(scope="module")
def formats(tmp_path_factory, tfds_folder):
    """Format -> (config, the Record of each i)."""
    root = tmp_path_factory.mktemp("formats")
    write_prepared(root / "prepared")
    write_images(root / "images")
    rows = [{"image": f"{i}.png", "text": f"caption {i}"} for i in range(N)]
    write_lines(root / "a.jsonl", rows)
    llava = [{"id": i, "image": f"{i}.png"} for i in range(N)]
    for i, row in enumerate(llava):
        row["conversations"] = talk(i, ("human", "gpt"), ("from", "value"), "<image>\n")
    (root / "llava.json").write_text(json.dumps(llava))
    table = {"content": [f"caption {i}" for i in range(N)], "image": [picture(i) for i in range(N)]}
    pq.write_table(pa.table(table | {"other": [0] * N}), root / "a.parquet", row_group_size=5)
    for shard in range(2):
        numbers = range(shard * N // 2, (shard + 1) * N // 2)
        members = [(f"{i:04d}.{s}", b) for i in numbers for s, b in (
            ("png", picture(i)), ("txt", f"caption {i}\n".encode()), ("cls", b"7"))]  # fmt: skip
        write_tar(root / f"{shard:05d}.tar", members)
    for i in range(N):
        (root / "folder" / f"big_cat_{i // 10}").mkdir(parents=True, exist_ok=True)
        (root / "folder" / f"big_cat_{i // 10}" / f"{i:04d}.png").write_bytes(picture(i))

    def caption(key, i):
        return Record(key, picture(i), texts=(f"caption {i}",))

    def prepared(i):
        codes = np.arange(i + 1, dtype=np.int32)
        return Record(f"r{i}", picture(i), codes, (f"caption {i}",), tuple(talk(i)), "short")

    stem = str(root)
    return {
        "arrayrecord": (SourceConfig(f"{stem}/prepared"), prepared),
        "tfds": (SourceConfig(str(tfds_folder), "tfds"), None),
        "webdataset": (
            SourceConfig(f"{stem}/{{00000..00001}}.tar", "webdataset"),
            lambda i: caption(f"0000{i // (N // 2)}/{i:04d}", i),
        ),
        "parquet": (
            SourceConfig(f"{stem}/a.parquet", "parquet", image="image"),
            lambda i: caption(f"a.parquet:{i}", i),
        ),
        "jsonl": (
            SourceConfig(f"{stem}/a.jsonl", "jsonl", image_root=f"{stem}/images"),
            lambda i: caption(f"a.jsonl:{i + 1}", i),
        ),
        "llava": (
            SourceConfig(f"{stem}/llava.json", "llava", image_root=f"{stem}/images"),
            lambda i: Record(f"llava.json:{i}", picture(i), turns=tuple(talk(i))),
        ),
        "imagefolder": (
            SourceConfig(f"{stem}/folder", "imagefolder"),
            lambda i: Record(f"big_cat_{i // 10}/{i:04d}.png", picture(i), texts=(f"big cat {i // 10}",)),
        ),
    }


FILES = [name for name in FORMATS if name not in ("digits", "totals")]


def same(a, b):
    a, b = (dict(vars(record)) for record in (a, b))
    np.testing.assert_array_equal(a.pop("codes"), b.pop("codes"))
    return a == b


def digest(record):
    return hashlib.sha256(pack(record)).hexdigest()


# ---- What all formats have in common ---------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_records_come_back(formats, name):
    config, expect = formats[name]
    source = open_source(config)
    assert len(source) == N
    assert len({source[i].key for i in range(N)}) == N
    assert source.ignored == {}
    if expect:
        assert all(same(source[i], expect(i)) for i in range(N))
        assert same(source[np.int64(3)], expect(3))
    for index in (-1, N, N + 7):
        with pytest.raises(IndexError, match=f"has {N} records, none is number {index}"):
            source[index]


@pytest.mark.parametrize("name", FILES)
def test_threads_read_what_one_reads(formats, name, monkeypatch):
    monkeypatch.setattr(sources.parquet, "CACHED", 12_000)  # so that row groups come and go
    source = open_source(formats[name][0])
    expect = [digest(source[i]) for i in range(N)]
    order = np.random.default_rng(0).integers(N, size=20 * N).tolist()
    fresh = open_source(formats[name][0])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: digest(fresh[i]), order))
    assert found == [expect[i] for i in order]


@pytest.mark.parametrize("name", FILES)
def test_a_copy_reads_the_same(formats, name):
    source = open_source(formats[name][0])
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint == source.fingerprint
    assert [digest(copy[i]) for i in range(N)] == [digest(source[i]) for i in range(N)]


def test_another_process_reads_the_same_and_needs_no_tensorflow(formats, tmp_path):
    opened = {name: open_source(formats[name][0]) for name in FILES}
    (tmp_path / "sources").write_bytes(pickle.dumps(opened))
    code = (
        "import pickle, sys\n"
        "sources = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(*[source[5].key for source in sources.values()], sep='\\n')\n"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sources")], capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:-1] == [source[5].key for source in opened.values()], done.stderr


@pytest.mark.parametrize("name", FILES)
def test_fingerprints_are_stable_and_tell_configurations_apart(formats, name):
    config, _ = formats[name]
    fingerprint = open_source(config).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", fingerprint)
    assert open_source(dataclasses.replace(config, weight=3.0, resize="pad")).fingerprint == fingerprint
    others = [open_source(formats[other][0]).fingerprint for other in FILES if other != name]
    assert fingerprint not in others


def test_paths_are_relative_to_the_root_and_so_are_fingerprints(tmp_path):
    prints = []
    for root in (tmp_path / "a", tmp_path / "b"):
        write_images(root / "images", 2)
        write_lines(root / "x.jsonl", [{"image": "0.png", "text": "t"}])
        source = open_source(SourceConfig("x.jsonl", "jsonl", image_root="images"), str(root))
        assert source[0].image == picture(0)
        prints.append(source.fingerprint)
    assert prints[0] == prints[1]
    write_lines(tmp_path / "b" / "x.jsonl", [{"image": "1.png", "text": "t"}])
    assert (
        open_source(SourceConfig("x.jsonl", "jsonl", image_root="images"), f"{tmp_path}/b").fingerprint
        not in prints
    )


@pytest.mark.parametrize("name", [name for name in FILES if name != "tfds"])
def test_fingerprints_change_with_the_data(tmp_path, name):
    def write(j, count=2):
        (tmp_path / "f" / "c").mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / "c" / "0.png").write_bytes(picture(j))
        write_lines(tmp_path / "x.jsonl", [{"text": f"{j}"}] * count)
        rows = [{"image": "f/c/0.png", "conversations": talk(j)}] * count
        (tmp_path / "x.json").write_text(json.dumps(rows))
        pq.write_table(pa.table({"content": [f"{j}"] * count}), tmp_path / "x.parquet")
        write_tar(tmp_path / "x.tar", [(f"{i}.{s}", b) for i in range(count) for s, b in (
            ("png", picture(j)), ("txt", b"t"))])  # fmt: skip
        write_shard(tmp_path / "x.array_record", [Record(f"{j}", texts=("t",))] * count)

    path = {"arrayrecord": "x.array_record", "webdataset": "x.tar", "llava": "x.json", "imagefolder": "f"}
    config = SourceConfig(path.get(name, f"x.{name}"), name)
    seen = set()
    for j, count in ((0, 2), (1, 2), (1, 3)):
        write(j, count)
        if name == "imagefolder" and count == 3:
            (tmp_path / "f" / "c" / "1.png").write_bytes(picture(1))
        seen.add(open_source(config, str(tmp_path)).fingerprint)
    assert len(seen) == 3


def test_fingerprints_see_both_ends_of_a_large_file(tmp_path):
    def fingerprint(first, last):
        write_lines(tmp_path / "x.jsonl", [{"text": text} for text in (first, "x" * 10**6, last)])
        return open_source(SourceConfig("x.jsonl", "jsonl"), str(tmp_path)).fingerprint

    assert len({fingerprint("a", "a"), fingerprint("b", "a"), fingerprint("a", "b")}) == 3


def test_digits_are_opened_by_kind_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(digits, "open_records", lambda *args: asked.append(args), raising=False)
    open_source(SourceConfig("captions", "digits", split="test"))
    assert asked == [("captions", "test")]


def test_unknown_formats_and_fields_without_use_are_errors(formats):
    with pytest.raises(ValueError, match="unknown format 'csv' of x; known: arrayrecord, tfds"):
        open_source(SourceConfig("x", "csv"))
    config = dataclasses.replace(formats["imagefolder"][0], text="t", captions="c")
    with pytest.raises(ValueError, match="format 'imagefolder' has no use for text, captions"):
        open_source(config)


# ---- Paths -----------------------------------------------------------------------------------------


def lines_at(root, path):
    source = open_source(SourceConfig(path, "jsonl"), str(root))
    return [source[i].texts[0] for i in range(len(source))]


def test_paths_may_be_lists_globs_braces_folders_and_quoted(tmp_path):
    (tmp_path / "d [x]" / "deep").mkdir(parents=True)
    for name in ("a08", "a09", "a10", "d [x]/b", "d [x]/deep/c", "d [x]/._b"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    assert lines_at(tmp_path, "a{08..10}.jsonl") == ["a08", "a09", "a10"]
    assert lines_at(tmp_path, "a{10,08}.jsonl a*.jsonl") == ["a10", "a08", "a09"]
    assert lines_at(tmp_path, "'d [x]'") == ["d [x]/b", "d [x]/deep/c"]
    assert lines_at(tmp_path / "d [x]", "**/*.jsonl") == ["d [x]/b", "d [x]/deep/c"]
    assert lines_at("", str(tmp_path / "a08.jsonl")) == ["a08"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/where/x.jsonl", r"ROOT/no/where/x.jsonl doesn't exist; the nearest folder that does is ROOT$"),
        ("x{0..3}.jsonl", r"ROOT/x1.jsonl doesn't exist"),
        ("*.json", r"no file matches ROOT/\*.json"),
        ("empty", r"no file matches ROOT/empty/\*.jsonl"),
        ("", "empty path"),
        ("x{3..0}.jsonl", r"\{3..0\} in x\{3..0\}.jsonl is neither a range"),
        ("x{a}.jsonl", "neither a range"),
        ("'x", "No closing quotation"),
        (
            "s3://bucket/x.jsonl",
            "s3://bucket/x.jsonl can't be read or written: name a folder of this machine or a bucket",
        ),
        ("blank.jsonl", "blank.jsonl has no record that can be used"),
    ],
)
def test_paths_that_lead_nowhere_are_errors(tmp_path, path, message):
    write_lines(tmp_path / "x0.jsonl", [{"text": "t"}])
    (tmp_path / "blank.jsonl").write_text("\n\r\n\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=message.replace("ROOT", str(tmp_path))):
        open_source(SourceConfig(path, "jsonl"), str(tmp_path))


@pytest.mark.parametrize("given", ["webdataset", "parquet", "jsonl", "llava", "arrayrecord"])
def test_files_of_another_format_are_refused_by_name(formats, given):
    for name in ("webdataset", "parquet", "jsonl", "llava"):
        path = formats[name][0].path
        if name != given:
            with pytest.raises(ValueError, match=f"is not of format '{given}'; it looks like '{name}'"):
                open_source(SourceConfig(path, given))


def test_compressed_files_are_refused(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError, match="is compressed, which has no random access; decompress it first"):
        open_source(SourceConfig("x.tar.gz", "webdataset"), str(tmp_path))


@pytest.mark.parametrize("name", ["tfds", "imagefolder"])
def test_formats_of_folders_want_one(formats, name):
    with pytest.raises(ValueError, match=f"isn't one folder, which format '{name}' expects"):
        open_source(SourceConfig(formats["jsonl"][0].path, name))


# ---- What libraries raise ----------------------------------------------------------------------------


class Odd(Exception):
    """An error of a library, of no type that Python has, which takes more than a message."""

    def __init__(self, one, two):
        super().__init__(one, two)


@pytest.mark.parametrize(
    "error", [Odd(1, 2), TypeError("t"), AssertionError(), RecursionError("r"), KeyError("k"),
              StopIteration(), MemoryError("m"), OverflowError("o"),
              UnicodeDecodeError("utf-8", b"x", 0, 1, "why")]
)  # fmt: skip
@pytest.mark.parametrize("name", FILES)
def test_any_error_on_one_record_is_a_bad_record(formats, name, error, monkeypatch):
    source = open_source(formats[name][0])
    key = source[5].key

    def fail(index):
        raise error

    monkeypatch.setattr(source, "_read", fail)
    with pytest.raises(ValueError, match=r"record '.*[:/].*': .+") as caught:
        source[5]
    assert type(caught.value) is ValueError
    assert caught.value.__cause__ is error
    assert key.rpartition("/")[2] in str(caught.value) or name == "arrayrecord"
