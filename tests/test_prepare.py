"""launch/prepare.py: shards that are functions of the source, whatever happens while they are written."""

import dataclasses
import fcntl
import io
import json
import os
import runpy
import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from conftest import ROOT, golden_weights, load_golden
from PIL import Image
from safetensors.numpy import save_file

from mmada_jax.data import images, sources
from mmada_jax.data.records import LeftOut, Record, unpack
from mmada_jax.devices import sharding
from mmada_jax.model.vision import Vision
from mmada_jax.nets import vq
from mmada_jax.serve.api import MMaDA
from mmada_jax.weights import magvit_keys
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.inspect import inspect

PREPARE = str(ROOT / "launch" / "prepare.py")
VQ = vq.Config(32, (1, 2), (1, 1), (1, 2), (1, 1), bits=6)


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


@pytest.fixture
def prepare(monkeypatch, capfd, tmp_path):
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


# ---- What is written -------------------------------------------------------------------------------


def test_shards_are_ranges_of_the_source(prepare, tmp_path):
    records = texts(10)
    records[3] = Record("turns", turns=({"role": "user", "content": "q"},), short="s")
    out, error = prepare("--records_per_shard", 4, source=Source(records))
    assert error is None
    assert out.splitlines() == ["10 records in 3 shards", str(tmp_path / "out")]
    about = dataset(tmp_path / "out")
    assert about == {
        "records": 10,
        "shards": {f"shard-0000{k}-of-00003.array_record": n for k, n in enumerate((4, 4, 2))},
        "skipped": {},
        "source": {"format": "jsonl", "path": "somewhere", "fingerprint": "f"},
        "image_size": None,
        "codes": 0,
        "image_tokenizer": None,
    }
    assert everything(tmp_path / "out") == records


