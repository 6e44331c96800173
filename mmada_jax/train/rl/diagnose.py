"""How well the gradients under the maskings of UniGRPO agree: a measurement, nothing is trained."""

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmada_jax.devices import sharding
from mmada_jax.train import optim
from mmada_jax.train.rl import unigrpo
from mmada_jax.train.rl.loop import (
    Batch,
    check,
    check_model,
    choose,
    inputs,
    judge,
    load,
    make_objective,
    make_program,
    make_score,
    shapes_of,
)
from mmada_jax.train.rl.rollout import read


def diagnose(
    config: Mapping[str, Any], workdir: str | pathlib.Path, maskings: Sequence[str], batches: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Task -> masking -> how its gradient behaves at the model in `config.init`, which stays as it is.

    between_batches   mean cosine between the gradients of two rollouts
    with_every        cosine of their mean with that over every reveal of every rollout ("every")
    norm              mean norm of the gradient of a rollout

    A gradient is the mean over the masks of `mu` inner updates, none of which is made. Holds one for each
    of `batches` rollouts and maskings. Raises ValueError for unknown maskings, less than two batches, and
    in more than one process.
    """
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes; gradients are compared in one, start one alone")
    unknown = set(maskings) - set(unigrpo.MASKINGS)
    if unknown or batches < 2:
        raise ValueError(
            f"maskings {', '.join(sorted(unknown)) or 'are known'}, batches {batches}; known are "
            f"{', '.join(unigrpo.MASKINGS)}, and two batches are needed"
        )
    run, mesh, prompts, rewards = check(config, workdir)
    for masking in maskings:  # raises for a mu that doesn't fit
        dataclasses.replace(run.objective, masking=masking)
    model = load(run, pathlib.Path(workdir), mesh)
    check_model(run, model, prompts, rewards)
    found: dict[str, dict[str, dict[str, float]]] = {}
    with contextlib.ExitStack() as stack, jax.set_mesh(mesh):
        for combined in rewards.values():
            stack.enter_context(combined)
        optimizer = optim.make(run.optim, 1)
        _, shardings = shapes_of(model, optimizer, mesh)
        for name in sorted(run.tasks):
            program = make_program(
                run, name, model, prompts[name], rewards[name], optimizer, mesh, shardings
            )
            rolled = []
            turns = (i for i in itertools.count() if run.turn(i)[0] == name)
            for iteration in itertools.islice(turns, batches):
                asked, given = inputs(run, model, program, iteration)
                rollout = program.generate(model.params, *given)
                responses = read(model, program.task, program.at, np.asarray(rollout.tokens_RL))
                total_R, _ = judge(program, asked, responses)
                rolled.append((rollout, choose(run, program.task, total_R)[0]))
            if not any(chosen.advantage_S.any() for _, chosen in rolled):
                raise ValueError(
                    f"task {name}: no group of {batches} rollouts has rewards that differ, so all "
                    "gradients are 0; take more batches, or a model that is neither perfect nor hopeless"
                )
            gradients = {
                masking: gradients_of(run, model, program, masking, rolled, mesh, shardings.params)
                for masking in ("every", *maskings)
            }
            mean = {masking: _mean(of_batches) for masking, of_batches in gradients.items()}
            found[name] = {
                masking: {
                    "between_batches": np.mean(
                        [_cosine(of_batches[i], of_batches[j]) for i in range(batches) for j in range(i)]
                    ),
                    "with_every": _cosine(mean[masking], mean["every"]),
                    "norm": np.mean([float(optax.tree.norm(g)) for g in of_batches]),
                }
                for masking, of_batches in gradients.items()
            }
    return found


def gradients_of(run, model, program, masking, rolled, mesh, shardings) -> list[Any]:
    """The gradient of each rollout under a masking, the mean over its inner updates."""
    mu = program.at.length if masking == "every" else run.objective.mu
    settings = dataclasses.replace(run.objective, masking=masking, mu=mu, beta=0.0, kl="old")
    run = dataclasses.replace(run, objective=settings)
    score = make_score(run, model, program.at, mesh, shardings)
    objective = make_objective(run, model, program.at)

    def add(sums, params, batch):
        grads = jax.grad(lambda params: objective.loss(params, objective.prepare(None, batch))[0])(params)
        return jax.tree.map(lambda a, b: a + b / mu, sums, grads)

    rows = sharding.batch_sharding(mesh)
    add = jax.jit(add, in_shardings=(shardings, shardings, rows), out_shardings=shardings)

    out = []
    for i, (rollout, chosen) in enumerate(rolled):
        sums = jax.tree.map(jnp.zeros_like, model.params)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), 3), i)
        fresh_S = np.ones(len(chosen.which_S), bool)
        longest = int(jnp.max(jnp.sum(rollout.response_RL, axis=1))) if masking == "every" else mu
        for n in range(longest):
            scored = score(model.params, None, rollout, key, n)
            batch = Batch(scored, rollout.tokens_RL, rollout.valid_RL, chosen, fresh_S)
            sums = add(sums, model.params, batch)
        out.append(sums)
    return out


def _mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def _cosine(a, b):
    return float(optax.tree.vdot(a, b) / (optax.tree.norm(a) * optax.tree.norm(b)))
