"""How well gradients under the maskings of UniGRPO agree: a measurement. Nothing is trained or written."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmada_jax import storage
from mmada_jax.devices import sharding
from mmada_jax.model.model import Model
from mmada_jax.nets.lora import LoraConfig
from mmada_jax.train import optim
from mmada_jax.train.metrics import duration, tell
from mmada_jax.train.rl import unigrpo
from mmada_jax.train.rl.resume import state_shapes
from mmada_jax.train.rl.rollout import read_responses
from mmada_jax.train.rl.run import RLRun
from mmada_jax.train.rl.start import check_tasks, load_policy, open_run
from mmada_jax.train.rl.tasks import OpenTask, judge, open_task, rollout_inputs
from mmada_jax.train.rl.unigrpo import Rollout
from mmada_jax.train.rl.update import Chosen, UpdateBatch, choose, make_objective, make_score


def diagnose(
    config: Mapping[str, Any],
    workdir: storage.Name,
    maskings: Sequence[str],
    batches: int,
    allow_code: str = "",
) -> dict[str, dict[str, dict[str, float]]]:
    """Task -> masking -> measures of its gradient at the model in `config.init`, which isn't changed.

    between_batches   mean cosine between the gradients of two rollouts
    with_every        cosine between the mean gradient and the mean gradient under "every", which takes
                      every reveal of every rollout
    norm              mean norm of the gradient of a rollout

    The gradient of a rollout is the mean over the masks of `mu` inner updates, at the same params. Memory
    holds one gradient for each of `batches` rollouts and each masking. Raises ValueError for unknown
    maskings, less than two batches, and in more than one process. `allow_code` is that of `open_run`.
    """
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes; gradients are compared in one, start one alone")
    unknown = set(maskings) - set(unigrpo.MASKINGS)
    if unknown or batches < 2:
        raise ValueError(
            f"maskings {', '.join(sorted(unknown)) or 'are known'}, batches {batches}; known are "
            f"{', '.join(unigrpo.MASKINGS)}, and two batches are needed"
        )
    run, mesh, prompts, rewards = open_run(config, workdir, allow_code)
    # What is compared are the gradients of the model itself.
    run = dataclasses.replace(run, lora=LoraConfig())
    for masking in maskings:  # raises for a mu that doesn't fit
        dataclasses.replace(run.objective, masking=masking)
    model, params, _ = load_policy(run, storage.path(workdir), mesh)
    check_tasks(run, model, prompts, rewards)
    found = {}
    with contextlib.ExitStack() as stack, jax.set_mesh(mesh):
        for combined in rewards.values():
            stack.enter_context(combined)
        optimizer = optim.make(run.optim, 1)
        _, shardings = state_shapes(run, model, optimizer, mesh)
        for name in sorted(run.tasks):
            opened = open_task(run, name, model, prompts[name], rewards[name], optimizer, mesh, shardings)
            rolled = _roll(run, name, model, params, opened, batches)
            # "every" has one inner update for each token of the longest response that there can be. Beyond
            # the longest one that there is every weight is 0.
            longest = [int(jnp.max(jnp.sum(rollout.response_RL, axis=1))) for rollout, _ in rolled]
            updates = {"every": longest} | dict.fromkeys(maskings, [run.objective.mu] * batches)
            gradients, began, done = {}, time.perf_counter(), 0
            for masking, of_each in updates.items():
                mu = opened.at.length if masking == "every" else run.objective.mu
                settings = dataclasses.replace(run.objective, masking=masking, mu=mu, beta=0.0, kl="old")
                of_run = dataclasses.replace(run, objective=settings)
                of_rollouts = _gradients(of_run, model, params, opened, of_each, rolled, shardings.params)
                gradients[masking] = jax.block_until_ready(of_rollouts)
                done += sum(of_each)
                left = (time.perf_counter() - began) * (sum(map(sum, updates.values())) / done - 1)
                tell(f"{name}: {masking} ({len(gradients)} of {len(updates)}), ETA {duration(left)}")
            every = _mean(gradients["every"])
            found[name] = {
                masking: {
                    "between_batches": np.mean([_cosine(a, b) for a, b in itertools.combinations(g, 2)]),
                    "with_every": _cosine(_mean(g), every),
                    "norm": np.mean([float(optax.tree.norm(of_rollout)) for of_rollout in g]),
                }
                for masking, g in gradients.items()
            }
    return found


def _roll(
    run: RLRun, name: str, model: Model, params: Any, opened: OpenTask, batches: int
) -> list[tuple[Rollout, Chosen]]:
    """The first rollouts of a task and the rows that updates would take. Raises ValueError if no rewards
    differ."""
    rolled = []
    turns = (i for i in itertools.count() if run.turn(i)[0] == name)
    for iteration in itertools.islice(turns, batches):
        asked, given = rollout_inputs(run, model, opened, iteration)
        rollout = opened.generate(params, *given)
        responses = read_responses(model, opened.task, opened.at, np.asarray(rollout.tokens_RL))
        total_R, _ = judge(opened, asked, responses)
        rolled.append((rollout, choose(run, opened.task, total_R)[0]))
    if not any(chosen.advantage_S.any() for _, chosen in rolled):
        raise ValueError(
            f"task {name}: no group of {batches} rollouts has rewards that differ, so all "
            "gradients are 0; take more batches, or a model that is neither perfect nor hopeless"
        )
    return rolled


def _gradients(
    run: RLRun,
    model: Model,
    params: Any,
    opened: OpenTask,
    updates: Sequence[int],
    rolled: Sequence[tuple[Rollout, Chosen]],
    shardings: Any,
) -> list[Any]:
    """The gradient of each rollout under the masking of `run`: the sum over the first `updates` of its
    `mu` inner updates, divided by `mu`."""
    score = make_score(run, model, opened.at, model.mesh, shardings)
    objective = make_objective(run, model, opened.at)

    def add(sums, params, batch):
        grads = jax.grad(lambda params: objective.loss(params, objective.prepare(None, batch))[0])(params)
        return jax.tree.map(lambda a, b: a + b / run.objective.mu, sums, grads)

    rows = sharding.batch_sharding(model.mesh)
    add = jax.jit(add, in_shardings=(shardings, shardings, rows), out_shardings=shardings)

    out = []
    for i, ((rollout, chosen), n_updates) in enumerate(zip(rolled, updates, strict=True)):
        sums = jax.tree.map(jnp.zeros_like, params)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), 3), i)
        fresh_S = np.ones(len(chosen.which_S), bool)
        for n in range(n_updates):
            scored = score(params, None, rollout, key, n)
            batch = UpdateBatch(scored, rollout.tokens_RL, rollout.valid_RL, chosen, fresh_S)
            sums = add(sums, params, batch)
        out.append(sums)
    return out


def _mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def _cosine(a, b):
    return float(optax.tree.vdot(a, b) / (optax.tree.norm(a) * optax.tree.norm(b)))
