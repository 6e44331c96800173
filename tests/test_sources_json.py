"""Rows of JSON: each is a record, is left out and counted, or is an error that names it."""

import json
import os

import pytest
from data_files import DEEP, POINTER, picture, talk, write_images, write_lines

from mmada_jax.data.records import LeftOut, Record
from mmada_jax.data.sources import SourceConfig, open_source


def test_json_lines(tmp_path):
    write_images(tmp_path / "images", 1)
    rows = [
        {"text": "a"},
        {"text": ["b", " ", "c"], "image": "images/0.png", "short": "s"},
        {"messages": talk(2)},
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "x.jsonl").write_text(f"{lines[0]}\r\n\n{lines[1]}\n[1]\n{{]\n{lines[2]}")
    source = open_source(SourceConfig("x.jsonl", "jsonl"), str(tmp_path))
    assert len(source) == 5
    assert source[0] == Record("x.jsonl:1", texts=("a",))
    assert source[1] == Record("x.jsonl:3", picture(0), texts=("b", "c"), short="s")
    assert source[4] == Record("x.jsonl:6", turns=tuple(talk(2)))
    for index, reason in (
        (2, "line 4 holds an array, expected an object"),
        (3, "line 5 is no JSON: Expecting"),
    ):
        with pytest.raises(ValueError, match=f"x.jsonl: record 'x.jsonl:{index + 2}': {reason}"):
            source[index]


def test_lines_of_spaces_are_no_rows(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\n   \n{"text": "a"}\n\t \r\n \r\n{"text": "b"}\n    ')
    source = open_source(SourceConfig("x.jsonl", "jsonl"), str(tmp_path))
    assert [source[i] for i in range(len(source))] == [
        Record("x.jsonl:3", texts=("a",)), Record("x.jsonl:6", texts=("b",)),
    ]  # fmt: skip


def test_roles_by_the_names_that_data_sets_have(tmp_path):
    names = [
        ("User", "Assistant"), ("HUMAN", "GPT"), ("human", "chatgpt"), ("human", "bard"),
        ("human", "bing"), ("user", "model"), (" user", "assistant "),
    ]  # fmt: skip
    rows = [
        {"messages": [{"role": q, "content": "q"}, {"role": a, "content": "a"}], "text": "a<image>"}
        for q, a in names
    ]
    write_lines(tmp_path / "x.jsonl", rows)
    source = open_source(SourceConfig("x.jsonl", "jsonl"), str(tmp_path))
    want = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    assert [source[i].turns for i in range(len(source))] == [want] * len(rows)


@pytest.mark.parametrize(
    "image", [{"bytes": None, "path": None}, {"bytes": None, "path": ""}, [None], [""]]
)
def test_an_image_of_nothing_is_none(tmp_path, image):
    rows = [{"image": image, "conversations": talk(0)}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    write_lines(tmp_path / "x.jsonl", rows)
    config = SourceConfig("x.json", "llava")
    with pytest.raises(ValueError, match=r"no record that can be used .no image: 1"):
        open_source(config, str(tmp_path))
    assert open_source(config, str(tmp_path), with_images=False)[0].turns == tuple(talk(0))
    assert open_source(SourceConfig("x.jsonl", "jsonl"), str(tmp_path))[0].image is None


def test_llavas_rows_may_have_messages(tmp_path):
    write_images(tmp_path, 1)
    (tmp_path / "x.json").write_text(json.dumps([{"images": ["0.png"], "messages": talk(0)}]))
    source = open_source(SourceConfig("x.json", "llava"), str(tmp_path))
    assert source[0] == Record("x.json:0", picture(0), turns=tuple(talk(0)))


def test_the_place_of_an_image_leaves_its_captions(tmp_path):
    write_images(tmp_path, 1)
    rows = [
        {"text": ["<image>\na cat", "<image>"], "short": "<image> cat", "image": "0.png"},
        {"text": "a <image>"},
    ]
    write_lines(tmp_path / "x.jsonl", rows)
    source = open_source(SourceConfig("x.jsonl", "jsonl"), str(tmp_path))
    assert source[0] == Record("x.jsonl:1", picture(0), texts=("a cat",), short="cat")
    assert source[1].texts == ("a <image>",)  # markup, about no image


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            {"text": "a", "image": {"url": "a.png"}},
            {},
            "an image is given by url, not by its bytes or path",
        ),
        (
            {"turns": {"role": ["user"], "content": ["q", "a"]}},
            {},
            "different lengths: 1 under role, 2 under",
        ),
        ({"text": "a"}, {"text": "caption"}, "the row has no 'caption'; it has: text"),
        ({"text": "a"}, {"short": "brief"}, "the row has no 'brief'"),
        ({"x": 1, "y": 2}, {}, "nothing under text or caption or turns.*; the row has: x, y"),
        ({"text": 7}, {}, "text must be a string or a list of them, not"),
        ({"text": {"a": 1}}, {}, "text must be a string"),
        ({"turns": [{"role": "tool", "content": "x"}]}, {}, "turn 0 has role 'tool'"),
        ({"turns": "hello"}, {}, "the text 'hello' is no JSON"),
        ({"turns": [*talk(0), {"role": "user"}]}, {}, "turn 2 has role 'user' and content None"),
        ({"turns": [{"role": ["user"], "content": "x"}]}, {}, "unhashable"),
        ({"text": "a", "image": "../x.png"}, {}, r"path '\.\./x\.png' leads out of"),
        ({"text": "a", "image": "/etc/passwd"}, {}, "path '/etc/passwd' leads out of"),
        ({"text": "a", "image": "b/../../x.png"}, {}, "leads out of"),
        ({"text": "a", "image": 7}, {}, "an image is a path or up to .* bytes, not int"),
        ({"text": "a", "image": "none.png"}, {}, "No such file"),
        ({"text": "a", "image": "empty.png"}, {}, "0 bytes in .*empty.png, expected 1 to"),
        ({"text": "a", "image": "."}, {}, "is no regular file"),
        ({"text": "a", "image": "\0"}, {}, "null"),
    ],
)
def test_rows_that_are_no_records_are_errors(tmp_path, row, fields, message):
    (tmp_path / "empty.png").touch()
    write_lines(tmp_path / "x.jsonl", [row])
    with pytest.raises(ValueError, match=f"no record that was tried can be read.*x.jsonl:1': .*{message}"):
        open_source(SourceConfig("x.jsonl", "jsonl", **fields), str(tmp_path))
    write_lines(tmp_path / "x.jsonl", [row, {"caption": "c", "brief": "b", "text": "t"}])
    source = open_source(SourceConfig("x.jsonl", "jsonl", **fields), str(tmp_path))
    assert source[1].texts
    with pytest.raises(ValueError, match=message):
        source[0]


