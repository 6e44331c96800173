"""UniGRPO: advantages, masks and their spacing, the objective against NumPy and finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.diffusion import loss
from mmada_jax.ranges import without_effect
from mmada_jax.train.rl import unigrpo
from mmada_jax.train.rl.unigrpo import MASKINGS, Rollout, UniGRPOConfig, hide

R, L, START, MASK = 64, 24, 10, 99
SIZES = 1 + np.arange(R) % (L - START)  # tokens up to the end of text
RNG = np.random.default_rng(0)
CONFIG = UniGRPOConfig(mu=4)


def rollout():
    place = np.arange(L)[None]
    response = (place >= START) & (place < START + SIZES[:, None])
    generated = np.broadcast_to(place >= START, (R, L))
    # Revealed in a random order, two at a time.
    order = np.stack([RNG.permutation(L - START) // 2 for _ in range(R)])
    step = np.full((R, L), -1)
    step[:, START:] = order
    return Rollout(
        jnp.asarray(RNG.integers(0, MASK, (R, L)), jnp.int32),
        jnp.asarray(np.broadcast_to(place >= 2, (R, L))),
        jnp.asarray(response),
        jnp.asarray(step, jnp.int32),
        jnp.asarray(np.where(generated, -RNG.exponential(size=(R, L)), 0), jnp.float32),
        jnp.asarray(np.where(generated, RNG.exponential(size=(R, L)), 0), jnp.float32),
    )


ROLLOUT = rollout()


@functools.partial(jax.jit, static_argnames=("masking", "config"))
def hide_jit(seed, n, masking, config=CONFIG):
    return hide(jax.random.key(seed), ROLLOUT, n, MASK, masking, config)


# ---- Advantages ----------------------------------------------------------------------------------


def test_advantages_are_z_scores_of_the_population():
    rewards = np.array([[0.0, 2.5, 0.5, 2.5], [0.1, 0.1, 0.1, 0.1], [1, 0, 0, 0]], np.float32)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    want = centred / np.where(
        rewards.std(axis=1, keepdims=True) < 1e-6, 1, rewards.std(axis=1, keepdims=True)
    )
    want[1] = 0
    np.testing.assert_allclose(unigrpo.advantages(rewards), want, atol=1e-6)
    np.testing.assert_allclose(unigrpo.advantages(rewards, normalise=False), centred, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-3, 2.5, -3.3])
@pytest.mark.parametrize("n", [2, 3, 7, 8])
def test_a_group_without_spread_has_no_advantage(value, n):
    rewards = np.full((1, n), value, np.float32)  # whose float32 mean isn't always the value
    np.testing.assert_array_equal(unigrpo.advantages(rewards), np.zeros((1, n)))
    np.testing.assert_array_equal(unigrpo.advantages(rewards, normalise=False), np.zeros((1, n)))


# ---- Masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", [*MASKINGS, "every"])
def test_prompts_stay_and_at_least_one_token_of_the_response_is_scored(masking):
    for seed, n in ((0, 0), (1, 1), (2, 3)):
        masked = jax.device_get(hide_jit(seed, n, masking))
        changed = masked.seen_RL != np.asarray(ROLLOUT.tokens_RL)
        assert (masked.seen_RL[changed] == MASK).all()
        if masking != "full":
            assert not changed[:, :START].any()
        assert (masked.seen_RL[masked.scored_RL] == MASK).all()
        assert not (masked.scored_RL & ~np.asarray(ROLLOUT.response_RL)).any()
        counted = masked.weight_R > 0
        assert masked.scored_RL.any(axis=1)[counted].all()
        assert counted.all() or masking in ("every", "top_entropy")
        if masking not in ("trace", *unigrpo.SAME_STATE):  # what follows the end of text
            tail = np.asarray((ROLLOUT.step_RL >= 0) & ~ROLLOUT.response_RL)
            assert (masked.seen_RL[tail] == MASK).all()


@pytest.mark.parametrize("mu", [1, 2, 4, 5])
def test_ratios_are_evenly_spaced_from_a_random_start(mu):
    points = np.sort([np.asarray(unigrpo.spaced(jax.random.key(3), R, n, mu)) for n in range(mu)], axis=0)
    assert (points > 0).all()
    assert (points <= 1).all()
    np.testing.assert_allclose(np.diff(points, axis=0), 1 / mu, atol=1e-6)
    np.testing.assert_allclose(points[0] + 1 - points[-1], 1 / mu, atol=1e-6)  # wrapping
    starts = points[0] * mu  # anywhere within a gap
    assert starts.min() < 0.2
    assert starts.max() > 0.8


@pytest.mark.parametrize("mu", [2, 4])
def test_unigrpo_hides_as_many_tokens_as_the_ratio_says(mu):
    config = dataclasses.replace(CONFIG, mu=mu)
    place = jax.random.fold_in(jax.random.key(5), 0)
    for n in range(mu):
        masked = hide_jit(5, n, "unigrpo", config)
        ratio = np.asarray(unigrpo.spaced(place, R, n, mu))
        want = np.clip(np.ceil(ratio * SIZES.astype(np.float32)), 1, SIZES)
        np.testing.assert_array_equal(masked.scored_RL.sum(axis=1), want)


def test_updates_and_seeds_hide_other_tokens():
    first = np.asarray(hide_jit(0, 0, "unigrpo").scored_RL)
    np.testing.assert_array_equal(first, hide_jit(0, 0, "unigrpo").scored_RL)
    for masking in MASKINGS:
        a, b, c = (hide_jit(*at, masking) for at in ((0, 0), (0, 1), (1, 0)))
        assert (a.seen_RL != b.seen_RL).any(), masking
        assert (a.seen_RL != c.seen_RL).any() or masking == "top_entropy", masking


def test_full_hides_the_response_and_some_of_the_prompt():
    masked = jax.device_get(hide_jit(0, 0, "full"))
    np.testing.assert_array_equal(masked.scored_RL, ROLLOUT.response_RL)
    prompt = np.asarray(ROLLOUT.valid_RL & (ROLLOUT.step_RL < 0))
    share = (masked.seen_RL == MASK)[prompt].mean()
    assert 0.08 < share < 0.22
    assert not (masked.seen_RL == MASK)[~np.asarray(ROLLOUT.valid_RL)].any()
    none = hide_jit(0, 0, "full", dataclasses.replace(CONFIG, prompt_mask=0.0))
    assert not (none.seen_RL[:, :START] == MASK).any()


def test_coupled_masks_are_complements():
    for pair in (0, 2):
        first, second = (np.asarray(hide_jit(0, pair + i, "coupled").scored_RL) for i in range(2))
        long = SIZES > 1
        np.testing.assert_array_equal((first ^ second)[long], np.asarray(ROLLOUT.response_RL)[long])
        np.testing.assert_array_equal(first[~long], second[~long])
    assert (hide_jit(0, 0, "coupled").scored_RL != hide_jit(0, 2, "coupled").scored_RL).any()


@pytest.mark.parametrize("masking", ["trace", *unigrpo.SAME_STATE])
def test_reveal_masks_are_states_of_the_rollout(masking):
    step, response = np.asarray(ROLLOUT.step_RL), np.asarray(ROLLOUT.response_RL)
    for n in range(4):
        masked = jax.device_get(hide_jit(n, n, masking))
        for r in np.flatnonzero(masked.weight_R > 0):
            cut = step[r][masked.scored_RL[r]].min()
            np.testing.assert_array_equal(masked.seen_RL[r] == MASK, step[r] >= cut)
            if masking == "trace":
                # The next tokens in the order of the rollout, fewer only where it ends.
                rest = (response[r] & (step[r] > step[r][masked.scored_RL[r]].max())).sum()
                assert masked.scored_RL[r].sum() == 3 or rest == 0
            elif masking != "every":
                np.testing.assert_array_equal(masked.scored_RL[r], response[r] & (step[r] == cut))
            else:
                assert masked.scored_RL[r].sum() == 1


@pytest.mark.parametrize("masking", ["exact", "uniform"])
def test_draws_of_steps_are_unbiased_for_the_mean_over_the_rollout(masking):
    value = RNG.normal(size=(R, L)).astype(np.float32)
    response = np.asarray(ROLLOUT.response_RL)
    want = (value * response).sum(axis=1) / SIZES

    @jax.jit
    def estimate(seed):
        def one(n):
            masked = hide(jax.random.key(seed), ROLLOUT, n, MASK, masking, CONFIG)
            sum_R, n_R = (jnp.sum(jnp.where(masked.scored_RL, x, 0), axis=1) for x in (value, 1.0))
            return masked.weight_R * sum_R / n_R, masked.weight_R

        return jax.vmap(one)(jnp.arange(4))

    got, weights = jax.lax.map(estimate, jnp.arange(1500))
    if masking == "exact":
        assert weights.max() <= 1 / unigrpo.UNIFORM + 1e-3
    got = np.asarray(got, np.float64)
    error = got.mean(axis=(0, 1)) - want
    deviation = got.mean(axis=1).std(axis=0) / np.sqrt(1500) + 1e-6
    assert np.abs(error / deviation).max() < 4.5
    if masking == "uniform":
        return
    # And steps that were uncertain are drawn more often.
    often = np.asarray(jax.lax.map(lambda s: hide_jit(s, 0, "exact").scored_RL, jnp.arange(500))).mean(
        axis=0
    )
    r, step, entropy = R - 2, np.asarray(ROLLOUT.step_RL), np.asarray(ROLLOUT.entropy_RL)
    together = (step[r][:, None] == step[r][None]) & response[r]
    of_step = np.sum(together * entropy[r], axis=1)
    assert np.corrcoef(often[r][response[r]], of_step[response[r]])[0, 1] > 0.8


def test_uniform_draws_every_step_equally_often():
    drawn = np.asarray(jax.lax.map(lambda s: hide_jit(s, 1, "uniform").scored_RL, jnp.arange(3000)))
    step, response = np.asarray(ROLLOUT.step_RL), np.asarray(ROLLOUT.response_RL)
    for r in range(R):
        steps = np.unique(step[r][response[r]])
        often = [drawn[:, r, np.flatnonzero(response[r] & (step[r] == at))[0]].mean() for at in steps]
        error = np.sqrt((1 / len(steps)) * (1 - 1 / len(steps)) / 3000) + 1e-9
        assert np.abs(np.array(often) - 1 / len(steps)).max() < 4.5 * error + 1e-6


def test_top_entropy_takes_the_steps_in_the_order_of_their_mean_entropy():
    step, response = np.asarray(ROLLOUT.step_RL), np.asarray(ROLLOUT.response_RL)
    entropy = np.asarray(ROLLOUT.entropy_RL)
    for r in range(R):
        steps = np.unique(step[r][response[r]])
        means = [entropy[r][response[r] & (step[r] == at)].mean() for at in steps]
        want = steps[np.argsort(means)[::-1]]
        for n in range(4):
            masked = jax.device_get(hide_jit(7, n, "top_entropy"))
            assert masked.weight_R[r] == (n < len(steps))
            if n < len(steps):
                np.testing.assert_array_equal(masked.scored_RL[r], response[r] & (step[r] == want[n]))


def test_every_reveal_counts_once():
    config = dataclasses.replace(CONFIG, mu=L - START)
    total = np.zeros((R, L))
    for n in range(config.mu):
        masked = jax.device_get(hide_jit(0, n, "every", config))
        total += masked.weight_R[:, None] * masked.scored_RL / config.mu
    np.testing.assert_allclose(total, np.asarray(ROLLOUT.response_RL) / SIZES[:, None], rtol=1e-5)


# ---- Objective -----------------------------------------------------------------------------------

B, D, V = 6, 5, 11
TARGETS = RNG.integers(0, V, (B, L), dtype=np.int32)
SCORED = np.asarray(ROLLOUT.response_RL)[5 : 5 + B] & (RNG.random((B, L)) < 0.7)
ADVANTAGE = RNG.normal(size=B).astype(np.float32)
WEIGHT = (RNG.random(B) / B).astype(np.float32)
LOGPS = [-RNG.exponential(size=(B, L)).astype(np.float32) for _ in range(3)]


def transcription(new, old, anchor, clip, beta, correction=None):
    """Row by row, token by token, in float64."""
    total, clipped = 0.0, 0.0
    for r in range(B):
        row, tokens = 0.0, np.flatnonzero(SCORED[r])
        for t in tokens:
            rho = np.exp(new[r, t] - old[r, t])
            first, second = rho * ADVANTAGE[r], min(max(rho, 1 - clip), 1 + clip) * ADVANTAGE[r]
            d = anchor[r, t] - new[r, t]
            trust = 1 if correction is None else correction[r, t]
            row += -trust * min(first, second) + beta * (np.exp(d) - d - 1)
            clipped += WEIGHT[r] * (second < first) / len(tokens)
        total += WEIGHT[r] * row / max(len(tokens), 1)
    return total, clipped


@pytest.mark.parametrize(
    ("clip", "beta", "corrected"),
    [(0.2, 0.0, False), (0.2, 0.01, True), (0.05, 0.5, False), (5.0, 1.0, True)],
)
def test_value_and_gradient_equal_the_transcription(clip, beta, corrected):
    new, old, anchor = LOGPS
    recorded = -RNG.exponential(size=(B, L)).astype(np.float32)
    trust = unigrpo.correction(old, recorded) if corrected else None
    of_rows = old, anchor, ADVANTAGE, SCORED, WEIGHT, clip, beta, trust
    run = jax.jit(lambda new: unigrpo.objective(new, *of_rows))
    value, seen = run(new)
    exact = [x.astype(np.float64) for x in LOGPS]
    if corrected:
        trust = np.minimum(np.exp(exact[1] - recorded), 2.0)
        assert (trust[SCORED] == 2).any()
        assert (trust[SCORED] < 1).any()
        means = [np.mean(trust[r][SCORED[r]]) if SCORED[r].any() else 0 for r in range(B)]
        np.testing.assert_allclose(seen["correction"], np.dot(WEIGHT, means), rtol=1e-5)
    want, clipped = transcription(*exact, clip, beta, trust)
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen["clip_fraction"], clipped, rtol=1e-5, atol=1e-6)
    slope = np.asarray(jax.grad(lambda new: run(new)[0])(new))
    assert not slope[~SCORED].any()
    for r, t in zip(*np.nonzero(SCORED), strict=True):
        step = np.zeros((B, L))
        step[r, t] = 1e-6
        ends = [transcription(exact[0] + s * step, *exact[1:], clip, beta, trust)[0] for s in (1, -1)]
        np.testing.assert_allclose(slope[r, t], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


def of_sequences(new, old, anchor, clip, beta):
    """The transcription of ESPO's objective: one ratio for each row."""
    total = 0.0
    for r in range(B):
        if not SCORED[r].any():
            continue
        d, lag = (np.mean((x - y)[r][SCORED[r]]) for x, y in ((new, old), (anchor, new)))
        rho = np.exp(d)
        gain = min(rho * ADVANTAGE[r], min(max(rho, 1 - clip), 1 + clip) * ADVANTAGE[r])
        total += WEIGHT[r] * (-gain + beta * lag**2 / 2)
    return total


