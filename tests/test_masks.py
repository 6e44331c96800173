"""The masks of UniGRPO and of its neighbours, each against its formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.train.rl import unigrpo
from mmada_jax.train.rl.unigrpo import MASKINGS, hide
from tests.masks import CONFIG, MASK, RNG, ROLLOUT, SIZES, START, L, R, hide_jit


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
        assert counted.all() or masking in ("every", "top_entropy", "surprisal")
        if masking not in ("trace", "surprisal", *unigrpo.SAME_STATE):  # what follows the end of text
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


@pytest.mark.parametrize("spread", unigrpo.SPREADS)
def test_ratios_of_rows_are_their_own_or_even_or_one(spread):
    key = jax.random.key(4)
    at = [np.asarray(unigrpo.spaced(key, R, n, 4, spread, (0.6, 0.9))) for n in range(4)]
    points = np.sort(at, axis=0)
    assert (points > 0.6 - 1e-6).all() and (points <= 0.9 + 1e-6).all()
    np.testing.assert_allclose(np.diff(points, axis=0), 0.3 / 4, atol=1e-6)
    gaps = np.diff(np.sort(at[1]))
    if spread == "even":
        np.testing.assert_allclose(gaps, 0.3 / R, atol=1e-6)
        assert (np.argsort(at[1]) != np.arange(R)).any()
    else:
        assert (gaps < 1e-6).all() if spread == "one" else gaps.max() > 2 * 0.3 / R
    # Over many draws the ratios of a row are uniform, however they are spread.
    many = jax.vmap(lambda seed: unigrpo.spaced(jax.random.key(seed), R, 2, 4, spread, (0.6, 0.9)))
    drawn = np.sort(np.asarray(many(jnp.arange(4000)))[:, 3])
    assert np.abs(drawn - np.linspace(0.6, 0.9, 4000)).max() < 0.3 * 1.95 / np.sqrt(4000)


@pytest.mark.parametrize("spread", unigrpo.SPREADS)
@pytest.mark.parametrize(("mu", "hidden"), [(2, None), (4, None), (4, (0.25, 0.5)), (2, (0.5, 0.5))])
def test_unigrpo_hides_as_many_tokens_as_the_ratio_says(mu, hidden, spread):
    config = dataclasses.replace(CONFIG, mu=mu, hidden=hidden, spread=spread)
    place = jax.random.fold_in(jax.random.key(5), 0)
    for n in range(mu):
        masked = hide_jit(5, n, "unigrpo", config)
        ratio = np.asarray(unigrpo.spaced(place, R, n, mu, spread, hidden or (0.0, 1.0)))
        want = np.clip(np.ceil(ratio * SIZES.astype(np.float32)), 1, SIZES)
        np.testing.assert_array_equal(masked.scored_RL.sum(axis=1), want)


def test_random_masks_hide_a_share_within_the_range_that_is_given():
    config = dataclasses.replace(CONFIG, hidden=(0.5, 0.6))
    masks = jax.lax.map(lambda seed: hide_jit(seed, 0, "random", config).scored_RL, jnp.arange(400))
    long = SIZES >= 10
    means = np.asarray(masks).sum(axis=(0, 2))[long] / (400 * SIZES[long])
    assert np.abs(means - 0.55).max() < 4.5 * 0.5 / np.sqrt(400 * 10)


@pytest.mark.parametrize(("image", "hidden"), [(False, None), (True, None), (False, (0.2, 0.5))])
def test_fading_hides_later_tokens_more_often_and_more_of_all_in_later_updates(image, hidden):
    config, draws = dataclasses.replace(CONFIG, hidden=hidden), 1500
    least, most = hidden or ((0.8, 1.0) if image else (0.6, 1.0))
    for n in (0, 2):
        masks = jax.lax.map(
            lambda seed, n=n: hide_jit(seed, n, "fading", config, image).scored_RL,
            jnp.arange(draws),
            batch_size=100,
        )
        often = np.asarray(masks).mean(axis=0)
        p = least + (most - least) * (n + 1) / 4
        for r in np.flatnonzero(SIZES >= 4):
            # MaskGRPO's first algorithm: what stays falls in a straight line to 0 at the last token.
            stays = np.linspace(1, 0, SIZES[r])
            want = 1 - stays * (1 - p) * SIZES[r] / stays.sum()
            if want[0] < 0:  # the paper's shares are 0.6 and more
                want = 2 * p * np.linspace(0, 1, SIZES[r])
            want = np.full(SIZES[r], p) if image else want
            # Where nothing was drawn one token is hidden all the same, which few draws are.
            none = np.prod(1 - want)
            error = 4.5 * np.sqrt(want * (1 - want) / draws) + none + 1e-6
            assert (np.abs(often[r, START : START + SIZES[r]] - want) < error).all(), (n, r)
            assert np.isclose(want.mean(), p)


def test_surprisal_draws_steps_by_the_softmax_of_their_mean_surprisal():
    step, response = np.asarray(ROLLOUT.step_RL), np.asarray(ROLLOUT.response_RL)
    logp, draws = np.asarray(ROLLOUT.logp_RL, np.float64), 4000
    drawn = [
        np.asarray(jax.lax.map(lambda s, n=n: hide_jit(s, n, "surprisal")[1:], jnp.arange(draws))[0])
        for n in range(2)
    ]
    for r in np.flatnonzero(SIZES >= 6):
        steps = np.unique(step[r][response[r]])
        mean = np.array([-logp[r][response[r] & (step[r] == at)].mean() for at in steps])
        share = np.exp(mean) / np.exp(mean).sum()
        late = np.where(response[r], step[r], 10**6)
        first, second = (np.where(x[:, r], late, 10**6).min(axis=1) for x in drawn)
        assert (first != second).all()  # without replacement
        for at, want in zip(steps, share, strict=True):
            assert abs((first == at).mean() - want) < 4.5 * np.sqrt(want * (1 - want) / draws) + 1e-6
            others = share * (steps != at) / (1 - share)  # the first draw was another one, and this is left
            again = want * others.sum()
            assert abs((second == at).mean() - again) < 4.5 * np.sqrt(again * (1 - again) / draws) + 1e-6


def test_surprisal_scores_the_tokens_of_the_step_and_the_likely_ones_that_are_hidden():
    step, response = np.asarray(ROLLOUT.step_RL), np.asarray(ROLLOUT.response_RL)
    old = np.log(RNG.uniform(0.2, 1, (R, L))).astype(np.float32)
    left = 0
    for n in range(4):
        masked = jax.device_get(hide_jit(3, n, "surprisal"))
        scored = np.asarray(unigrpo.likely(masked, ROLLOUT.step_RL, old))
        for r in range(R):
            steps = np.unique(step[r][response[r]])
            assert masked.weight_R[r] == (n < len(steps))
            at = step[r][masked.scored_RL[r]].min()
            np.testing.assert_array_equal(masked.seen_RL[r] == MASK, step[r] >= at)
            hidden = response[r] & (step[r] >= at)
            np.testing.assert_array_equal(masked.scored_RL[r], hidden)
            want = response[r] & (step[r] == at) | hidden & (old[r] > np.log(0.6))
            np.testing.assert_array_equal(scored[r], want)
            left += (hidden & ~want).sum()
    assert left > 100


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