def test_deep_json_is_a_bad_record_and_no_crash(tmp_path):
    (tmp_path / "x.jsonl").write_text("[" * 200_000 + "\n" + '{"text": "a"}\n')
    write_lines(tmp_path / "y.jsonl", [{"text": "a"}])
    deep = open_source(SourceConfig("y.jsonl x.jsonl", "jsonl"), str(tmp_path))
    with pytest.raises(ValueError, match="line 1 is JSON that is nested too deeply"):
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
    source = open_source(SourceConfig("x.json", "llava"), str(tmp_path))
    assert source.ignored == {"no image": 1, "several images": 1, "no object": 1}
    assert len(source) == 5
    assert source[0] == Record("x.json:0", picture(0), turns=(*talk(0), *talk(1)))
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
        ("[1, 2", "x.json is no JSON: .*; expected a list of"),
        (" {}", "x.json holds an object, expected an array; expected a list of"),
        ("[]", "it is empty"),
    ],
)
def test_llava_files_without_use_are_refused(tmp_path, text, message):
    write_images(tmp_path, 1)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(SourceConfig("x.json", "llava"), str(tmp_path))


def about(**image):
    return {**image, "conversations": talk(0, ("human", "gpt"), ("from", "value"), "<image> ")}


def test_a_list_of_one_image_is_an_image(tmp_path):
    write_images(tmp_path, 2)
    rows = [
        about(image=["0.png"]), about(images=["1.png"]), about(images=[{"path": "0.png"}]),
        about(image="", images=["1.png"]), about(image=["0.png", "1.png"]),
    ]  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(rows))
    write_lines(tmp_path / "x.jsonl", rows)
    llava = open_source(SourceConfig("x.json", "llava"), str(tmp_path))
    lines = open_source(SourceConfig("x.jsonl", "jsonl"), str(tmp_path))
    for source in (llava, lines):
        assert [source[i].image for i in range(4)] == [picture(i) for i in (0, 1, 0, 1)]
    assert llava.ignored == {"several images": 1}
    with pytest.raises(LeftOut, match=r"x.jsonl:5': there is a list of 2 images") as caught:
        lines[4]
    assert caught.value.why == "several images"


@pytest.mark.parametrize("form", ["llava", "jsonl"])
def test_the_place_of_an_image_goes_from_every_turn(tmp_path, form):
    write_images(tmp_path, 1)
    contents = ["<image>", "What <image>\r\nis it?", "It is <image>.", "<image>", "<image> Red"]
    roles = ["system", "human", "gpt", "human", "gpt"]
    turns = [{"from": role, "value": text} for role, text in zip(roles, contents, strict=True)]
    rows = [{"image": "0.png", "conversations": turns}]
    (tmp_path / "x").write_text(json.dumps(rows if form == "llava" else rows[0]))
    record = open_source(SourceConfig("x", form), str(tmp_path))[0]
    assert [t["content"] for t in record.turns] == ["What\r\nis it?", "It is.", "", "Red"]
    assert not record.lacks_image


