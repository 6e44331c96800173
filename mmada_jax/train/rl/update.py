"""Two of the jitted functions of a task: `score` a rollout under a mask, and the objective of its update.

Also which rows an update takes (`choose`). The formulas themselves are those of `unigrpo`; here they meet
the model. Nothing here knows prompts or rewards, only numbers.

P prompts, G responses to each, R = P G rows of a rollout, S rows of an update, L positions, D width, V ids.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.devices import sharding
from mmada_jax.diffusion import decode, loss
from mmada_jax.model.model import Model
from mmada_jax.nets import lora, transformer
from mmada_jax.tokens.vocab import Vocab
from mmada_jax.train.program import Objective
from mmada_jax.train.rl import unigrpo
from mmada_jax.train.rl.rollout import ResponseSpan
from mmada_jax.train.rl.run import RLRun, Task
from mmada_jax.train.runs import ModelRun, held_base
from mmada_jax.weights.quantized import rest_dtype


class Scored(NamedTuple):
    """Rows under a mask (`seen`, `scored` and `weight` of unigrpo.Masked), and the log-probabilities of
    their tokens by the rollout's policy (`old`) and by the anchor of the KL divergence. The gain of each
    token is multiplied by its `correction` (`unigrpo.correction`); None where nothing is to correct."""

    seen_RL: jax.Array
    scored_RL: jax.Array
    weight_R: jax.Array
    old_RL: jax.Array
    anchor_RL: jax.Array
    correction_RL: jax.Array | None = None


class Chosen(NamedTuple):
    """The S rows of a rollout that an update takes, their advantages, and their weights in the loss."""

    which_S: np.ndarray
    advantage_S: np.ndarray
    weight_S: np.ndarray


class UpdateBatch(NamedTuple):
    """The input of an update: R scored rows, the choice of S among them, and for each of the S whether
    the policy is still the one that made the rollout (`fresh`)."""

    scored: Scored
    targets_RL: jax.Array
    valid_RL: jax.Array
    chosen: Chosen
    fresh_S: jax.Array


def policy_of(run: RLRun, params: Any, base: Any) -> Any:
    """The params of the policy, as the model reads them: what is trained, beside its base if it has one."""
    return lora.beside(base, params, run.lora) if run.lora.rank else params


def base_shapes(run: RLRun | ModelRun, config: transformer.ModelConfig) -> Any:
    """The shapes of the base of adapters; None where all is trained."""
    if not run.lora.rank:
        return None
    held = held_base(config, run.base_dtype)
    return transformer.held_shapes(dataclasses.replace(held, dtype=rest_dtype(run.base_dtype)))


def policy_places(run: RLRun, model: Model, mesh: jax.sharding.Mesh, trained: Any) -> tuple[Any, list[Any]]:
    """The shardings of the policy's params as the model reads them, and of what isn't trained, in a list
    that is empty where all is. `trained` are the shardings of what is."""
    if not run.lora.rank:
        return trained, []
    base = decode.param_shardings(mesh, model.config)
    return decode.param_shardings(mesh, model.config, adapted=True), [base]


def make_score(
    run: RLRun, model: Model, at: ResponseSpan, mesh: jax.sharding.Mesh, params: Any
) -> Callable[..., Scored]:
    """The jitted (params, reference or None, rollout, key, n) -> Scored of inner update n.

    `params` here are shardings.
    """
    objective, vocab = run.objective, model.vocab

    def score(params, reference, rollout, key, n):
        image = at.rule.modality == "image"
        masked = unigrpo.hide(key, rollout, n, vocab.mask, objective.masking, objective, image)

        def log_probs(params):
            h_RLD = transformer.hidden_states(params, model.config, masked.seen_RL, rollout.valid_RL)
            head_DV, targets_RL = response_head(params, rollout.tokens_RL, at, vocab)
            return loss.token_log_probs(h_RLD, head_DV, targets_RL, masked.scored_RL, run.loss_chunk)

        # Under these masks a token is scored in the very state in which the rollout revealed it, so the
        # log-probability that the rollout recorded is the old one, and a forward pass is saved. With a
        # cache the rollout drew the token from probabilities that are a little off: both are needed.
        same_state, cached = objective.masking in unigrpo.SAME_STATE, at.rule.cache != "none"
        old_RL = rollout.logp_RL if same_state and not cached else log_probs(params)
        anchor_RL = old_RL if reference is None else log_probs(reference)
        correction_RL = unigrpo.correction(old_RL, rollout.logp_RL) if same_state and cached else None
        if objective.masking == "surprisal":
            masked = masked._replace(scored_RL=unigrpo.likely(masked, rollout.step_RL, old_RL))
        return Scored(*masked, old_RL, anchor_RL, correction_RL)

    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    whole = {name: places for name, places in params.items() if name != "lora"}
    reference = whole if objective.kl == "reference" else None
    return sharding.jit(
        mesh,
        score,
        in_shardings=(params, reference, rows, everywhere, everywhere),
        out_shardings=rows,
    )


def make_objective(run: RLRun, model: Model, at: ResponseSpan) -> Objective:
    """UniGRPO's objective on an UpdateBatch: a sum over rows, and the same function for all tasks."""

    def prepare(key, batch, step=None):
        del key, step  # the masks were drawn when the rows were scored

        def take(x_R):
            return sharding.constrain(x_R[batch.chosen.which_S], "batch", *(None,) * (x_R.ndim - 1))

        rows = jax.tree.map(take, (batch.scored, batch.targets_RL, batch.valid_RL))
        return rows, batch.chosen, batch.fresh_S

    def loss_fn(params, prepared):
        (scored, targets_SL, valid_SL), chosen, fresh_S = prepared
        h_SLD = transformer.hidden_states(params, model.config, scored.seen_RL, valid_SL)
        head_DV, targets_SL = response_head(params, targets_SL, at, model.vocab)

        def of_new(new_SL):
            # While the policy is still the rollout's, old and new log-probabilities are equal. Two programs
            # round them differently, and a ratio of exactly 1 needs the same number on both sides.
            old_SL = jnp.where(fresh_S[:, None], jax.lax.stop_gradient(new_SL), scored.old_RL)
            return unigrpo.objective(
                new_SL,
                old_SL,
                old_SL if run.objective.kl == "old" else scored.anchor_RL,
                chosen.advantage_S,
                scored.scored_RL,
                scored.weight_R * chosen.weight_S,
                run.objective.clip,
                run.objective.beta,
                scored.correction_RL,
                run.objective.ratio,
            )

        return loss.of_log_probs(of_new, h_SLD, head_DV, targets_SL, scored.scored_RL, run.loss_chunk)

    if run.lora.rank:
        init = functools.partial(lora.init_adapters, config=model.config, lora=run.lora)
        return Objective(init, None, prepare, loss_fn, lambda x, base: lora.beside(base, x, run.lora))
    init = functools.partial(transformer.init_params, config=model.config)
    return Objective(init, transformer.param_axes(model.config), prepare, loss_fn)


