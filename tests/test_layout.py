import inspect

import numpy as np
import pytest

from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import LLADA as V

MAX_TEXT, N = 12, 6
IMAGE = V.image_ids([0, 5, V.codebook_size - 1, 7, 7, 9])
CHAT = [V.start_header, 5, V.end_header, 7, 8, V.start_header, 6, V.end_header, 9, 10]
LENGTH = MAX_TEXT + N + 3

ROWS = {
    "t2i": lambda text: layout.t2i(V, text, IMAGE, MAX_TEXT),
    "lm": lambda text: layout.lm(V, text, LENGTH),
    "lm_chat": lambda text: layout.lm_chat(V, text, LENGTH),
    "mmu": lambda text: layout.mmu(V, IMAGE, text, MAX_TEXT),
    "r2i": lambda text: layout.r2i(V, text, IMAGE, MAX_TEXT),
}
TEXTS = ([], [3], CHAT, [V.bos, 3, 4], list(range(11)), list(range(40)), CHAT * 4)
every_row = pytest.mark.parametrize(
    ("task", "text"), [(task, text) for task in layout.TASKS for text in TEXTS]
)


@every_row
def test_all_rows_have_one_length_and_their_task(task, text):
    row = ROWS[task](text)
    for field in ("tokens", "valid", "target", "shown"):
        assert getattr(row, field).shape == (LENGTH,)
    assert (row.tokens.dtype, row.valid.dtype, row.target.dtype) == (np.int32, bool, bool)
    assert layout.TASKS[row.task] == task


@every_row
def test_marks_exclude_each_other(task, text):
    row = ROWS[task](text)
    assert row.target.any()
    assert not (row.target & row.shown).any()
    assert not ((row.target | row.shown) & ~row.valid).any()


@every_row
def test_exactly_the_left_padding_of_t2i_is_not_valid(task, text):
    row = ROWS[task](text)
    np.testing.assert_array_equal(row.valid, row.tokens != V.pad)
    assert task == "t2i" or row.valid.all()
    assert (np.diff(row.valid.astype(int)) >= 0).all()


@every_row
def test_text_is_kept_from_its_beginning_and_has_one_bos(task, text):
    tokens = ROWS[task](text).tokens.tolist()
    start = tokens.index(V.bos) + 1
    clean = [id for id in text if id != V.bos]
    kept = len(clean) if len(clean) <= MAX_TEXT - 2 else MAX_TEXT - 2
    assert tokens.count(V.bos) == 1
    assert tokens[start : start + kept] == clean[:kept]


