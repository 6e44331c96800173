"""Records as bytes, and the texts that are trained on: functions of a record and a generator."""

import json

import numpy as np
import pytest

from mmada_jax.data.records import (
    INSTRUCTIONS,
    OPENINGS,
    THINK_DRAW_PROMPT,
    THINK_PROMPT,
    WINDOW,
    Record,
    drawing_caption,
    pack,
    plain_text,
    reading_turns,
    thinking_turns,
    unpack,
    with_think_prompt,
    without_image_tag,
)

USER, ASSISTANT = "user", "assistant"


def turns(*contents):
    return tuple({"role": (USER, ASSISTANT)[i % 2], "content": text} for i, text in enumerate(contents))


def draws(function, record, n=200):
    return [function(record, np.random.default_rng(seed)) for seed in range(n)]


# ---- Bytes -----------------------------------------------------------------------------------------

FULL = Record(
    "a/ü", b"\xff\xd8picture", np.array([0, 8191, 5], np.int32), ("eins", "zwei\n😀"), turns("q", "a"), "s"
)


@pytest.mark.parametrize("without", ["", "image", "codes", "texts", "turns", "short"])
def test_a_record_comes_back(without):
    values = vars(FULL) | ({without: getattr(Record("k"), without)} if without else {})
    back = unpack(pack(Record(**values)))
    for name, value in values.items():
        if name == "codes" and value is not None:
            assert back.codes.dtype == np.int32
            np.testing.assert_array_equal(back.codes, value)
        else:
            assert getattr(back, name) == value


def test_bytes_that_are_no_record_are_refused():
    data = pack(FULL)
    for end in range(len(data)):
        with pytest.raises(ValueError, match=r"no record of ours|bytes instead of"):
            unpack(data[:end])
    with pytest.raises(ValueError, match="bytes instead of"):
        unpack(data + b"x")
    with pytest.raises(ValueError, match="no record of ours"):
        unpack((200_000).to_bytes(4, "little") + b"[" * 200_000)
    with pytest.raises(ValueError, match="no record of ours"):
        unpack((2).to_bytes(4, "little") + b"{}")
    with pytest.raises(ValueError, match="encode it as a PNG first"):
        pack(Record("k", np.zeros((2, 2, 3), np.uint8)))


# ---- Drawing ---------------------------------------------------------------------------------------


def test_one_of_the_captions_whole_or_its_first_sentence():
    record = Record("k", texts=("A cat sits. It sleeps.", "two dogs"))
    found = draws(drawing_caption, record)
    assert set(found) == {"A cat sits. It sleeps.", "A cat sits", "two dogs"}
    assert 60 < found.count("two dogs") < 140
    cats = [text for text in found if text != "two dogs"]
    assert 0.3 < cats.count("A cat sits") / len(cats) < 0.7
    assert found == draws(drawing_caption, record)


def test_openings_of_machines_go():
    for opening in OPENINGS:
        assert set(draws(drawing_caption, Record("k", texts=(f"{opening}a red kite",)), 4)) == {
            "a red kite"
        }
        assert set(draws(drawing_caption, Record("k", texts=(f"{opening.lower()}kites",)), 4)) == {"kites"}
    for kept in ("The image showsoff", "a sign: The image shows nothing", "The image shows "):
        assert set(draws(drawing_caption, Record("k", texts=(kept,)), 4)) == {kept.strip()}


def test_a_caption_is_never_empty():
    for text in (".", "...", " . a", "The image shows . more", "x"):
        assert all(draws(drawing_caption, Record("k", texts=(text,)), 20))
    for record in (Record("k"), Record("k", texts=(" ", ""))):
        with pytest.raises(ValueError, match="record 'k' has no caption"):
            drawing_caption(record, np.random.default_rng(0))
    assert set(draws(drawing_caption, Record("k", texts=("", "a fox")), 20)) == {"a fox"}


def test_people_whose_names_were_taken_out():
    found = set(draws(drawing_caption, Record("k", texts=("<person> waves at <PERSON>'s dog",))))
    assert len(found) == 9
    assert all("<" not in text and text.endswith("'s dog") and " waves at " in text for text in found)
    found = set(draws(drawing_caption, Record("k", texts=("portrait of <person> <person><person>, 1950",))))
    assert found == {"portrait of people, 1950"}


# ---- Reading ---------------------------------------------------------------------------------------


def test_a_caption_becomes_a_conversation():
    assert len(set(INSTRUCTIONS)) == len(INSTRUCTIONS) >= 20
    found = draws(reading_turns, Record("k", texts=("The image shows a cat. It sleeps.", "a cat")), 400)
    assert {t[0]["content"] for t in found} == set(INSTRUCTIONS)
    assert {t[1]["content"] for t in found} == {"The image shows a cat. It sleeps.", "a cat"}
    assert {tuple(turn["role"] for turn in t) for t in found} == {(USER, ASSISTANT)}


