"""Slots in which rows are decoded side by side: a row joins a slot, is decoded, and leaves when it is done.

The functions are jitted once for a mesh, a rule and a shape; `serve.engine` says who gets a slot.

Letters: S slots, L places of a row, R rows that join in one call.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.devices import sharding
from mmada_jax.diffusion import cached, decode, denoise, rules
from mmada_jax.diffusion.decode import Placed
from mmada_jax.diffusion.denoise import State
from mmada_jax.nets import transformer
from mmada_jax.tokens.vocab import Vocab

# Shapes whose functions are kept; each temperature and number of steps that is asked for makes another one.
COMPILED = 256


class Slots(NamedTuple):
    """The rows in the slots, and where each stands. An empty slot holds a row with an empty span."""

    placed: Placed
    state: State


class Report(NamedTuple):
    """What the host learns after some steps: the tokens of each slot [S, L], its steps so far, whether it
    still has something to do, and for how many steps the call ran."""

    tokens_SL: Any
    steps_S: Any
    going_S: Any
    ran: Any


class Shape(NamedTuple):
    """What rows must share to stand side by side: the model and its mesh, the rule, the longest span that
    the rule is meant for, whether there are adapters beside the params."""

    mesh: jax.sharding.Mesh
    config: transformer.ModelConfig
    vocab: Vocab
    length: int
    rule: rules.Rule
    adapted: bool = False


def sizes(most: int, parts: int) -> list[int]:
    """The numbers of slots that lanes have: few of them, since each is compiled by itself, and not too few,
    since steps compute empty slots too."""
    sizes = [parts * 2**n for n in range(20) if parts * 2**n < most]
    return [*sizes, most]


def empty(shape: Shape, slots: int, places: int, other: bool = False) -> Slots:
    """Slots without a row, on the mesh; with `other` for rows that bring an unconditional row along."""
    rows = Placed(
        *(np.zeros((slots, places), kind) for kind in (np.int32, bool)),
        *(np.zeros(slots, kind) for kind in (np.int32, np.int32, np.uint32, np.int32)),
        tuple(np.zeros((slots, places), kind) for kind in (np.int32, bool)) if other else None,
    )
    return _made(shape)(sharding.put_batch(shape.mesh, rows))


@functools.lru_cache(COMPILED)
def _made(shape):
    def make(placed):
        network = transformer.Network(None, shape.config)
        return Slots(
            placed, denoise.blank(network, placed.tokens_BL, shape.length, shape.rule, shape.vocab)
        )

    return sharding.jit(shape.mesh, make, (sharding.batch_sharding(shape.mesh),), _shardings(shape))


@functools.lru_cache(COMPILED)
def joiner(shape: Shape, reach: int | None) -> Callable[[Any, Slots, Placed, Any, Any], Slots]:
    """The jitted (params, slots, rows [R], number_R, fresh_R) -> slots in which the slot of each number has
    its row.

    Rows whose number is beyond the slots are left out; they come last. First passes of text with a cache
    are made here: those of the rows that are `fresh`, while a row that isn't equals the row before it, and
    shares its pass; a picture's first step computes all of its row anyway. `reach` is that of
    `denoise`."""

    def join(params, slots, rows, number_R, fresh_R):
        network, rule = transformer.Network(params, shape.config), shape.rule
        draft = decode.draft_of(rows)
        new = Slots(rows, denoise.blank(network, rows.tokens_BL, shape.length, rule, shape.vocab))

        def put(old_S, new_R):
            return old_S.at[number_R].set(new_R.astype(old_S.dtype), mode="drop")

        cache = slots.state.cache
        if rule.cache != "none":
            spot = denoise.spot(draft, new.state, shape.length, rule, shape.vocab)
            size = rule.size(shape.length)
            cache = cached.join(network, rule, size, spot, reach, cache, number_R, fresh_R)
        of_rows = (Slots(x.placed, x.state._replace(cache=None)) for x in (slots, new))
        placed, state = jax.tree.map(put, *of_rows)
        return Slots(placed, state._replace(cache=cache))

    rows, one = sharding.batch_sharding(shape.mesh), sharding.replicated(shape.mesh)
    of_slots = _shardings(shape)
    return sharding.jit(
        shape.mesh, join, (_params(shape), of_slots, rows, one, one), of_slots, donate_argnums=1
    )


@functools.lru_cache(COMPILED)
def runner(shape: Shape) -> Callable[[Any, Slots, Any, Any], tuple[Slots, Report]]:
    """The jitted (params, slots, most, by_block) -> (slots, Report) after `most` steps, fewer if a row is
    done before, or with `by_block` if a row has come to the end of a block."""

    def run(params, slots, most, by_block):
        network, draft = transformer.Network(params, shape.config), decode.draft_of(slots.placed)
        of_rule = {"length": shape.length, "rule": shape.rule, "vocab": shape.vocab}
        at_first_S = slots.state.block_B

        def unfinished(state):
            return denoise.unfinished(draft, state, shape.length, shape.rule)

        began_S = unfinished(slots.state)

        def going(state_and_n):
            state, n = state_and_n
            left_S = unfinished(state)
            at_a_border = jnp.any(began_S & (state.block_B != at_first_S))
            return jnp.any(left_S) & ~jnp.any(began_S & ~left_S) & (n < most) & ~(by_block & at_a_border)

        def step(state_and_n):
            state, n = state_and_n
            return denoise.advance(network, draft, state, **of_rule), n + 1

        state, n = jax.lax.while_loop(going, step, (slots.state, jnp.int32(0)))
        report = Report(state.tokens_BL, state.steps_B, unfinished(state), n)
        return Slots(slots.placed, state), report

    one, of_slots = sharding.replicated(shape.mesh), _shardings(shape)
    return sharding.jit(
        shape.mesh, run, (_params(shape), of_slots, one, one), (of_slots, one), donate_argnums=1
    )


@functools.lru_cache(COMPILED)
def mover(shape: Shape) -> Callable[[Slots, Any], Slots]:
    """The jitted (slots [S], numbers [S']) -> slots [S'] with the rows of those numbers; number -1 leaves a
    slot empty."""

    def move(slots, number_S):
        kept_S, from_S = number_S >= 0, jnp.maximum(number_S, 0)
        n = shape.rule.caches  # rows of the cache that belong to a slot stand side by side
        from_R = (from_S[:, None] * n + jnp.arange(n, dtype=from_S.dtype)[None]).reshape(-1)
        cache = jax.tree.map(lambda x_NR: jnp.take(x_NR, from_R, axis=1), slots.state.cache)
        slots = Slots(slots.placed, slots.state._replace(cache=None))
        placed, state = jax.tree.map(lambda x_S: jnp.take(x_S, from_S, axis=0), slots)
        placed = placed._replace(length_B=jnp.where(kept_S, placed.length_B, 0))
        return Slots(placed, state._replace(cache=cache))

    of_slots = _shardings(shape)
    return sharding.jit(shape.mesh, move, (of_slots, sharding.replicated(shape.mesh)), of_slots)


@functools.lru_cache(COMPILED)
def leaver(shape: Shape) -> Callable[[Slots, Any], Slots]:
    """The jitted (slots, number) -> slots in which the slot of that number is empty."""

    def leave(slots, number):
        length_S = slots.placed.length_B.at[number].set(0)
        return Slots(slots.placed._replace(length_B=length_S), slots.state)

    of_slots = _shardings(shape)
    return sharding.jit(
        shape.mesh, leave, (of_slots, sharding.replicated(shape.mesh)), of_slots, donate_argnums=0
    )


def _params(shape):
    return decode.param_shardings(shape.mesh, shape.config, shape.adapted)


def _shardings(shape):
    return Slots(sharding.batch_sharding(shape.mesh), decode.state_shardings(shape.mesh, shape.rule))
