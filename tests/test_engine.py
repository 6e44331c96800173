"""The engine: whatever company, slot, lane or time a request has, its tokens are those it has alone."""

import concurrent.futures
import dataclasses
import itertools
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_toys import (
    BLOCK,
    KINDS,
    LENGTH,
    MODEL,
    NEVER,
    NEW,
    PARAMS,
    PROMPTS,
    SEEDS,
    V,
    assert_equal,
    drawing_job,
    fill,
    job,
    one_device,
    run_whole,
)  # fmt: skip

from mmada_jax.devices import sharding
from mmada_jax.diffusion import cached, decode, denoise, slots
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.nets import transformer
from mmada_jax.serve.engine import Engine
from mmada_jax.tokens import layout

RULES = {
    "plain": TextRule(block=8, never=NEVER),
    "sampled": TextRule(block=8, never=NEVER, temperature=0.8, threshold=0.5),
    "guided": TextRule(block=8, never=NEVER, guidance=1.0),
    "dual": dataclasses.replace(KINDS["dual"], never=NEVER, temperature=0.8),
    "dual, window": dataclasses.replace(KINDS["dual, window"], never=NEVER),
}


def engine(mesh=None, **fields):
    mesh = mesh or one_device()
    params = sharding.put_params(PARAMS, decode.param_shardings(mesh, MODEL))
    return Engine(types.SimpleNamespace(mesh=mesh, config=MODEL, vocab=V, params=params), **fields)


@pytest.mark.parametrize("name", RULES)
def test_few_slots_and_many_rows_give_the_same_tokens(name):
    alone = fill(RULES[name])
    rows = [0, 1, 2, 3, 2, 0, 1]
    for number in (1, 3):
        made = engine(slots=number)
        assert_equal(made.run(job(RULES[name], rows), [SEEDS[i] for i in rows]), [alone[i] for i in rows])
        assert made.counters["rows"] == len(rows)
        assert made.counters["tokens"] == sum(NEW[i] for i in rows)


def test_on_several_devices_too():
    rule, rows = RULES["dual, window"], [0, 1, 2, 3, 1]
    made = engine(sharding.make_mesh(2, 2, 2), slots=4)
    alone = fill(rule)
    assert_equal(made.run(job(rule, rows), [SEEDS[i] for i in rows]), [alone[i] for i in rows])


@pytest.mark.parametrize("images", [
    ImageRule(steps=4, guidance=0.0), ImageRule(steps=4, guidance=2.0),
    ImageRule(steps=4, guidance=2.0, guide_every=2),
], ids=["plain", "guided", "guided now and then"])  # fmt: skip
def test_text_and_drawings_at_once(images):
    text = RULES["dual"]
    made = engine(slots=3)
    tickets = [*made.submit(job(text), SEEDS), *made.submit(drawing_job(images), [1, 2])]
    drawn = run_whole(drawing_job(images), [1, 2])
    assert_equal([ticket.result() for ticket in tickets], [*fill(text), *drawn])


def test_a_row_that_is_done_gives_its_slot_to_the_next_while_others_go_on():
    rule = RULES["plain"]  # one token a step: 17 to 24 steps
    made = engine(slots=2)
    tickets = made.submit(job(rule, [0, 3, 3]), [1, 2, 3])
    longest, soon, next_one = [ticket.result() is not None and ticket for ticket in tickets]
    assert soon.ended <= next_one.begun < longest.ended
    assert made.counters["idle"] == 0
    assert [ticket.steps for ticket in tickets] == [NEW[i] for i in (0, 3, 3)]


@pytest.mark.parametrize("before", [0, 1])
def test_a_lane_becomes_smaller_only_where_that_is_compiled(before):
    rule, made = RULES["plain"], engine(slots=4)
    if before:
        made.run(job(rule, [3]), 1)
    watch, sizes = {"progress": lambda ticket: None, "every": "step"}, []
    tickets = made.submit(job(rule, [0, 3, 3, 3]), SEEDS, **watch)  # 24, 17, 17 and 17 steps
    while not tickets[0].over:
        made.turn()
        sizes += [len(lane.tickets) for lane in made._lanes.values()]
    assert set(sizes) == ({4, 1} if before else {4})
    np.testing.assert_array_equal(tickets[0].result(), fill(rule, [0])[0])


