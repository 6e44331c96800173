"""Rows of JSON: each is a record, is left out and counted, or is an error that names it."""

import json

import pytest
from data_files import picture, talk, write_images, write_lines

from mmada_jax.data.records import Record
from mmada_jax.data.sources import Config, open_source


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
    for index, reason in (
        (2, "line 4 holds an array, expected an object"),
        (3, "line 5 is no JSON: Expecting"),
    ):
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
    source = open_source(Config("x.json", "llava"), str(tmp_path))
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
        open_source(Config("x.json", "llava"), str(tmp_path))
