"""What a step reveals, by each rule, against the same written out place by place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoise_toys import LENGTH, NETWORK, START, VOCAB, B, denoise_steps, hidden, rows, settings, unembed

from mmada_jax.diffusion.rules import ImageRule, TextRule, halton_order


def passing(rule, sure_N, entropy_N):
    """Which of a block's hidden places (NaN: not hidden) a step reveals, written out place by place."""
    hidden = np.flatnonzero(~np.isnan(sure_N))
    best_first = sorted(hidden, key=lambda n: entropy_N[n] if rule.bound is not None else -sure_N[n])
    chosen, total = {best_first[0]}, 0.0
    if rule.threshold is not None:
        tau = rule.threshold * (1 - rule.relax * (1 - len(hidden) / len(sure_N)))
        anchors = [n for n in hidden if sure_N[n] >= tau]
        chosen |= set(anchors)
        if rule.leap is not None:
            near = [n for n in hidden if any(abs(n - a) <= rule.radius for a in anchors)]
            chosen |= {n for n in near if sure_N[n] >= rule.leap}
    elif rule.bound is not None:
        for n in best_first:
            if total > rule.bound:
                break
            chosen.add(n)
            total += entropy_N[n]
    else:
        for k, n in enumerate(best_first):
            if k and sure_N[n] < 1 - rule.factor / (k + 2):
                break
            chosen.add(n)
    return chosen


@pytest.mark.parametrize("rule", [
    TextRule(threshold=0.5), TextRule(threshold=0.9), TextRule(threshold=0.6, relax=0.5),
    TextRule(threshold=0.7, leap=0.2, radius=1), TextRule(threshold=0.7, leap=0.4), TextRule(factor=1.0),
    TextRule(factor=0.3), TextRule(bound=0.5), TextRule(bound=2.0), TextRule(bound=0.0),
], ids=str)  # fmt: skip
def test_what_a_step_reveals_is_the_formula(rule):
    rng, n = np.random.default_rng(3), 16
    logits = rng.normal(size=(40, n, 6)) * rng.uniform(0.5, 6, (40, n, 1))
    hidden = rng.random((40, n)) < 0.6
    hidden[:, 0] = True
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    sure = np.where(hidden, p.max(axis=2), np.nan)
    entropy = -(p * np.log(p)).sum(axis=2)
    _, revealed = rule.reveal(
        jax.random.key(0), jnp.asarray(logits, jnp.float32), jnp.asarray(hidden), jnp.full(40, n),
        jnp.zeros(40, jnp.int32), n,
    )  # fmt: skip
    for found, *given in zip(np.asarray(revealed), sure, entropy, strict=True):
        assert set(np.flatnonzero(found)) == passing(rule, *given)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_guidance_is_computed_in_every_nth_step_and_kept_in_between(every):
    """Against the loop written out: c + g (c - u), with c - u of the last step that had both."""
    rule = ImageRule(steps=5, guidance=2.0, guide_every=every, draw="argmax", temperature=0.0)
    tokens, valid = rows()
    other, other_valid = settings(rule)["unconditional"]
    steps = denoise_steps(NETWORK, tokens, valid, **settings(rule))
    now, apart = jnp.asarray(tokens), None
    span = slice(START, START + LENGTH)

    def logits(tokens, valid):
        return unembed(hidden(tokens, jnp.asarray(valid))[:, span], VOCAB.image_offset, VOCAB.codebook_size)

    for step, after in enumerate(steps):
        c = logits(now, valid)
        if step % every == 0:
            apart = c - logits(jnp.asarray(other).at[:, span].set(now[:, span]), other_valid)
        is_hidden = now[:, span] == VOCAB.mask
        key = jax.vmap(jax.vmap(jax.random.key))(jnp.zeros((B, LENGTH), jnp.uint32))
        index, reveal = rule.reveal(
            key, c + 2.0 * apart, is_hidden,
            jnp.full(B, LENGTH), jnp.full(B, step), LENGTH,
        )  # fmt: skip
        now = now.at[:, span].set(jnp.where(reveal, index + VOCAB.image_offset, now[:, span]))
        np.testing.assert_array_equal(now, after)


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 7), (16, 16), (32, 32)])
def test_the_halton_order_visits_every_place_once_and_every_quarter_early(grid):
    order = halton_order(*grid)
    assert sorted(order) == list(range(grid[0] * grid[1]))
    if min(grid) > 3:
        n = grid[0] * grid[1] // 4
        i, j = np.divmod(order[:n], grid[1])
        counts = np.bincount(2 * (2 * i >= grid[0]) + (2 * j >= grid[1]), minlength=4)
        assert np.abs(counts - n / 4).max() <= max(1, 0.1 * n)


def reveals(rule, seed, logits_seed, rows=400, n=16):
    """The places that each step reveals [steps, rows, n], by a decoding of nothing but logits."""
    logits = jnp.asarray(np.random.default_rng(logits_seed).normal(size=(rows, n, 8)), jnp.float32)
    hidden, shown = jnp.ones((rows, n), bool), []
    keys = jax.random.split(jax.random.key(seed), (rule.steps, rows, n))
    for step in range(rule.steps):
        args = keys[step], logits, hidden, jnp.full(rows, n), jnp.full(rows, step)
        shown.append(np.asarray(rule.reveal(*args, n)[1]))
        hidden &= ~shown[-1]
    assert not hidden.any()
    return np.array(shown)


@pytest.mark.parametrize("rule", [
    ImageRule(steps=6, order="halton", columns=4, schedule="arccos"), ImageRule(steps=6, order="emerge"),
], ids=["halton", "emerge"])  # fmt: skip
def test_the_order_does_not_depend_on_the_draw(rule):
    np.testing.assert_array_equal(reveals(rule, 0, 1), reveals(rule, 0, 2))
    other_seed = (reveals(rule, 0, 1) != reveals(rule, 1, 1)).any()
    assert other_seed == (rule.order == "emerge")


def test_by_halton_each_step_reveals_the_next_places_of_the_order():
    rule = ImageRule(steps=6, order="halton", columns=4, schedule="arccos")
    shown, order = reveals(rule, 0, 1, rows=2)[:, 0], halton_order(4, 4)
    counts = shown.sum(axis=1)
    for step, end in enumerate(np.cumsum(counts)):
        assert set(np.flatnonzero(shown[step])) == set(order[end - counts[step] : end])
    np.testing.assert_array_equal(16 - np.cumsum(counts), [14, 12, 10, 8, 5, 0])  # floor(16 arccos(t) 2/pi)


def test_by_emerge_the_share_of_hidden_codes_follows_the_schedule():
    rows, n = 400, 16
    left = 1 - np.cumsum(reveals(ImageRule(steps=6, order="emerge"), 0, 1).mean(axis=(1, 2)))
    expected = np.cos(np.pi / 2 * np.arange(1, 7) / 6)
    error = np.sqrt(expected * (1 - expected) / (rows * n))
    assert (np.abs(left - expected) <= 4 * error + 1e-6).all()


@pytest.mark.parametrize("columns", [None, 5])
def test_the_halton_order_needs_the_columns_of_the_picture(columns):
    with pytest.raises(ValueError, match=f"columns is {columns}; with order 'halton' it must be"):
        ImageRule(order="halton", columns=columns).check_length(16)
