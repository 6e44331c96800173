"""Mesh, axis rules, and the placing of params and batches.

Arrays name their axes logically ("embed", "heads", ...). Two tables say on which mesh axes these
lie: REST, how weights and optimizer state are stored, and USE, how they are when a layer reads
them. Weights are stored under REST and constrained to USE where they are read: the FSDP gather is
that one line.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mmada_jax.devices import chips

MESH_AXES = ("data", "fsdp", "tensor")
AXIS_TYPES = (AxisType.Auto,) * 3


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Logical axis -> mesh axis or axes; None is replicated."""

    batch: Any = ("data", "fsdp")
    all_rows: Any = "data"  # the rows of all devices that hold parts of the same weights
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
    """The mesh ("data", "fsdp", "tensor") over all devices; one size may be -1: what is left.

    Of several slices only `data` crosses the slower network between them (it carries nothing but sums
    of gradients): it is raised to their number if it is 1. Raises ValueError for sizes that don't fit.
    """
    devices = jax.devices() if devices is None else devices
    # On GPUs a "slice" is a host, and weights may well be spread over several.
    of_tpu = [device for device in devices if device.platform == "tpu"]
    slices = len({getattr(device, "slice_index", None) for device in of_tpu}) or 1
    data = slices if data == 1 else data
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
    if slices > 1:
        if sizes["data"] % slices:
            raise ValueError(
                f"mesh data={sizes['data']} must be a multiple of the {slices} slices: the other axes "
                "can't cross the network between them"
            )
        within = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
        return jax.sharding.Mesh(grid, MESH_AXES, AXIS_TYPES)
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, AXIS_TYPES, devices=devices)


def constrain(x: jax.Array, *axes: str | None, rules: AxisRules = USE) -> jax.Array:
    """Lays `x` out by its logical axes under `rules`; does nothing outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(*axes))


def on_each_device(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`f`, run by every device on its own part of the arrays, for what the compiler can't split (a
    kernel) or splits badly. Outside of a mesh it is `f`, and the sums below are the identity."""
    if jax.sharding.get_abstract_mesh().empty:
        return f
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def all_sum(x: jax.Array, axis: str) -> jax.Array:
    """Within `on_each_device`: the sum of x over the devices among which logical `axis` is split."""
    return jax.lax.psum(x, _used(axis))


def all_max(x: jax.Array, axis: str) -> jax.Array:
    """Within `on_each_device`: the largest x over the devices among which logical `axis` is split."""
    return jax.lax.pmax(x, _used(axis))


def first_of(size: int, axis: str) -> Any:
    """Within `on_each_device`: where this device's `size` entries of logical `axis` begin."""
    return jax.lax.axis_index(_used(axis)) * size if _used(axis) else 0


def scatter_sum(x_D: jax.Array) -> jax.Array:
    """Within `on_each_device`: a gradient [embed, ...], summed over all rows, each device its part."""
    if not _used("batch"):
        return x_D
    x_D = jax.lax.psum_scatter(x_D, REST.embed, scatter_dimension=0, tiled=True)
    return jax.lax.psum(x_D, tuple(a for a in USE.batch if a != REST.embed))


def memory_left(mesh: jax.sharding.Mesh) -> int | None:
    """The bytes that the device of `mesh` has left that has least, the same in all processes. None where
    devices don't say, as CPUs."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    if not stats or not all(stats) or not all("bytes_limit" in of for of in stats):
        return None
    least = min(of["bytes_limit"] - of.get("bytes_in_use", 0) for of in stats)
    if len({device.process_index for device in mesh.devices.flat}) == jax.process_count():
        least = np.min(multihost_utils.process_allgather(np.float32(least)))
    return int(least)


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str] | None:
    """Options of a compilation for the devices of `mesh` (the table is in chips.py)."""
    chip = chips.of_kind(mesh.devices.flat[0].device_kind)
    return chip and chip.compiler_options


def jit(
    mesh: jax.sharding.Mesh,
    function: Callable[..., Any],
    in_shardings: Any,
    out_shardings: Any,
    donate_argnums: int | tuple[int, ...] = (),
) -> Any:
    """`jax.jit` for the devices of `mesh`, with the options of a compilation for them."""
    return jax.jit(
        function,
        in_shardings=in_shardings,
        out_shardings=out_shardings,
        donate_argnums=donate_argnums,
        compiler_options=compiler_options(mesh),
    )


def row_parts(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts the rows of a batch are split on `mesh`, which needn't be in use."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def whole_rows(mesh: jax.sharding.Mesh, rows: int) -> int:
    """The least number of rows, `rows` at least, that `row_parts` divides."""
    return -(-rows // row_parts(mesh)) * row_parts(mesh)


def parts(axis: str) -> int:
    """Into how many parts logical `axis` is split in use; 1 outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return int(np.prod([mesh.shape[a] for a in _used(axis)]))


def _used(axis):
    """The mesh axes of a logical axis, none outside of a mesh."""
    axes = getattr(USE, axis)
    axes = (axes,) if isinstance(axes, str) else axes
    return () if jax.sharding.get_abstract_mesh().empty else axes


def platform() -> str:
    """ "cpu", "gpu" or "tpu": the platform of the mesh in use, or without a mesh of the default device. The
    chips of a mesh needn't be in this machine: the compiler can target others."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


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


def own_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that lie on the devices of this process."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for (rows,) in places.values() for row in range(batch_size)[rows]})


def put_batch(mesh: jax.sharding.Mesh, batch: Any, rows: Sequence[int] | None = None, n: int = 0) -> Any:
    """A pytree of host arrays [rows, ...] -> global arrays, each device's rows placed by its process.

    The arrays hold the whole batch, or its `rows` of `n` that this process has, in ascending order.
    """
    sharding = batch_sharding(mesh)

    def put(x):
        def read(index):
            first, stop, _ = index[0].indices(n)
            return x[rows.index(first) : rows.index(stop - 1) + 1]

        if rows is None:
            return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
        return jax.make_array_from_callback((n, *x.shape[1:]), sharding, read)

    return jax.tree.map(put, batch)
