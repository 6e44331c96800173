"""UniGRPO: advantages, the masks under which a response is scored, and the objective.

The method is UniGRPO of the MMaDA paper (arXiv 2505.15809). The other masks come from d1 (arXiv
2504.12216), DiffuCoder (arXiv 2506.20639), dLLM-RL with TraceRL (arXiv 2509.06949), AGRPO (arXiv
2510.04019), EGSPO (arXiv 2603.12554), RLDF (arXiv 2605.25638) and MaskGRPO (arXiv 2510.02880); `exact` and
`every` are our own. Ratios of whole responses come from ESPO (arXiv 2512.03759), weights without a ratio
from wd1 (arXiv 2507.08838). Nothing here knows a model: a policy is an array of log-probabilities.

P prompts, G responses to each, R = P G rows, L positions, T tokens of a response.
"""

import dataclasses
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.ranges import OnlyWith, Positive, Range, Ranged, Share, Weight

# The masks that hide a share of a response, with the least and the most of it by default; of images
# MaskGRPO hides more.
SHARES = {"unigrpo": (0.0, 1.0), "random": (0.1, 0.9), "fading": (0.6, 1.0)}
SHARES_OF_IMAGES = SHARES | {"fading": (0.8, 1.0)}
MASKINGS = (
    "unigrpo", "full", "random", "coupled", "fading",
    "trace", "exact", "uniform", "top_entropy", "surprisal",
)  # fmt: skip
# Of these, and for `every`, a token is scored in the very state in which the rollout revealed it.
SAME_STATE = ("exact", "uniform", "top_entropy", "every")
RATIOS = ("token", "sequence", "none")
SPREADS = ("each", "even", "one")
# Share of the draws of `exact` that are uniform over the tokens of a response instead of following their
# entropy. It keeps every importance weight at 1 / UNIFORM or less.
UNIFORM = 0.1
# "surprisal" scores hidden tokens too whose probability is above this (RLDF).
LIKELY = 0.6
# The largest correction of a token that a rollout drew from slightly other probabilities than the policy's.
MOST_CORRECTION = 2.0


@dataclasses.dataclass(frozen=True)
class UniGRPOConfig(Ranged):
    """How a rollout becomes updates.

    A rollout has `responses` (G) to each prompt, and `mu` inner updates follow it. `ratio` says what is
    compared with the rollout's policy (see `objective`); ratios are clipped to 1 +- `clip`. `beta` weighs
    the KL divergence from the frozen reference or from the rollout's policy (`kl`). With `normalise`
    advantages are divided by the standard deviation of their group. `prompt_mask` is the share of the
    prompt that "full" hides, `trace_next` the number of tokens that "trace" scores. `hidden` is the least
    and the most share of a response that is hidden, None that of SHARES, for images of SHARES_OF_IMAGES;
    `spread` says how the shares of "unigrpo" differ among rows (`spaced`).
    """

    masking: Literal[MASKINGS] = "unigrpo"
    responses: Annotated[int, Range(2, 100_000)] = 8
    mu: Annotated[int, Range(1, 10_000)] = 4
    ratio: Literal[RATIOS] = "token"
    clip: Annotated[float, Range(0, 1000, above=True), OnlyWith("ratio", ("token", "sequence"))] = 0.2
    beta: Weight = 0.01
    kl: Literal["reference", "old"] = "reference"
    normalise: bool = True
    prompt_mask: Annotated[float, Range(0, 1, below=True), OnlyWith("masking", ("full",))] = 0.15
    trace_next: Annotated[Positive, OnlyWith("masking", ("trace",))] = 3
    hidden: Annotated[tuple[Share, ...] | None, OnlyWith("masking", tuple(SHARES))] = None
    spread: Annotated[Literal[SPREADS], OnlyWith("masking", ("unigrpo", "coupled"))] = "each"

    def __post_init__(self):
        super().__post_init__()
        if self.hidden is not None and (len(self.hidden) != 2 or self.hidden[0] > self.hidden[1]):
            raise ValueError(
                f"hidden is {tuple(self.hidden)}; it must be the least and the most share of a response "
                "that is hidden, two numbers, the first one not above the second"
            )
        if self.masking == "coupled" and self.mu % 2:
            raise ValueError(
                f"mu is {self.mu}; coupled masks come in pairs: make it even, or leave them out"
            )


