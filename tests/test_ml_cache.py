"""Pictures of which a step computes the least certain codes (ML-Cache), against the loop written out."""

import dataclasses
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_toys import MODEL, PARAMS, SEEDS, V, assert_equal, drawing_job, one_device, run_whole

from mmada_jax.devices import sharding
from mmada_jax.diffusion import decode, denoise
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.nets import transformer
from mmada_jax.serve.engine import Engine
from mmada_jax.tokens import layout
from mmada_jax.train.rl import rollout
from mmada_jax.train.rl.run import Task

STEPS, N = 14, 16
# Steps that compute all: 30 % of 14 are 4.2, and every fifth of those that follow is the fifth.
WHOLE = {0, 1, 2, 3, 4, 9}
PLAIN = ImageRule(steps=STEPS, guidance=0.0, recompute=0.2)
GUIDED = dataclasses.replace(PLAIN, guidance=2.0)
RULES = {"plain": PLAIN, "guided": GUIDED}
ROWS = range(3)
NETWORK = transformer.Network(PARAMS, MODEL)
GIVEN = {"length": N, "vocab": V}


def draw(rule, rows=ROWS, mesh=None, params=PARAMS, config=MODEL, job=None):
    """The codes of the drawings of these numbers."""
    return run_whole(job or drawing_job(rule, rows), [SEEDS[i] for i in rows], mesh, config, params)


class WrittenOut:
    """One row with the stored keys and values of all of its places, and what a step computes of it."""

    def __init__(self, tokens_L, valid_L):
        self.tokens_L, self.valid_L = tokens_L.copy(), valid_L
        self.k = self.v = None  # [layers, heads, places, width]

    def compute(self, places):
        """Logits over the codes at these places, from all else that is stored."""
        seen_L = self.valid_L.copy()
        seen_L[places] = False
        size = MODEL.n_layers, MODEL.n_kv_heads, len(seen_L), MODEL.d_head
        self.k, self.v = (np.zeros(size, np.float32) if x is None else x for x in (self.k, self.v))
        past = transformer.Cache(self.k[:, None], self.v[:, None])
        of_places = self.tokens_L[None, places], np.asarray(places)[None], self.valid_L[None, places]
        h_1QD, new = _block(*of_places, past, seen_L[None])
        self.k[:, :, places], self.v[:, :, places] = (np.asarray(x)[:, 0] for x in new)
        return np.asarray(NETWORK.unembed(h_1QD, V.image_offset, V.codebook_size))[0]


@jax.jit
def _block(*given):
    return NETWORK.hidden_block(*given)


@pytest.mark.parametrize("name", RULES)
def test_the_loop_is_the_one_written_out(name):
    rule = RULES[name]
    job = drawing_job(rule, [0])
    job.rows.tokens[0, 13:16] = 100  # three codes are known
    draft = decode.draft_of(decode.rows_of(job, 3))
    advance = jax.jit(lambda state: denoise.advance(NETWORK, draft, state, rule=rule, **GIVEN))
    state = denoise.begin(NETWORK, draft, rule=rule, **GIVEN)
    span = slice(10, 10 + N)
    made = [job.rows, *([job.unconditional] if rule.guidance else [])]
    rows = [WrittenOut(of.tokens[0], of.valid[0]) for of in made]
    keys_N = jax.vmap(jax.random.fold_in, (None, 0))
    logits_NV, fresh, counts = None, set(), []
    for step in range(STEPS):
        for row in rows:
            row.tokens_L[span] = np.asarray(state.tokens_BL)[0, span]
        hidden_N = rows[0].tokens_L[span] == V.mask
        if step in WHOLE:
            of_rows = [row.compute(np.arange(len(row.tokens_L)))[span] for row in rows]
            chosen = np.arange(N)
        else:
            order = sorted(range(N), key=lambda n: (n not in fresh, not hidden_N[n], logits_NV[n].max()))
            chosen = np.array(order[: math.ceil(0.2 * N)])
            of_rows = [row.compute(10 + chosen) for row in rows]
        counts.append(len(chosen))
        fresh -= set(chosen)
        logits_NV = np.zeros((N, V.codebook_size), np.float32) if logits_NV is None else logits_NV.copy()
        logits_NV[chosen] = of_rows[-1] + (1 + rule.guidance) * (of_rows[0] - of_rows[-1])
        before = rows[0].tokens_L[span].copy()
        state = advance(state)
        np.testing.assert_allclose(state.kept[0], logits_NV, atol=2e-4)
        key_N = keys_N(jax.random.fold_in(draft.key_B[0], step), jnp.arange(N))
        of_step = jnp.full(1, int((job.rows.tokens[0, span] == V.mask).sum())), jnp.full(1, step)
        index, reveal = rule.reveal(key_N[None], state.kept, jnp.asarray(hidden_N)[None], *of_step, N)
        wanted = np.where(np.asarray(reveal)[0], np.asarray(index)[0] + V.image_offset, before)
        np.testing.assert_array_equal(np.asarray(state.tokens_BL)[0, span], wanted)
        fresh |= set(np.flatnonzero(wanted != before))
    assert counts.count(4) == STEPS - len(WHOLE) and (wanted != V.mask).all()


def test_all_codes_anew_in_one_layer_are_those_of_plain_drawing():
    """The keys and values of a layer are functions of its own token, and those of the text stay."""
    config = dataclasses.replace(MODEL, n_layers=1)
    params = PARAMS | {"blocks": jax.tree.map(lambda x: x[:1], PARAMS["blocks"])}
    most = dataclasses.replace(GUIDED, recompute=0.95)
    assert most.n_anew(N) == N
    plain = dataclasses.replace(GUIDED, recompute=1.0)
    drawn = [draw(rule, params=params, config=config) for rule in (most, plain, GUIDED)]
    assert_equal(*drawn[:2])
    assert any((a != b).any() for a, b in zip(*drawn[1:], strict=True))


