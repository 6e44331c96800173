"""The forward process: clean rows -> rows with hidden tokens, and what each token weighs in the loss.

Every task loss of MMaDA is linear in the per-token negative log-likelihood, so a task is nothing but
a way of hiding (by exact number for images, independently for text) and a weight per token:

    t2i            c / (labelled positions over all t2i rows: the hidden ones, soi and eoi)
    lm, per token  c / (p * rows * L)        the form of the first two pretraining phases
    lm, lm_chat, mmu, r2i
                   c / (p * rows * answer_length)

with c the task's coefficient, p the row's hiding probability, rows the global count of the task.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax import schedule
from mmada_jax.layout import TASKS, Batch

jax.tree_util.register_dataclass(
    Batch, data_fields=[f.name for f in dataclasses.fields(Batch)], meta_fields=[]
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Coefficients of the losses and how much is hidden."""

    t2i: float = 1.0
    lm: float = 0.1
    lm_chat: float = 0.1
    mmu: float = 1.0
    r2i: float = 1.0
    lm_per: Literal["token", "answer"] = "token"
    schedule: str = "cosine"
    min_ratio: float = 0.0  # least share of an image that is hidden
    eps: float = 1e-3  # least probability of hiding a text token

    def __post_init__(self):
        schedule.named(self.schedule)


class Corrupted(NamedTuple):
    """What the model sees, what it should say, and what each position counts."""

    tokens_BL: jax.Array
    targets_BL: jax.Array
    weights_BL: jax.Array


def corrupt(key: jax.Array, batch: Batch, mask: int, config: Config) -> Corrupted:
    """Hides targets of a batch. Each row draws its own t; nothing but targets is ever hidden."""
    t_B = jax.random.uniform(jax.random.fold_in(key, 0), batch.task.shape)
    noise_BL = jax.random.uniform(jax.random.fold_in(key, 1), batch.tokens.shape)

    # Images: exactly round(N * schedule(t)) of the targets, those that rank first in the noise.
    ratio_B = jnp.maximum(schedule.named(config.schedule)(t_B), np.float32(config.min_ratio))
    n_target_B = jnp.sum(batch.target, axis=1)
    n_hidden_B = jnp.maximum(1, jnp.round(n_target_B.astype(jnp.float32) * ratio_B))
    order_BL = jnp.argsort(jnp.where(batch.target, noise_BL, 2.0), axis=1)
    rank_BL = jnp.argsort(order_BL, axis=1).astype(jnp.float32)
    by_number_BL = rank_BL < n_hidden_B[:, None]

    # Text: each target on its own with probability p.
    p_B = (1 - np.float32(config.eps)) * t_B + np.float32(config.eps)
    by_chance_BL = noise_BL < p_B[:, None]

    is_t2i_B1 = (batch.task == TASKS.index("t2i"))[:, None]
    hidden_BL = batch.target & jnp.where(is_t2i_B1, by_number_BL, by_chance_BL)
    return Corrupted(
        tokens_BL=jnp.where(hidden_BL, jnp.int32(mask), batch.tokens),
        targets_BL=batch.tokens,
        weights_BL=token_weights(hidden_BL, batch.shown, batch.task, p_B, n_target_B, config),
    )


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
