"""The forward process: clean rows become rows with hidden tokens and a weight per token in the loss.

Every task loss of MMaDA (arXiv 2505.15809) is linear in the negative log-likelihood of each token. So a
task is nothing but a way of hiding tokens (an exact number of image tokens, each text token independently)
and a weight per token:

    t2i            c / (labelled positions over all t2i rows: hidden tokens, soi and eoi)
    lm, per token  c / (p * rows * L)        as in the first two pretraining phases
    lm, lm_chat, mmu, r2i
                   c / (p * rows * answer_length)

Here c is the task's coefficient, p the row's hiding probability, L the length of a row, and rows the
number of rows of the task in the whole batch.

Random hiding leaves holes all over an answer, and block-by-block decoding never meets such an answer. So
rows of lm_chat, mmu and r2i can also be hidden as decoding meets them (`answer_mask`): tokens before a cut
are clean, all tokens after the cut are hidden, and the next n tokens are scored. The cut is uniform over
the text of the answer, up to its first EOS. Half of these r2i rows have the cut in the thought, and their
whole image is hidden. In the other half the thought is clean, and an exact number of image tokens is
hidden, as in t2i. In a share of the rows with a cut, some of the next n tokens are shown by chance
(`prefix_shown`), as in a block of which decoding has revealed a part. The weight of a scored token is then

    lm_chat, mmu, r2i
                   c / (rows * scored tokens of the row)

Nothing here knows the model; `loss` takes the hidden rows and the weights.
"""

import dataclasses
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.diffusion import schedule
from mmada_jax.ranges import OnlyWith, Positive, Ranged, Share, Weight
from mmada_jax.tokens.layout import TASKS, Batch
from mmada_jax.tokens.vocab import Vocab


@dataclasses.dataclass(frozen=True)
class LossConfig(Ranged):
    """The coefficient of each task's loss, and how tokens are hidden.

    `answer_mask` says how the answers of lm_chat, mmu and r2i are hidden. "random" hides each token
    independently, as the reference does. "prefix" hides all tokens after a cut. "mixture" hides a share
    `prefix_rows` of the rows like "prefix" and the other rows like "random".
    """

    t2i: Weight = 1.0
    lm: Weight = 0.1
    lm_chat: Weight = 0.1
    mmu: Weight = 1.0
    r2i: Weight = 1.0
    lm_per: Literal["token", "answer"] = "token"
    schedule: str = "cosine"
    min_ratio: Share = 0.0  # smallest share of an image's tokens that is hidden
    eps: Share = 1e-3  # smallest probability of hiding a text token
    answer_mask: Literal["random", "prefix", "mixture"] = "random"
    prefix_rows: Annotated[Share, OnlyWith("answer_mask", ("mixture",))] = 0.6
    prefix_next: Annotated[Positive, OnlyWith("answer_mask", ("prefix", "mixture"))] = (
        4  # tokens after the cut that are scored
    )
    # Share of the rows with a cut in which tokens that would be scored are shown, each with a probability
    # that is uniform in [0, 1) and the same for all tokens of a row.
    prefix_shown: Annotated[Share, OnlyWith("answer_mask", ("prefix", "mixture"))] = 0.0

    def __post_init__(self):
        super().__post_init__()
        schedule.named(self.schedule)


class Corrupted(NamedTuple):
    """Rows as the model sees them, the clean tokens as targets, and the weight of each position."""

    tokens_BL: jax.Array
    targets_BL: jax.Array
    weights_BL: jax.Array


def corrupt(
    key: jax.Array, batch: Batch, vocab: Vocab, config: LossConfig, ratio: jax.Array | None = None
) -> Corrupted:
    """Hides targets of a batch and weighs them. No token but a target is ever hidden.

    Each row draws its own time t, uniform in [0, 1). With `ratio`, a scalar in (0, 1], every row hides
    this share instead.
    """
    t_B = jax.random.uniform(jax.random.fold_in(key, 0), batch.task.shape)
    noise_BL = jax.random.uniform(jax.random.fold_in(key, 1), batch.tokens.shape)
    is_t2i_B1 = (batch.task == TASKS.index("t2i"))[:, None]

    # Images: exactly round(N * schedule(t)) of N targets are hidden, the targets with the smallest noise
    # (MaskGIT, arXiv 2202.04200). A draw per token would make the number itself random.
    image_BL = batch.target & (is_t2i_B1 | (batch.tokens >= vocab.image_offset))
    ratio_B = jnp.maximum(schedule.named(config.schedule)(t_B), np.float32(config.min_ratio))
    if ratio is not None:
        ratio_B = jnp.full_like(t_B, ratio)
    n_image_B = jnp.sum(image_BL, axis=1).astype(jnp.float32)
    n_hidden_B = jnp.maximum(1, jnp.round(n_image_B * ratio_B))
    order_BL = jnp.argsort(jnp.where(image_BL, noise_BL, 2.0), axis=1)
    rank_BL = jnp.argsort(order_BL, axis=1).astype(jnp.float32)
    by_number_BL = image_BL & (rank_BL < n_hidden_B[:, None])

    # Text: each target is hidden independently with p = (1 - eps) t + eps (LLaDA, arXiv 2502.09992); eps
    # keeps the weight 1 / p finite.
    p_B = (1 - np.float32(config.eps)) * t_B + np.float32(config.eps)
    if ratio is not None:
        p_B = jnp.full_like(t_B, ratio)
    by_chance_BL = batch.target & (noise_BL < p_B[:, None])

    hidden_BL = scored_BL = jnp.where(is_t2i_B1, by_number_BL, by_chance_BL)
    length_B = jnp.sum(batch.target, axis=1)
    if config.answer_mask != "random":
        by_prefix_B, after_BL, next_BL = _by_prefix(
            jax.random.fold_in(key, 2), batch, image_BL, by_number_BL, vocab, config
        )
        hidden_BL = jnp.where(by_prefix_B[:, None], after_BL, hidden_BL)
        scored_BL = jnp.where(by_prefix_B[:, None], next_BL, scored_BL)
        p_B = jnp.where(by_prefix_B, 1, p_B)
        length_B = jnp.where(by_prefix_B, jnp.sum(next_BL, axis=1), length_B)
    return Corrupted(
        tokens_BL=jnp.where(hidden_BL, jnp.int32(vocab.mask), batch.tokens),
        targets_BL=batch.tokens,
        weights_BL=token_weights(scored_BL, batch.shown, batch.task, p_B, length_B, config),
    )


