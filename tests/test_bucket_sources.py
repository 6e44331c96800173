"""Sources in a bucket give the records that they give from a disk, to threads and processes too."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pickle
import time

import numpy as np
import pytest
from buckets import BUCKET, skip_without_server, upload
from data_files import (
    DEEP,
    POINTER,
    N,
    fresh_cache,
    picture,
    write_every_format,
    write_images,
    write_lines,
)

from mmada_jax import nearby, storage
from mmada_jax.config import to_dict
from mmada_jax.data import pipeline, sources
from mmada_jax.data.records import pack
from mmada_jax.data.sources import SourceConfig, open_source
from mmada_jax.data.sources.paths import below
from mmada_jax.ranges import without_effect
from mmada_jax.train import own
from mmada_jax.train.rl import prompts as prompts_lib
from mmada_jax.train.rl import rollout
from mmada_jax.train.rl.start import FIXED_GROUPS
from mmada_jax.train.runs import parse
from mmada_jax.train.supervised import FIXED, check_run, check_same
from mmada_jax.weights.workdir import claim_workdir

skip_without_server()
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),  # of jax; the child doesn't use it
]


@pytest.fixture(autouse=True)
def cache(tmp_path):
    with fresh_cache(tmp_path / "cache"):
        yield


@pytest.fixture(scope="module")
def disk(tmp_path_factory, tfds_folder):
    """A folder with data of every format."""
    root = tmp_path_factory.mktemp("data")
    (root / "tfds").symlink_to(tfds_folder)
    write_every_format(root)
    return root


@pytest.fixture(scope="module")
def bucket(disk, proxy):
    upload((disk / "tfds").resolve(), "data/tfds")
    return upload(disk, "data")


ODD = "'ä #1%?&+/"
CONFIGS = {
    "prepared": ("prepared", "arrayrecord"),
    "shards by glob": ("prepared/*.array_record", "arrayrecord"),
    "one shard": ("prepared/00001.array_record", "arrayrecord"),
    "a folder with odd characters": (ODD + "prepared [1]*'", "arrayrecord"),
    "tfds": ("tfds", "tfds"),
    "a slice of tfds": ("tfds", "tfds", {"split": "train[25%:50%]", "text": "several"}),
    "tfds with labels": ("tfds", "tfds", {"text": "kind", "labels": "labels.txt"}),
    "tars by braces": ("tars/more/{00000..00001}.tar", "webdataset"),
    "tars by **": ("**/*.tar", "webdataset"),
    "tars of a folder": ("tars", "webdataset"),
    "several tars": ("tars/more/00001.tar tars/more/00000.tar", "webdataset"),
    "captions of json": ("tars/*/*.tar", "webdataset", {"captions": "captions.json"}),
    "captions of csv": ("tars/more/0000?.tar", "webdataset", {"captions": "captions.csv"}),
    "captions beside": ("tars/*/[0-9]*.tar", "webdataset", {"captions": "{dir}/{tar}/{key}.txt"}),
    "parquet with bytes": ("bytes.parquet", "parquet", {"image": "image"}),
    "parquet with paths": ("paths.parquet", "parquet", {"image": "image", "image_root": "images"}),
    "jsonl": ("a.jsonl", "jsonl", {"image_root": "images"}),
    "jsonl with odd names": (ODD + "a b'\"'\"'c.jsonl'", "jsonl"),
    "several jsonl": ("in/{b,c}.jsonl", "jsonl"),
    "jsonl of a folder": ("in", "jsonl", {"image_root": "."}),
    "llava": ("llava.json", "llava", {"image_root": "images"}),
    "classes": ("classes", "imagefolder"),
    "classes with names": ("classes", "imagefolder", {"labels": "names.txt"}),
    "captioned": ("captioned", "imagefolder"),
}


def config_of(name):
    path, kind, *fields = CONFIGS[name]
    return SourceConfig(path, kind, **(fields[0] if fields else {}))


def contents(source):
    """All that a source says; of a record that can't be read its error."""
    records = []
    for i in range(len(source)):
        try:
            records.append(pack(source[i]))
        except ValueError as error:
            records.append(f"{type(error)} {str(error).partition(': record')[2][:9]}")
    return records, source.fingerprint, source.ignored, source.info


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bucket_gives_what_a_disk_gives(name, disk, bucket):
    config = config_of(name)
    local, remote = open_source(config, str(disk)), open_source(config, str(bucket))
    assert contents(remote) == contents(local) and len(remote)
    assert remote.from_bucket and not local.from_bucket
    assert contents(pickle.loads(pickle.dumps(remote))) == contents(local)
    again = open_source(config, str(bucket))  # from what is kept
    assert contents(again) == contents(local)