def test_of_a_conversation_the_first_pairs_stay():
    whole = turns("q1", "a1", "q2", "a2", "q3", "a3", "q4")
    found = draws(reading_turns, Record("k", texts=("unused",), turns=whole))
    assert {len(t) for t in found} == {2, 4, 6}
    assert all(tuple(t) == whole[: len(t)] for t in found)
    system = ({"role": "system", "content": "s"}, *turns("q", "a"))
    assert reading_turns(Record("k", turns=system), np.random.default_rng(0)) == list(system)
    with pytest.raises(ValueError, match="'k' has a conversation without an answer"):
        reading_turns(Record("k", turns=turns("q")), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<image>\nWhat?", "What?"),
        ("<image>\r\nWhat?", "What?"),
        ("<image> What?", "What?"),
        ("<image>What?", "What?"),
        ("What?\n<image>", "What?"),
        ("What? <image> ", "What?"),
        ("<image>", ""),
        (" <image>\n <image> ", ""),
        ("<image>\n<image>\nWhat?", "What?"),
        ("<IMAGE><image>What?", "What?"),
        ("<image/>What?", "What?"),
        ("<image />\n<image></image> What?", "What?"),
        ("<im_start><image><im_end>\nWhat?", "What?"),
        ("What? <img><image></img>", "What?"),
        ("Compare <image 1> with <image 2>.", "Compare <image 1> with <image 2>."),
        ("What do <img>, <images> and <video> do?", "What do <img>, <images> and <video> do?"),
        ("What is <image> here?", "What is here?"),
        ("What is<image> here?", "What is here?"),
        ("What is <image>here?", "What is here?"),
        ("What is<image>here?", "What is here?"),
        ("What is this <image>?", "What is this?"),
        ("Look (<image> again)", "Look (again)"),
        ("One.\n<image>\nTwo.", "One.\nTwo."),
        ("One.\n\n<image>\nTwo.", "One.\n\nTwo."),
        ("One.\r\n<image>\r\nTwo.", "One.\r\nTwo."),
        ("One. <image>\nTwo.", "One.\nTwo."),
        ("One.\n<image> Two.", "One.\nTwo."),
        ("Run:\n<image>\n    x = 1", "Run:\n    x = 1"),
        ("\u56fe<image>\u7247", "\u56fe\u7247"),
        ("a<image>a<image>a", "a a a"),
        ("  one <image>", "  one"),
        ("  as it  was \n", "  as it  was \n"),
        ("", ""),
        ("<images> and < image>", "<images> and < image>"),
    ],
)
def test_the_tag_of_an_image_goes_and_the_words_around_it_stay_apart(text, left):
    assert without_image_tag(text) == left


def test_the_tag_of_an_image_goes_from_any_text():
    rng = np.random.default_rng(0)
    for _ in range(300):
        words = rng.choice(["<image>", "one", "two.", " ", "\n", "\r\n", "?", "("], 12)
        left = without_image_tag("".join(words))
        assert "<image>" not in left
        # Nothing but the tags and spaces goes.
        assert "".join(left.split()) == "".join("".join(words).replace("<image>", "").split())


# ---- Text ------------------------------------------------------------------------------------------


def test_plain_text_has_no_newlines_and_an_end():
    rng = np.random.default_rng(0)
    assert plain_text(Record("k", texts=("one\ntwo\n\n three",)), rng) == "onetwo three"
    short = "x" * (WINDOW - 1) + "\n" + "y"
    assert plain_text(Record("k", texts=(short,)), rng) == "x" * (WINDOW - 1) + "y"
    text = "".join(f"{i:06}" for i in range(WINDOW // 6 + 2))
    found = draws(plain_text, Record("k", texts=(text,)), 300)
    assert {len(t) for t in found} == {WINDOW}
    assert all(t in text for t in found)
    starts = {text.index(t) for t in found}
    assert starts == set(range(len(text) - WINDOW + 1))
    for record in (Record("k"), Record("k", texts=("\n\n",))):
        with pytest.raises(ValueError, match="record 'k' has no text"):
            plain_text(record, rng)


# ---- Thinking --------------------------------------------------------------------------------------


def test_the_think_prompt_leads_the_first_question():
    given = ({"role": "system", "content": "s"}, *turns("q1", "a1", "q2"))
    before = json.dumps(given)
    out = with_think_prompt(given, "think!")
    assert [turn["content"] for turn in out] == ["s", "think!\nq1", "a1", "q2"]
    assert json.dumps(given) == before
    for prompt in (THINK_PROMPT, THINK_DRAW_PROMPT):
        assert "<think>" in prompt and "</think>" in prompt and "\n" not in prompt


def test_the_long_caption_is_the_thought():
    record = Record("k", texts=("a long one.",), short="short")
    assert thinking_turns(record) == list(turns("short", "<think>a long one.</think>"))
    for lacking in (
        Record("k", texts=("long",)),
        Record("k", short="short"),
        Record("k", texts=(" ",), short="s"),
    ):
        with pytest.raises(ValueError, match="'k' lacks a short or a long caption"):
            thinking_turns(lacking)


def test_a_text_of_many_places_is_read_in_linear_time():
    assert without_image_tag("a <image> " * 200_000) == " ".join(["a"] * 200_000)
    spaces = " " * 200_000
    assert without_image_tag(f"a{spaces}b{spaces}<image>{spaces}") == f"a{spaces}b"