def test_shuffled_once_by_a_seed(prepare, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare("--records_per_shard", 7, "--shuffle", seed, source=Source(texts(30)), out=tmp_path / name)
    a, b, c = (keys(tmp_path / name) for name in "abc")
    assert a == b != c
    assert sorted(a) == sorted(c) == sorted(record.key for record in texts(30))
    assert a != [record.key for record in texts(30)]


def test_images_stay_the_files_that_they_were(prepare, tmp_path):
    files = [encode(picture(0), "JPEG"), encode(picture(1), "WEBP")]
    records = [Record(str(i), file, texts=("t",)) for i, file in enumerate(files)]
    records.append(Record("pixels", picture(2), texts=("t",)))
    records.append(Record("floats", picture(3).astype(np.float32) / 127.5 - 1, texts=("t",)))
    assert prepare(source=Source(records))[1] is None
    found = everything(tmp_path / "out")
    assert [record.image for record in found[:2]] == files
    for i in (2, 3):
        np.testing.assert_array_equal(np.asarray(images.open_image(found[i].image)), picture(i))


# ---- Codes -----------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("tokenizer") / "rgb", VQ)


def api_codes(tokenizer, pixels):
    """What the model of the API would be given."""
    grid = (pixels[0].shape[0] // 2, pixels[0].shape[1] // 2)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    vision = Vision.place(open_folder(tokenizer).params, VQ, grid, mesh)
    model = MMaDA(None, None, None, None, vision.params, VQ, 0, grid, mesh)
    return model.encode(pixels).reshape(len(pixels), -1)


@pytest.mark.parametrize("how", ["crop", "squash", "pad"])
def test_codes_are_those_of_the_api(prepare, tokenizer, tmp_path, how):
    # More than a batch of all devices, and a bad one between.
    files = [encode(picture(i, 16 + i % 9, 16 + i % 7)) for i in range(70)]
    records = [Record(str(i), file, texts=("t",)) for i, file in enumerate(files)]
    records[5] = Record("5", files[5][:100], texts=("t",))
    args = ("--image_tokenizer", tokenizer, "--image_size", 16, "--resize", how, "--max_skipped", 0.1)
    assert prepare(*args, "--records_per_shard", 67, source=Source(records))[1] is None
    found = everything(tmp_path / "out")
    kept = [i for i in range(70) if i != 5]
    assert [record.key for record in found] == [str(i) for i in kept]
    assert all(record.image is None for record in found)
    codes = np.stack([record.codes for record in found])
    pixels = [images.resize(images.open_image(files[i]), 16, how) for i in kept]
    np.testing.assert_array_equal(codes, api_codes(tokenizer, pixels))
    about = dataset(tmp_path / "out")
    assert (about["image_size"], about["codes"]) == (16, 64)
    assert about["image_tokenizer"] == inspect(tokenizer)["sha256"]
    assert about["skipped"] == {"unreadable image": 1}


def test_images_beside_codes(prepare, tokenizer, tmp_path):
    files = [encode(picture(i)) for i in range(3)]
    records = [Record(str(i), file, texts=("t",)) for i, file in enumerate(files)]
    args = ("--image_tokenizer", tokenizer, "--image_size", 16, "--keep_images")
    assert prepare(*args, source=Source(records))[1] is None
    found = everything(tmp_path / "out")
    assert [record.image for record in found] == files
    assert all(record.codes.shape == (64,) for record in found)


def test_a_tokenizer_that_does_not_fit(prepare, tokenizer, tmp_path):
    grey = publish(tmp_path / "grey", dataclasses.replace(VQ, pixel_channels=1))
    settings = load_golden("backbone_mha")[0]
    fields = settings["config"] | {"model_type": "llada"}
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_text(json.dumps(fields))
    save_file(golden_weights(settings), model / "model.safetensors")
    source = Source([Record("k", encode(picture(0)), texts=("t",))])
    for args, message in (
        (("--image_tokenizer", tokenizer), "--image_tokenizer needs --image_size"),
        (("--image_size", 16), "--image_size and --keep_images are for --image_tokenizer"),
        (
            ("--image_tokenizer", tokenizer, "--image_size", 15),
            "sides divisible by 2; images are to have 3 and 15",
        ),
        (("--image_tokenizer", grey, "--image_size", 16), "takes 1 channels"),
        (
            ("--image_tokenizer", model, "--image_size", 16),
            "no image tokenizer but a model of type 'llada'",
        ),
        (("--image_tokenizer", tmp_path, "--image_size", 16), "is no workdir of a training run"),
        (("--records_per_shard", 0), "--records_per_shard is 0; it must be at least 1"),
        (("--max_skipped", 1.5), "--max_skipped is 1.5; it is a share from 0 to 1"),
    ):
        error = prepare(*args, source=source)[1]
        assert error.startswith("error: ") and message in error, error
    assert not (tmp_path / "out").exists()


# ---- Bad records -----------------------------------------------------------------------------------

BAD = {
    "unreadable image": Record("cut", encode(picture(0))[:300], texts=("t",)),
    "no text": Record("mute", encode(picture(0)), texts=("", " ")),
    "unreadable record": ValueError("somewhere: record 'torn': line 7 is no JSON"),
}


def test_bad_records_are_left_out_counted_and_named(prepare, tmp_path):
    records = texts(40)
    for at, bad in zip((0, 11, 39), BAD.values(), strict=True):
        records[at] = bad
    records[20] = Record("bomb", encode(np.zeros((7000, 6000, 3), np.uint8)), texts=("t",))
    records[21] = Record("surrogate", texts=("\ud800",))
    source = Source(records)
    source.ignored = {"no caption": 12}
    out, error = prepare("--records_per_shard", 10, "--max_skipped", 0.2, source=source)
    assert error is None
    assert keys(tmp_path / "out") == [f"k{i}" for i in range(40) if i not in (0, 11, 20, 21, 39)]
    counts = {"unreadable image": 2, "no text": 1, "unreadable record": 2, "no caption": 12}
    assert dataset(tmp_path / "out")["skipped"] == counts
    assert "35 records in 4 shards" in out
    assert all(f"{reason} {n}" in out for reason, n in counts.items())
    assert "record 20 (bomb): unreadable image, the image has 6000x7000 pixels; the limit is" in out
    assert "record 39: unreadable record, somewhere: record 'torn'" in out
    about = json.loads((tmp_path / "out" / "shard-00001-of-00004.json").read_text())
    assert about["records"] == 9
    assert [(skip["index"], skip["key"], skip["reason"]) for skip in about["skipped"]] == [
        (11, "mute", "no text")
    ]


def test_where_codes_are_wanted_an_image_is_needed(prepare, tokenizer, tmp_path):
    records = [Record("k", encode(picture(0)), texts=("t",)), *texts(1)]
    args = ("--image_tokenizer", tokenizer, "--image_size", 16, "--max_skipped", 0.5)
    assert prepare(*args, source=Source(records))[1] is None
    assert keys(tmp_path / "out") == ["k"]
    assert dataset(tmp_path / "out")["skipped"] == {"no image": 1}


def test_too_many_bad_records_end_it_and_a_higher_share_goes_on(prepare, tmp_path):
    records = texts(100)
    records[50], records[60], records[61] = BAD.values()
    args = ("--records_per_shard", 30)
    error = prepare(*args, source=Source(records))[1]
    assert "can't be used, of 100 --max_skipped allows 1: record 50 (cut): unreadable image, " in error
    assert "record 60 (mute): no text" in error
    assert not (tmp_path / "out" / "dataset.json").exists()
    source = Source(records)
    assert prepare(*args, "--max_skipped", 0.03, source=source)[1] is None
    assert min(source.asked) == 60  # two shards are kept, one with a bad record
    assert len(everything(tmp_path / "out")) == 97
    # What was left out counts when it is given again, too.
    assert "--max_skipped allows 1" in prepare(*args, source=Source(records))[1]
    # A shard of which nothing is left is one all the same.
    bad = [BAD["no text"]] * 3
    assert prepare("--records_per_shard", 3, "--max_skipped", 0.5, source=Source(bad + texts(3)),
                   out=tmp_path / "half")[1] is None  # fmt: skip
    assert keys(tmp_path / "half") == ["k0", "k1", "k2"]


def test_the_wrong_source_ends_early(prepare):
    source = Source([BAD["unreadable record"]] * 50_000)
    error = prepare("--max_skipped", 1, source=source)[1]
    assert "records can't be used, of 50,000" in error
    assert len(source.asked) < 2000


# ---- Going on --------------------------------------------------------------------------------------


def same_files(a, b):
    for name in (*dataset(a)["shards"], "dataset.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("at", [0, 5, 13, 19])
def test_what_was_finished_is_kept(prepare, tmp_path, at):
    args, out, whole = ("--records_per_shard", 5), tmp_path / "out", tmp_path / "whole"
    broken = texts(20)
    broken[at] = OSError("the network is gone")
    assert prepare(*args, source=Source(broken))[1] == "error: the network is gone"
    assert not (out / "dataset.json").exists()
    assert not list(out.glob("*.tmp"))
    source = Source(texts(20))
    assert prepare(*args, source=source)[1] is None
    assert sorted(source.asked) == list(range(at // 5 * 5, 20))
    prepare(*args, source=Source(texts(20)), out=whole)
    same_files(out, whole)
    done = Source(texts(20))
    assert prepare(*args, source=done)[0].startswith("20 records in 4 shards")
    assert not done.asked


KILLED = """
import os, runpy, signal, sys
from mmada_jax.data import sources
from mmada_jax.data.records import Record

class Source:
    fingerprint, ignored = "f", {}
    def __len__(self): return 4000
    def __getitem__(self, index):
        if index == 2700:
            os.kill(os.getpid(), signal.SIGKILL)
        return Record(f"k{index}", texts=(f"text {index}",))

sources.open_source = lambda config: Source()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(code, *args, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, PREPARE, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def test_a_kill_costs_no_more_than_the_shard_under_way(prepare, tmp_path):
    args = ("--records_per_shard", 1000)
    killed = run(KILLED, "--out", tmp_path / "out", "--format", "jsonl", "--path", "somewhere", *args)
    assert killed.returncode == -9
    assert not (tmp_path / "out" / "dataset.json").exists()
    source = Source(texts(4000))
    assert prepare(*args, source=source)[1] is None
    assert sorted(source.asked) == list(range(2000, 4000))
    assert keys(tmp_path / "out") == [f"k{i}" for i in range(4000)]


@pytest.mark.parametrize("damage", ["cut", "empty", "deleted", "unsaid"])
def test_a_damaged_shard_is_written_again(prepare, tmp_path, damage):
    args, out = ("--records_per_shard", 5), tmp_path / "out"
    prepare(*args, source=Source(texts(20)))
    name = out / "shard-00002-of-00004.array_record"
    if damage == "cut":
        os.truncate(name, name.stat().st_size - 100)
    elif damage == "empty":
        name.write_bytes(b"")
    elif damage == "deleted":
        name.unlink()
    else:
        name.with_suffix(".json").unlink()
    source = Source(texts(20))
    assert prepare(*args, source=source)[1] is None
    assert sorted(source.asked) == list(range(10, 15))
    assert keys(out) == [f"k{i}" for i in range(20)]


@pytest.mark.parametrize("name", ["prepare.json", "shard-00000-of-00002.json"])
@pytest.mark.parametrize("text", ["", "[]", '{"records": "2"}', "[" * 100_000, "\ufffd", "null"])
def test_what_it_keeps_beside_the_shards_is_named_when_it_is_damaged(prepare, tmp_path, name, text):
    prepare("--records_per_shard", 2, source=Source(texts(4)))
    (tmp_path / "out" / name).write_text(text)
    _, error = prepare("--records_per_shard", 2, source=Source(texts(4)))
    assert error.startswith("error: ")
    assert str(tmp_path / "out") in error
    assert name in error or (name == "prepare.json" and "begun with other settings" in error)


def test_records_with_a_reason_of_their_own_are_counted_by_it(prepare, tmp_path):
    records = [*texts(5), LeftOut("several images", "there is a list of 2 images")]
    source = Source(records)
    source.ignored = {"no image": 3}
    out, error = prepare("--max_skipped", 0.5, source=source)
    assert error is None
    assert dataset(tmp_path / "out")["skipped"] == {"several images": 1, "no image": 3}
    assert "left out: several images 1, no image 3; as record 5: several images, there is a" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--records_per_shard", 6), "records_per_shard is 5 there and 6 now"),
        (("--shuffle", 0), "shuffle is None there and 0 now"),
        (("--text", "caption"), "text is '' there and 'caption' now"),
        (("--resize", "pad"), "resize is 'crop' there and 'pad' now"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(prepare, tmp_path, change, message):
    prepare("--records_per_shard", 5, source=Source(texts(20)))
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    error = prepare("--records_per_shard", 5, *change, source=Source(texts(20)))[1]
    assert f"was begun with other settings ({message})" in error
    assert before == sorted(p.name for p in (tmp_path / "out").iterdir())


def test_other_data_and_other_tokenizers_are_refused_by_name(prepare, tokenizer, tmp_path):
    prepare(source=Source(texts(20)))
    changed = Source(texts(20))
    changed.fingerprint = "g"
    assert "(fingerprint is 'f' there and 'g' now)" in prepare(source=changed)[1]
    assert "source_records is 20 there and 21 now" in prepare(source=Source(texts(21)))[1]
    error = prepare("--image_tokenizer", tokenizer, "--image_size", 16, source=Source(texts(20)))[1]
    sha = inspect(tokenizer)["sha256"]
    assert f"image_tokenizer is None there and {sha!r} now; image_size is None there and 16 now" in error


def test_folders_that_are_not_ours(prepare, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("")
    assert "is there already and holds something else" in prepare(source=Source(texts(2)))[1]
    (out / "thesis.txt").unlink()
    with (out / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is writing to" in prepare(source=Source(texts(2)))[1]
    assert prepare(source=Source(texts(2)))[1] is None


def test_a_source_without_records(prepare, tmp_path):
    assert prepare(source=Source([]))[1] == "error: somewhere holds no records"
    assert not (tmp_path / "out").exists()


# ---- Files -----------------------------------------------------------------------------------------


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_from_tars(prepare, tokenizer, tmp_path):
    files = [encode(picture(i), "JPEG") for i in range(12)]
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:05}.tar", "w") as tar:
            for i in range(6 * number, 6 * number + 6):
                add(tar, f"{i:04}.jpg", files[i] if i != 8 else files[i][:200])
                add(tar, f"{i:04}.txt", f"caption {i}".encode())
    args = ("--format", "webdataset", "--path", tmp_path / "{00000..00001}.tar", "--max_skipped", 0.1)
    args += ("--image_tokenizer", tokenizer, "--image_size", 16, "--records_per_shard", 5)
    assert prepare(*args)[1] is None
    kept = [i for i in range(12) if i != 8]
    found = everything(tmp_path / "out")
    assert [record.texts for record in found] == [(f"caption {i}",) for i in kept]
    pixels = [images.resize(images.open_image(files[i]), 16) for i in kept]
    np.testing.assert_array_equal(np.stack([r.codes for r in found]), api_codes(tokenizer, pixels))
    again = sources.open_source(sources.Config(str(tmp_path / "out")))
    assert len(again) == 11
    np.testing.assert_array_equal(again[10].codes, found[10].codes)


LIMITED = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def test_from_json_lines_and_onto_a_full_disk(prepare, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "texts.jsonl"
    rows = [f"text {i}" for i in range(4)] + [bytes(rng.integers(32, 127, 400_000)).decode()] * 2
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    args = ("--format", "jsonl", "--path", path, "--records_per_shard", 2)
    # bash counts kilobytes: the first two shards fit, the third doesn't.
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); {LIMITED}"
    full = run(code, "--out", tmp_path / "out", *args)
    assert full.returncode == 1
    (error,) = [line for line in full.stderr.splitlines() if line.startswith("error")]
    assert "shard-00002-of-00003.array_record can't be written: " in error
    assert "File too large" in error and "the shards that are finished are kept" in error
    assert "Traceback" not in full.stderr
    assert not list((tmp_path / "out").glob("*00002*"))
    assert len(list((tmp_path / "out").glob("*.array_record"))) == 2
    assert prepare(*args)[1] is None
    assert [record.texts[0] for record in everything(tmp_path / "out")] == rows


def test_speed_and_time_left_are_shown(tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "t"}) + "\n")
    done = run(LIMITED, "--out", tmp_path / "out", "--format", "jsonl", "--path", tmp_path / "texts.jsonl")
    assert done.returncode == 0
    assert "100%  1/1 records" in done.stderr and "records/s  in " in done.stderr