def test_absolute_names_and_roots_in_other_places(disk, bucket):
    config = config_of("jsonl")
    expected = contents(open_source(config, str(disk)))
    whole = dataclasses.replace(config, path=f"{bucket}/a.jsonl", image_root=f"{bucket}/images")
    upload(disk / "images", "elsewhere")
    for fields, root in (
        ({}, str(bucket)),
        ({"path": whole.path, "image_root": whole.image_root}, "/nowhere"),
        ({"image_root": str(disk / "images")}, str(bucket)),
        ({"image_root": f"gs://{BUCKET}/elsewhere"}, str(bucket)),
        ({"image_root": f"gs://{BUCKET}/elsewhere"}, str(disk)),
    ):
        source = open_source(dataclasses.replace(config, **fields), root)
        assert contents(source) == expected and source.from_bucket


def test_images_in_another_bucket(disk, bucket):
    other = storage.path("gs://other")
    make_bucket(other.bucket)
    for i in range(N):
        (other / f"{i}.png").write_bytes(picture(i))
    config = dataclasses.replace(config_of("jsonl"), image_root=str(other))
    assert (
        contents(open_source(config, str(bucket)))[0]
        == contents(open_source(config_of("jsonl"), str(disk)))[0]
    )


def make_bucket(name):
    from mmada_jax import bucket

    bucket._fs().mkdir(name)


@pytest.mark.parametrize(
    "name",
    ["gs://bkt/secret", "gs:/bkt/secret", "../x", "a/../../x", "/etc/passwd", r"..\x", "..", "file:///x"],
)
def test_no_row_names_a_file_outside_of_its_folder(name, bucket):
    (bucket.parent / "x").write_bytes(picture(1))
    config = SourceConfig("leads/out.jsonl", "jsonl")
    (bucket / "leads/out.jsonl").write_bytes(json.dumps({"image": name, "text": "t"}).encode())
    with pytest.raises(ValueError, match=r"leads out of|no such object"):
        open_source(config, str(bucket))
    if name != "gs:/bkt/secret":  # which is an object below the folder
        with pytest.raises(ValueError, match="leads out of"):
            below(str(bucket), name)


# ---- Threads and processes -----------------------------------------------------------------------

SHARED = ["prepared", "tfds", "captions of json", "parquet with paths", "jsonl", "classes"]


def read_all(source, order=range(N)):
    return [pack(source[i % len(source)]) for i in order]