def response_head(
    params: Any, tokens_RL: jax.Array, at: ResponseSpan, vocab: Vocab
) -> tuple[jax.Array, jax.Array]:
    """The columns of the head [D, V] for the ids that a response can have, and the tokens [R, L] as numbers
    of these columns."""
    first, size = at.rule.vocabulary(vocab)
    head_DV = transformer.head(params)
    return head_DV if size is None else head_DV[:, first : first + size], tokens_RL - first


def choose(run: RLRun, task: Task, total_R: np.ndarray) -> tuple[Chosen, dict[str, float]]:
    """The rows that an update takes by their rewards [R], and metrics of the rewards.

    With `update_groups` None all groups count alike. Else groups whose rewards differ come first, and a
    group without differences is taken only to keep the shape: its weight is 0.
    """
    G = run.objective.responses
    rewards_PG = total_R.reshape(task.groups, G)
    advantage_PG = unigrpo.advantages(rewards_PG, run.objective.normalise)
    if run.objective.ratio == "none":
        advantage_PG = unigrpo.weights(advantage_PG)
    differ_P = np.ptp(rewards_PG, axis=1) > 0
    kept_K = np.arange(task.groups)
    counts_K = np.ones(task.groups, bool)
    if task.update_groups is not None:
        kept_K = np.argsort(~differ_P, kind="stable")[: task.update_groups]
        counts_K = differ_P[kept_K]
    weight_K = counts_K / np.float32(max(1, np.sum(counts_K)) * G)
    metrics = {
        "reward": np.mean(total_R),
        "reward_deviation": np.mean(np.std(rewards_PG, axis=1)),
        "advantage_deviation": np.std(advantage_PG),
        "groups_that_differ": np.mean(differ_P),
    }
    rows_S = (kept_K[:, None] * G + np.arange(G)[None]).ravel().astype(np.int32)
    weight_S = np.repeat(weight_K, G).astype(np.float32)
    return Chosen(rows_S, advantage_PG[kept_K].ravel(), weight_S), metrics
