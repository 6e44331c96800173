"""UniGRPO: advantages, and the objective against NumPy and finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.diffusion import loss
from mmada_jax.ranges import without_effect
from mmada_jax.train.rl import unigrpo
from tests.masks import CONFIG, RNG, ROLLOUT, L

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
        ({"masking": "coupled", "mu": 3}, "mu is 3; coupled masks come in pairs: make it even, or leave"),
        ({"clip": 0.0}, "clip is 0.0; it must be positive and at most 1,000"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"trace_next": 0}, "trace_next is 0"),
        ({"prompt_mask": 1.0}, "prompt_mask is 1.0"),
        ({"hidden": (0.2, 1.2)}, r"hidden\[1\] is 1.2; it must be a share from 0 to 1"),
        ({"hidden": (0.9, 0.5)}, "hidden is .0.9, 0.5.; it must be the least and the most share"),
        ({"hidden": (0.5,)}, "two numbers"),
    ],
)
def test_bad_settings_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