def _by_prefix(
    key: jax.Array,
    batch: Batch,
    image_BL: jax.Array,
    by_number_BL: jax.Array,
    vocab: Vocab,
    config: LossConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether a row is cut, bool [B]; and as if all rows were cut: the tokens that are hidden and the
    hidden tokens that are scored, bool [B, L]."""
    of_row_B, cut_B = jax.random.uniform(key, (2, *batch.task.shape))
    share = np.float32(1 if config.answer_mask == "prefix" else config.prefix_rows)
    answers_T = np.array([task in ("lm_chat", "mmu", "r2i") for task in TASKS])
    by_prefix_B = jnp.asarray(answers_T)[batch.task] & (of_row_B < share)

    text_BL = batch.target & ~image_BL
    index_BL = jnp.cumsum(text_BL, axis=1) - 1  # number of a text target within its row, from 0
    # A cut after the first EOS would score nothing but the padding that follows an answer.
    eos_BL = text_BL & (batch.tokens == vocab.eos)
    n_eos_BL = jnp.cumsum(eos_BL, axis=1)
    n_B = jnp.sum(text_BL & ((n_eos_BL == 0) | (eos_BL & (n_eos_BL == 1))), axis=1)
    cut_B1 = jnp.floor(cut_B * n_B.astype(jnp.float32)).astype(jnp.int32)[:, None]
    after_BL = text_BL & (index_BL >= cut_B1)
    next_BL = after_BL & (index_BL < cut_B1 + config.prefix_next)
    if config.prefix_shown:
        key = jax.random.fold_in(key, 1)
        of_row_2B1 = jax.random.uniform(key, (2, *batch.task.shape, 1))
        in_part_B1, p_B1 = of_row_2B1[0] < np.float32(config.prefix_shown), of_row_2B1[1]
        noise_BL = jax.random.uniform(jax.random.fold_in(key, 1), batch.tokens.shape)
        shown_BL = next_BL & in_part_B1 & (noise_BL < p_B1)
        after_BL, next_BL = after_BL & ~shown_BL, next_BL & ~shown_BL

    draws_B1 = ((batch.task == TASKS.index("r2i")) & (of_row_B < share / 2))[:, None]
    hidden_BL = jnp.where(draws_B1, by_number_BL, after_BL | image_BL)
    return by_prefix_B, hidden_BL, jnp.where(draws_B1, by_number_BL, next_BL)


def token_weights(
    hidden_BL: jax.Array,
    shown_BL: jax.Array,
    task_B: jax.Array,
    p_B: jax.Array,
    answer_length_B: jax.Array,
    config: LossConfig,
) -> jax.Array:
    """The weight of each token, float32 [B, L]; the loss is sum(weights * nll) over the batch."""
    is_t2i_B = task_B == TASKS.index("t2i")
    scored_BL = hidden_BL | (shown_BL & is_t2i_B[:, None])
    labelled = jnp.sum(jnp.where(is_t2i_B[:, None], scored_BL, False)).astype(jnp.float32)

    rows_T = jnp.sum(task_B[:, None] == jnp.arange(len(TASKS))[None], axis=0).astype(jnp.float32)
    length_B = answer_length_B.astype(jnp.float32)
    if config.lm_per == "token":
        length_B = jnp.where(task_B == TASKS.index("lm"), hidden_BL.shape[1], length_B)
    text_B = 1 / (p_B * rows_T[task_B] * jnp.maximum(length_B, 1))

    coefficient_T = np.array([getattr(config, task) for task in TASKS], np.float32)
    each_B = jnp.where(is_t2i_B, 1 / jnp.maximum(labelled, 1), text_B)
    weight_B = jnp.asarray(coefficient_T)[task_B] * each_B
    return jnp.where(scored_BL, weight_B[:, None], 0)