def test_with_all_tokens_in_all_steps_nothing_is_stored():
    rule = ImageRule(steps=STEPS, guidance=2.0)
    assert rule == dataclasses.replace(GUIDED, recompute=1.0) and not rule.caches
    state = denoise.blank(NETWORK, jnp.zeros((2, 27), jnp.int32), N, rule, V)
    assert state.cache is state.kept is None
    assert [RULES[name].caches for name in ("plain", "guided")] == [1, 2]
    assert [TextRule(cache=cache).caches for cache in ("none", "dual")] == [0, 1]


def test_which_steps_compute_all_and_how_many_codes_the_others_do():
    whole = {n for n in range(STEPS) if PLAIN.all_anew(jnp.array([n]))[0]}
    assert whole == WHOLE
    tens = dataclasses.replace(PLAIN, steps=10).all_anew(jnp.arange(10))
    assert np.flatnonzero(tens).tolist() == [0, 1, 2, 7]
    assert dataclasses.replace(PLAIN, steps=1).all_anew(jnp.arange(1)).all()
    shares = [(0.1, 1024, 103), (0.07, 100, 7), (0.1, 3, 1), (1e-5, 16, 1), (0.5, 16, 8)]
    for share, length, n in shares:
        assert dataclasses.replace(PLAIN, recompute=share).n_anew(length) == n


@pytest.mark.parametrize("name", RULES)
def test_a_row_does_not_depend_on_its_company_nor_on_the_mesh(name):
    rule = RULES[name]
    together = draw(rule)
    assert_equal(together[1:2], draw(rule, [1]))
    assert_equal(together, draw(rule, ROWS[::-1], sharding.make_mesh(2, 2, 2))[::-1])
    assert any((a != b).any() for a, b in itertools.pairwise(together))


def engine(mesh=None, **fields):
    mesh = mesh or one_device()
    params = sharding.put_params(PARAMS, decode.param_shardings(mesh, MODEL))
    return Engine(types.SimpleNamespace(mesh=mesh, config=MODEL, vocab=V, params=params), **fields)


def test_rows_of_the_engine_are_at_different_steps_and_give_their_slots_away():
    alone, rows = draw(GUIDED), [1, 0, 2, 1]
    made = engine(slots=4)
    first = made.submit(drawing_job(GUIDED, [2]), SEEDS[2:3], progress=lambda x: None, every="step")
    for _ in range(6):
        made.turn()
    assert first[0].steps == 6
    later = made.submit(drawing_job(GUIDED, rows), [SEEDS[i] for i in rows])
    assert_equal([x.result() for x in (*first, *later)], [alone[i] for i in (2, *rows)])
    assert {x.steps for x in (*first, *later)} == {STEPS}


def test_in_the_engine_on_several_devices_too():
    rows = [0, 1, 2, 0, 1]
    made = engine(sharding.make_mesh(2, 2, 2), slots=4)
    alone = draw(GUIDED)
    assert_equal(made.run(drawing_job(GUIDED, rows), [SEEDS[i] for i in rows]), [alone[i] for i in rows])


def test_caches_and_logits_of_a_row_are_counted():
    places = drawing_job(PLAIN).rows.tokens.shape[1]
    of_cache = 2 * MODEL.n_layers * MODEL.n_kv_heads * places * MODEL.d_head * 4
    plain, guided = (n * of_cache + N * V.codebook_size * 4 for n in (1, 2))  # and logits of each code
    for rule, memory, joined in (
        (PLAIN, 4 * plain, 4),
        (GUIDED, 2 * guided, 2),
        (GUIDED, 2 * guided - 1, 1),
    ):
        made = engine(slots=4, memory=memory)
        tickets = made.submit(drawing_job(rule, [0, 1, 2, 0]), 1)
        with made._turn:
            assert sum(len(x) for x in made._seat().values()) == joined
        assert {x.state for x in tickets} == {"waiting"}
    message = rf"stored of a row of {places} tokens takes .*; leave out recompute"
    with pytest.raises(ValueError, match=message):
        engine(memory=guided - 1).submit(drawing_job(GUIDED))
    engine(memory=plain).submit(drawing_job(PLAIN))
    engine(memory=0).submit(drawing_job(ImageRule(steps=3)))


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match=r"guide_every 4 doesn't go with recompute 0\.2; leave out one"):
        dataclasses.replace(GUIDED, guide_every=4)
    for share in (0, 1.5):
        with pytest.raises(
            ValueError, match=f"recompute is {share}; it must be a share from 0 to 1, not 0"
        ):
            ImageRule(recompute=share)
    job = drawing_job(PLAIN)
    draft = decode.draft_of(decode.rows_of(job, 0))
    with pytest.raises(ValueError, match=r"recompute 0\.2 draws from logits of earlier steps, of which no"):
        denoise.begin(NETWORK, draft, rule=PLAIN, record=True, **GIVEN)
    span = denoise.Span(draft.start_B, draft.length_B, N, PLAIN)
    with pytest.raises(ValueError, match=r"recompute is 0\.2; rows with several spans need 1\.0"):
        denoise.denoise_spans(NETWORK, *draft[:2], [span], vocab=V, key_B=draft.key_B)
    task = Task("t2i", None, {}, groups=2, image=PLAIN)
    with pytest.raises(ValueError, match=r"image\.recompute is 0\.2; rollouts need 1\.0"):
        rollout.response_span(task, V, layout.RowShape(8, N))
