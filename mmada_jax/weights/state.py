"""The state of a training run at a step: the step, the params, the optimizer's state. It holds no keys."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from mmada_jax.devices import sharding


class TrainState(NamedTuple):
    """A pytree. The random key of a step is fold_in(root, step), so a resumed run needs no stored key."""

    step: jax.Array
    params: Any
    opt_state: Any


def state_shardings(
    mesh: jax.sharding.Mesh,
    init_params: Callable[[jax.Array], Any],
    axes: Any,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, TrainState]:
    """(shapes, shardings) of the state.

    `axes` is the tree of logical axis names of the params, or None to replicate them. The optimizer's
    moments are split as their params are; counters are replicated.
    """

    def init(key):
        params = init_params(key)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    everywhere = sharding.replicated(mesh)
    if axes is None:
        return shapes, jax.tree.map(lambda _: everywhere, shapes)
    params = sharding.tree_shardings(mesh, axes, shapes.params)
    of_path = dict(jax.tree.leaves_with_path(params))

    def place(path, leaf):
        # A moment's path in the optimizer's state ends in the path of its param.
        del leaf
        suffixes = (path[i:] for i in range(len(path)))
        return next((of_path[suffix] for suffix in suffixes if suffix in of_path), everywhere)

    return shapes, TrainState(everywhere, params, jax.tree.map_with_path(place, shapes.opt_state))


def init_state(
    key: jax.Array,
    init_params: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
) -> TrainState:
    """A fresh state, created in place on its devices."""

    def init(key):
        params = init_params(key)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    # Compiling with all optimisations takes most of the time of a start on a CPU, for code that runs once.
    hurry = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    create = jax.jit(
        init, in_shardings=shardings.step, out_shardings=shardings, compiler_options=hurry
    )  # the step lies everywhere, as the key does
    return create(key)


def start_state(params: Any, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """The state at step 0 of a run that begins with `params`, which are placed by `shardings` already."""
    init = jax.jit(optimizer.init, in_shardings=(shardings.params,), out_shardings=shardings.opt_state)
    opt_state = init(params)
    return TrainState(jax.device_put(jnp.int32(0), shardings.step), params, opt_state)


def all_finite(params: Any) -> bool:
    """Whether all numbers of a tree of arrays are finite. The arrays may be split over devices and
    processes; then all processes call this. Only the answer leaves a device."""
    arrays = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)]
    places = tuple(getattr(x, "sharding", None) for x in arrays)
    return bool(_finite(places)(arrays)) if arrays else True


@functools.cache
def _finite(places: tuple[Any, ...]) -> Callable[[list[jax.Array]], jax.Array]:
    """The jitted test for arrays with these shardings; None stands for an array of the host."""

    def every(arrays):
        return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()

    mesh = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
    return jax.jit(every, in_shardings=(list(places),), out_shardings=mesh and sharding.replicated(mesh))
