"""What a checkpoint of a run holds beside the policy, written and read back.

That is the frozen reference, and with `ahead` the rollout in flight with its scores. Nothing random is
stored: prompts, keys and masks are functions of (seed, iteration).
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmada_jax.devices import sharding
from mmada_jax.model.model import Model
from mmada_jax.nets import lora, transformer
from mmada_jax.train.rl.prompts import Prompt
from mmada_jax.train.rl.run import RLRun
from mmada_jax.train.rl.tasks import OpenTask, rollout_inputs
from mmada_jax.train.rl.unigrpo import Rollout
from mmada_jax.train.rl.update import Scored, base_shapes, policy_of
from mmada_jax.weights.checkpoint import Checkpoints
from mmada_jax.weights.state import TrainState, state_shardings


class InFlight(NamedTuple):
    """A rollout that is generated: the prompt of each row, the rollout, and its scores for each inner
    update, None if it isn't scored yet."""

    asked: list[Prompt]
    rollout: Rollout
    scored: list[Scored] | None


def state_shapes(
    run: RLRun, model: Model, optimizer: Any, mesh: jax.sharding.Mesh
) -> tuple[TrainState, TrainState]:
    """(shapes, shardings) of the state that is trained: of the policy, or of its adapters."""
    if run.lora.rank:
        init = functools.partial(lora.init_adapters, config=model.config, lora=run.lora)
        return state_shardings(mesh, init, None, optimizer)
    init = functools.partial(transformer.init_params, config=model.config)
    return state_shardings(mesh, init, transformer.param_axes(model.config), optimizer)


def frozen_reference(params: Any, run: RLRun) -> Any:
    """The reference: a copy of the params in `reference_dtype`, on the same devices; None if the objective
    asks for none, or if there are adapters, whose base is the reference. It has to be a copy, since the
    updates donate their params."""
    if run.objective.kl != "reference" or run.lora.rank:
        return None
    return jax.tree.map(lambda x: jnp.array(x, run.reference_dtype, copy=True), params)


def to_checkpoint(state: TrainState, reference: Any, ahead: InFlight | None) -> TrainState:
    """The state as a checkpoint holds it, with the reference and the rollout in flight beside the
    optimizer's state. The prompts of the rollout aren't stored, since they follow from the iteration."""
    more = {} if reference is None else {"reference": reference}
    if ahead:
        more["rollout"] = ahead.rollout._asdict()
        more["scored"] = {
            str(n): {name: x for name, x in scored._asdict().items() if x is not None}
            for n, scored in enumerate(ahead.scored)
        }
    return state._replace(opt_state={"optimizer": state.opt_state} | more)


def resume(
    run: RLRun,
    model: Model,
    tasks: Mapping[str, OpenTask],
    checkpoints: Checkpoints,
    shapes: TrainState,
    shardings: TrainState,
) -> tuple[TrainState, Any, InFlight | None]:
    """The content of the newest whole checkpoint: the state, the reference, and with `ahead` the rollout
    in flight."""
    mu = run.objective.mu
    reference = jax.eval_shape(functools.partial(frozen_reference, run=run), shapes.params)
    base = base_shapes(run, model.config)
    policy = jax.eval_shape(functools.partial(policy_of, run), shapes.params, base)

    def next_inputs(step):
        iteration = int(step) // mu
        opened = tasks[run.turn(iteration)[0]]
        return opened, *rollout_inputs(run, model, opened, iteration)

    def layout(step):
        # The rollout in flight has the shape of its task's rows, so its layout depends on the step.
        ahead = None
        if run.ahead:
            opened, asked, given = next_inputs(step)
            rollout = jax.eval_shape(opened.generate, policy, *given)
            anchor = base if run.lora.rank and run.objective.kl == "reference" else reference
            scored = jax.eval_shape(opened.score, policy, anchor, rollout, jax.random.key(0), 0)
            ahead = InFlight(asked, rollout, [scored] * mu)
        whole = to_checkpoint(shapes, reference, ahead)
        rows = sharding.batch_sharding(model.mesh)
        places = ahead and InFlight([], *jax.tree.map(lambda _: rows, (ahead.rollout, ahead.scored)))
        return whole, to_checkpoint(shardings, reference and shardings.params, places)

    state = checkpoints.restore_as(layout)
    held = state.opt_state
    state = state._replace(opt_state=held["optimizer"])
    ahead = None
    if run.ahead:
        scored = [Scored(**held["scored"][str(n)]) for n in range(mu)]
        ahead = InFlight(next_inputs(state.step)[1], Rollout(**held["rollout"]), scored)
    return state, held.get("reference"), ahead
