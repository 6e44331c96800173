"""The denoising loop and its rules, on a made-up network whose logits are a function of the tokens."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoise_toys import (
    IMAGE_RULES,
    LENGTH,
    NETWORK,
    RULES,
    START,
    TEXT_RULES,
    VOCAB,
    B,
    L,
    denoise_steps,
    hidden,
    rows,
    run,
    settings,
    unembed,
    with_head,
)

from mmada_jax.diffusion import schedule
from mmada_jax.diffusion.denoise import denoise
from mmada_jax.diffusion.rules import ImageRule, TextRule, transfer_quota


def test_a_model_that_draws_the_mask_comes_to_an_end():
    def unembed_mask(h_BLD, first=0, size=None):
        return unembed(h_BLD).at[..., VOCAB.mask].set(99.0)

    for stop, left in ((None, VOCAB.mask), (11, 11)):
        rule = TextRule(steps=24, block=3, stop=stop)
        out = jax.jit(lambda t, v, rule=rule: denoise(with_head(unembed_mask), t, v, **settings(rule)))(
            *rows()
        )
        assert (np.asarray(out)[:, START : START + LENGTH] == left).all()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("known", [(), (0, 5, 11)], ids=["all hidden", "inpainting"])
def test_the_prompt_never_changes_and_less_and_less_is_hidden(name, known):
    tokens, valid = rows(known)
    steps = [np.asarray(x) for x in denoise_steps(NETWORK, tokens, valid, **settings(RULES[name]))]
    for now in steps:
        np.testing.assert_array_equal(now[tokens != VOCAB.mask], tokens[tokens != VOCAB.mask])
    counts = np.array([(x == VOCAB.mask).sum(axis=1) for x in [tokens, *steps]])
    assert (np.diff(counts, axis=0) <= 0).all()
    assert (counts[-1] == 0).all()
    for before, after in itertools.pairwise(steps):
        revealed = before != VOCAB.mask
        np.testing.assert_array_equal(after[revealed], before[revealed])
    # The same, jitted whole.
    np.testing.assert_array_equal(run(RULES[name], (tokens, valid)), steps[-1])


@pytest.mark.parametrize(
    ("rule", "greedy"),
    [
        (TextRule(steps=4, block=12, temperature=1.0), {"temperature": 0.0}),
        (ImageRule(steps=2, guidance=0.0, temperature=0.1), {"draw": "argmax"}),
    ],
)
def test_by_the_largest_probability_the_order_does_not_depend_on_the_draw(rule, greedy):
    def revealed(**values):
        changed = dataclasses.replace(rule, **values)
        first = [next(denoise_steps(NETWORK, *rows(), **settings(changed, seed))) for seed in (0, 1)]
        return np.asarray(first)[:, :, START : START + LENGTH] != VOCAB.mask

    np.testing.assert_array_equal(revealed(remask="largest"), revealed(remask="largest", **greedy))
    assert (revealed() != revealed(**greedy)).any()


@pytest.mark.parametrize("name", IMAGE_RULES)
def test_images_consist_of_codes(name):
    drawn = run(IMAGE_RULES[name])[:, START : START + LENGTH]
    assert ((drawn >= VOCAB.image_offset) & (drawn < VOCAB.image_offset + VOCAB.codebook_size)).all()


def test_text_blocks_are_filled_from_the_left():
    rule = TEXT_RULES["blocks"]
    for now in denoise_steps(NETWORK, *rows(), **settings(rule)):
        blocks = (np.asarray(now)[:, START : START + LENGTH] == VOCAB.mask).reshape(B, -1, rule.block)
        started = (~blocks).any(axis=2)
        finished = (~blocks).all(axis=2)
        assert (finished[:, :-1] | ~started[:, 1:]).all()


def test_the_number_of_steps_is_the_rules():
    for name, rule in TEXT_RULES.items():
        rule = dataclasses.replace(rule, never=(VOCAB.mask,))  # to draw it reveals nothing
        n = sum(1 for _ in denoise_steps(NETWORK, *rows(), **settings(rule)))
        if rule.threshold is None and rule.factor is None and name != "stop":
            assert n == (rule.steps or LENGTH), name
        else:
            assert n <= LENGTH, name
    for name, rule in IMAGE_RULES.items():
        n = sum(1 for _ in denoise_steps(NETWORK, *rows(), **settings(rule)))
        assert n <= rule.steps, name


def test_images_hide_what_the_schedule_says():
    rule = IMAGE_RULES["cosine"]
    wanted = schedule.hidden_counts(schedule.named("cosine"), LENGTH, rule.steps)
    steps = [np.asarray(x) for x in denoise_steps(NETWORK, *rows(), **settings(rule))]
    counts = [(x == VOCAB.mask).sum(axis=1) for x in steps[:-1]]
    for got, want in zip(counts, wanted, strict=False):
        np.testing.assert_array_equal(got, max(1, want))


def test_inpainting_is_spread_over_the_steps_by_the_quota_of_the_hidden():
    tokens, valid = rows(known=range(6))
    counts = {}
    for quota in ("total", "hidden"):
        rule = ImageRule(steps=4, guidance=0.0, schedule="linear", quota=quota)
        steps = denoise_steps(NETWORK, tokens, valid, **settings(rule))
        counts[quota] = [int((np.asarray(x)[0] == VOCAB.mask).sum()) for x in steps]
    assert counts["total"] == [5, 4, 3, 0]  # 9, 6, 3 of 12 stay hidden, at most one less than before
    assert counts["hidden"] == [4, 3, 1, 0]  # floor of 6 * (3/4, 2/4, 1/4)


def test_seeds_make_draws_and_greedy_needs_none():
    hot, cool = TEXT_RULES["hot"], TEXT_RULES["greedy"]
    np.testing.assert_array_equal(run(hot, seed=3), run(hot, seed=3))
    assert (run(hot, seed=3) != run(hot, seed=4)).any()
    np.testing.assert_array_equal(run(cool, seed=3), run(cool, seed=4))
    image = IMAGE_RULES["cosine"]
    assert (run(image, seed=3) != run(image, seed=4)).any()


def test_greedy_reveals_the_most_likely_token_of_the_surest_position_first():
    tokens, valid = rows()
    p = np.asarray(jax.nn.softmax(unembed(hidden(tokens, valid)), axis=-1))[:, START : START + LENGTH]
    first = np.asarray(next(denoise_steps(NETWORK, tokens, valid, **settings(TEXT_RULES["greedy"]))))
    for b in range(B):
        place = int(p[b].max(axis=-1).argmax())
        span = first[b, START : START + LENGTH]
        assert list(np.flatnonzero(span != VOCAB.mask)) == [place]
        assert span[place] == p[b, place].argmax()


def test_never_and_defer():
    plain = run(TEXT_RULES["greedy"])
    often = int(np.bincount(plain[:, START : START + LENGTH].ravel()).argmax())
    never = run(dataclasses.replace(TEXT_RULES["greedy"], never=(often,)))
    assert often not in never[:, START : START + LENGTH]
    defer = dataclasses.replace(TEXT_RULES["greedy"], defer=(often,))
    tokens, valid = rows()
    first = np.asarray(next(denoise_steps(NETWORK, tokens, valid, **settings(defer))))
    likely = np.asarray(unembed(hidden(tokens, valid))).argmax(-1)
    for b in range(B):
        (place,) = np.flatnonzero(first[b] != tokens[b])
        assert likely[b, place] != often or (likely[b, START : START + LENGTH] == often).all()


def test_stop_ends_decoding_and_fills_the_rest():
    calls = []

    def unembed_stop(h_BLD, first=0, size=None):
        logits = unembed(h_BLD, first, size)
        return logits.at[..., 11].set(100.0)

    rule = TextRule(steps=6, block=4, stop=11)
    for now in denoise_steps(with_head(unembed_stop), *rows(), **settings(rule)):
        calls.append(np.asarray(now))
    assert len(calls) == 2  # of 6: the first block of three ended in the stop token everywhere
    assert (calls[-1][:, START : START + LENGTH] == 11).all()


def test_guidance_moves_away_from_the_unconditional_row():
    # With weight g the logits are u + (1 + g)(c - u); as g grows the choice is argmax(c - u).
    rule = ImageRule(steps=1, guidance=1e6, draw="argmax")
    tokens, valid = rows()
    other, other_valid = settings(rule)["unconditional"]
    span = slice(START, START + LENGTH)
    c, u = (unembed(hidden(t, v), 24, 16)[:, span] for t, v in ((tokens, valid), (other, other_valid)))
    np.testing.assert_array_equal(run(rule)[:, span], np.asarray(jnp.argmax(c - u, -1)) + 24)


def test_text_guidance_hides_the_prompt_where_no_other_row_is_given():
    rule = dataclasses.replace(TEXT_RULES["guided"], steps=2, block=12)
    tokens, valid = rows()
    hidden_row = np.full_like(tokens, VOCAB.mask)
    given = settings(rule) | {"unconditional": (hidden_row, valid)}
    want = jax.jit(lambda t, v: denoise(NETWORK, t, v, **given))(tokens, valid)
    np.testing.assert_array_equal(run(rule), want)


@pytest.mark.parametrize(("n", "steps"), [(12, 5), (5, 5), (3, 8), (0, 4), (16, 4)])
def test_quotas_add_up_and_come_first(n, steps):
    quota = [int(transfer_quota(jnp.array([n]), steps, jnp.int32(step))[0]) for step in range(steps)]
    assert sum(quota) == n
    assert max(quota) - min(quota) <= 1
    assert quota == sorted(quota, reverse=True)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda: TextRule(steps=5, block=4), "steps 5 are not divisible by the 3 blocks"),
        (lambda: TextRule(steps=10, block=5), "steps 10 are not divisible by the 3 blocks of 5 tokens"),
        (lambda: TextRule(steps=12, block=0), "block is 0; it must be at least 1"),
        (lambda: TextRule(steps=12, block=12, remask="luck"), "unknown remask 'luck'"),
        (lambda: TextRule(steps=12, block=12, temperature=-1), "temperature is -1; it must be at least 0"),
        (lambda: ImageRule(steps=0), "steps is 0"),
        (lambda: ImageRule(schedule="saw"), "saw"),
    ],
)
def test_rules_that_cannot_fill_the_span_are_errors(rule, message):
    with pytest.raises(ValueError, match=message):
        denoise(NETWORK, *rows(), **settings(rule()))


def test_a_span_outside_the_row_is_an_error():
    given = settings(TextRule(steps=12, block=12)) | {"start": 10}
    with pytest.raises(ValueError, match=r"span \[10, 22\) is outside a row of 20 tokens"):
        denoise(NETWORK, *rows(), **given)


# ---- A row doesn't depend on its company -------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "text hot", "text guided", "text factor", "text random", "text stop", "text shorter last block",
    "image guided", "image hidden",
])  # fmt: skip
def test_a_row_is_decoded_as_it_is_alone(name):
    # Rows whose spans begin and end elsewhere, so that their blocks do, with keys of their own.
    rule = RULES[name]
    length = LENGTH if isinstance(rule, TextRule) else 9
    starts, lengths = np.array([6, 2, 7]), np.array([12, 7, 10] if isinstance(rule, TextRule) else [9] * 3)
    rng = np.random.default_rng(3)
    tokens = rng.integers(12, 24, size=(B, L)).astype(np.int32)
    for row, start, n in zip(tokens, starts, lengths, strict=True):
        row[start : start + n] = VOCAB.mask
    valid = np.ones((B, L), bool)
    valid[1, 18:] = False
    other = np.where(tokens == VOCAB.mask, tokens, 12).astype(np.int32), valid
    key = jax.random.split(jax.random.key(7), B)

    @jax.jit
    def fill(which):
        return denoise(
            NETWORK, tokens[which], valid[which], start=jnp.asarray(starts)[which], length=length,
            lengths=jnp.asarray(lengths)[which], rule=rule, vocab=VOCAB, key=key[which],
            unconditional=jax.tree.map(lambda x: jnp.asarray(x)[which], other) if rule.guidance else None,
        )  # fmt: skip

    tokens, valid = jnp.asarray(tokens), jnp.asarray(valid)
    together = np.asarray(fill(np.arange(B)))
    assert not (together[0, starts[0] : starts[0] + lengths[0]] == VOCAB.mask).any()
    for b in range(B):
        outside = np.ones(L, bool)
        outside[starts[b] : starts[b] + lengths[b]] = False
        np.testing.assert_array_equal(together[b, outside], np.asarray(tokens)[b, outside])
        np.testing.assert_array_equal(np.asarray(fill(np.full(B, b)))[0], together[b])
    np.testing.assert_array_equal(np.asarray(fill(np.array([2, 0, 1]))), together[[2, 0, 1]])


def test_the_last_block_is_shorter_and_the_others_are_not():
    rule = TEXT_RULES["shorter last block"]  # 5, 5 and 2 of 12
    for now in denoise_steps(NETWORK, *rows(), **settings(rule)):
        span = np.asarray(now)[:, START : START + LENGTH] == VOCAB.mask
        for one in span:
            blocks = [one[:5], one[5:10], one[10:]]
            for before, after in itertools.pairwise(blocks):
                assert not before.any() or after.all()
