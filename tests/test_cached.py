"""Decoding with stored keys and values, on a small model with grouped-query attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_toys import (
    BLOCK,
    KINDS,
    MODEL,
    NEVER,
    PARAMS,
    PROMPTS,
    RNG,
    V,
    assert_equal,
    fill,
    job,
    one_device,
)  # fmt: skip

from mmada_jax.devices import sharding
from mmada_jax.diffusion import decode, denoise
from mmada_jax.diffusion.rules import TextRule
from mmada_jax.nets import transformer
from mmada_jax.tokens import layout


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_stored_anew_at_every_step_it_is_plain_decoding(cache, temperature):
    plain = TextRule(block=BLOCK, temperature=temperature, never=NEVER)
    assert_equal(fill(dataclasses.replace(plain, cache=cache, refresh=1)), fill(plain))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_where_each_block_takes_one_step_it_is_plain_decoding(cache):
    plain = TextRule(block=BLOCK, steps=4, never=NEVER)
    assert_equal(fill(dataclasses.replace(plain, cache=cache)), fill(plain))


def part_and_rest(dtype):
    """Hidden states of places 10..17 of two rows, from whole rows and from stored keys and values."""
    config = dataclasses.replace(MODEL, dtype=dtype)
    network = transformer.Network(PARAMS, config)
    tokens_BL = jnp.asarray(RNG.integers(16, 90, (2, 40)), jnp.int32)
    valid_BL = np.ones((2, 40), bool)
    valid_BL[1, 33:] = False
    place_BL = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), (2, 40))
    whole_BLD = network.hidden_states(tokens_BL, jnp.asarray(valid_BL))
    _, stored = network.hidden_block(tokens_BL, place_BL, jnp.asarray(valid_BL))
    seen_BL = valid_BL & ~((np.arange(40) >= 10) & (np.arange(40) < 18))
    now = slice(10, 18)
    h_BQD, _ = network.hidden_block(
        tokens_BL[:, now], place_BL[:, now], jnp.asarray(valid_BL[:, now]), stored, jnp.asarray(seen_BL)
    )
    return np.asarray(whole_BLD[:, now], np.float32), np.asarray(h_BQD, np.float32)


def test_a_part_of_a_row_has_the_hidden_states_of_the_whole():
    whole, part = part_and_rest("float32")
    np.testing.assert_allclose(part, whole, atol=1e-5)
    exact = whole
    whole, part = part_and_rest("bfloat16")
    error = np.abs(whole - exact).mean()
    assert np.abs(part - exact).mean() < 1.5 * error  # no worse than bfloat16 is


def test_a_place_that_is_not_seen_changes_nothing():
    network = transformer.Network(PARAMS, MODEL)
    tokens_BQ, place_BQ = jnp.full((1, 4), 20), jnp.arange(4)[None]
    seen_BP = jnp.arange(12)[None] < 7

    def hidden(stored):
        return network.hidden_block(tokens_BQ, place_BQ, tokens_BQ > 0, stored, seen_BP)[0]

    cache = jax.tree.map(lambda x: jnp.ones_like(x), network.empty_cache(1, 12))
    other = jax.tree.map(lambda x: x.at[:, :, :, 7:].set(99.0), cache)
    np.testing.assert_array_equal(hidden(cache), hidden(other))
    other = jax.tree.map(lambda x: x.at[:, :, :, 6].set(9.0), cache)
    assert (hidden(cache) != hidden(other)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_company_nor_on_its_bucket(kind):
    rule = dataclasses.replace(KINDS[kind], temperature=0.8 if "window" in kind else 0.0, never=NEVER)
    together = fill(rule)
    assert_equal(together, [fill(rule, [i])[0] for i in range(4)])
    assert_equal(together, fill(rule, range(3, -1, -1))[::-1])
    assert_equal(together, fill(rule, length=96))


@pytest.mark.parametrize("kind", ["dual", "prefix, window"])
def test_sharded_equals_unsharded(kind):
    rule = dataclasses.replace(KINDS[kind], never=NEVER)
    assert_equal(fill(rule, mesh=sharding.make_mesh(2, 2, 2)), fill(rule))


def test_equal_rows_share_their_first_pass():
    rule = dataclasses.replace(KINDS["dual, window"], temperature=0.8, never=NEVER)
    rows = [0, 0, 1, 1]
    mesh = one_device()
    assert decode.first_pass(mesh, job(rule, rows))["share"] == 2
    assert decode.first_pass(mesh, job(rule, [0, 0, 0, 1]))["share"] == 1
    of_row = {i: fill(rule, [i])[0] for i in (0, 1)}
    assert_equal(fill(rule, rows), [of_row[i] for i in rows])


def test_places_beyond_the_window_are_not_seen():
    """With one step, so that there is only a first pass, what stands behind the window has no effect."""
    network = transformer.Network(PARAMS, MODEL)
    batch = layout.answers(V, [PROMPTS[0]], [30], 64)
    rule = TextRule(block=BLOCK, steps=4, cache="dual", window=6, never=NEVER)

    def first_logp(tokens_BL):
        draft = denoise.Draft(
            tokens_BL, batch.valid, jnp.array([7]), jnp.array([30]), jax.random.key(0)[None]
        )
        of_rule = {"length": 30, "rule": rule, "vocab": V}
        state = denoise.begin(network, draft, **of_rule, record=True)
        state = denoise.advance(network, draft, state, **of_rule)
        return np.asarray(state.record.logp_BL)[0, 7:15]

    other = batch.tokens.copy()
    other[0, 21:36] = 50  # from the end of the window to the place before the last
    logp = first_logp(batch.tokens)
    np.testing.assert_array_equal(logp, first_logp(other))
    other[0, 36] = 50
    assert (logp != first_logp(other)).all()


def test_a_row_that_has_ended_keeps_its_tokens_while_others_go_on():
    rule = dataclasses.replace(
        KINDS["dual, window"], never=NEVER, stop=int(fill(KINDS["dual, window"])[0][3])
    )
    together = fill(rule)
    assert (together[0][BLOCK:] == rule.stop).all()
    assert_equal(together, [fill(rule, [i])[0] for i in range(4)])


def test_soft_padding_is_refused():
    config = dataclasses.replace(MODEL, pad="soft")
    with pytest.raises(ValueError, match="pad='hard'; this model's is 'soft'"):
        fill(KINDS["dual"], config=config)


@pytest.mark.parametrize(("fields", "message"), [
    ({"window": 4}, "window 4 is for decoding with a cache"),
    ({"refresh": 4}, "refresh 4 is for decoding with a cache"),
    ({"cache": "dual", "window": 0}, "window is 0"),
    ({"cache": "dual", "guidance": 1.0}, "guidance 1.0 doesn't go with cache 'dual'"),
    ({"threshold": 0.0}, "threshold is 0.0"),
    ({"threshold": 1.5}, "threshold is 1.5"),
    ({"threshold": 0.9, "factor": 1.0}, "threshold and factor both"),
    ({"bound": 0.1, "factor": 1.0}, "factor and bound both"),
    ({"relax": 0.3}, "relax 0.3 lowers a threshold"),
    ({"leap": 0.3}, "leap 0.3 lowers a threshold"),
    ({"threshold": 0.6, "leap": 0.7}, "leap 0.7 is above threshold 0.6"),
])  # fmt: skip
def test_combinations_that_cannot_be_meant_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        TextRule(**fields)


def test_an_unknown_cache_is_refused():
    with pytest.raises(ValueError, match="unknown cache 'daul'; known: none, prefix, dual"):
        TextRule(cache="daul").check_length(8)
