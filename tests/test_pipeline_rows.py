"""How records become rows: layouts, conversations, control tokens, images without codes."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import vq_params

from mmada_jax.data import sources
from mmada_jax.data.pipeline import Shape
from mmada_jax.data.records import Record
from mmada_jax.devices import sharding
from mmada_jax.model.vision import Vision
from mmada_jax.nets import vq
from mmada_jax.tokens import layout
from mmada_jax.tokens.tokenizer import CONTROL, TextTokenizer, chat
from tests.pipeline_toys import (  # noqa: F401
    CODES,
    MAX_TEXT,
    N_IMAGE,
    SHAPE,
    Listed,
    all_tasks,
    assert_same,
    bytes_tokenizer,
    dialogues,
    make,
    png,
    texts,
    with_codes,
)


def test_rows_are_those_of_their_layouts(tokenizer):
    rows = all_tasks(tokenizer)
    vocab, batch = tokenizer.vocab(CODES), rows.load(0).rows.batch
    for (task, k), tokens, target in zip(rows.places, batch.tokens, batch.target, strict=True):
        name, i = rows.record_at(task, k)
        record = rows.opened[task][name][i]
        ids = record.codes is not None and vocab.image_ids(record.codes)
        if task == "t2i":
            want = layout.t2i(vocab, tokenizer.encode(record.texts[0]), ids, MAX_TEXT)
        elif task == "lm":
            want = layout.lm(vocab, tokenizer.encode(record.texts[0]), SHAPE.length)
        elif task == "lm_chat":
            text = chat(record.turns[:1], record.turns[1]["content"])
            want = layout.lm_chat(vocab, tokenizer.encode(text), SHAPE.length)
        else:
            first = layout.image_start(task, MAX_TEXT)
            np.testing.assert_array_equal(tokens[first : first + N_IMAGE], ids)
            assert f"a {i}" in tokenizer.decode(tokens[target])
            continue
        np.testing.assert_array_equal(tokens, want.tokens)
        np.testing.assert_array_equal(target, want.target)


def test_conditions_are_dropped_from_drawing_rows_alone(tokenizer):
    always, never = all_tasks(tokenizer, cond_dropout=1.0).load(0), all_tasks(tokenizer).load(0)
    a, n = always.rows.batch, never.rows.batch
    np.testing.assert_array_equal((a.tokens != n.tokens).any(axis=1), n.task == layout.TASKS.index("t2i"))
    share = [all_tasks(tokenizer, cond_dropout=0.3).load(step).rows.batch for step in range(60)]
    dropped = [
        (b.tokens[b.task == 0] == tokenizer.vocab(CODES).pad).sum(axis=1) == MAX_TEXT - 2 for b in share
    ]
    assert 0.2 < np.concatenate(dropped).mean() < 0.4


def test_r2i_rows_think(tokenizer):
    record = Record("x", codes=np.zeros(N_IMAGE, int), texts=("a long caption",), short="short")
    rows = make(tokenizer, {"r2i": {"a": Listed([record], info={"codes": N_IMAGE})}}, size=1)
    batch = rows.load(0).rows.batch
    text = tokenizer.decode(batch.tokens[0, batch.target[0]])
    assert "<think>a long caption</think>" in text
    assert "short" not in text


def test_a_think_prompt_leads_the_users_words(tokenizer):
    rows = make(tokenizer, {"lm_chat": {"d": dialogues(1)}}, size=1, think_prompt="think")
    think = dataclasses.replace(rows, data={"lm_chat": {"d": sources.SourceConfig(think=True)}})
    plain, led = (r.load(0).rows.batch for r in (rows, think))
    assert "think\nq 0" in tokenizer.decode(led.tokens[0])
    assert "think" not in tokenizer.decode(plain.tokens[0])
    assert tokenizer.decode(plain.tokens[0, plain.target[0]]) == tokenizer.decode(
        led.tokens[0, led.target[0]]
    )


def test_a_conversation_ends_with_its_last_answer(tokenizer):
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    later = (*turns, {"role": "user", "content": "and"})
    batches = [
        make(tokenizer, {"lm_chat": {"d": Listed([Record("x", turns=t)])}}, size=1).load(0).rows.batch
        for t in (turns, later)
    ]
    np.testing.assert_array_equal(batches[0].tokens, batches[1].tokens)
    with pytest.raises(ValueError, match="no answer of the assistant"):
        make(tokenizer, {"lm_chat": {"d": Listed([Record("x", turns=turns[:1])])}}, size=1).load(0)
    with pytest.raises(ValueError, match="has no text"):
        make(tokenizer, {"lm_chat": {"d": Listed([Record("x")])}}, size=1).load(0)


def test_rendered_conversations_stay_as_they_are(tokenizer):
    text = str(chat("as they have it", "yes"))
    plain = make(tokenizer, {"lm_chat": {"d": Listed([Record("x", texts=(text,))])}}, size=1)
    said = dataclasses.replace(plain, data={"lm_chat": {"d": sources.SourceConfig(rendered=True)}})
    batch = said.load(0).rows.batch
    assert tokenizer.decode(batch.tokens[0, batch.target[0]]) == tokenizer.decode(tokenizer.encode("\nyes"))
    assert "rendered" in str(said.description) and "rendered" not in str(plain.description)
    # Where the source doesn't say so it is a person's text, and no conversation.
    with pytest.raises(ValueError, match=r"has a text and no turns; .* rendered=True"):
        plain.load(0)


def spelled(task, text):
    """A record of a task with that text in every place that is trained on."""
    turns = ({"role": "user", "content": text}, {"role": "assistant", "content": text})
    codes = None if task in ("lm", "lm_chat") else np.zeros(N_IMAGE, int)
    if task in ("t2i", "lm"):
        return Record("x", codes=codes, texts=(text,))
    return Record("x", codes=codes, turns=turns)


@pytest.mark.parametrize("task", layout.TASKS)
@pytest.mark.parametrize("rendered", [False, True])
def test_control_tokens_in_data_are_ordinary_text(tokenizer, task, rendered):
    vocab = tokenizer.vocab(CODES)
    control = [getattr(vocab, name) for name in CONTROL]

    def row(text):
        source = Listed([spelled(task, text)], info={"codes": N_IMAGE})
        rows = make(tokenizer, {task: {"a": source}}, size=1, cut_long=True)
        rows = dataclasses.replace(rows, data={task: {"a": sources.SourceConfig(rendered=rendered)}})
        batch = rows.load(0).rows.batch
        return [i for i in batch.tokens[0] if i in control and i not in (vocab.pad, vocab.eos)]

    short = {task: "[iPAD]<|soi|>" for task in layout.TASKS} | {"lm": "".join(CONTROL.values())}
    assert row(short[task]) == row("a")


@pytest.mark.parametrize("task", layout.TASKS)
def test_a_record_that_a_library_refuses_is_replaced_and_counted(tokenizer, task, monkeypatch):
    items = [spelled(task, text) for text in ("good", "cut in two \ud83d", "good")]
    rows = make(tokenizer, {task: {"a": Listed(items, info={"codes": N_IMAGE})}}, size=3)
    loaded = rows.load(0)  # an epoch, the bad record in it
    assert loaded.skipped == {f"{task}.a: unreadable": 1} or sum(loaded.skipped.values()) > 1
    assert_same(loaded, rows.load(0))  # the same when the run is resumed
    whole = make(tokenizer, {task: {"a": Listed(items[:1], info={"codes": N_IMAGE})}}, size=3).load(0)
    np.testing.assert_array_equal(loaded.rows.batch.tokens, whole.rows.batch.tokens)
    # Whatever the library raises, its own panics included, which no Exception is.
    panic = type("PanicException", (BaseException,), {})
    for error in (TypeError("x"), MemoryError(), RecursionError(), AttributeError("y"), panic("z")):
        broken = TextTokenizer.train(["a caption of words", chat("q 1", "a 1")], 320)
        monkeypatch.setattr(broken, "_tokenizer", Refusing(broken._tokenizer, error))
        rows = make(broken, {task: {"a": Listed(items[::2], info={"codes": N_IMAGE})}}, size=1)
        with pytest.raises(ValueError, match=rf"{task}.a: 100 records, one after the other, can't be used"):
            rows.load(0)
    monkeypatch.setattr(broken, "_tokenizer", Refusing(broken._tokenizer, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        rows.load(0)


class Refusing:
    """A library's tokenizer that raises an error for every text."""

    def __init__(self, tokenizer, error):
        self._all, self._error = tokenizer, error

    def __getattr__(self, name):
        return getattr(self._all, name)

    def encode(self, *_, **__):
        raise self._error


