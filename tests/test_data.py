"""Scans and their split, the sentences, the text tokenizer, and batches as functions of a step."""

import itertools

import numpy as np
import pytest

from mmada_jax import layout
from mmada_jax.data import digits
from mmada_jax.data.pipeline import DigitCanvases, DigitRows, rows_per_task
from mmada_jax.data.tokenizer import TextTokenizer, chat, conversation_end

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
    head += "<|start_header_id|>assistant<|end_header_id|>"
    assert chat(" hi ") == head
    assert chat("hi", "yes") == f"{head}\nyes<|eot_id|>"
    vocab = tokenizer.vocab(64)
    ids = tokenizer.encode(chat("hi", "yes"))
    assert ids[0] == vocab.bos
    assert ids.count(vocab.end_turn) == 2
    assert ids[: len(tokenizer.encode(head))] == tokenizer.encode(head)
    answer = ids[len(tokenizer.encode(head)) :]
    assert tokenizer.decode(conversation_end([*answer, vocab.eos], vocab)) == "\nyes"


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
