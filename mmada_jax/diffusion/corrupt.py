"""The forward process: clean rows -> rows with hidden tokens, and what each token weighs in the loss.

Every task loss of MMaDA is linear in the per-token negative log-likelihood, so a task is nothing but
a way of hiding (by exact number for images, independently for text) and a weight per token:

    t2i            c / (labelled positions over all t2i rows: the hidden ones, soi and eoi)
    lm, per token  c / (p * rows * L)        the form of the first two pretraining phases
    lm, lm_chat, mmu, r2i
                   c / (p * rows * answer_length)

with c the task's coefficient, p the row's hiding probability, rows the global count of the task.

Decoding block by block never meets answers with holes all over. Rows of lm_chat, mmu and r2i can be
hidden as it meets them (`answer_mask`): what stands before a cut is clean, everything after it is
hidden, and the next n tokens are scored. The cut is uniform over the text of the answer, up to its
first EOS. Half of such r2i rows have it in the thought, the whole image hidden; in the other half the
thought is clean and the image hidden as that of t2i, by exact number. Then

    lm_chat, mmu, r2i
                   c / (rows * scored)
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
class Config(Ranged):
    """Coefficients of the losses and what is hidden.

    `answer_mask` is how the answers of lm_chat, mmu and r2i are hidden: each token on its own, as the
    reference does; all that follows a cut; or the latter in a share `prefix_rows` of the rows.
    """

    t2i: Weight = 1.0
    lm: Weight = 0.1
    lm_chat: Weight = 0.1
    mmu: Weight = 1.0
    r2i: Weight = 1.0
    lm_per: Literal["token", "answer"] = "token"
    schedule: str = "cosine"
    min_ratio: Share = 0.0  # least share of an image that is hidden
    eps: Share = 1e-3  # least probability of hiding a text token
    answer_mask: Literal["random", "prefix", "mixture"] = "random"
    prefix_rows: Annotated[Share, OnlyWith("answer_mask", ("mixture",))] = 0.6
    prefix_next: Annotated[Positive, OnlyWith("answer_mask", ("prefix", "mixture"))] = (
        4  # tokens after the cut that are scored
    )

    def __post_init__(self):
        super().__post_init__()
        schedule.named(self.schedule)


class Corrupted(NamedTuple):
    """What the model sees, what it should say, and what each position counts."""

    tokens_BL: jax.Array
    targets_BL: jax.Array
    weights_BL: jax.Array


def corrupt(
    key: jax.Array, batch: Batch, vocab: Vocab, config: Config, ratio: jax.Array | None = None
) -> Corrupted:
    """Hides targets of a batch. Each row draws its own t; nothing but targets is ever hidden.

    With `ratio`, a scalar in (0, 1], that share is hidden in every row instead.
    """
    t_B = jax.random.uniform(jax.random.fold_in(key, 0), batch.task.shape)
    noise_BL = jax.random.uniform(jax.random.fold_in(key, 1), batch.tokens.shape)
    is_t2i_B1 = (batch.task == TASKS.index("t2i"))[:, None]

    # Images: exactly round(N * schedule(t)) of the targets, those that rank first in the noise.
    image_BL = batch.target & (is_t2i_B1 | (batch.tokens >= vocab.image_offset))
    ratio_B = jnp.maximum(schedule.named(config.schedule)(t_B), np.float32(config.min_ratio))
    if ratio is not None:
        ratio_B = jnp.full_like(t_B, ratio)
    n_image_B = jnp.sum(image_BL, axis=1).astype(jnp.float32)
    n_hidden_B = jnp.maximum(1, jnp.round(n_image_B * ratio_B))
    order_BL = jnp.argsort(jnp.where(image_BL, noise_BL, 2.0), axis=1)
    rank_BL = jnp.argsort(order_BL, axis=1).astype(jnp.float32)
    by_number_BL = image_BL & (rank_BL < n_hidden_B[:, None])

    # Text: each target on its own with probability p.
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
    config: Config,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which rows are cut [B]; if they are: what is hidden, and what of it is scored [B, L]."""
    of_row_B, cut_B = jax.random.uniform(key, (2, *batch.task.shape))
    share = np.float32(1 if config.answer_mask == "prefix" else config.prefix_rows)
    answers_T = np.array([task in ("lm_chat", "mmu", "r2i") for task in TASKS])
    by_prefix_B = jnp.asarray(answers_T)[batch.task] & (of_row_B < share)

    text_BL = batch.target & ~image_BL
    index_BL = jnp.cumsum(text_BL, axis=1) - 1  # of a text target among those of its row
    eos_BL = text_BL & (batch.tokens == vocab.eos)
    n_eos_BL = jnp.cumsum(eos_BL, axis=1)
    n_B = jnp.sum(text_BL & ((n_eos_BL == 0) | (eos_BL & (n_eos_BL == 1))), axis=1)
    cut_B1 = jnp.floor(cut_B * n_B.astype(jnp.float32)).astype(jnp.int32)[:, None]
    after_BL = text_BL & (index_BL >= cut_B1)
    next_BL = after_BL & (index_BL < cut_B1 + config.prefix_next)

    draws_B1 = ((batch.task == TASKS.index("r2i")) & (of_row_B < share / 2))[:, None]
    hidden_BL = jnp.where(draws_B1, by_number_BL, after_BL | image_BL)
    return by_prefix_B, hidden_BL, jnp.where(draws_B1, by_number_BL, next_BL)


def token_weights(
    hidden_BL: jax.Array,
    shown_BL: jax.Array,
    task_B: jax.Array,
    p_B: jax.Array,
    answer_length_B: jax.Array,
    config: Config,
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
