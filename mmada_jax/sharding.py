"""Mesh, axis rules, and the placing of params and batches.

Arrays name their axes logically ("embed", "heads", ...). Two tables say on which mesh axes these
lie: REST, how weights and optimizer state are stored, and USE, how they are when a layer reads
them. Weights are stored under REST and constrained to USE where they are read: the FSDP gather is
that one line.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
AXIS_TYPES = (AxisType.Auto,) * 3


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Logical axis -> mesh axis or axes; None is replicated."""

    batch: Any = ("data", "fsdp")
    length: Any = None
    embed: Any = None
    heads: Any = "tensor"
    kv_heads: Any = "tensor"
    head_dim: Any = None
    mlp: Any = "tensor"
    vocab: Any = "tensor"
    layers: Any = None

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Logical axis names of one array -> its PartitionSpec."""
        return PartitionSpec(*(None if axis is None else getattr(self, axis) for axis in axes))


USE = AxisRules()
REST = AxisRules(embed="fsdp")


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
    """The mesh ("data", "fsdp", "tensor") over all devices; one size may be -1: what is left."""
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or fixed < 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise ValueError(
            f"mesh {sizes} doesn't fit {len(devices)} devices: the sizes must multiply to "
            f"{len(devices)}, and one of them may be -1"
        )
    for name in free:
        sizes[name] = len(devices) // fixed
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, AXIS_TYPES, devices=devices)


def constrain(x: jax.Array, *axes: str | None, rules: AxisRules = USE) -> jax.Array:
    """Lays `x` out by its logical axes under `rules`; does nothing outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(*axes))


def tree_shardings(mesh: jax.sharding.Mesh, axes: Any, shapes: Any, rules: AxisRules = REST) -> Any:
    """Trees of logical axis tuples and of shapes -> the tree of shardings.

    Raises ValueError where an axis doesn't divide by the mesh axes that it should lie on.
    """

    def place(axis_names, shape):
        spec = rules.spec(*axis_names)
        for name, dim, on in zip(axis_names, shape.shape, spec, strict=True):
            parts = int(np.prod([mesh.shape[a] for a in ((on,) if isinstance(on, str) else on or ())]))
            if dim % parts:
                raise ValueError(
                    f"axis {name!r} of size {dim} can't be split over {parts} devices of mesh "
                    f"{dict(mesh.shape)}; choose mesh sizes that divide it"
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def put_params(params: Any, shardings: Any, dtype: Any = None) -> Any:
    """A tree of host arrays, which may be read piece by piece as they are indexed -> global arrays.

    Every process reads what lies on its devices. With `dtype` the pieces are cast on the way.
    """

    def put(array, place):
        def read(index):
            return np.asarray(array[index]).astype(dtype or array.dtype, copy=False)

        return jax.make_array_from_callback(array.shape, place, read)

    return jax.tree.map(put, params, shardings)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Arrays whose first axis is the row: split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(USE.batch))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """A pytree of host arrays [rows, ...], this process's part of the batch -> global arrays."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