@pytest.mark.parametrize("task", ["t2i", "mmu", "r2i"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_image_is_whole_and_between_its_brackets(task, text):
    row = ROWS[task](text)
    (soi,) = np.flatnonzero(row.tokens == V.soi)
    (eoi,) = np.flatnonzero(row.tokens == V.eoi)
    np.testing.assert_array_equal(row.tokens[soi + 1 : eoi], IMAGE)
    image = np.zeros(LENGTH, bool)
    image[soi + 1 : eoi] = True
    assert (row.target & image).sum() == (0 if task == "mmu" else N)
    if task == "t2i":
        np.testing.assert_array_equal(row.target, image)
        np.testing.assert_array_equal(np.flatnonzero(row.shown), [soi, eoi])
    else:
        assert not row.shown.any()
    if task != "lm":
        assert not row.target[[soi, eoi]].any()


@pytest.mark.parametrize("task", ["lm_chat", "mmu", "r2i"])
def test_the_target_of_a_conversation_follows_its_last_header(task):
    row = ROWS[task](CHAT)
    text = row.tokens < V.image_offset
    text &= ~np.isin(row.tokens, [V.soi, V.eoi, V.mmu, V.r2i])
    last = np.flatnonzero(row.tokens == V.end_header)[-1]
    after = np.arange(LENGTH) > last
    np.testing.assert_array_equal(row.target & text, text & after)


def test_without_a_header():
    assert ROWS["lm_chat"]([3, 4]).target.all()
    assert ROWS["mmu"]([3, 4]).target.sum() == MAX_TEXT
    np.testing.assert_array_equal(ROWS["r2i"]([3, 4]).target, ROWS["r2i"]([3, 4]).tokens >= V.image_offset)


@pytest.mark.parametrize("task", ["t2i", "mmu", "r2i"])
def test_truncated_text_still_ends_in_eos(task):
    tokens = ROWS[task](list(range(40))).tokens.tolist()
    last_text = tokens.index(V.soi) - 1 if task != "mmu" else LENGTH - 1
    assert tokens[last_text] == V.eos
    assert tokens.count(V.eos) == 1


def test_truncated_lm_has_no_eos():
    assert V.eos not in layout.lm(V, range(40), 20).tokens


def test_drop_condition_is_the_row_of_empty_text():
    dropped = layout.drop_condition(V, ROWS["t2i"](CHAT), MAX_TEXT)
    empty = ROWS["t2i"]([])
    for one, other in zip(dropped, empty, strict=True):
        np.testing.assert_array_equal(one, other)


def test_generation_row_is_the_training_row_with_a_hidden_image():
    row = layout.t2i_generation(V, [3, 4], N, MAX_TEXT)
    clean = ROWS["t2i"]([3, 4])
    np.testing.assert_array_equal(row.tokens, np.where(clean.target, V.mask, clean.tokens))
    np.testing.assert_array_equal(row.valid, clean.valid)


def test_thinking_row_is_the_training_row_with_all_behind_the_prompt_hidden():
    prompt, thought = CHAT[:-2], CHAT[-2:]
    row = layout.r2i_generation(V, prompt, N, MAX_TEXT)
    clean = layout.r2i(V, prompt + thought, IMAGE, MAX_TEXT)
    np.testing.assert_array_equal(row.tokens, np.where(clean.target, V.mask, clean.tokens))
    full = list(range(MAX_TEXT - 2))
    assert (layout.r2i_generation(V, full, N, MAX_TEXT).tokens == V.mask).sum() == N + 1
    with pytest.raises(ValueError, match=f"has {MAX_TEXT + 1} tokens, the limit is {MAX_TEXT}"):
        layout.r2i_generation(V, [*full, 1], N, MAX_TEXT)


def test_a_prompt_that_fills_the_slot_fits_and_a_longer_one_is_an_error():
    row = layout.t2i_generation(V, range(MAX_TEXT - 2), N, MAX_TEXT)
    assert row.valid.all()
    with pytest.raises(ValueError, match=f"has {MAX_TEXT + 1} tokens, the limit is {MAX_TEXT}"):
        layout.t2i_generation(V, range(MAX_TEXT - 1), N, MAX_TEXT)


def test_continuation_pads_on_the_left_and_hides_the_end():
    prompts = [[5, 6, 7], [8], [1, 2]]
    batch = layout.continuation(V, prompts, 4)
    assert batch.tokens.shape == (3, 7)
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(batch.tokens[i, 3 - len(prompt) : 3], prompt)
        assert batch.valid[i].sum() == len(prompt) + 4 and batch.valid[i, -1]
    np.testing.assert_array_equal(batch.target, batch.tokens == V.mask)
    np.testing.assert_array_equal(batch.target, np.tile(np.arange(7) >= 3, (3, 1)))


def test_stack_keeps_rows_and_refuses_other_lengths():
    rows = [ROWS[task](CHAT) for task in layout.TASKS]
    batch = layout.stack(rows)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(batch.tokens[i], row.tokens)
    np.testing.assert_array_equal(batch.task, np.arange(len(layout.TASKS)))
    with pytest.raises(ValueError, match="rows of lengths"):
        layout.stack([rows[0], layout.lm(V, [3], LENGTH + 1)])


@pytest.mark.parametrize("task", ["t2i", "mmu", "r2i"])
@pytest.mark.parametrize("bad", [0, V.codebook_size, V.image_offset - 1, V.rows])
def test_codes_that_are_no_ids_are_errors(task, bad):
    make = getattr(layout, task)
    order = list(inspect.signature(make).parameters)[1:3]
    arguments = {"text": [3], "image": [*IMAGE[:-1], bad]}
    with pytest.raises(ValueError, match=f"image token {bad} is outside"):
        make(V, *(arguments[name] for name in order), MAX_TEXT)