@pytest.mark.parametrize("where", ["_resize", "_join", "_advance"])
def test_rows_that_are_interrupted_begin_anew_or_give_their_slots_back(where, monkeypatch):
    rule, made, calls = RULES["dual"], engine(slots=2), []
    inner = getattr(made, where)

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        inner(*given)
        if len(calls) == 4:
            raise KeyboardInterrupt  # when all of it is done, and nobody knows

    monkeypatch.setattr(made, where, interrupted)
    others = made.submit(job(rule, [1, 3]), [SEEDS[1], SEEDS[3]])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made.run(job(rule, [0, 2]), [SEEDS[0], SEEDS[2]])
    assert_equal([ticket.result() for ticket in others], fill(rule, [1, 3]))
    assert not made.turn() and not made._lanes
    assert made.counters["rows"] == 6 and made.counters["tokens"] == NEW[1] + NEW[3]


def test_a_prompt_of_another_length_compiles_nothing():
    rule, made = RULES["dual"], engine(slots=2)
    made.run(job(rule, [0, 3]), [1, 2])  # 31 and 24 tokens, in one bucket of 32
    jitted = [f for f in (slots.joiner, slots.runner, slots.mover)]
    shape = slots.Shape(made.model.mesh, MODEL, V, 32, rule)
    before = [f.cache_info().currsize for f in jitted], slots.runner(shape)._cache_size()
    prompts = [PROMPTS[1][:n] for n in (5, 9, 2)]
    batch = layout.answers(V, prompts, [20, 22, 26], 64)
    made.run(decode.Job(batch, np.array([5, 9, 2]), np.array([20, 22, 26]), 26, rule), [1, 2, 3])
    assert ([f.cache_info().currsize for f in jitted], slots.runner(shape)._cache_size()) == before


def test_progress_shows_each_block_and_the_tokens_never_change_again():
    seen = []
    made = engine()
    rule = RULES["dual"]
    [ticket] = made.submit(job(rule, [0]), SEEDS[:1], progress=lambda x: seen.append(x.ids.copy()))
    final = ticket.result()
    for ids in seen:
        np.testing.assert_array_equal(ids[ids != V.mask], final[ids != V.mask])
    first, *others = [int((ids == V.mask).sum()) for ids in seen]
    assert 16 <= first < 24 and others == [16, 8, 0]  # its first step, then blocks of 8


def test_every_step_is_shown_to_who_asks_for_it():
    rule, seen = RULES["plain"], []
    made = engine(slots=4)
    tickets = made.submit(job(rule, [3]), SEEDS[3:], progress=lambda x: seen.append(x.steps), every="step")
    tickets += made.submit(job(rule, [0]), SEEDS[:1])
    assert_equal([ticket.result() for ticket in tickets], fill(rule, [3, 0]))
    assert seen == list(range(1, NEW[3] + 1))
    shown = list(made.steps(job(rule, [3, 0]), [SEEDS[3], SEEDS[0]]))
    assert [int((ids == V.mask).sum()) for ids, _ in shown[:3]] == [NEW[3] - n for n in (1, 2, 3)]
    assert_equal(shown[-1], fill(rule, [3, 0]))


def test_who_stops_asking_for_steps_gives_the_slots_back():
    made = engine(slots=1)
    next(made.steps(job(RULES["plain"], [3])))
    made.turn()
    assert not made.turn()


