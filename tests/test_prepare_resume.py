"""launch/prepare.py again and again in one folder: what is kept, what is written anew, what is refused."""

import fcntl
import json
import os

import numpy as np
import pytest
from prepare_run import Source, dataset, everything, keys, preparer, published, run, texts

from mmada_jax.data.records import LeftOut
from mmada_jax.weights.inspect import inspect

prepare = pytest.fixture(preparer)
tokenizer = pytest.fixture(scope="module")(published)

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