@pytest.mark.parametrize("name", SHARED)
def test_threads_read_what_one_reads(name, bucket):
    source = pickle.loads(pickle.dumps(open_source(config_of(name), str(bucket))))
    order = np.random.default_rng(0).integers(N, size=4 * N).tolist()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda i: pack(source[i % len(source)]), order))
    assert found == read_all(source, order)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_processes_read_what_one_reads(how, bucket):
    shared = SHARED if how == "spawn" else SHARED[2:]
    opened = {name: open_source(config_of(name), str(bucket)) for name in shared}
    expected = {name: read_all(source) for name, source in opened.items()}
    context = multiprocessing.get_context(how)
    queue = context.Queue()
    process = context.Process(target=all_of_child, args=(opened, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join(10)
    assert process.exitcode == 0


def all_of_child(opened, queue):
    queue.put({name: read_all(source) for name, source in opened.items()})


def test_a_forked_process_is_told_that_it_cannot_read_shards(bucket):
    source = open_source(config_of("prepared"), str(bucket))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=error_of_child, args=(source, queue))
    process.start()
    assert "can't be read by a process that was forked" in queue.get(timeout=60)
    process.join(10)


def error_of_child(source, queue):
    try:
        source[0]
    except ValueError as error:
        queue.put(str(error))


def test_workers_of_the_pipeline_read_a_bucket(bucket, disk):
    def loaded(root, **how):
        source = open_source(config_of("prepared"), str(root))
        return [list(part) for part in pipeline.iterate(Load(source), 0, 6, **how)]

    assert loaded(bucket, threads=2, workers=2) == loaded(bucket, threads=16) == loaded(disk)


@dataclasses.dataclass
class Load:
    source: object

    def __call__(self, step):
        return [pack(self.source[(4 * step + i) % len(self.source)]) for i in range(4)]


# ---- What is wrong is told -----------------------------------------------------------------------


def said(config, root, kind=ValueError):
    with pytest.raises(kind) as error:
        open_source(config, str(root))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_missing_is_named(bucket):
    for path, format in (("nothing/x.jsonl", "jsonl"), ("in/x/y.jsonl", "jsonl"), ("no", "imagefolder")):
        text = said(SourceConfig(path, format), bucket, FileNotFoundError)
        near = f"{bucket}/in" if path.startswith("in") else str(bucket)
        assert f"{bucket}/{path} doesn't exist; the nearest folder that does is {near}" in text
    assert f"no file matches {bucket}/*.tar" in said(SourceConfig("*.tar", "webdataset"), bucket, OSError)
    text = said(SourceConfig("gs://nobody/x.tar", "webdataset"), "", FileNotFoundError)
    assert "gs://nobody" in text
    text = said(SourceConfig("tars", "tfds"), bucket, FileNotFoundError)
    assert "has no dataset_info.json" in text
    text = said(SourceConfig("", "tfds"), bucket.parent, ValueError)
    assert "empty path" in text
    assert "such as gs://bkt/data/tfds" in said(SourceConfig("data", "tfds"), bucket.parent, OSError)


@pytest.fixture
def folder(bucket, request):
    where = bucket.parent / "damaged"
    yield where
    where.rmtree()


def test_damaged_shards(disk, folder):
    shard = (disk / "prepared/00000.array_record").read_bytes()
    for name in ("00000", "00001"):
        (folder / f"{name}.array_record").write_bytes(shard)
    info = {"records": 20, "shards": {"00000.array_record": 10, "00001.array_record": 10}}
    (folder / "dataset.json").write_bytes(json.dumps(info).encode())
    config = SourceConfig("damaged")
    assert len(open_source(config, str(folder.parent))) == 20
    for data in (b"", shard[: len(shard) // 2], shard[:-1], shard[:100], b"\0" * 1000):
        (folder / "00001.array_record").write_bytes(data)
        text = said(config, folder.parent)
        assert "00001.array_record" in text and "delete it and run mmada prepare again" in text
    (folder / "00001.array_record").write_bytes(POINTER)
    assert "00001.array_record is a pointer of git LFS" in said(config, folder.parent)
    (folder / "00001.array_record").unlink()
    assert "00001.array_record is missing; delete" in said(config, folder.parent, FileNotFoundError)


def test_damaged_tars(disk, folder):
    tar = (disk / "tars/more/00000.tar").read_bytes()
    config = SourceConfig("damaged/x.tar", "webdataset")
    for data, why in (
        (tar[:5000], "truncated"),
        (tar[: 3 * 512 + 100], "is damaged after byte"),
        (tar[:8192] + b"\0" * 8192 + tar[16384:], "damaged|goes on at byte"),
        (tar + tar, "goes on at byte"),
        (tar + b"\0" * 100_000, "ends with"),
        (b"", "empty|no tar|truncated"),
        (POINTER, "pointer of git LFS"),
        (b"\x1f\x8b" + tar, "compressed"),
        (DEEP.encode(), "looks like 'llava'"),
    ):
        (folder / "x.tar").write_bytes(data)
        with pytest.raises(ValueError, match=why) as error:
            open_source(config, str(folder.parent))
        assert f"{folder}/x.tar" in str(error.value)
    (folder / "x.tar").write_bytes(tar)  # an object that was written anew is looked at anew
    assert len(open_source(config, str(folder.parent))) == N // 2
    (folder / "y.tar.gz").write_bytes(b"1")
    assert "y.tar.gz is compressed" in said(SourceConfig("damaged", "webdataset"), folder.parent)


@pytest.mark.parametrize("data", [b"PAR1", b"PAR1" + b"\0" * 1000, b""])
def test_damaged_parquet(data, folder):
    (folder / "x.parquet").write_bytes(data)
    text = said(SourceConfig("damaged/x.parquet", "parquet"), folder.parent)
    assert f"{folder}/x.parquet is no whole Parquet file" in text


def test_an_object_that_is_written_anew_is_an_unreadable_record(disk, folder):
    (folder / "a.jsonl").write_bytes((disk / "a.jsonl").read_bytes())
    lines = open_source(SourceConfig("a.jsonl", "jsonl", image_root=str(disk / "images")), str(folder))
    (folder / "a.jsonl").write_bytes(b'{"text": "other"}')
    with pytest.raises(ValueError, match=r"record 'a.jsonl:6'.* has changed since"):
        lines[5]
    shard = folder / "0.array_record"
    shard.write_bytes((disk / "prepared/00000.array_record").read_bytes())
    records = open_source(SourceConfig("*.array_record"), str(folder))
    shard.write_bytes((disk / "prepared/00001.array_record").read_bytes())
    with pytest.raises(ValueError, match=f"{shard} was written anew after it was opened"):
        records[5]
    shard.unlink()
    with pytest.raises(ValueError, match="no such object"):
        records[5]


def test_formats_that_are_tested_are_all(bucket):
    kinds = {config_of(name).format for name in CONFIGS}
    assert kinds == set(sources.FORMATS) - {"digits", "totals"}


# ---- What runs read ------------------------------------------------------------------------------


def test_prompts_of_a_bucket_are_those_of_a_disk(bucket, tmp_path, proxy):
    rows = [{"prompt": f"What is {i}?", "answer": "it", "image": f"images/{i}.png"} for i in range(N)]
    write_images(tmp_path / "rl/images")
    write_lines(tmp_path / "rl/rows.jsonl", [*rows, {"prompt": "Why?", "answer": "so"}])
    upload(tmp_path / "rl", "rl")
    config = prompts_lib.PromptsConfig("rows.jsonl")
    proxy.delay = 0.05
    began = time.monotonic()
    remote = prompts_lib.open_prompts(config, f"gs://{BUCKET}/rl")
    assert time.monotonic() - began < N * proxy.delay  # images are looked at side by side
    proxy.delay = 0.0
    local = prompts_lib.open_prompts(config, tmp_path / "rl")
    assert [(p.text, p.answer) for p in remote] == [(p.text, p.answer) for p in local]
    for a, b in zip(remote[::5], local[::5], strict=True):
        pixels = [np.asarray(rollout.read_image(prompt.image, (8, 8))) for prompt in (a, b)]
        assert (a.image is None and b.image is None) or (pixels[0] == pixels[1]).all()
    where = storage.path(f"gs://{BUCKET}/rl")
    for image, why in (("no.png", r"line 1: it names the image gs://bkt/rl/no.png, which isn't there"),
                       ("rows.jsonl", r"line 1: gs://bkt/rl/rows.jsonl.* cannot identify image"),
                       ("gs://bkt/x.png", r"line 1: .* leads out of gs://bkt/rl")):  # fmt: skip
        (where / "bad.jsonl").write_text(json.dumps(rows[0] | {"image": image}))
        with pytest.raises((OSError, ValueError), match=why) as error:
            prompts_lib.open_prompts(prompts_lib.PromptsConfig("bad.jsonl"), where)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no prompts at gs://bkt/rl/no.jsonl"):
        prompts_lib.open_prompts(prompts_lib.PromptsConfig("no.jsonl"), where)


@pytest.mark.parametrize(
    ("path", "format"),
    [
        ("prepared", "arrayrecord"), ("classes", "imagefolder"), ("tars/more", "webdataset"),
        ("in", "jsonl"), ("llava.json", "llava"), ("bytes.parquet", "parquet"), ("tfds", "tfds"),
    ],
)  # fmt: skip
def test_a_run_of_own_data_knows_the_format_of_a_bucket(path, format, bucket, disk):
    found, local = (own.source_of(f"{root}/{path}") for root in (bucket, disk))
    assert found["format"] == local["format"] == format and found.keys() == local.keys()
    if format != "llava":  # whose images don't lie beside it
        opened = [open_source(SourceConfig(**source)) for source in (found, local)]
        assert contents(opened[0]) == contents(opened[1])


def test_a_run_of_own_data_is_planned_from_a_bucket(bucket, disk):
    plans = []
    for root in (bucket, disk):
        config = {"program": "own", "data": f"{root}/captioned"}
        model, codec, told = own.configurations(config)
        plans.append(json.dumps([model, codec, told]).replace(str(root), "ROOT"))
    assert plans[0] == plans[1]
    with pytest.raises(OSError, match=f"config.data: {bucket}/no doesn't exist; the nearest folder"):
        own.configurations({"program": "own", "data": f"{bucket}/no"})


@pytest.mark.parametrize("program", ["own", "model"])
def test_copies_are_kept_where_the_configuration_says(program, bucket, tmp_path, smoke_config):
    where = tmp_path / "copies"
    config = {"program": "own", "data": f"{bucket}/captioned"} if program == "own" else smoke_config
    check = own.configurations if program == "own" else lambda config: check_run(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"cache_dir 'gs://bkt/x' .*: name a folder of this machine"):
        check(config | {"cache_dir": "gs://bkt/x"})
    with pytest.raises(ValueError, match="cache_gib is 0"):
        check(config | {"cache_dir": str(where), "cache_gib": 0.0})
    if program == "own":
        model, codec, _ = check(config | {"cache_dir": str(where), "cache_gib": 2.0})
        assert {(c["cache_dir"], c["cache_gib"]) for c in (model, codec)} == {(str(where), 2.0)}
        assert len(list(where.glob("*.copy"))) == 8  # four images, four captions
    else:
        nearby.use(str(where), 2.0)
    assert os.environ[nearby.FOLDER] == str(where) and os.environ[nearby.GIB] == "2.0"


def test_where_copies_are_kept_is_no_change_of_a_run(smoke_config, tmp_path):
    run = parse(smoke_config)
    claim_workdir(tmp_path, to_dict(run), None, {})
    check_same(dataclasses.replace(run, cache_dir="/elsewhere", cache_gib=3.0, load_threads=7), tmp_path)
    assert not {"cache_dir", "cache_gib", "load_threads"} & {*FIXED, *FIXED_GROUPS}
    for line in without_effect(dataclasses.replace(run, cache_gib=3.0)):
        assert line.startswith("cache_gib is 3.0, which has no effect: cache_dir is ''")
