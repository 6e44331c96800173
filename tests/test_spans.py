"""Several spans of a row, each with its rule."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoise_toys import NETWORK, VOCAB, B, hidden, rows, unembed

from mmada_jax.diffusion.denoise import Draft, Span, advance, begin, denoise, denoise_spans
from mmada_jax.diffusion.rules import ImageRule, TextRule

SPANS = {
    "text": (2, 7, TextRule(block=3)),
    "image": (10, 8, ImageRule(steps=4, guidance=2.0, draw="argmax")),
}


def run_spans(names, network=NETWORK, **changes):
    """Rows whose text and image are hidden, with the spans of these names filled."""
    tokens, valid = rows()
    tokens[:, 9] = 20
    for start, length, _ in SPANS.values():
        tokens[:, start : start + length] = VOCAB.mask
    spans = [
        Span(jnp.full(B, start), jnp.full(B, length), length, dataclasses.replace(rule, **changes))
        for start, length, rule in map(SPANS.get, names)
    ]
    keys = jax.random.split(jax.random.key(4), B)
    call = jax.jit(lambda t, v: denoise_spans(network, t, v, spans, vocab=VOCAB, key_B=keys))
    return tokens, np.asarray(call(tokens, valid))


@pytest.mark.parametrize("name", SPANS)
def test_a_span_by_itself_is_filled_as_by_denoise(name):
    start, length, rule = SPANS[name]
    rule = dataclasses.replace(rule, temperature=0.0)
    tokens, filled = run_spans([name], temperature=0.0)
    alone = denoise(
        NETWORK,
        tokens,
        rows()[1],
        start=start,
        length=length,
        rule=rule,
        vocab=VOCAB,
        key=jax.random.key(0),
    )
    np.testing.assert_array_equal(filled, alone)


def test_two_spans_are_filled_in_the_same_steps_and_see_each_other():
    """Against the loop written out: both spans predict from the row that the step before has left."""
    tokens, filled = run_spans(["text", "image"], temperature=0.0)
    assert (filled != VOCAB.mask).all()
    draft_of = {
        name: Draft(jnp.asarray(tokens), jnp.asarray(rows()[1]), jnp.full(B, start), jnp.full(B, length),
                    jax.random.split(jax.random.key(0), B))
        for name, (start, length, _) in SPANS.items()
    }  # fmt: skip
    fields = {
        name: {"length": length, "rule": dataclasses.replace(rule, temperature=0.0), "vocab": VOCAB}
        for name, (_, length, rule) in SPANS.items()
    }
    states = {name: begin(NETWORK, draft_of[name], **fields[name]) for name in SPANS}
    now = np.array(tokens)
    for _ in range(7):  # the text takes 7 steps, the image 4
        states = {
            name: advance(
                NETWORK, draft_of[name], state._replace(tokens_BL=jnp.asarray(now)), **fields[name]
            )
            for name, state in states.items()
        }
        for name, (start, length, _) in SPANS.items():
            span = slice(start, start + length)
            now[:, span] = np.asarray(states[name].tokens_BL)[:, span]
    np.testing.assert_array_equal(filled, now)
    # The text would be another one without the image.
    assert (run_spans(["text"], temperature=0.0)[1][:, 2:9] != filled[:, 2:9]).any()


def test_spans_without_guidance_share_a_pass():
    passes = []

    def counted(tokens_BL, valid_BL):
        passes.append(1)
        return hidden(tokens_BL, valid_BL)

    network = types.SimpleNamespace(hidden_states=counted, unembed=unembed)
    run_spans(["text", "image"], network, guidance=0.0)
    assert len(passes) == 1  # as the step is traced


def test_several_spans_do_not_go_with_a_cache():
    with pytest.raises(ValueError, match="cache is 'dual'; rows with several spans need 'none'"):
        run_spans(["text"], cache="dual")
