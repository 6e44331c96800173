"""Draft and verify (WINO): the shadows of a block, and the loop against one that is written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_toys import BLOCK, LENGTH, MODEL, NEVER, NEW, PARAMS, PROMPTS, V, fill, job

from mmada_jax.devices import sharding
from mmada_jax.diffusion import cached, decode, denoise
from mmada_jax.diffusion.rules import TextRule
from mmada_jax.nets import transformer
from mmada_jax.tokens import layout
from mmada_jax.train.rl import rollout
from mmada_jax.train.rl.run import Task

RULE = TextRule(block=BLOCK, threshold=0.3, verify=0.6, never=NEVER)
# In a single layer a shadow sees what a mask in the place of its token would see.
ONE = dataclasses.replace(MODEL, n_layers=1)
PARAMS_OF_ONE = PARAMS | {"blocks": jax.tree.map(lambda x: x[:1], PARAMS["blocks"])}


@jax.jit
def _probabilities(tokens_L):
    network = transformer.Network(PARAMS_OF_ONE, ONE)
    h_BLD = network.hidden_states(tokens_L[None], jnp.ones((1, len(tokens_L)), bool))
    return jax.nn.softmax(network.unembed(h_BLD), axis=-1)[0]


def probabilities(tokens_L):
    """[L, V] at every place of a row."""
    return np.array(_probabilities(tokens_L))


def written_out(prompt, new):
    """The span, filled by a loop over steps in NumPy; and how often a token was hidden again."""
    tokens_L = np.array([*prompt, *[V.mask] * new], np.int32)
    n_again = 0
    for first in range(len(prompt), len(tokens_L), BLOCK):
        places = np.arange(first, min(first + BLOCK, len(tokens_L)))
        while (tokens_L[places] == V.mask).any():
            p_LV, before_L = probabilities(tokens_L), tokens_L.copy()
            hidden = places[tokens_L[places] == V.mask]
            drawn = {i: int(np.argmax(np.delete(p_LV[i], V.mask))) for i in hidden}
            drawn = {i: x + (x >= V.mask) for i, x in drawn.items()}
            surest = sorted(hidden, key=lambda i: -p_LV[i, drawn[i]])
            most = min(max(int(0.7 * len(hidden)), 5), 20)
            passed = [i for i in surest[:most] if p_LV[i, drawn[i]] >= RULE.threshold] or surest[:1]
            shown = [i for i in places if before_L[i] != V.mask]
            likely = {}
            for i in shown:
                without_L = before_L.copy()
                without_L[i] = V.mask
                likely[i] = probabilities(without_L)[i, before_L[i]]
            wrong = sorted((i for i in shown if likely[i] < RULE.verify), key=likely.get)
            again = wrong[: len(passed) - 1]
            for i in passed:
                tokens_L[i] = drawn[i]
            tokens_L[again] = V.mask
            n_again += len(again)
    return tokens_L[len(prompt) :], n_again


def test_the_loop_is_the_one_written_out():
    batch = layout.answers(V, [PROMPTS[0]], [NEW[0]], len(PROMPTS[0]) + NEW[0])
    given = {"start": len(PROMPTS[0]), "length": NEW[0], "rule": RULE, "vocab": V, "key": jax.random.key(0)}
    network = transformer.Network(PARAMS_OF_ONE, ONE)
    found = jax.jit(lambda t, v: denoise.denoise(network, t, v, **given))(batch.tokens, batch.valid)
    wanted, n_again = written_out(PROMPTS[0], NEW[0])
    np.testing.assert_array_equal(np.asarray(found)[0, len(PROMPTS[0]) :], wanted)
    assert n_again > 3


def test_nobody_sees_a_shadow_but_itself():
    network = transformer.Network(PARAMS, MODEL)
    rng = np.random.default_rng(1)
    tokens_BQ = jnp.asarray(rng.integers(16, 90, (2, 12)), jnp.int32)
    place_BQ, valid_BQ = jnp.broadcast_to(jnp.arange(12), (2, 12)), jnp.ones((2, 12), bool)
    alone_BQD, _ = network.hidden_block(tokens_BQ, place_BQ, valid_BQ)

    def with_shadows(shadow_BN, tokens_BQ=tokens_BQ):
        join = lambda x_BQ, y_BN: jnp.concatenate([x_BQ, y_BN], axis=1)  # noqa: E731
        of_part = (
            join(tokens_BQ, shadow_BN),
            join(place_BQ, place_BQ[:, 4:8]),
            join(valid_BQ, valid_BQ[:, 4:8]),
        )
        h_BQD, _ = network.hidden_block(*of_part, shadows=4)
        return np.asarray(h_BQD[:, :12]), np.asarray(h_BQD[:, 12:])

    masks = jnp.full((2, 4), V.mask, jnp.int32)
    real, shadow = with_shadows(masks)
    np.testing.assert_allclose(real, alone_BQD, atol=1e-5)
    real, other = with_shadows(masks.at[:, 1].set(20))
    np.testing.assert_allclose(real, alone_BQD, atol=1e-5)
    np.testing.assert_allclose(np.delete(other, 1, axis=1), np.delete(shadow, 1, axis=1), atol=1e-5)
    assert np.abs(other[:, 1] - shadow[:, 1]).min() > 0
    # A token that isn't its own changes a shadow.
    _, other = with_shadows(masks, tokens_BQ.at[:, 6].add(1))
    assert (np.abs(other - shadow).max(axis=(0, 2)) > 1e-3).all()


def test_a_block_with_stored_keys_and_values_has_the_shadows_of_the_whole_row():
    """What was stored saw the very same row, so that nothing is approximate."""
    rule = dataclasses.replace(RULE, cache="dual")
    draft = decode.draft_of(decode.rows_of(job(rule), 0))
    shown_BL = jnp.arange(64)[None] < draft.start_B[:, None] + 5  # five tokens of the first block
    tokens_BL = jnp.where((draft.tokens_BL == V.mask) & shown_BL, 30, draft.tokens_BL)
    draft = draft._replace(tokens_BL=tokens_BL)
    network = transformer.Network(PARAMS, MODEL)
    state = denoise.begin(network, draft, length=LENGTH, rule=rule, vocab=V)
    spot = denoise.spot(draft, state, LENGTH, rule, V)
    active_B = jnp.ones(len(tokens_BL), bool)
    part_BND, _ = cached.hidden_states(network, rule, BLOCK, LENGTH, spot, active_B, state.cache)
    whole_BND = cached.with_shadows(network, rule, BLOCK, spot)
    assert part_BND.shape[1] == 2 * BLOCK
    np.testing.assert_allclose(part_BND, whole_BND, atol=1e-5)
    shadows_BND = np.asarray(whole_BND[:, BLOCK:])
    assert np.abs(shadows_BND - np.asarray(whole_BND[:, :BLOCK])).max(axis=(1, 2)).min() > 1e-2


@pytest.mark.parametrize("fields", [{}, {"cache": "dual"}], ids=["no cache", "dual"])
def test_a_row_does_not_depend_on_its_company_nor_on_the_mesh(fields):
    rule = dataclasses.replace(RULE, **fields)
    together = fill(rule)
    for other in (
        fill(rule, range(3, -1, -1), length=96)[::-1],
        fill(rule, mesh=sharding.make_mesh(2, 2, 2)),
    ):
        for a, b in zip(together, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert all((ids != V.mask).all() for ids in together)


def test_stored_anew_at_every_step_a_draft_is_never_judged():
    """A first pass has no shadows, so the tokens are those of the threshold with WINO's limit."""
    anew = dataclasses.replace(RULE, cache="dual", refresh=1)
    blind = dataclasses.replace(RULE, verify=1e-9)
    for a, b in zip(fill(anew), fill(blind), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("fields", "message"), [
    ({"verify": 0.9, "threshold": None}, "verify 0.9 judges what passes a threshold; give threshold too"),
    ({"guidance": 1.0}, "guidance 1.0 doesn't go with verify 0.6"),
    ({"verify": 1.5}, "verify is 1.5"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RULE, **fields)


def test_rollouts_and_rows_of_several_spans_refuse_it():
    task = Task("lm_chat", None, {}, groups=2, text=dataclasses.replace(RULE, temperature=1.0))
    with pytest.raises(ValueError, match=r"text\.verify is 0\.6; rollouts need None"):
        rollout.response_span(task, V, layout.RowShape(8, 16))
    draft = decode.draft_of(decode.rows_of(job(RULE), 0))
    span = denoise.Span(draft.start_B, draft.length_B, LENGTH, RULE)
    with pytest.raises(ValueError, match=r"verify is 0\.6; rows with several spans need None"):
        denoise.denoise_spans(None, *draft[:2], [span], vocab=V, key_B=draft.key_B)


def test_no_record_is_kept_of_tokens_that_are_hidden_again():
    rows, network = job(RULE), transformer.Network(PARAMS, MODEL)
    given = {"start": 7, "length": LENGTH, "rule": RULE, "vocab": V, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match="hides tokens again, of which no record"):
        denoise.denoise(network, rows.rows.tokens, rows.rows.valid, record=True, **given)