def test_rows_that_join_together_share_the_first_pass_of_equal_ones():
    """A row that isn't fresh gets the pass of the row before it, whatever it holds itself."""
    rule, network = RULES["dual"], transformer.Network(PARAMS, MODEL)
    draft = decode.draft_of(decode.rows_of(job(rule, [0, 1, 3]), 0))
    state = denoise.blank(network, draft.tokens_BL, LENGTH, rule, V)
    spot = denoise.spot(draft, state, LENGTH, rule, V)

    @jax.jit
    def join(number_R, fresh_R):
        empty = network.empty_cache(4, 64)
        return cached.join(network, rule, BLOCK, spot, None, empty, number_R, fresh_R)

    def rows(cache):
        return np.asarray(cache.k_NBGPK).swapaxes(0, 1)

    each = rows(join(jnp.array([0, 1, 2]), jnp.array([True, True, True])))
    shared = rows(join(jnp.array([2, 0, 1]), jnp.array([True, False, True])))
    np.testing.assert_array_equal(shared[[2, 0, 1]], each[[0, 0, 2]])
    two = rows(join(jnp.array([3, 1, 4]), jnp.array([True, True, True])))
    np.testing.assert_array_equal(two[[3, 1]], each[[0, 1]])
    assert not two[[0, 2]].any() and (each[0] != each[1]).any()
    # With other seeds they are equal all the same.
    rows = decode.rows_of(job(rule, [0, 0, 1, 1, 0]), [1, 2, 3, 3, 3])
    assert decode.fresh(*rows[:4]).tolist() == [True, False, True, False, True]


def test_a_request_is_cancelled_and_its_slot_used_again():
    made = engine(slots=1)
    first, second = made.submit(job(RULES["plain"], [2, 2]), [1, 2])
    made.turn()
    assert (first.state, second.state) == ("running", "waiting")
    first.cancel()
    with pytest.raises(concurrent.futures.CancelledError, match="was cancelled"):
        first.result()
    alone = engine().run(job(RULES["plain"], [2]), [2])
    assert_equal([second.result()], alone)
    second.cancel()  # too late
    assert second.state == "done"
    [waits] = made.submit(job(RULES["plain"], [2]), 1)
    waits.cancel()
    assert not made.turn()


def test_a_time_limit():
    made = engine(slots=1)
    [late] = made.submit(job(RULES["plain"], [2]), 1, time_limit=1e-6)
    with pytest.raises(TimeoutError, match=r"took .* its limit is 0.0 s"):
        late.result()
    assert late.state == "late"
    with pytest.raises(ValueError, match="time_limit is 0"):
        made.submit(job(RULES["plain"], [2]), 1, time_limit=0)


def test_a_thread_of_its_own_serves_other_threads():
    made, alone = engine(slots=3), fill(RULES["dual"])
    made.start()
    found = {}

    def ask(i):
        found[i] = made.submit(job(RULES["dual"], [i % 4]), [SEEDS[i % 4]])[0].result()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    made.close()
    assert_equal([found[i] for i in range(12)], [alone[i % 4] for i in range(12)])


def test_a_thousand_requests_wait_in_order_and_no_more_than_the_queue_takes():
    made = engine(slots=16, queue=1000)
    batch = layout.answers(V, [PROMPTS[0]] * 1000, [2] * 1000, 16)
    many = decode.Job(batch, np.full(1000, 7), np.full(1000, 2), 2, TextRule(block=2, never=NEVER))
    tickets = made.submit(many, 0)
    with pytest.raises(RuntimeError, match="1000 rows wait, the queue takes 1000; 1000 more"):
        made.submit(many, 0)
    tickets[-1].result()
    assert all(ticket.state == "done" for ticket in tickets)
    begun = [ticket.begun + ticket.submitted for ticket in tickets]
    assert all(a <= b for a, b in itertools.pairwise(begun))


def test_what_fails_is_told_to_all_who_wait_for_it():
    soft = dataclasses.replace(MODEL, pad="soft")
    made = engine(slots=2)
    made.model.config = soft
    tickets = made.submit(job(RULES["dual"], [0, 1]), [1, 2])
    for ticket in tickets:
        with pytest.raises(ValueError, match="need pad='hard'"):
            ticket.result()
    made.model.config = MODEL
    assert_equal(made.run(job(RULES["dual"]), SEEDS), fill(RULES["dual"]))


