"""Which records a step has, and how they become rows: proportions, epochs, determinism, bad records."""

import collections
import dataclasses
import functools
import json
import types

import numpy as np
import pytest

from mmada_jax.data import pipeline, records, sources
from mmada_jax.data.pipeline import Pipeline, Shape, rows_per_task
from mmada_jax.data.records import Record
from mmada_jax.devices import sharding
from mmada_jax.tokens import layout
from mmada_jax.train import pictures, supervised
from tests.pipeline_toys import (  # noqa: F401
    CODES,
    MIXTURE,
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

# ---- Which records ---------------------------------------------------------------------------------


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


def test_tasks_alternate(tokenizer):
    rows = all_tasks(tokenizer)
    for task, count in rows.rows.items():
        halves = [sum(t == task for t, _ in rows.places[half]) for half in (slice(10), slice(10, 20))]
        assert sum(halves) == count
        assert abs(halves[0] - halves[1]) <= 1


def test_the_mixture_is_within_a_percent_over_ten_thousand_rows(tokenizer):
    weights = {"a": 3.5, "b": 5.5, "c": 0.5, "d": 0.5}
    opened = {"mmu": {name: with_codes(name, 50) for name in weights}}
    rows = make(tokenizer, opened, weights=weights)
    seen = collections.Counter(rows.record_at("mmu", position)[0] for position in range(10_000))
    for name, weight in weights.items():
        assert abs(seen[name] / 10_000 - weight / 10) < 0.01


@pytest.mark.parametrize("n_processes", [1, 2, 4])
def test_an_epoch_has_every_record_once_over_all_processes(tokenizer, n_processes):
    # Each process asks for the rows of its devices; 10 steps of 8 rows are two epochs of 40 records.
    opened = {"t2i": {"a": with_codes("a", 40)}, "lm": {"c": texts("c", 40)}}
    rows = make(tokenizer, opened, mixture={"t2i": 1, "lm": 1}, size=16)
    seen = {task: [collections.Counter(), collections.Counter()] for task in opened}
    for step in range(10):
        for process in range(n_processes):
            for row in range(process * 16 // n_processes, (process + 1) * 16 // n_processes):
                task, k = rows.places[row]
                _, index = rows.record_at(task, step * rows.rows[task] + k)
                seen[task][step // 5][index] += 1
    for epochs in seen.values():
        for epoch in epochs:
            assert epoch == collections.Counter(range(40))
    orders = [[rows.record_at("lm", 40 * e + i)[1] for i in range(40)] for e in range(2)]
    assert orders[0] != orders[1], "every epoch has an order of its own"


def test_the_parts_of_processes_make_the_whole_batch(tokenizer):
    rows = all_tasks(tokenizer)
    whole = rows.load(3)
    parts = [rows.load(3, range(4 * p, 4 * p + 4)).rows.batch.tokens for p in range(5)]
    np.testing.assert_array_equal(np.concatenate(parts), whole.rows.batch.tokens)


def test_own_rows_are_those_of_the_devices():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert sharding.own_rows(mesh, 8) == list(range(8))


def test_put_batch_takes_the_rows_that_a_process_has():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    x = np.arange(24).reshape(8, 3)
    placed = sharding.put_batch(mesh, {"x": x}, list(range(8)), 8)["x"]
    np.testing.assert_array_equal(placed, x)
    assert placed.sharding == sharding.batch_sharding(mesh)


def test_a_batch_is_a_function_of_seed_and_step(tokenizer):
    rows = all_tasks(tokenizer)
    assert_same(rows.load(3), all_tasks(tokenizer).load(3))
    assert (rows.load(3).rows.batch.tokens != rows.load(4).rows.batch.tokens).any()
    assert (rows.load(3).rows.batch.tokens != all_tasks(tokenizer, seed=1).load(3).rows.batch.tokens).any()
    counts = np.bincount(rows.load(0).rows.batch.task, minlength=len(layout.TASKS))
    assert dict(zip(layout.TASKS, counts.tolist(), strict=True)) == {
        "t2i": 6, "lm": 2, "lm_chat": 4, "mmu": 8, "r2i": 0
    }  # fmt: skip


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_do_not_depend_on_the_threads(tokenizer, threads):
    rows = all_tasks(tokenizer)
    loaded = list(pipeline.iterate(rows.load, 2, 8, threads))
    assert len(loaded) == 6
    for step, batch in enumerate(loaded, start=2):
        assert_same(batch, rows.load(step))


def test_batches_do_not_depend_on_processes(tokenizer, tmp_path, capfd):
    # Slow: each process imports all of this anew. Both kinds of source go to them, in memory and a file.
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(9))
    (tmp_path / "lines.jsonl").write_text(lines)
    config = sources.SourceConfig(path=str(tmp_path / "lines.jsonl"), format="jsonl")
    opened = {"t2i": {"a": with_codes("a", 30)}, "lm": {"c": sources.open_source(config)}}
    rows = make(tokenizer, opened, size=4)
    load = functools.partial(rows.load, which=range(4))
    loaded = list(pipeline.iterate(load, 2, 7, threads=1, workers=2))
    assert len(loaded) == 5
    for step, batch in enumerate(loaded, start=2):
        assert_same(batch, rows.load(step))
    assert capfd.readouterr() == ("", "")


def test_an_error_in_a_process_is_the_error(tokenizer):
    rows = make(tokenizer, {"lm": {"c": Listed([ValueError("damaged")])}}, size=2)
    with pytest.raises(ValueError, match=r"config.data.lm.c: 100 records, .*: damaged"):
        next(pipeline.iterate(rows.load, 0, 3, threads=1, workers=1))


def test_what_is_described_changes_with_the_data(tokenizer):
    rows = all_tasks(tokenizer)
    assert rows.description == all_tasks(tokenizer).description
    others = [
        all_tasks(tokenizer, seed=1),
        all_tasks(tokenizer, size=30),
        all_tasks(tokenizer, weights={"a": 2.0}),
        dataclasses.replace(rows, opened=dict(rows.opened) | {"lm": {"c": texts("c", 10)}}),
    ]
    for other in others:
        assert other.description != rows.description


# ---- What can't be used ----------------------------------------------------------------------------


def test_bad_and_long_records_are_replaced_and_counted(tokenizer):
    good, long = dialogues(6), dialogues(1, "word " * 200)
    items = [*good.items, *long.items, ValueError("record 'x' is damaged")]
    rows = make(tokenizer, {"lm_chat": {"d": Listed(items)}}, size=8)
    counts = collections.Counter()
    for step in range(4):  # every record four times
        loaded = rows.load(step)
        assert_same(loaded, rows.load(step))
        counts.update(loaded.skipped)
    assert counts["lm_chat.d: too long"] >= 4
    assert counts["lm_chat.d: unreadable"] >= 4
    cut = dataclasses.replace(rows, cut_long=True)
    assert not any("long" in name for step in range(4) for name in cut.load(step).skipped)


def test_conversations_about_images_are_no_text_to_chat(tokenizer):
    pictured = [
        dataclasses.replace(dialogues(1).items[0], image=png(0)),
        dialogues(1, codes=True).items[0],
        dataclasses.replace(dialogues(1).items[0], lacks_image=True),
    ]
    text = dialogues(1, "another").items[0]
    rows = make(tokenizer, {"lm_chat": {"d": Listed([*pictured, text], info={"codes": N_IMAGE})}}, size=8)
    loaded = rows.load(0)
    want = make(tokenizer, {"lm_chat": {"d": Listed([text])}}, size=8).load(0)
    np.testing.assert_array_equal(loaded.rows.batch.tokens, want.rows.batch.tokens)
    assert set(loaded.skipped) == {"lm_chat.d: about an image"}
    assert loaded.skipped["lm_chat.d: about an image"] >= 6
    skipped = pipeline.Skipped(0.0)
    skipped.count({"lm_chat.d: about an image": 1000}, 10)  # is no fault of the data


def test_a_list_of_llava_goes_to_chat_without_its_images(tokenizer, tmp_path):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "0.png").write_bytes(png(0))
    rows = [{"conversations": talk}] * 2 + [{"image": "0.png", "conversations": talk}] * 3
    (tmp_path / "x.json").write_text(json.dumps(rows))
    config = sources.SourceConfig(f"{tmp_path}/x.json", "llava")
    data = {"lm_chat": {"a": config}, "mmu": {"b": config}}
    opened = pipeline.open_sources(data, ("lm_chat", "mmu"))
    assert pipeline.left_out(opened, "held_out") == [
        "config.held_out.lm_chat.a: 2 records; left out: one image 3",
        "config.held_out.mmu.b: 3 records; left out: no image 2",
    ]
    rows = Pipeline(tokenizer, tokenizer.vocab(CODES), data, opened, {"lm_chat": 5, "mmu": 5}, SHAPE, 0)
    assert not rows.load(0).skipped


def test_what_is_left_out_is_said_when_training_starts(monkeypatch, capsys):
    source = Listed([Record("x")])
    object.__setattr__(source, "ignored", {"no caption": 1200, "several images": 3})
    rows = types.SimpleNamespace(opened={"t2i": {"a": source, "b": Listed([Record("y")])}}, encodes=False)
    rows.places, rows.rows, rows.load = [("t2i", 0)], {"t2i": 1}, lambda *_: None
    monkeypatch.setattr(supervised, "open_data", lambda *_: rows)
    monkeypatch.setattr(supervised, "image_tokenizer_path", lambda *_: "image_tokenizer")
    monkeypatch.setattr(supervised, "open_image_tokenizer", lambda _: None)
    with pytest.raises(AttributeError, match="no more is needed here"):
        supervised.model_program(Nothing(), "workdir", None, Nothing())
    assert capsys.readouterr().out == (
        "config.data.t2i.a: 1 records; left out: no caption 1,200, several images 3\n"
    )


class Nothing:
    """What a run would be."""

    eval_every = 0

    def __getattr__(self, name):
        raise AttributeError("no more is needed here")


def test_errors_of_opening_name_the_source_whatever_their_type(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.png").write_bytes(png(0))
    (tmp_path / "labels").write_bytes("a: größe".encode("latin-1"))
    config = sources.SourceConfig("images", "imagefolder", labels="labels")
    with pytest.raises(ValueError, match=r"config.data.t2i.x: .*labels, line 1: byte 0xf6 is no UTF-8"):
        pipeline.open_sources({"t2i": {"x": config}}, ("t2i",), str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"config.data.t2i.x: .*nowhere doesn't exist"):
        pipeline.open_sources({"t2i": {"x": sources.SourceConfig("nowhere")}}, ("t2i",), str(tmp_path))


def test_a_source_without_a_usable_record_is_an_error(tokenizer):
    rows = make(tokenizer, {"lm_chat": {"d": dialogues(3, "word " * 200)}}, size=2)
    with pytest.raises(ValueError, match=r"config.data.lm_chat.d: 100 records, .* the limit is 54"):
        rows.load(0)


def test_codes_of_another_size_are_unreadable(tokenizer):
    rows = dataclasses.replace(
        make(tokenizer, {"t2i": {"a": with_codes("a", 3)}}), shape=Shape(48, 9, (3, 3, 3))
    )
    with pytest.raises(ValueError, match="has 4 image codes, rows have 9"):
        rows.load(0)


def test_codes_of_an_unknown_tokenizer_are_refused(tokenizer):
    nameless = Listed(with_codes("a", 3).items)
    with pytest.raises(ValueError, match=r"image codes of an unknown tokenizer; name the folder"):
        make(tokenizer, {"t2i": {"a": nameless}}).load(0)


def test_too_many_unreadable_records_end_the_run():
    skipped = pipeline.Skipped(0.01)
    skipped.count({"lm.c: unreadable": 10, "lm.c: too long": 500}, 1000)
    assert skipped.values() == {"skipped lm.c: unreadable": 10.0, "skipped lm.c: too long": 500.0}
    with pytest.raises(ValueError, match=r"11 records out of 1001 .* max_skipped=0.01"):
        skipped.count({"lm.c: unreadable": 1}, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "no source with a weight"),
        ({"lm": {"a": sources.SourceConfig(weight=0.0)}}, "no source with a weight"),
        (
            {"lm": {"a": sources.SourceConfig(path="nowhere.jsonl", format="jsonl")}},
            "config.data.lm.a: .*nowhere",
        ),
    ],
)
def test_sources_that_can_not_be_opened_are_named(data, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipeline.open_sources(data, ["lm"], str(tmp_path))


def test_records_survive_packing():
    record = Record("k", b"image", np.arange(5), ("a", "b"), ({"role": "user", "content": "é"},), "s")
    again = records.unpack(records.pack(record))
    assert dataclasses.replace(again, codes=None) == dataclasses.replace(record, codes=None)
    np.testing.assert_array_equal(again.codes, record.codes)


def test_canvases_are_functions_of_seed_and_step():
    a, again, other = (pictures.Canvases(5, seed).load for seed in (0, 0, 1))
    assert a(2).rows.shape == (5, 8, 16, 1)
    np.testing.assert_array_equal(a(2).rows, again(2).rows)
    np.testing.assert_array_equal(a(2, [1, 3]).rows, a(2).rows[[1, 3]])
    assert (a(2).rows != a(3).rows).any()
    assert (a(2).rows != other(2).rows).any()
