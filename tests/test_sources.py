"""Every format comes back as it was written, to threads and processes too; nothing bad goes unnoticed."""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mmada_jax.data import digits, sources
from mmada_jax.data.records import Record, pack
from mmada_jax.data.sources import FORMATS, Config, open_source

N = 24


def picture(i):
    """A PNG unlike the others, incompressible, of 1 to 2 kB."""
    file = io.BytesIO()
    side = 18 + i % 7
    pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def talk(i, roles=("user", "assistant"), names=("role", "content"), head=""):
    values = (f"{head}question {i}", f"answer {i}")
    return [dict(zip(names, pair, strict=True)) for pair in zip(roles, values, strict=True)]


def write_tar(path, members):
    """Members are (name, bytes), or TarInfos of links and devices."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))


def write_shard(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(pack(record))
    writer.close()


def write_prepared(folder, counts=(10, N - 10)):
    folder.mkdir(exist_ok=True)
    names, at = [f"{i:05d}.array_record" for i in range(len(counts))], 0
    for name, count in zip(names, counts, strict=True):
        write_shard(
            folder / name,
            [
                Record(f"r{i}", picture(i), np.arange(i + 1), (f"caption {i}",), tuple(talk(i)), "short")
                for i in range(at, at + count)
            ],
        )
        at += count
    info = {"records": at, "shards": dict(zip(names, counts, strict=True)), "image_size": 32}
    (folder / "dataset.json").write_text(json.dumps(info | {"image_tokenizer": "ab12", "codes": 0}))
    return info


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_images(folder, count=N):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(picture(i))


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    class SourcesToy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "text": tfds.features.Text(),
                "several": tfds.features.Sequence(tfds.features.Text()),
                "talk": tfds.features.Sequence(
                    {"role": tfds.features.Text(), "content": tfds.features.Text()}
                ),
                "kind": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(N), "test": self._generate_examples(3)}

        def _generate_examples(self, n):
            for i in range(n):
                row = {"image": io.BytesIO(picture(i)), "text": f"caption {i}", "talk": talk(i)}
                yield i, row | {"several": [f"a {i}", f"b {i}"], "kind": ("cat", "dog")[i % 2]}

    folder = tmp_path_factory.mktemp("tfds")
    SourcesToy(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "sources_toy" / "1.0.0"


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
        "arrayrecord": (Config(f"{stem}/prepared"), prepared),
        "tfds": (Config(str(tfds_folder), "tfds"), None),
        "webdataset": (
            Config(f"{stem}/{{00000..00001}}.tar", "webdataset"),
            lambda i: caption(f"0000{i // (N // 2)}/{i:04d}", i),
        ),
        "parquet": (
            Config(f"{stem}/a.parquet", "parquet", image="image"),
            lambda i: caption(f"a.parquet:{i}", i),
        ),
        "jsonl": (
            Config(f"{stem}/a.jsonl", "jsonl", image_root=f"{stem}/images"),
            lambda i: caption(f"a.jsonl:{i + 1}", i),
        ),
        "llava": (
            Config(f"{stem}/llava.json", "llava", image_root=f"{stem}/images"),
            lambda i: Record(f"llava.json:{i}", picture(i), turns=tuple(talk(i))),
        ),
        "imagefolder": (
            Config(f"{stem}/folder", "imagefolder"),
            lambda i: Record(f"big_cat_{i // 10}/{i:04d}.png", picture(i), texts=(f"big cat {i // 10}",)),
        ),
    }


FILES = [name for name in FORMATS if name != "digits"]


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
        source = open_source(Config("x.jsonl", "jsonl", image_root="images"), str(root))
        assert source[0].image == picture(0)
        prints.append(source.fingerprint)
    assert prints[0] == prints[1]
    write_lines(tmp_path / "b" / "x.jsonl", [{"image": "1.png", "text": "t"}])
    assert (
        open_source(Config("x.jsonl", "jsonl", image_root="images"), f"{tmp_path}/b").fingerprint
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
    config = Config(path.get(name, f"x.{name}"), name)
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
        return open_source(Config("x.jsonl", "jsonl"), str(tmp_path)).fingerprint

    assert len({fingerprint("a", "a"), fingerprint("b", "a"), fingerprint("a", "b")}) == 3


def test_digits_are_opened_by_kind_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(digits, "open_records", lambda *args: asked.append(args), raising=False)
    open_source(Config("captions", "digits", split="test"))
    assert asked == [("captions", "test")]


def test_unknown_formats_and_fields_without_use_are_errors(formats):
    with pytest.raises(ValueError, match="unknown format 'csv' of x; known: arrayrecord, tfds"):
        open_source(Config("x", "csv"))
    config = dataclasses.replace(formats["imagefolder"][0], text="t", captions="c")
    with pytest.raises(ValueError, match="format 'imagefolder' has no use for text, captions"):
        open_source(config)


# ---- Paths -----------------------------------------------------------------------------------------


def lines_at(root, path):
    source = open_source(Config(path, "jsonl"), str(root))
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
        ("gs://bucket/x.jsonl", "gs://bucket/x.jsonl is no local path; mount the bucket"),
        ("blank.jsonl", "blank.jsonl has no record that can be used"),
    ],
)
def test_paths_that_lead_nowhere_are_errors(tmp_path, path, message):
    write_lines(tmp_path / "x0.jsonl", [{"text": "t"}])
    (tmp_path / "blank.jsonl").write_text("\n\r\n\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=message.replace("ROOT", str(tmp_path))):
        open_source(Config(path, "jsonl"), str(tmp_path))


@pytest.mark.parametrize("given", ["webdataset", "parquet", "jsonl", "llava", "arrayrecord"])
def test_files_of_another_format_are_refused_by_name(formats, given):
    for name in ("webdataset", "parquet", "jsonl", "llava"):
        path = formats[name][0].path
        if name != given:
            with pytest.raises(ValueError, match=f"is not of format '{given}'; it looks like '{name}'"):
                open_source(Config(path, given))


def test_compressed_files_are_refused(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError, match="is compressed, which has no random access; decompress it first"):
        open_source(Config("x.tar.gz", "webdataset"), str(tmp_path))


@pytest.mark.parametrize("name", ["tfds", "imagefolder"])
def test_formats_of_folders_want_one(formats, name):
    with pytest.raises(ValueError, match=f"isn't one folder, which format '{name}' expects"):
        open_source(Config(formats["jsonl"][0].path, name))


# ---- ArrayRecord -----------------------------------------------------------------------------------


def test_prepared_records_tell_what_they_are(tmp_path):
    info = write_prepared(tmp_path / "p")
    source = open_source(Config("p"), str(tmp_path))
    assert source.info == info | {"image_tokenizer": "ab12", "codes": 0}
    bare = open_source(Config("p/*.array_record"), str(tmp_path))
    assert len(bare) == N
    assert bare.info == {}


def test_shards_that_are_not_whole_are_refused(tmp_path):
    folder = tmp_path / "p"
    write_prepared(folder)
    shard = folder / "00001.array_record"
    whole = shard.read_bytes()

    def refused(message, path="p", kind=ValueError):
        with pytest.raises(kind, match=message):
            open_source(Config(path), str(tmp_path))

    for size in range(0, len(whole) - 1, len(whole) // 7):
        shard.write_bytes(whole[:size])
        refused(
            r"00001.array_record (is no whole|has 0 records instead of 14: it is trunc).*; delete it and"
        )
        refused("00001.array_record (is no whole|has no records).*; fetch", "p/*.array_record")
    write_shard(shard, [Record("r", texts=("t",))] * 13)
    refused("00001.array_record has 13 records instead of 14: it is truncated; delete it and run")
    write_shard(shard, [])
    refused("00001.array_record has no records: it is empty or truncated; fetch", "p/*.array_record")
    shard.unlink()
    refused("the shard .*00001.array_record is missing; delete it", kind=FileNotFoundError)


def test_a_dataset_json_must_fit(tmp_path):
    folder = tmp_path / "p"
    info = write_prepared(folder)
    changes = [{"records": 5}, {"shards": None}, {"shards": {"00000.array_record": "10"}}]
    for change in changes:
        (folder / "dataset.json").write_text(json.dumps(info | change))
        with pytest.raises(ValueError, match=r"dataset.json doesn't add up; prepare the records again"):
            open_source(Config(str(folder)))
    (folder / "dataset.json").write_text(json.dumps(info | {"shards": {"../x": N}}))
    with pytest.raises(ValueError, match=r"path '../x' leads out of"):
        open_source(Config(str(folder)))
    (folder / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset.json is no JSON"):
        open_source(Config(str(folder)))
    with pytest.raises(ValueError, match="is a folder among several paths"):
        open_source(Config(f"{folder} {folder}/00000.array_record"))
    (folder / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset.json doesn't exist; launch/prepare.py writes it"):
        open_source(Config(str(folder)))


def test_a_damaged_record_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "x.array_record"
    write_shard(path, [Record(f"r{i}", picture(i), texts=("t",)) for i in range(N)])
    data = bytearray(path.read_bytes())
    data[data.find(picture(7)[-40:])] ^= 1
    path.write_bytes(data)
    source = open_source(Config(str(path)))
    for i in set(range(N)) - {7}:
        assert source[i].image == picture(i)
    with pytest.raises(ValueError, match=r"x.array_record: record 'x.array_record:7': .+"):
        source[7]


# ---- TFDS ------------------------------------------------------------------------------------------


def test_tfds_features_are_chosen_by_name(tfds_folder, tmp_path):
    def opened(**fields):
        source = open_source(Config(str(tfds_folder), "tfds", **fields))
        return {source[i].image: source[i] for i in range(len(source))}

    assert len(opened(split="test")) == 3
    assert len(opened(split="train[:50%]")) == N // 2
    usual, several, kinds = opened(), opened(text="several"), opened(text="kind", turns="talk")
    (tmp_path / "labels").write_text("cat: a small cat\ndog: a big dog")
    labelled = opened(text="kind", labels=f"{tmp_path}/labels")
    for i in range(N):
        assert usual[picture(i)].texts == (f"caption {i}",)
        assert several[picture(i)].texts == (f"a {i}", f"b {i}")
        assert kinds[picture(i)].texts == (("cat", "dog")[i % 2],)
        assert kinds[picture(i)].turns == tuple(talk(i))
        assert labelled[picture(i)].texts == (("a small cat", "a big dog")[i % 2],)


def test_tfds_folders_that_do_not_fit_are_errors(tfds_folder, tmp_path):
    known = "image, kind, several, talk, text"
    with pytest.raises(ValueError, match=f"has no 'caption'; it has: {known}"):
        open_source(Config(str(tfds_folder), "tfds", text="caption"))
    for split in ("dev", "train[:"):
        with pytest.raises(ValueError, match=f"has no split '{re.escape(split)}'; known: train, test"):
            open_source(Config(str(tfds_folder), "tfds", split=split))
    with pytest.raises(FileNotFoundError, match=r"name the folder of a prepared version, such as .*/1.0.0"):
        open_source(Config(str(tfds_folder.parent), "tfds"))
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="is no dataset that TFDS can read"):
        open_source(Config(str(tmp_path), "tfds"))


def test_tfds_shards_that_are_not_whole_are_refused(tfds_folder, tmp_path):
    for path in tfds_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (shard,) = tmp_path.glob("*train.array_record*")
    config, fingerprint = (
        Config(str(tmp_path), "tfds"),
        open_source(Config(str(tfds_folder), "tfds")).fingerprint,
    )
    assert open_source(config).fingerprint == fingerprint
    write_shard(shard, [Record("r", texts=("t",))] * 5)
    with pytest.raises(ValueError, match=f"has 5 records instead of {N}: it is truncated; prepare the"):
        open_source(config)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"the shard .*train.array_record.* is missing"):
        open_source(config)


# ---- Tars ------------------------------------------------------------------------------------------


def open_tar(path, members, **fields):
    write_tar(path, members)
    return open_source(Config(str(path), "webdataset", **fields))


def test_captions_beside_images(tmp_path):
    both = json.dumps({"caption": "of json", "prompt": "p", "long": ["a", "b"], "brief": "s"}).encode()
    prompt = json.dumps({"prompt": "of the prompt"}).encode()
    members = [
        ("./in/a.b.jpg", picture(9)),  # suffix b.jpg: no image
        ("./in/a.JPG", picture(0)),
        ("in/a.json", both),
        ("in/a.txt", b" of txt\n"),
        ("b.webp", picture(1)),
        ("b.json", prompt),
        ("c.png", picture(2)),
        ("c.caption", "größe".encode()),
    ]
    source = open_tar(tmp_path / "x.tar", members)
    found = {source[i].key: source[i] for i in range(3)}
    texts = {"x/in/a": ("of txt",), "x/b": ("of the prompt",), "x/c": ("größe",)}
    assert {key: record.texts for key, record in found.items()} == texts
    assert [found[key].image for key in texts] == [picture(i) for i in range(3)]
    named = open_tar(tmp_path / "x.tar", members, text="long", short="brief")
    assert named[0].texts == ("a", "b")
    assert named[0].short == "s"
    assert named.ignored == {"no caption": 1}
    with pytest.raises(ValueError, match="record 'x/b': the row has no 'long'; it has: prompt"):
        named[1]


def test_conversations_beside_images(tmp_path):
    row = {"talk": talk(3, ("human", "gpt"), ("from", "value"), "<image>\n"), "caption": "c"}
    members = [("a.png", picture(0)), ("a.json", json.dumps(row).encode())]
    record = open_tar(tmp_path / "x.tar", members, turns="talk")[0]
    assert record.turns == tuple(talk(3))
    assert record.texts == ()


def test_what_no_sample_has_is_left_out_and_counted(tmp_path):
    names = ("link", "hard", "device", "sparse")
    link, hard, device, sparse = (tarfile.TarInfo(f"{name}.jpg") for name in names)
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.png"
    device.type, sparse.type = tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    members = [
        folder, link, hard, device, sparse,
        ("a.png", picture(0)), ("a.txt", b"t"), ("a.pyd", b"code"), ("a.pickle", b"code"),
        ("/etc/b.png", picture(1)), ("../c.png", picture(2)), ("d/../../d.png", picture(3)),
        ("e.txt", b"no image"), ("f.png", picture(4)),
        ("g.png", b""), ("h.png", picture(5)), ("h.txt", b"x" * ((1 << 20) + 1)), ("._a.png", picture(6)),
    ]  # fmt: skip
    source = open_tar(tmp_path / "x.tar", members)
    assert [source[i].key for i in range(len(source))] == ["x/a"]
    assert source.ignored == {
        "link or special file": 4, "path outside of the tar": 3, "empty or too large": 2,
        "no image": 1, "no caption": 2,
    }  # fmt: skip


def test_side_files_of_captions(tmp_path):
    members = [(f"{key}.jpg", picture(i)) for i, key in enumerate(("00a", "00b", "sub/00c"))]
    (tmp_path / "x").mkdir()
    for key in ("00a", "00c"):
        (tmp_path / "x" / f"{key}.caption").write_text(f"first of {key}\nsecond")
    source = open_tar(tmp_path / "x.tar", members, captions="{dir}/{tar}/{key}.caption")
    assert [source[i].texts for i in (0, 2)] == [("first of 00a",), ("first of 00c",)]
    with pytest.raises(ValueError, match=r"record 'x/00b': .*No such file.*/x/00b.caption"):
        source[1]
    relative = Config("x.tar", "webdataset", captions="x/{key}.caption")
    assert open_source(relative, str(tmp_path))[0].texts == ("first of 00a",)
    with pytest.raises(ValueError, match=r"no record that was tried can be read.*x/00a.nothing"):
        open_tar(tmp_path / "x.tar", members, captions="{dir}/{tar}/{key}.nothing")

    (tmp_path / "c.json").write_text(json.dumps({"00a": "one", "00c": ["two", "three"], "00b": []}))
    source = open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/c.json")
    assert [source[i].texts for i in range(len(source))] == [("one",), ("two", "three")]
    assert source.ignored == {"no caption": 1}
    first = source.fingerprint
    (tmp_path / "c.json").write_text(json.dumps({"00a": "two", "sub/00c": ["two", "three"], "00b": []}))
    assert open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/c.json").fingerprint != first

    (tmp_path / "c.txt").write_text("00a one")
    with pytest.raises(ValueError, match=r"c.txt: expected .json, .csv or a pattern"):
        open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/c.txt")
    with pytest.raises(ValueError, match="captions replace the keys long"):
        open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/c.json", text="long")


def test_questions_of_a_csv_become_a_record_each(tmp_path):
    lines = ["id,image,question,solution", '1,a.png,"q, 1","s\n1"', "2,b.jpg,q2,s2", "3,a.png,q3,s3", "4"]
    (tmp_path / "q.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    members = [(f"{key}.png", picture(i)) for i, key in enumerate("abc")]
    source = open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/q.csv")
    found = {source[i].key: source[i] for i in range(len(source))}
    assert {key: tuple(t["content"] for t in record.turns) for key, record in found.items()} == {
        "x/a": ("q, 1", "s\n1"), "x/a#1": ("q3", "s3"), "x/b": ("q2", "s2")
    }  # fmt: skip
    assert [t["role"] for t in found["x/b"].turns] == ["user", "assistant"]
    assert found["x/a#1"].image == picture(0)
    assert source.ignored == {"no caption": 1}
    (tmp_path / "q.csv").write_text("image,question\na.png,q")
    with pytest.raises(ValueError, match=r"q.csv has no 'solution'; it has: image, question"):
        open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/q.csv")


def test_truncated_tars_are_refused_wherever_they_end(tmp_path):
    path = tmp_path / "x.tar"
    members = [(f"{i}.{s}", b) for i in range(3) for s, b in (("png", picture(i)), ("txt", b"t"))]
    write_tar(path, members)
    whole, kinds = path.read_bytes(), set()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for size in range(0, end + 512, 256):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.tar.*; fetch it again") as caught:
            open_source(Config(str(path), "webdataset"))
        kinds.add(re.search("(in the data of|at a header|no tar)", str(caught.value))[0])
        if kinds >= {"at a header"}:
            assert re.search(r"byte \d+", str(caught.value))
    assert kinds == {"in the data of", "at a header", "no tar"}
    damaged = bytearray(whole)
    damaged[end - 1024 + 20] ^= 255  # in the last header
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"x.tar is damaged: there is no header at byte {end - 1024}"):
        open_source(Config(str(path), "webdataset"))


def test_tars_without_samples_and_with_too_many_members_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"has no record that can be used \(no image: 1; no caption: 1\)"):
        open_tar(tmp_path / "x.tar", [("a.txt", b"t"), ("b.png", picture(0))])
    monkeypatch.setattr(sources.webdataset, "MAX_MEMBERS", 3)
    with pytest.raises(ValueError, match="refused after 4 members"):
        open_tar(tmp_path / "x.tar", [(f"{i}.txt", b"t") for i in range(4)])


def test_a_tar_that_shrinks_is_noticed(tmp_path):
    source = open_tar(tmp_path / "x.tar", [("a.txt", b"t"), ("a.png", picture(0))])
    os.truncate(tmp_path / "x.tar", 2000)
    with pytest.raises(
        ValueError, match=r"record 'x/a': .* ends before byte .*changed since it was opened"
    ):
        source[0]


# ---- Parquet ---------------------------------------------------------------------------------------


def open_parquet(path, columns, size=4, **fields):
    pq.write_table(pa.table(columns), path, row_group_size=size)
    return open_source(Config(str(path), "parquet", **fields))


def test_parquet_columns(tmp_path):
    path, image = (
        tmp_path / "x.parquet",
        [{"bytes": picture(0), "path": None}, {"bytes": None, "path": "0.png"}],
    )
    write_images(tmp_path / "images", 2)
    columns = {
        "text": ["a", "b"],
        "content": ["c", "d"],
        "talk": [talk(0), talk(1)],
        "image": image,
        "s": ["x", "y"],
    }
    assert open_parquet(path, columns)[1] == Record("x.parquet:1", texts=("d",))
    assert open_parquet(path, {"text": ["a", "b"]})[1].texts == ("b",)
    chosen = {
        "text": "text",
        "turns": "talk",
        "image": "image",
        "short": "s",
        "image_root": f"{tmp_path}/images",
    }
    source = open_parquet(path, columns, **chosen)
    assert source[1] == Record("x.parquet:1", picture(0), texts=("b",), turns=tuple(talk(1)), short="y")
    assert source[0].image == picture(0)
    assert open_parquet(path, columns, turns="talk")[0] == Record("x.parquet:0", turns=tuple(talk(0)))
    with pytest.raises(
        ValueError, match=r"x.parquet has no 'prompt'; it has: text, content, talk, image, s"
    ):
        open_parquet(path, columns, text="prompt")
    with pytest.raises(ValueError, match="none of the usual columns; name one of: a, b"):
        open_parquet(path, {"a": [1], "b": [2]})
    with pytest.raises(ValueError, match=r"no record that was tried can be read.*text must be a string"):
        open_parquet(path, {"text": [1, 2]})
    columns["content"][1] = None
    with pytest.raises(
        ValueError, match=r"'x.parquet:1': there is nothing under content; the row has: content"
    ):
        open_parquet(path, columns)[1]


def test_parquet_reads_only_what_it_needs_and_keeps_what_fits(tmp_path, monkeypatch):
    read = []
    original = pq.ParquetFile.read_row_group

    def spy(self, group, columns, **kwargs):
        read.append((group, tuple(columns)))
        return original(self, group, columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    columns = {"text": ["x" * 1000] * 40, "huge": ["y" * 9000] * 40}
    source = open_parquet(tmp_path / "x.parquet", columns)
    read.clear()
    for i in range(40):
        source[i]
    assert read == [(group, ("text",)) for group in range(1, 10)]  # the first was tried at the opening
    source[0]
    assert len(read) == 9
    monkeypatch.setattr(sources.parquet, "CACHED", 10_000)
    source = pickle.loads(pickle.dumps(source))
    for i in (0, 39, 0, 39, 20, 0, 39):
        source[i]
        assert source._cached == sum(table.nbytes for table in source._cache.values()) <= 10_000
    fresh = pickle.loads(pickle.dumps(source))
    read.clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(fresh.__getitem__, [3] * 64))
    assert len(read) == 1


def test_parquet_files_follow_each_other(tmp_path):
    for name, texts in (("a", ["0", "1", "2"]), ("b", ["3"]), ("c", ["4", "5"])):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=2)
    source = open_source(Config("{a,b,c}.parquet", "parquet"), str(tmp_path))
    assert [source[i].texts[0] for i in range(len(source))] == list("012345")
    assert source[5].key == "c.parquet:1"


def test_parquet_files_that_are_not_whole_are_refused(tmp_path):
    open_parquet(tmp_path / "x.parquet", {"text": ["a"] * 9})
    whole = (tmp_path / "x.parquet").read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.parquet").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x.parquet is no whole Parquet file: .*; fetch it again"):
            open_source(Config(str(tmp_path), "parquet"))


# ---- JSON ------------------------------------------------------------------------------------------


def test_json_lines(tmp_path):
    write_images(tmp_path / "images", 1)
    rows = [
        {"text": "a"},
        {"text": ["b", " ", "c"], "image": "images/0.png", "short": "s"},
        {"messages": talk(2)},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "x.jsonl").write_text(f"{lines[0]}\r\n\n{lines[1]}\n[1]\n{{]\n{lines[2]}")
    source = open_source(Config("x.jsonl", "jsonl"), str(tmp_path))
    assert len(source) == 5
    assert source[0] == Record("x.jsonl:1", texts=("a",))
    assert source[1] == Record("x.jsonl:3", picture(0), texts=("b", "c"), short="s")
    assert source[4] == Record("x.jsonl:6", turns=tuple(talk(2)))
    for index, reason in ((2, "line 4: expected a JSON object, found"), (3, "line 5: Expecting")):
        with pytest.raises(ValueError, match=f"x.jsonl: record 'x.jsonl:{index + 2}': {reason}"):
            source[index]


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"text": "a"}, {"text": "caption"}, "the row has no 'caption'; it has: text"),
        ({"text": "a"}, {"short": "brief"}, "the row has no 'brief'"),
        ({"x": 1, "y": 2}, {}, "nothing under text or caption or turns.*; the row has: x, y"),
        ({"text": 7}, {}, "text must be a string or a list of them, not"),
        ({"text": {"a": 1}}, {}, "text must be a string"),
        ({"turns": [{"role": "tool", "content": "x"}]}, {}, "turn 0 has role 'tool'"),
        ({"turns": "hello"}, {}, "turn 0 has role None"),
        ({"turns": [*talk(0), {"role": "user"}]}, {}, "turn 2 has role 'user' and content None"),
        ({"turns": [{"role": ["user"], "content": "x"}]}, {}, "unhashable"),
        ({"text": "a", "image": "../x.png"}, {}, r"path '\.\./x\.png' leads out of"),
        ({"text": "a", "image": "/etc/passwd"}, {}, "path '/etc/passwd' leads out of"),
        ({"text": "a", "image": "b/../../x.png"}, {}, "leads out of"),
        ({"text": "a", "image": 7}, {}, "an image is a path or up to .* bytes, not int"),
        ({"text": "a", "image": "none.png"}, {}, "No such file"),
        ({"text": "a", "image": "empty.png"}, {}, "0 bytes in .*empty.png, expected 1 to"),
        ({"text": "a", "image": "."}, {}, "directory|expected 1 to|bytes in"),
        ({"text": "a", "image": "\0"}, {}, "null"),
    ],
)
def test_rows_that_are_no_records_are_errors(tmp_path, row, fields, message):
    (tmp_path / "empty.png").touch()
    write_lines(tmp_path / "x.jsonl", [row])
    with pytest.raises(ValueError, match=f"no record that was tried can be read.*x.jsonl:1': .*{message}"):
        open_source(Config("x.jsonl", "jsonl", **fields), str(tmp_path))
    write_lines(tmp_path / "x.jsonl", [row, {"caption": "c", "brief": "b", "text": "t"}])
    source = open_source(Config("x.jsonl", "jsonl", **fields), str(tmp_path))
    assert source[1].texts
    with pytest.raises(ValueError, match=message):
        source[0]


def test_deep_json_is_a_bad_record_and_no_crash(tmp_path):
    (tmp_path / "x.jsonl").write_text("[" * 200_000 + "\n" + '{"text": "a"}\n')
    write_lines(tmp_path / "y.jsonl", [{"text": "a"}])
    deep = open_source(Config("y.jsonl x.jsonl", "jsonl"), str(tmp_path))
    with pytest.raises(ValueError, match="recursion"):
        deep[1]
    assert deep[2].texts == ("a",)


def test_llava_rows(tmp_path):
    write_images(tmp_path, 2)
    pair = ("human", "gpt")
    first = talk(0, pair, ("from", "value"))
    first[0]["value"] += "\n<image>"
    rows = [
        {"image": "0.png", "conversations": first + talk(1, pair, ("from", "value"), "<image>\n")},
        {"id": "no image", "conversations": first},
        {"image": "1.png", "prompt": "<image>\nquestion 1", "response": "answer 1"},
        {"image": ["0.png", "1.png"], "conversations": first},
        {"image": "0.png", "conversations": []},
        {"image": "0.png"},
        {"image": "0.png", "prompt": "p"},
        "row",
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    source = open_source(Config("x.json", "llava"), str(tmp_path))
    assert source.ignored == {"no image": 3}
    assert len(source) == 5
    later = talk(1, head="<image>\n")  # only the first question has the place of the image
    assert source[0] == Record("x.json:0", picture(0), turns=(*talk(0), *later))
    assert source[1] == Record("x.json:2", picture(1), turns=tuple(talk(1)))
    for index in (2, 3, 4):
        with pytest.raises(ValueError, match=r"nothing under conversations|role 'gpt' and content None"):
            source[index]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"conversations": []}]', r"no record that can be used \(no image: 1\)"),
        ('[{"image": "0.png", "question": "q"}]', "no record .* can be read.*it?.*has: image, question"),
        ('[{"image": "1.png", "prompt": "q", "response": "r"}]', "no record that was tried .*1.png"),
        ("[1, 2", "x.json is no JSON .*; expected a list of"),
        (" {}", "x.json holds a dict; expected a list of"),
        ("[]", "it is empty"),
    ],
)
def test_llava_files_without_use_are_refused(tmp_path, text, message):
    write_images(tmp_path, 1)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(Config("x.json", "llava"), str(tmp_path))


# ---- Folders of images -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        ("0: tench, Tinca tinca\n1: goldfish\n", ["tench, Tinca tinca", "goldfish"]),
        ("n02 gold fish\nn01\ttench\n", ["tench", "gold fish"]),
        ("n02: a: b\nn01: tench\nn03: other", ["tench", "a: b"]),
        (None, ["n01", "n02"]),
    ],
)
def test_names_of_classes(tmp_path, lines, texts):
    for i, name in enumerate(("n02", "n01")):
        write_images(tmp_path / "images" / name, i + 1)
    (tmp_path / "images" / "n01" / "readme.txt").write_text("no image")
    (tmp_path / "images" / ".cache").mkdir()
    if lines:
        (tmp_path / "labels").write_text(lines)
    config = Config("images", "imagefolder", labels="labels" if lines else "")
    source = open_source(config, str(tmp_path))
    assert [source[i].key for i in range(3)] == ["n01/0.png", "n01/1.png", "n02/0.png"]
    assert [source[i].texts for i in range(3)] == [(texts[0],), (texts[0],), (texts[1],)]


@pytest.mark.parametrize(
    ("lines", "missing"),
    [
        ("n01: a", "'n02' \\(1 of 2"),
        ("0: a", "'n01' \\(2 of 2"),
        ("0: a\n1: b\n2: c", "'n01' \\(2 of 2"),  # of more classes than there are: another order
        ("n01: a\nn02:", "'n02' \\(1 of 2"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_errors(tmp_path, lines, missing):
    for name in ("n01", "n02"):
        write_images(tmp_path / "images" / name, 1)
    (tmp_path / "labels").write_text(lines)
    with pytest.raises(ValueError, match=f"labels names no class {missing}"):
        open_source(Config("images", "imagefolder", labels="labels"), str(tmp_path))


def test_folders_without_classes_or_images_are_errors(tmp_path):
    write_images(tmp_path / "flat", 1)
    with pytest.raises(ValueError, match="flat has no folders; expected one for each class"):
        open_source(Config("flat", "imagefolder"), str(tmp_path))
    (tmp_path / "bare" / "class").mkdir(parents=True)
    with pytest.raises(ValueError, match="bare has no record that can be used"):
        open_source(Config("bare", "imagefolder"), str(tmp_path))