def test_a_listener_that_fails_ends_its_own_request_alone():
    made = engine(slots=2)
    rule = RULES["dual"]

    def fail(ticket):
        raise OSError("the listener has gone")

    [gone] = made.submit(job(rule, [0]), SEEDS[:1], progress=fail)
    [stays] = made.submit(job(rule, [3]), SEEDS[3:])
    with pytest.raises(OSError, match="the listener has gone"):
        gone.result()
    assert_equal([stays.result()], fill(rule, [3]))


def test_caches_keep_within_the_memory():
    rule = RULES["dual, window"]
    of_row = 2 * MODEL.n_layers * MODEL.n_kv_heads * 32 * MODEL.d_head * 4
    made = engine(slots=8, memory=4 * of_row)
    rows = [0, 3, 0, 3, 0, 3]
    tickets = made.submit(job(rule, rows), [SEEDS[i] for i in rows])
    made.turn()
    assert sum(ticket.state == "waiting" for ticket in tickets) == 2
    alone = fill(rule)
    assert_equal([ticket.result() for ticket in tickets], [alone[i] for i in rows])
    numbers = r"of 48 tokens takes \d\.\d MB on a device, 0\.0 MB are there; ask for fewer"
    with pytest.raises(ValueError, match=numbers):
        engine(memory=of_row).submit(job(rule, [1]))
    assert "16 slots; with a cache a row of 32 tokens takes" in engine().plan(32)


def test_a_row_that_needs_much_memory_is_not_passed_by_for_ever():
    rule, of_place = RULES["dual"], 2 * MODEL.n_layers * MODEL.n_kv_heads * MODEL.d_head * 4
    made = engine(slots=8, memory=2 * 32 * of_place)
    small = made.submit(job(rule, [0, 3]), 1)
    [large] = made.submit(job(rule, [1]), 2)  # 48 places
    later = made.submit(job(rule, [3, 3, 3]), 3)
    for ticket in (*small, large, *later):
        ticket.result()
    begun = [ticket.submitted + ticket.begun for ticket in (small[1], large, later[0])]
    assert begun == sorted(begun)
    assert large.begun + large.submitted >= min(t.ended + t.submitted for t in small)


@pytest.mark.parametrize(("fields", "message"), [
    ({"slots": 0}, "slots is 0"), ({"queue": 0}, "queue is 0"),
])  # fmt: skip
def test_bad_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        engine(**fields)
    with pytest.raises(ValueError, match="slots is 3; it must be a positive multiple of 4"):
        engine(sharding.make_mesh(2, 2, 2), slots=3)


def test_a_short_row_has_room_for_the_block_that_the_longest_one_needs():
    rule = TextRule(block=32, steps=32, never=NEVER)
    batch = layout.answers(V, [PROMPTS[0], PROMPTS[1]], [4, 60], 96)
    both = decode.Job(batch, np.array([7, 20]), np.array([4, 60]), 60, rule)
    assert_equal(engine(slots=2).run(both, [1, 2]), run_whole(both, [1, 2]))


def test_a_row_that_the_model_does_not_take_is_refused_before_it_waits():
    batch = layout.answers(V, [PROMPTS[0]], [200], 256)
    long = decode.Job(batch, np.array([7]), np.array([200]), 200, TextRule(block=8))
    with pytest.raises(ValueError, match="a row has 207 tokens; the model takes 128"):
        engine().submit(long)


def test_a_sharing_of_seeds_is_that_of_a_whole_job():
    rule = RULES["sampled"]
    whole = run_whole(job(rule), 9)
    assert_equal(engine(slots=2).run(job(rule), 9), whole)
    assert jax.device_count() > 1 and LENGTH == 30