def advantages(rewards_PG: np.ndarray, normalise: bool = True) -> np.ndarray:
    """Rewards [P, G] -> advantages [P, G] within each group of G: (r - mean) / standard deviation of the
    population, and 0 where all rewards of a group are equal (GRPO, arXiv 2402.03300, as in MMaDA and
    dLLM-RL). Without `normalise` r - mean (diffu-GRPO of d1, arXiv 2504.12216). numpy computes them on the
    host, where the rewards are."""
    centred_PG = rewards_PG - np.mean(rewards_PG, axis=1, keepdims=True)
    # Rounding gives equal rewards a tiny deviation, by which nothing may be divided.
    flat_P1 = np.ptp(rewards_PG, axis=1, keepdims=True) == 0
    deviation_P1 = np.std(rewards_PG, axis=1, keepdims=True) if normalise else np.float32(1)
    return np.where(flat_P1, np.float32(0), centred_PG / np.where(flat_P1, np.float32(1), deviation_P1))


def weights(advantages_PG: np.ndarray) -> np.ndarray:
    """Advantages [P, G] -> G (softmax(A) - softmax(-A)) within each group: what a response is drawn to,
    minus what it is driven from (wd1, arXiv 2507.08838, there without the factor G, since its loss is a
    sum). The weights of a group sum to 0, and are all 0 where its advantages are equal."""

    def softmax(a_PG):
        e_PG = np.exp(a_PG - np.max(a_PG, axis=1, keepdims=True))
        return e_PG / np.sum(e_PG, axis=1, keepdims=True)

    G = np.float32(advantages_PG.shape[1])
    return G * (softmax(advantages_PG) - softmax(-advantages_PG))