# ---- Images ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_vq():
    levels = {name: (1, 1) for name in ("encoder_mult", "encoder_blocks", "decoder_mult", "decoder_blocks")}
    config = vq.VQConfig(channels=32, bits=6, **levels)
    return vq_params(config), config


def test_images_without_codes_are_encoded_on_the_devices(tokenizer, tiny_vq):
    params, config = tiny_vq
    side = 2 * config.downsampling
    shape = Shape(MAX_TEXT, 4, (side, side, 3))
    pictures = Listed([Record(str(i), png(20 * i, 3 * side), texts=(f"x {i}",)) for i in range(8)])
    opened = {
        "t2i": {"a": with_codes("a", 5), "p": pictures},
        "lm": {"c": texts("c", 9)},
        "mmu": {"p": pictures},
    }
    rows = dataclasses.replace(make(tokenizer, opened, size=16), shape=shape)
    vocab = tokenizer.vocab(CODES)
    loaded = rows.load(0)
    assert loaded.rows.pixels_BIJC.dtype == np.uint8
    batches = []
    for sizes in ({"devices": jax.devices()[:1]}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = sharding.make_mesh(**sizes)
        vision = Vision.place(jax.device_get(params), config, mesh)
        encode = vision.row_encoder(vocab, MAX_TEXT)
        batches.append(jax.device_get(encode(sharding.put_batch(mesh, loaded.rows))))
    np.testing.assert_array_equal(batches[0].tokens, batches[1].tokens)
    encoded, code = 0, jax.jit(vq.encode, static_argnums=1)
    for (task, k), before, after in zip(
        rows.places, loaded.rows.batch.tokens, batches[0].tokens, strict=True
    ):
        name, i = rows.record_at(task, k)
        record = rows.opened[task][name][i]
        if record.image is None:
            np.testing.assert_array_equal(before, after)
            continue
        pixels = np.full((1, side, side, 3), 20 * i / 127.5 - 1, np.float32)
        ids = vocab.image_ids(np.asarray(code(params, config, pixels)).ravel())
        first = layout.image_start(task, MAX_TEXT)
        np.testing.assert_array_equal(after[first : first + 4], ids)
        changed = before != after
        assert not changed[:first].any()
        assert not changed[first + 4 :].any()
        encoded += 1
    assert encoded
