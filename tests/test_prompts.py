"""Files of prompts: what they may hold, and how they are refused."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from mmada_jax.data import totals
from mmada_jax.train.rl import prompts as prompts_lib


@pytest.fixture
def folder(tmp_path):
    """A folder with a picture, and one beside it."""
    (tmp_path / "prompts/more").mkdir(parents=True)
    for path in (tmp_path / "prompts/a.png", tmp_path / "prompts/more/b.png", tmp_path / "outside.png"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    os.mkfifo(tmp_path / "prompts/pipe.png")
    (tmp_path / "prompts/pointer.png").write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n")
    return tmp_path / "prompts"


def opened(folder, *rows, encoding="utf-8"):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding=encoding)
    return prompts_lib.open_prompts(prompts_lib.PromptsConfig("rows.jsonl"), folder)


def ask(prompt="What?", **fields):
    return {"prompt": prompt, "answer": "it"} | fields


def test_images_lie_beside_the_prompts_or_in_a_folder_there(folder):
    found = opened(folder, ask(image="a.png"), ask(image="more/b.png"), ask(image=""), ask(image=None))
    assert [prompt.image for prompt in found] == [folder / "a.png", folder / "more/b.png", None, None]
    lists = opened(
        folder, ask(image=["a.png"]), ask(images=["more/b.png"]), ask(image=[]), ask(images=[""])
    )
    assert [prompt.image for prompt in lists] == [prompt.image for prompt in found]
    with pytest.raises(ValueError, match="line 1: there is a list of 2 images"):
        opened(folder, ask(image=["a.png", "a.png"]))


def test_the_place_of_an_image_is_left_out_of_prompts(folder):
    found = opened(folder, ask("<image>\nWhat?", image="a.png"), ask("Is <image> red?", image="a.png"))
    assert [prompt.text for prompt in found] == ["What?", "Is red?"]
    with pytest.raises(ValueError, match=r"line 1: 'prompt' asks nothing but <image>"):
        opened(folder, ask("<image>", image="a.png"))


def test_a_byte_order_mark_is_no_part_of_a_file_of_prompts(folder):
    assert opened(folder, ask("Größe?"), encoding="utf-8-sig")[0].text == "Größe?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ask(image="../outside.png"), "line 2: path '../outside.png' leads out of"),
        (ask(image="more/../../outside.png"), "line 2: path .* leads out of"),
        (ask(image="/etc/hostname"), "line 2: path '/etc/hostname' leads out of"),
        (ask(image="pipe.png"), "line 2: it names the image .*pipe.png, which is no regular file"),
        (ask(image="more"), "line 2: it names the image .*more, which is no regular file"),
        (ask(image="rows.jsonl"), "line 2: .*cannot identify image file"),
        (ask(image=7), "line 2: 'image' is 7; name a file"),
        ("[" * 100_000, "line 2 is JSON that is nested too deeply"),
        ("[1]", "line 2 holds an array, expected an object"),
        ("null", "line 2 holds null, expected an object"),
    ],
)
def test_rows_that_are_refused_by_one_line_that_names_theirs(folder, row, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        opened(folder, ask(), row)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_pipe_of_prompts_does_not_block(folder):
    with pytest.raises(ValueError, match="is a pipe; name a file"):
        prompts_lib.open_prompts(prompts_lib.PromptsConfig("pipe.png"), folder)


def test_a_line_of_prompts_ends_where_json_says_so(tmp_path):
    rows = [{"prompt": "a\u2028b\x0c", "answer": "\u0085c"}, {"prompt": "d", "answer": "e"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    found = prompts_lib.open_prompts(prompts_lib.PromptsConfig("rows.jsonl"), tmp_path)
    assert [(p.text, p.answer) for p in found] == [(r["prompt"], r["answer"]) for r in rows]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "t2i_one", "format": "digits", "split": "prompts"}, "unknown split 'prompts'"),
        ({"path": "text_cot", "format": "digits", "split": "luck"}, "unknown split 'luck'"),
        ({"path": "10", "format": "totals"}, "'10' must be a number of rounds from 1 to 9"),
        ({"path": "1", "format": "totals", "split": "luck"}, "unknown split 'luck'; known: train"),
        ({"path": "chain_sum", "format": "reasoning_gym", "count": 0}, "count is 0"),
    ],
)
def test_prompts_that_are_not_there(values, message):
    with pytest.raises(ValueError, match=message):
        prompts_lib.open_prompts(prompts_lib.PromptsConfig(**values))


def test_totals_are_questions_with_their_last_total():
    config = prompts_lib.PromptsConfig("1-2", "totals", "validation", count=20)
    found = prompts_lib.open_prompts(config)
    assert len(found) == 20 == len({prompt.text for prompt in found})
    for prompt in found:
        chain = totals.parse(prompt.text)
        assert chain.split == "validation" and chain.rounds in (1, 2)
        assert int(prompt.answer) == sum(chain.terms) * chain.rounds % 10
        assert totals.check(prompt.text, chain.answer).total