# ---- Masks ---------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """Rows that a policy has completed. `response` marks the tokens that may be scored, up to and with the
    first end of text. `step`, `logp` and `entropy` of each token are as in denoise.Record: the step at
    which it was revealed (negative where it was given), its log-probability and the entropy there."""

    tokens_RL: jax.Array
    valid_RL: jax.Array
    response_RL: jax.Array
    step_RL: jax.Array
    logp_RL: jax.Array
    entropy_RL: jax.Array


class Masked(NamedTuple):
    """Rows with their hidden tokens as the policy sees them, the tokens that are scored, and the weight of
    each row."""

    seen_RL: jax.Array
    scored_RL: jax.Array
    weight_R: jax.Array


def spaced(
    key: jax.Array, rows: int, n: jax.Array | int, mu: int, spread: str = "each", share: tuple = (0.0, 1.0)
) -> jax.Array:
    """The n-th of `mu` points above the first and up to the second number of `share`, for each row: the
    part 1 - (u + n / mu) mod 1 of the way, with u uniform in [0, 1) (the structured noising of MMaDA). The
    points of a row are evenly spaced, and each one is uniform. By `spread` u is drawn for "each" row by
    itself, or it is "one" for all rows, or "even": then the rows have, in a random order, points that are
    evenly spaced too."""
    if spread == "each":
        u_R = jax.random.uniform(key, (rows,))
    else:
        u_R = jax.random.uniform(key, ()) + jnp.zeros(rows)
    if spread == "even":
        u_R += jax.random.permutation(jax.random.fold_in(key, 1), rows).astype(jnp.float32) / rows
    low, high = map(np.float32, share)
    return high - (u_R + jnp.asarray(n, jnp.float32) / mu) % 1 * (high - low)


def hide(
    key: jax.Array,
    rollout: Rollout,
    n: jax.Array | int,
    mask: int,
    masking: str,
    config: UniGRPOConfig,
    image: bool = False,
) -> Masked:
    """The masks of inner update n of `config.mu`. The same key and n give the policy, the rollout's policy
    and the reference the same masks. `image` says that responses are images.

    At least one token of each response is hidden and scored. Tokens that a rollout generated after its
    first end of text are hidden; where masks follow the rollout only if they were still hidden at its step.

        unigrpo  ceil(p T) of the T tokens are hidden and scored, p spaced over the inner updates (MMaDA)
        full     all T tokens, and each token of the prompt is hidden with probability prompt_mask (d1)
        random   each token with the probability of its row, uniform in [0.1, 0.9] (dLLM-RL)
        fading   each token with a probability that rises in a straight line from the first one of a text to
                 the last, from 2 p - 1 to 1 (below p = 0.5 from 0 to 2 p), or is p for all tokens of an
                 image. Its mean p is g + (1 - g) (n + 1) / mu, with g 0.6 for texts and 0.8 for images
                 (MaskGRPO)
        coupled  as unigrpo, with p spaced over pairs of updates; the second update of a pair hides and
                 scores the other tokens (DiffuCoder)
        trace    all tokens from a random step of the rollout on are hidden, the next trace_next are scored
                 (after TraceRL)
        exact    a step of the rollout is drawn; all tokens that were hidden then are hidden, and the tokens
                 that it revealed are scored. The probability of a step is the share of its tokens in the
                 rollout's entropy, mixed with their share in T (UNIFORM). The weight of the row is their
                 share in T divided by that probability, so the mean over draws is the mean over all tokens
        uniform  as exact, but each step of a row is equally likely (AGRPO): without a bias too
        top_entropy  as exact, for the steps whose tokens had the highest entropy in the mean: update n
                 takes the n-th of them. All weigh the same; a row with fewer steps weighs 0 (EGSPO)
        surprisal  mu steps of a row are drawn without replacement, each in proportion to exp of the mean
                 surprisal -log p of its tokens. Hidden are all tokens that were hidden then. Scored are all
                 of these, until `likely` leaves those of the step and the likely ones. No weights but 0 for
                 a row with fewer steps (RLDF)
        every    as exact, for the step that revealed the n-th token of each row, of which this token alone
                 is scored, with the weight mu / T: over all n that is every token once
    """
    if masking in ("trace", "surprisal", *SAME_STATE):
        return _hide_from_a_step(jax.random.fold_in(key, 0), rollout, n, mask, masking, config)
    return _hide_a_share(key, rollout, n, mask, masking, config, image)


def likely(masked: Masked, step_RL: jax.Array, old_RL: jax.Array) -> jax.Array:
    """Of the tokens that "surprisal" hides those that it scores, bool [R, L]: what was revealed first of
    them, and what the policy of the rollout gave a probability above LIKELY (RLDF)."""
    late = np.iinfo(np.int32).max
    first_R1 = jnp.min(jnp.where(masked.scored_RL, step_RL, late), axis=1, keepdims=True)
    return masked.scored_RL & ((step_RL == first_R1) | (old_RL > np.log(np.float32(LIKELY))))


def _hide_a_share(key, rollout, n, mask, masking, config, image):
    """The masks that hide a share of the response, wherever the rollout began."""
    tokens_RL, valid_RL, response_RL, step_RL, _, _ = rollout
    R, L = tokens_RL.shape
    place, each, other = (jax.random.fold_in(key, i) for i in range(3))
    size_R1 = jnp.sum(response_RL, axis=1, keepdims=True)
    of_masking = SHARES_OF_IMAGES if image else SHARES
    share = (config.hidden or of_masking[masking]) if masking in SHARES else (0.0, 1.0)
    turns, turn = (config.mu // 2, n // 2) if masking == "coupled" else (config.mu, n)
    noise_RL = jax.random.uniform(jax.random.fold_in(each, turn), (R, L))
    rank_RL = jnp.argsort(jnp.argsort(jnp.where(response_RL, noise_RL, 2.0), axis=1), axis=1)
    n_R1 = _count(spaced(place, R, turn, turns, config.spread, share)[:, None], size_R1)
    hidden_RL = (step_RL >= 0) & ~response_RL
    if masking == "full":
        n_R1 = size_R1
        by_chance_RL = jax.random.uniform(jax.random.fold_in(other, n), (R, L)) < config.prompt_mask
        hidden_RL |= valid_RL & (step_RL < 0) & by_chance_RL
    elif masking == "random":
        p_R1 = jax.random.uniform(jax.random.fold_in(place, n), (R, 1), minval=share[0], maxval=share[1])
        n_R1 = jnp.maximum(1, jnp.sum(response_RL & (noise_RL < p_R1), axis=1, keepdims=True))
    elif masking == "fading":
        p = share[0] + (share[1] - share[0]) * (jnp.asarray(n, jnp.float32) + 1) / config.mu
        low, high = (p, p) if image else (jnp.maximum(0, 2 * p - 1), jnp.minimum(1, 2 * p))
        way_RL = jnp.cumsum(response_RL.astype(jnp.float32), axis=1) - 1
        way_RL /= jnp.maximum(size_R1 - 1, 1).astype(jnp.float32)
        # What is left of its probability ranks a token: hidden are those with something left.
        left_RL = jnp.where(response_RL, low + (high - low) * way_RL - noise_RL, -1)
        rank_RL = jnp.argsort(jnp.argsort(-left_RL, axis=1), axis=1)
        n_R1 = jnp.maximum(1, jnp.sum(response_RL & (left_RL > 0), axis=1, keepdims=True))
    elif masking == "coupled":
        n_R1 = jnp.clip(n_R1, 1, jnp.maximum(size_R1 - 1, 1))
    rest_R1 = (n % 2 == 1) & (size_R1 > 1) & (masking == "coupled")
    scored_RL = response_RL & ((rank_RL < n_R1) ^ rest_R1)
    seen_RL = jnp.where(scored_RL | hidden_RL, jnp.int32(mask), tokens_RL)
    return Masked(seen_RL, scored_RL, jnp.ones(R, jnp.float32))


def _count(p_R1, size_R1):
    """ceil(p T), at least 1 and at most T."""
    return jnp.clip(jnp.ceil(p_R1 * size_R1.astype(jnp.float32)).astype(jnp.int32), 1, size_R1)


def _hide_from_a_step(place, rollout, n, mask, masking, config):
    """The masks that hide what was hidden at a step of the rollout."""
    tokens_RL, _, response_RL, step_RL, _, _ = rollout
    R, L = tokens_RL.shape
    size_R1 = jnp.sum(response_RL, axis=1, keepdims=True)
    length_R1, weight_R1 = size_R1.astype(jnp.float32), jnp.ones((R, 1), jnp.float32)
    # Tokens in the order in which they were revealed, from left to right where a step revealed several.
    order_RL = jnp.argsort(jnp.where(response_RL, step_RL, np.iinfo(np.int32).max), axis=1)
    rank_RL = jnp.argsort(order_RL, axis=1)
    cut_R1 = _count(spaced(place, R, n, config.mu)[:, None], size_R1) - 1
    if masking == "every":
        cut_R1 = jnp.full((R, 1), jnp.minimum(n, L - 1))
        weight_R1 = jnp.where(cut_R1 < size_R1, config.mu / length_R1, 0)
    elif masking in ("top_entropy", "surprisal"):
        of_token_RL = rollout.entropy_RL if masking == "top_entropy" else -rollout.logp_RL
        first_RL, _, mean_RL = _of_steps(rollout, order_RL, of_token_RL)
        if masking == "surprisal":  # the n largest sums with Gumbel noise are n draws without replacement
            mean_RL += jax.random.gumbel(place, (R, L))
        # A step stands where its first token does in the order of the rollout.
        score_RL = jnp.where(response_RL & (rank_RL == first_RL), mean_RL, -jnp.inf)
        nth_R1 = jnp.argsort(-score_RL, axis=1)[:, jnp.minimum(n, L - 1)][:, None]
        cut_R1 = jnp.take_along_axis(rank_RL, nth_R1, axis=1)
        steps_R1 = jnp.sum(score_RL > -jnp.inf, axis=1, keepdims=True)
        weight_R1 = jnp.float32(n < steps_R1)
        cut_R1 = jnp.where(n < steps_R1, cut_R1, 0)
    elif masking in ("exact", "uniform"):
        share_RL = _shares(rollout, order_RL, length_R1, masking)
        sums_RL = jnp.cumsum(jnp.take_along_axis(share_RL, order_RL, axis=1), axis=1)
        point_R1 = spaced(place, R, n, config.mu)[:, None] * sums_RL[:, -1:]
        cut_R1 = jnp.minimum(jnp.sum(sums_RL < point_R1, axis=1, keepdims=True), size_R1 - 1)
    at_R1 = jnp.take_along_axis(order_RL, cut_R1, axis=1)
    at_R1 = jnp.take_along_axis(step_RL, at_R1, axis=1)
    width = config.trace_next if masking == "trace" else 1
    scored_RL = response_RL & (rank_RL >= cut_R1) & (rank_RL < cut_R1 + width)
    if masking in ("exact", "uniform", "top_entropy"):
        scored_RL = response_RL & (step_RL == at_R1)
    elif masking == "surprisal":
        scored_RL = response_RL & (step_RL >= at_R1)
    if masking in ("exact", "uniform"):
        weight_R1 = 1 / (length_R1 * jnp.mean(share_RL, axis=1, keepdims=True, where=scored_RL))
    hidden_RL = (step_RL >= 0) & (step_RL >= at_R1)
    return Masked(jnp.where(hidden_RL, jnp.int32(mask), tokens_RL), scored_RL, weight_R1[:, 0])


def _of_steps(rollout, order_RL, value_RL):
    """Of the step that revealed each token of a response: its first place in the order of the rollout, the
    number of its tokens, the mean of their values."""
    late = np.iinfo(np.int32).max
    step_RL = jnp.where(rollout.response_RL, rollout.step_RL, late)
    sorted_RL = jnp.take_along_axis(step_RL, order_RL, axis=1)
    first_RL, end_RL = (
        jax.vmap(lambda x_L, v_L, side=side: jnp.searchsorted(x_L, v_L, side=side))(sorted_RL, step_RL)
        for side in ("left", "right")
    )
    n_RL = jnp.maximum(end_RL - first_RL, 1)
    value_RL = jnp.where(rollout.response_RL, value_RL, 0)
    sums_RL = jnp.cumsum(jnp.take_along_axis(value_RL, order_RL, axis=1), axis=1)
    sums_RL = jnp.pad(sums_RL, ((0, 0), (1, 0)))
    of_step_RL = jnp.take_along_axis(sums_RL, end_RL, 1) - jnp.take_along_axis(sums_RL, first_RL, 1)
    return first_RL, n_RL, of_step_RL / n_RL.astype(jnp.float32)


def _shares(rollout, order_RL, length_R1, masking):
    """How likely the step of each token is drawn because of this token; the shares of a row sum to 1."""
    if masking == "uniform":
        _, n_RL, _ = _of_steps(rollout, order_RL, rollout.entropy_RL)
        share_RL = jnp.where(rollout.response_RL, 1 / n_RL.astype(jnp.float32), 0)
        return share_RL / jnp.sum(share_RL, axis=1, keepdims=True)  # the sum is the number of steps
    share_RL = jnp.where(rollout.response_RL, rollout.entropy_RL + np.float32(1e-6), 0)
    share_RL = (1 - UNIFORM) * share_RL / jnp.sum(share_RL, axis=1, keepdims=True)
    return jnp.where(rollout.response_RL, share_RL + UNIFORM / length_R1, 0)


def correction(old_RL: jax.Array, recorded_RL: jax.Array) -> jax.Array:
    """The policy's probability of each token over the probability that a rollout with a cache drew it from,
    MOST_CORRECTION at most: truncated importance sampling, as in IMPALA (arXiv 1802.01561). It corrects how
    tokens were drawn, and not how often the rollout came into their states."""
    return jnp.minimum(jnp.exp(old_RL - recorded_RL), np.float32(MOST_CORRECTION))


# ---- Objective -----------------------------------------------------------------------------------


def objective(
    new_RL: jax.Array,
    old_RL: jax.Array,
    anchor_RL: jax.Array,
    advantage_R: jax.Array,
    scored_RL: jax.Array,
    weight_R: jax.Array,
    clip: float,
    beta: float,
    correction_RL: jax.Array | None = None,
    ratio: str = "token",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss; and clip fraction, KL divergence and |rho - 1|. Each is the sum over rows of the row's
    weight times the mean over the row's scored tokens. With the `ratio` of a token this is for the loss the
    mean of

        -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + beta k3,      rho = exp(new - old)
        k3 = exp(anchor - new) - (anchor - new) - 1

    (UniGRPO, arXiv 2505.15809, where the mean is over the masked tokens. k3 is Schulman's estimate of
    KL(new || anchor), as in GRPO, arXiv 2402.03300.) With that of a "sequence" the differences of
    log-probabilities are means over the scored tokens of a row, estimates of the difference of its bounds a
    token, and half their square is the divergence (ESPO, arXiv 2512.03759). With "none" the first term is
    new A, without a ratio and unclipped, where A are `weights` (wd1, arXiv 2507.08838).

    Log-probabilities of tokens that aren't scored have no effect. A `correction` multiplies the first term
    of its token, and its mean is told too.
    """
    count_R1 = jnp.float32(jnp.maximum(jnp.sum(scored_RL, axis=1, keepdims=True), 1))
    share_RL = jnp.where(scored_RL, weight_R[:, None] / count_R1, 0)
    new_RL, old_RL, anchor_RL = (jnp.where(scored_RL, x, 0) for x in (new_RL, old_RL, anchor_RL))
    moved_RL, lag_RL = new_RL - old_RL, anchor_RL - new_RL
    if ratio == "sequence":
        mean = lambda x_RL: jnp.zeros_like(x_RL) + jnp.sum(x_RL, axis=1, keepdims=True) / count_R1  # noqa: E731
        moved_RL, lag_RL = mean(moved_RL), mean(lag_RL)
    rho_RL = jnp.exp(moved_RL)
    gain_RL = rho_RL * advantage_R[:, None]
    clipped_RL = jnp.clip(rho_RL, 1 - clip, 1 + clip) * advantage_R[:, None]
    if ratio == "none":
        gain_RL = clipped_RL = new_RL * advantage_R[:, None]
    kl_RL = lag_RL**2 / 2 if ratio == "sequence" else jnp.exp(lag_RL) - lag_RL - 1
    least_RL = jnp.minimum(gain_RL, clipped_RL)
    clips_RL = jnp.float32(clipped_RL < gain_RL)
    values = {"clip_fraction": clips_RL, "kl": kl_RL, "ratio_error": jnp.abs(rho_RL - 1)}
    if correction_RL is not None:
        least_RL, values["correction"] = least_RL * correction_RL, correction_RL
    loss_RL = -least_RL + np.float32(beta) * kl_RL
    return jnp.sum(share_RL * loss_RL), {k: jnp.sum(share_RL * v) for k, v in values.items()}
