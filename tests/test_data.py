"""Scans and their split, the sentences, the text tokenizer, and batches as functions of a step."""

import itertools
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mmada_jax import layout
from mmada_jax.data import digits
from mmada_jax.data.pipeline import DigitCanvases, DigitRows, rows_per_task
from mmada_jax.data.tokenizer import CONTROL, HEADERS, TEMPLATE, TextTokenizer, chat, conversation_end
from mmada_jax.vocab import LLADA

N_IMAGE, MAX_TEXT = 32, 22
MIXTURE = {"t2i": 3, "lm": 1, "lm_chat": 2, "mmu": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(digits.corpus(), 384)


# ---- Scans -----------------------------------------------------------------------------------------


def test_splits_share_no_scan_and_lose_none():
    sizes = {split: len(digits.load(split).labels) for split in digits.SPLITS}
    assert sizes == {"train": 1258, "validation": 180, "test": 359}
    seen = [{scan.tobytes() for scan in digits.load(split).pixels} for split in digits.SPLITS]
    for a, b in itertools.combinations(seen, 2):
        assert not a & b
    for split in digits.SPLITS:
        pixels = digits.load(split).pixels
        assert pixels.min() == -1
        assert pixels.max() == 1
        assert set(digits.load(split).labels) == set(range(10))


def test_unknown_splits_are_errors():
    with pytest.raises(ValueError, match="unknown split 'dev'; known: train, validation, test"):
        digits.load("dev")


@pytest.mark.parametrize("n", [1, 2])
def test_a_canvas_is_cut_into_its_scans(n):
    scans = digits.load("train").pixels[:n]
    canvas = digits.canvas(*scans)
    assert canvas.shape == (8, 16, 1)
    np.testing.assert_array_equal(digits.cut(canvas, n), scans)


def test_sums_are_right_and_held_out_ones_are_not_trained():
    train, test = digits.sums("train"), digits.sums("test")
    assert all(eval(question) == int(answer) for question, answer in train + test)
    assert not set(train) & set(test)
    assert len(test) >= 200


def test_sentences():
    assert digits.caption(7) == "a handwritten seven"
    assert digits.caption(3, 8) == "a three and an eight"
    assert digits.reading(3, 5) == "three and five"


def test_records_show_what_they_say():
    for record in digits.records("train", 0, 0, {"mmu": 8, "t2i": 8}):
        known = {
            digits.load("train").pixels[i].tobytes(): d for i, d in enumerate(digits.load("train").labels)
        }
        n = 2 if " and " in record.text or "these" in record.text else 1
        labels = [int(known[scan.tobytes()]) for scan in digits.cut(record.pixels, n)]
        says = digits.caption(*labels) if record.task == "t2i" else digits.reading(*labels)
        assert record.text == says if record.task == "t2i" else f"\n{says}<|eot_id|>" in record.text


# ---- Text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a three and an eight", "7 + 12", "Zürich, 東京! \t x", ""])
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_are_single_digits(tokenizer):
    ids = [tokenizer.encode(str(d)) for d in range(10)]
    assert all(len(i) == 1 for i in ids)
    assert tokenizer.encode("407") == [*ids[4], *ids[0], *ids[7]]


def test_a_saved_tokenizer_is_the_same_and_training_repeats(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = TextTokenizer.train(digits.corpus(), 384)
    for other in (TextTokenizer.load(tmp_path / "tokenizer.json"), again):
        assert other.vocab(64) == tokenizer.vocab(64)
        assert other.encode(digits.caption(3, 8)) == tokenizer.encode(digits.caption(3, 8))
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        TextTokenizer.load(tmp_path / "none.json")


def test_the_chat_template_is_that_of_mmada(tokenizer):
    head = "<|startoftext|><|start_header_id|>user<|end_header_id|>\nhi<|eot_id|>"
    assistant = "<|start_header_id|>assistant<|end_header_id|>\n"
    assert chat(" hi ") == head + assistant
    assert chat("hi", "yes") == f"{head}{assistant}yes<|eot_id|>"
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes\n"},
        {"role": "user", "content": "and?"},
    ]
    more = "<|start_header_id|>user<|end_header_id|>\nand?<|eot_id|>"
    assert chat(turns) == f"{head}{assistant}yes<|eot_id|>{more}{assistant}"
    vocab = tokenizer.vocab(64)
    ids = tokenizer.encode(chat("hi", "yes"))
    assert ids[0] == vocab.bos
    assert ids.count(vocab.end_turn) == 2
    prompt = tokenizer.encode(chat("hi"))
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(conversation_end([*ids[len(prompt) :], vocab.eos], vocab)) == "yes"


# ---- LLaDA's tokenizer -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llada_words():
    """Word -> id of a tokenizer of LLaDA's size, with its control tokens in their places."""
    ids = {f"w{i}": i for i in range(LLADA.image_offset)}
    for name in ("bos", "eos", "mask", *HEADERS):
        del ids[f"w{getattr(LLADA, name)}"]
        ids[CONTROL[name]] = getattr(LLADA, name)
    return ids


def save_words(ids, path):
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([token for token in CONTROL.values() if token in ids])
    tokenizer.save(str(path))
    return path


def test_lladas_tokenizer_gives_lladas_vocab(llada_words, tmp_path):
    tokenizer = TextTokenizer.load(save_words(llada_words, tmp_path / "tokenizer.json"))
    assert tokenizer.vocab(8192, LLADA.rows) == LLADA
    asked = tokenizer.encode(chat("w5 w7"))
    assert asked[0] == LLADA.bos
    assert asked[asked.index(5) :][:4] == [5, 7, LLADA.end_turn, LLADA.start_header]
    bare = tokenizer.vocab(0, 126464)
    assert bare.codebook_size == 0
    assert bare.rows == 126464


def test_a_tokenizer_that_lacks_the_headers_is_given_them(llada_words, tmp_path):
    short = {token: i for token, i in llada_words.items() if i < LLADA.start_header}
    tokenizer = TextTokenizer.load(save_words(short, tmp_path / "tokenizer.json"))
    assert tokenizer.vocab(8192, LLADA.rows) == LLADA


def test_truncation_and_padding_of_a_file_are_not_used(llada_words, tmp_path):
    path = save_words(llada_words, tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(path))
    theirs.enable_truncation(5)
    theirs.enable_padding(length=64)
    theirs.save(str(path))
    tokenizer = TextTokenizer.load(path)
    assert tokenizer.encode("w1 w2 w3 w4 w5 w6 w7") == [1, 2, 3, 4, 5, 6, 7]


def test_what_is_exported_for_pytorch(llada_words, tmp_path):
    short = {token: i for token, i in llada_words.items() if i < LLADA.start_header}
    tokenizer = TextTokenizer.load(save_words(short, tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "theirs", "kept": 1}')
    tokenizer.export(tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert values == {"chat_template": TEMPLATE, "kept": 1}
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == LLADA.image_offset


def test_a_tokenizer_of_another_model_is_refused_by_token(llada_words, tmp_path):
    path, mask = tmp_path / "tokenizer.json", CONTROL["mask"]
    swapped = llada_words | {mask: 17, "w17": LLADA.mask}
    with pytest.raises(ValueError, match=r"isn't LLaDA's: '<\|mdm_mask\|>' has id 17, expected 126336$"):
        TextTokenizer.load(save_words(swapped, path)).vocab(8192, LLADA.rows)
    few = {token: i for token, i in llada_words.items() if i < 1000}
    with pytest.raises(
        ValueError, match=r"it has 1000 entries, expected 126349; '<\|startoftext\|>' has id None"
    ):
        TextTokenizer.load(save_words(few, path)).vocab(8192, LLADA.rows)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        TextTokenizer.load(path)


# ---- Batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 10, 33])
def test_rows_are_shared_out_exactly_and_fairly(size):
    rows = rows_per_task(MIXTURE, size)
    assert sum(rows.values()) == size
    for task, weight in MIXTURE.items():
        assert abs(rows[task] - size * weight / 10) < 1


@pytest.mark.parametrize("mixture", [{}, {"t2i": 0}, {"t2i": -1, "lm": 2}, {"audio": 1}])
def test_mixtures_that_mean_nothing_are_errors(mixture):
    with pytest.raises(ValueError, match="non-negative weights"):
        rows_per_task(mixture, 4)


def batches(tokenizer, seed=0, drop=0.0):
    def encode(pixels):
        return np.zeros((len(pixels), N_IMAGE), np.int32) + np.arange(N_IMAGE)

    rows = rows_per_task(MIXTURE, 20)
    return DigitRows(tokenizer, tokenizer.vocab(64), encode, rows, MAX_TEXT, N_IMAGE, drop, seed)


def test_a_batch_is_a_function_of_seed_and_step(tokenizer):
    make = batches(tokenizer)
    a, again = make(3), batches(tokenizer)(3)
    np.testing.assert_array_equal(a.tokens, again.tokens)
    assert (a.tokens != make(4).tokens).any()
    assert (a.tokens != batches(tokenizer, seed=1)(3).tokens).any()
    counts = np.bincount(a.task, minlength=len(layout.TASKS))
    assert dict(zip(layout.TASKS, counts, strict=True)) == {
        "t2i": 6, "lm": 2, "lm_chat": 4, "mmu": 8, "r2i": 0
    }  # fmt: skip
    assert a.tokens.shape == (20, MAX_TEXT + N_IMAGE + 3)


def test_conditions_are_dropped_from_drawing_rows_alone(tokenizer):
    always, never = batches(tokenizer, drop=1.0)(0), batches(tokenizer)(0)
    changed = (always.tokens != never.tokens).any(axis=1)
    np.testing.assert_array_equal(changed, never.task == layout.TASKS.index("t2i"))
    bare = layout.drop_condition(
        tokenizer.vocab(64), layout.Batch(*(x[0] for x in vars(never).values())), MAX_TEXT
    )
    np.testing.assert_array_equal(always.tokens[0], bare.tokens)


def test_canvases_are_functions_of_seed_and_step():
    make = DigitCanvases(5, seed=0)
    assert make(2).shape == (5, 8, 16, 1)
    np.testing.assert_array_equal(make(2), DigitCanvases(5, seed=0)(2))
    assert (make(2) != make(3)).any()
