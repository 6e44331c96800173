"""A task at work: its prompts in their shuffled order, its rewards, and its three jitted functions."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np

from mmada_jax import storage
from mmada_jax.data.pipeline import OUTAGES
from mmada_jax.devices import sharding
from mmada_jax.model.model import Model
from mmada_jax.train.metrics import warn
from mmada_jax.train.program import Objective
from mmada_jax.train.rl.prompts import Prompt
from mmada_jax.train.rl.rewards.functions import Combined
from mmada_jax.train.rl.rollout import (
    ResponseSpan,
    lay_out,
    make_generate,
    read_image,
    response_span,
)
from mmada_jax.train.rl.run import RLRun, Task
from mmada_jax.train.rl.unigrpo import Rollout
from mmada_jax.train.rl.update import Scored, make_objective, make_score, policy_places
from mmada_jax.train.supervised import make_step
from mmada_jax.weights.state import TrainState


@dataclasses.dataclass(frozen=True)
class OpenTask:
    """A task with all that the loops need of it.

    `order` maps the position of a prompt in the run to the prompt's index; every epoch is shuffled anew.
    `generate`, `score` and `update` are jitted, and nothing is compiled before they are called.
    `unreadable` collects the image files that couldn't be read.
    """

    task: Task
    at: ResponseSpan
    prompts: Sequence[Prompt]
    rewards: Combined
    order: grain.MapDataset
    objective: Objective
    generate: Callable[..., Rollout]
    score: Callable[..., Scored]
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    unreadable: set[storage.Path] = dataclasses.field(default_factory=set)


def open_task(
    run: RLRun,
    name: str,
    model: Model,
    prompts: Sequence[Prompt],
    rewards: Combined,
    optimizer: Any,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
) -> OpenTask:
    """The task of that name with its jitted functions; nothing is compiled yet."""
    task = run.tasks[name]
    at = response_span(task, model.vocab, model.rows)
    # By its name, so that other tasks in the run don't change the order.
    seed = int.from_bytes(hashlib.sha256(f"{run.seed} {name}".encode()).digest()[:4])
    order = grain.MapDataset.range(len(prompts)).seed(seed).shuffle().repeat()
    objective = make_objective(run, model, at)
    policy, frozen = policy_places(run, model, mesh, shardings.params)
    return OpenTask(
        task,
        at,
        prompts,
        rewards,
        order,
        objective,
        make_generate(mesh, model.config, model.vocab, at, policy, run.objective.responses),
        make_score(run, model, at, mesh, policy),
        make_step(objective, optimizer, mesh, shardings, run.accumulate, frozen),
    )


def rollout_inputs(
    run: RLRun, model: Model, opened: OpenTask, iteration: int
) -> tuple[list[Prompt], tuple]:
    """The prompts of an iteration, one for each row, and the inputs of `generate` beside the params.

    Both are functions of (seed, iteration), so nothing of them is stored in checkpoints.
    """
    task, G = opened.task, run.objective.responses
    _, turn = run.turn(iteration)
    asked = [_readable_prompt(model, opened, turn * task.groups + p) for p in range(task.groups)]
    job = lay_out(model, task, asked, G)
    rows, unconditional = (
        x and sharding.put_batch(model.mesh, (x.tokens, x.valid)) for x in (job.rows, job.unconditional)
    )
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), 2), iteration)
    return [prompt for prompt in asked for _ in range(G)], (*rows, key, unconditional)


def _readable_prompt(model: Model, opened: OpenTask, position: int) -> Prompt:
    """The prompt at a position, with the pixels that it asks about. Where its file can't be read, this is
    reported once and the next prompt stands in. Raises ValueError if no prompt can be read."""
    first, n, outages = opened.order[position], len(opened.prompts), 0
    for i in range(n):
        prompt = opened.prompts[(first + i) % n]
        if opened.task.layout != "mmu":
            return prompt
        try:
            return prompt._replace(image=read_image(prompt.image, model.image_size))
        except (ValueError, OSError) as error:
            if prompt.image not in opened.unreadable and jax.process_index() == 0:
                warn(f"{error}; another prompt stands in")
            opened.unreadable.add(prompt.image)
            outages += storage.is_outage(error)
            if outages == OUTAGES:  # each of them has taken up to a minute
                raise
    raise ValueError(f"none of the images of {n} prompts can be read; the last is {prompt.image}")


def judge(
    opened: OpenTask, asked: Sequence[Prompt], responses: tuple[list[str], np.ndarray | None]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The rewards of R responses: their weighted sum float32 [R], and each reward [R] by its name.

    The first process computes them; in the others they are 0 until its values arrive.
    """
    texts, images = responses
    if jax.process_index() == 0:
        prompts, answers = [prompt.text for prompt in asked], [prompt.answer for prompt in asked]
        return opened.rewards(prompts, texts, images, answers)
    nothing_R = np.zeros(len(asked), np.float32)
    return nothing_R, dict.fromkeys(opened.task.rewards, nothing_R)