def without_ratio(new, old, anchor, clip, beta):
    """The transcription of wd1's objective: weighted log-probabilities."""
    total = 0.0
    for r in range(B):
        tokens = np.flatnonzero(SCORED[r])
        lag = (anchor - new)[r][tokens]
        row = -new[r][tokens] * ADVANTAGE[r] + beta * (np.exp(lag) - lag - 1)
        total += WEIGHT[r] * np.sum(row) / max(len(tokens), 1)
    return total


@pytest.mark.parametrize(("ratio", "told"), [("sequence", of_sequences), ("none", without_ratio)])
@pytest.mark.parametrize(("clip", "beta"), [(0.05, 0.5), (5.0, 0.0)])
def test_other_ratios_equal_their_transcriptions(ratio, told, clip, beta):
    new, old, anchor = LOGPS
    of_rows = old, anchor, ADVANTAGE, SCORED, WEIGHT, clip, beta, None, ratio
    run = jax.jit(lambda new: unigrpo.objective(new, *of_rows)[0])
    exact = [x.astype(np.float64) for x in LOGPS]
    np.testing.assert_allclose(run(new), told(*exact, clip, beta), rtol=1e-5, atol=1e-6)
    slope = np.asarray(jax.grad(run)(new))
    assert not slope[~SCORED].any()
    for r, t in zip(*np.nonzero(SCORED), strict=True):
        step = np.zeros((B, L))
        step[r, t] = 1e-6
        ends = [told(exact[0] + s * step, *exact[1:], clip, beta) for s in (1, -1)]
        np.testing.assert_allclose(slope[r, t], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", unigrpo.RATIOS)
def test_every_ratio_has_the_policys_gradient_at_the_rollouts_policy(ratio):
    def value(new):
        old = jax.lax.stop_gradient(new)
        return unigrpo.objective(new, old, old, ADVANTAGE, SCORED, WEIGHT, 0.2, 0.3, None, ratio)

    (_, seen), slope = jax.value_and_grad(value, has_aux=True)(LOGPS[0])
    assert seen["kl"] == seen["clip_fraction"] == seen["ratio_error"] == 0
    share = SCORED * (WEIGHT / np.maximum(SCORED.sum(axis=1), 1))[:, None]
    np.testing.assert_allclose(slope, -share * ADVANTAGE[:, None], rtol=1e-6)


def test_weights_without_a_ratio_are_drawn_to_the_better_and_driven_from_the_worse():
    rewards = RNG.normal(size=(5, 4)).astype(np.float32)
    advantage = unigrpo.advantages(rewards)
    weights = unigrpo.weights(advantage)
    for a, w in zip(advantage.astype(np.float64), weights, strict=True):
        want = 4 * (np.exp(a) / np.exp(a).sum() - np.exp(-a) / np.exp(-a).sum())
        np.testing.assert_allclose(w, want, rtol=1e-5, atol=1e-6)
        assert np.array_equal(np.argsort(w), np.argsort(a))
    np.testing.assert_allclose(weights.sum(axis=1), 0, atol=1e-5)
    assert weights.dtype == np.float32
    assert not unigrpo.weights(np.zeros((2, 3), np.float32)).any()
    assert np.isfinite(unigrpo.weights(np.float32([[1000.0, -1000.0]]))).all()


def test_a_clip_without_a_ratio_has_no_effect():
    (line,) = without_effect(unigrpo.UniGRPOConfig(ratio="none", clip=0.3))
    assert "clip is 0.3" in line and "ratio is 'none'" in line
    assert not list(without_effect(unigrpo.UniGRPOConfig(ratio="sequence", clip=0.3)))


def test_at_the_rollouts_policy_the_ratio_is_one_and_the_gradient_that_of_the_policy():
    new = LOGPS[0]

    def value(new):
        old = jax.lax.stop_gradient(new)
        return unigrpo.objective(new, old, old, ADVANTAGE, SCORED, WEIGHT, 0.2, 0.3)

    (_, seen), slope = jax.value_and_grad(value, has_aux=True)(new)
    assert seen["kl"] == 0
    assert seen["clip_fraction"] == 0
    share = SCORED * (WEIGHT / np.maximum(SCORED.sum(axis=1), 1))[:, None]
    assert seen["ratio_error"] == 0
    np.testing.assert_allclose(slope, -share * ADVANTAGE[:, None], rtol=1e-6)  # A grad log p, descended


@pytest.mark.parametrize("chunk", [None, 7])
def test_gradients_reach_states_and_head_as_if_the_logits_had_been_there(chunk):
    h = RNG.normal(size=(B, L, D)).astype(np.float32)
    head = RNG.normal(size=(D, V)).astype(np.float32)
    _, old, anchor = LOGPS

    def f(new):
        return unigrpo.objective(new, old, anchor, ADVANTAGE, SCORED, WEIGHT, 0.2, 0.1)

    def plain(h, head):
        logp = jnp.take_along_axis(jax.nn.log_softmax(h @ head), TARGETS[..., None], axis=-1)[..., 0]
        return f(jnp.where(SCORED, logp, 0))

    def ours(h, head):
        return loss.of_log_probs(f, h, head, TARGETS, SCORED, chunk)

    got, want = (
        jax.jit(jax.value_and_grad(g, argnums=(0, 1), has_aux=True))(h, head) for g in (ours, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    assert not np.asarray(got[1][0])[~SCORED].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": 1}, "responses is 1; it must be at least 2"),
        ({"mu": 0}, "mu is 0"),
        ({"masking": "coupled", "mu": 3}, "mu is 3; .* for coupled masks even"),
        ({"clip": 0.0}, "clip is 0.0; it must be positive and at most 1,000"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"trace_next": 0}, "trace_next is 0"),
        ({"prompt_mask": 1.0}, "prompt_mask is 1.0"),
    ],
)
def test_bad_settings_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