def test_a_conversation_about_an_image_that_is_not_there_says_so(tmp_path):
    markup = {"role": "assistant", "content": "An RSS feed has <image> in <channel>."}
    rows = [{"turns": talk(0, head="<image>\n")}, {"turns": talk(0)}, {"turns": [talk(0)[0], markup]}]
    write_lines(tmp_path / "x.jsonl", rows)
    source = open_source(SourceConfig("x.jsonl", "jsonl"), str(tmp_path))
    assert [source[i].lacks_image for i in range(3)] == [True, False, False]
    assert source[0].turns == source[1].turns
    assert source[2].turns[1] == markup


def test_rows_of_llava_about_images_or_about_none(tmp_path):
    write_images(tmp_path, 1)
    rows = [
        about(),
        about(image="0.png"),
        about(image=[]),
        about(video="v.mp4"),
        about(images=["0.png"] * 2),
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with_images = open_source(SourceConfig("x.json", "llava"), str(tmp_path))
    without = open_source(SourceConfig("x.json", "llava"), str(tmp_path), with_images=False)
    assert [with_images[i].key for i in range(len(with_images))] == ["x.json:1"]
    assert [without[i].key for i in range(len(without))] == ["x.json:0", "x.json:2"]
    assert with_images.ignored == {"no image": 2, "video or audio": 1, "several images": 1}
    assert without.ignored == {"one image": 1, "video or audio": 1, "several images": 1}
    assert with_images.fingerprint != without.fingerprint


def test_a_byte_order_mark_is_no_content(tmp_path):
    row = {"text": "a", "conversations": talk(0), "image": "0.png"}
    write_images(tmp_path, 1)
    (tmp_path / "x.jsonl").write_text("".join(f"\ufeff{json.dumps(row)}\n" for _ in range(2)))
    (tmp_path / "x.json").write_text("\ufeff" + json.dumps([row]))
    lines = open_source(SourceConfig("x.jsonl", "jsonl"), str(tmp_path))
    assert [lines[i].texts for i in range(2)] == [("a",), ("a",)]
    assert open_source(SourceConfig("x.json", "llava"), str(tmp_path))[0].turns == tuple(talk(0))


@pytest.mark.parametrize(("form", "text"), [("llava", DEEP), ("llava", "[" + DEEP), ("llava", "[\x00]")])
def test_lists_that_are_no_json_are_one_line_that_names_the_file(tmp_path, form, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x.json is (JSON that is nested too deeply|no JSON).*; exp"):
        open_source(SourceConfig("x.json", form), str(tmp_path))


def test_pointers_and_pipes_are_named_and_never_waited_for(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(POINTER)
    (tmp_path / "x.json").write_bytes(POINTER)
    for name, form in (("x.jsonl", "jsonl"), ("x.json", "llava")):
        with pytest.raises(ValueError, match=f"{name} is a pointer of git LFS.*git lfs pull"):
            open_source(SourceConfig(name, form), str(tmp_path))
    (tmp_path / "0.png").write_bytes(POINTER)
    os.mkfifo(tmp_path / "1.png")
    write_lines(
        tmp_path / "y.jsonl", [{"text": "t", "image": f"{i}.png"} for i in range(2)] + [{"text": "t"}]
    )
    source = open_source(SourceConfig("y.jsonl", "jsonl"), str(tmp_path))
    for i, reason in enumerate(("git lfs pull", "no regular file")):
        with pytest.raises(ValueError, match=f"record 'y.jsonl:{i + 1}': .*{i}.png .*{reason}"):
            source[i]
    os.mkfifo(tmp_path / "z.jsonl")
    with pytest.raises(ValueError, match=r"z.jsonl is no regular file"):
        open_source(SourceConfig("z.jsonl", "jsonl"), str(tmp_path))


def test_packed_files_of_a_folder_are_not_passed_over(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    write_lines(tmp_path / "b.JSONL", [{"text": "b"}])
    (tmp_path / "c.csv").write_text("something else")
    source = open_source(SourceConfig(str(tmp_path), "jsonl"))
    assert [source[i].texts for i in range(len(source))] == [("a",), ("b",)]
    (tmp_path / "d.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"d.jsonl.gz is compressed, .*decompress it, or name the"):
        open_source(SourceConfig(str(tmp_path), "jsonl"))
