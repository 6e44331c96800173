"""launch/prepare.py: shards that are functions of the source; what is left out."""

import dataclasses
import io
import json
import re
import tarfile

import jax
import numpy as np
import pytest
from conftest import golden_weights, load_golden
from prepare_run import (
    VQ,
    Source,
    dataset,
    encode,
    everything,
    keys,
    picture,
    preparer,
    publish,
    published,
    run,
    texts,
)
from safetensors.numpy import save_file

from mmada_jax.data import images, sources
from mmada_jax.data.records import Record
from mmada_jax.devices import sharding
from mmada_jax.model.model import Model
from mmada_jax.model.vision import Vision
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.inspect import inspect

prepare = pytest.fixture(preparer)
tokenizer = pytest.fixture(scope="module")(published)

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


def api_codes(tokenizer, pixels):
    """What the model of the API would be given."""
    grid = (pixels[0].shape[0] // 2, pixels[0].shape[1] // 2)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    vision = Vision.place(open_folder(tokenizer).params, VQ, mesh)
    model = Model(None, None, None, vision.params, VQ, 0, grid, mesh)
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
    again = sources.open_source(sources.SourceConfig(str(tmp_path / "out")))
    assert len(again) == 11
    np.testing.assert_array_equal(again[10].codes, found[10].codes)


RUN = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def test_speed_and_time_left_are_shown(tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "t"}) + "\n")
    # A run that takes less than ten seconds would show nothing.
    code = f"from mmada_jax import progress; progress.IN_LOG = 0.0; {RUN}"
    done = run(code, "--out", tmp_path / "out", "--format", "jsonl", "--path", tmp_path / "texts.jsonl")
    assert done.returncode == 0
    assert re.search(r"^out: +100%.* 1\.00/1\.00 \[00:00<00:00, .* records/s\]$", done.stderr, re.M)
