"""Rows of Parquet come back, whoever wrote them and however they hold a conversation."""

import concurrent.futures
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import (
    DEEP,
    POINTER,
    picture,
    talk,
    write_images,
)

from mmada_jax.data import sources
from mmada_jax.data.records import LeftOut, Record
from mmada_jax.data.sources import SourceConfig, open_source


def open_parquet(path, columns, size=4, **fields):
    pq.write_table(pa.table(columns), path, row_group_size=size)
    return open_source(SourceConfig(str(path), "parquet", **fields))


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
    # What is said about a picture comes with it, though nobody asked for its column.
    assert open_parquet(path, columns, turns="talk")[0] == Record(
        "x.parquet:0", picture(0), turns=tuple(talk(0))
    )
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


@pytest.mark.parametrize("name", ["turns", "messages", "conversations"])
def test_conversations_are_found_by_their_usual_names(tmp_path, name):
    images = [[{"bytes": picture(0), "path": None}], [], [{"bytes": None, "path": None}]]
    record, *others = open_parquet(tmp_path / "x.parquet", {name: [talk(0)] * 3, "images": images})
    assert record == Record("x.parquet:0", picture(0), turns=tuple(talk(0)))
    assert [other.image for other in others] == [None, None]


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
    source = open_source(SourceConfig("{a,b,c}.parquet", "parquet"), str(tmp_path))
    assert [source[i].texts[0] for i in range(len(source))] == list("012345")
    assert source[5].key == "c.parquet:1"


def test_parquet_files_that_are_not_whole_are_refused(tmp_path):
    open_parquet(tmp_path / "x.parquet", {"text": ["a"] * 9})
    whole = (tmp_path / "x.parquet").read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.parquet").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x.parquet is no whole Parquet file: .*; fetch it again"):
            open_source(SourceConfig(str(tmp_path), "parquet"))


TURNS = [{"from": "human", "value": "<image> q"}, {"from": "gpt", "value": "a"}]
PARTS = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "q"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
]


@pytest.mark.parametrize(
    "value",
    [
        TURNS,
        {"from": ["human", "gpt"], "value": ["<image> q", "a"]},
        json.dumps(TURNS),
        json.dumps({"role": ["user", "assistant"], "content": ["q<image>", "a"]}),
        [json.dumps(turn) for turn in TURNS],
        PARTS,
        json.dumps(PARTS),
        {"role": ["user", "assistant"], "content": [turn["content"] for turn in PARTS]},
        [
            {"role": "user", "content": {"type": ["image", "text"], "text": [None, "q"]}},
            {"role": "assistant", "content": {"type": ["text"], "text": ["a"]}},
        ],
        [turn | {"role": None, "content": None} for turn in TURNS],
    ],
)
def test_conversations_in_the_forms_that_writers_make(tmp_path, value):
    source = open_parquet(tmp_path / "x.parquet", {"talk": pa.array([value])}, turns="talk")
    record = Record("x.parquet:0", turns=(
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    ), lacks_image=True)  # fmt: skip
    assert source[0] == record


@pytest.mark.parametrize(
    "value", ["no JSON", "7", DEEP, json.dumps({"role": "user"}),
              json.dumps([{"role": "user", "content": [7]}]),
              json.dumps([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]),
              json.dumps({"role": ["user"], "content": ["q", "a"]})]
)  # fmt: skip
def test_what_is_no_conversation_is_a_bad_record(tmp_path, value):
    rows = {"talk": [value, json.dumps(TURNS)]}
    source = open_parquet(tmp_path / "x.parquet", rows, turns="talk")
    assert len(source[1].turns) == 2
    with pytest.raises(ValueError, match=r"record 'x.parquet:0': "):
        source[0]


def test_a_list_of_one_image_is_an_image(tmp_path):
    write_images(tmp_path / "images", 2)
    as_bytes, as_path = {"bytes": picture(0), "path": None}, {"bytes": None, "path": "1.png"}
    path, fields = tmp_path / "x.parquet", {"image": "images", "image_root": f"{tmp_path}/images"}
    for values in (
        [[as_bytes], [as_path], [], None, [as_bytes, as_path]],
        [[picture(0)], [picture(1)], [], None, [picture(0), picture(1)]],
        [{"bytes": [x["bytes"] for x in xs or ()], "path": [x["path"] for x in xs or ()]}
         for xs in ([as_bytes], [as_path], [], [], [as_bytes, as_path])],
    ):  # fmt: skip
        source = open_parquet(path, {"text": list("abcde"), "images": pa.array(values)}, **fields)
        assert [source[i].image for i in range(4)] == [picture(0), picture(1), None, None]
        with pytest.raises(LeftOut, match=r"'x.parquet:4': there is a list of 2 images") as caught:
            source[4]
        assert caught.value.why == "several images"


def test_pages_whose_checksum_is_wrong_are_bad_records(tmp_path):
    path, text = tmp_path / "x.parquet", "an ordinary caption of some length"
    table = pa.table({"text": [f"{text} {i}" for i in range(8)]})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, path, row_group_size=4, **options)
    data = bytearray(path.read_bytes())
    data[data.find(f"{text} 5".encode()) + 3] ^= 1
    path.write_bytes(data)
    source = open_source(SourceConfig(str(path), "parquet"))
    assert [source[i].texts[0] for i in range(4)] == [f"{text} {i}" for i in range(4)]
    for i in range(4, 8):
        with pytest.raises(ValueError, match=f"record 'x.parquet:{i}': .*CRC"):
            source[i]


def test_any_file_may_be_a_pointer(tmp_path):
    for name in "ab":
        open_parquet(tmp_path / f"{name}.parquet", {"text": ["t"]})
    (tmp_path / "b.parquet").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"b.parquet is a pointer of git LFS.*git lfs pull"):
        open_source(SourceConfig(str(tmp_path), "parquet"))
