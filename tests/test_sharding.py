"""Meshes on eight fake devices: shapes, rules, placing, and that sharding changes no number."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mmada_jax.devices import sharding
from mmada_jax.devices.sharding import REST, USE, make_mesh
from mmada_jax.nets import transformer
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import SPECIAL_TOKENS, Vocab
from mmada_jax.train.runs import ModelRun
from mmada_jax.train.supervised import model_objective

CONFIG = transformer.ModelConfig(
    d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=64, vocab=64, max_len=32, dtype="float32"
)


def test_the_free_size_takes_what_is_left():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(data=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, -1, 1), (-1, -1, 1), (2, 2, 1), (0, -1, 1), (16, 1, 1)])
def test_sizes_that_do_not_fit_are_errors(sizes):
    with pytest.raises(ValueError, match="doesn't fit 8 devices"):
        make_mesh(*sizes)


def test_weights_rest_on_fsdp_and_are_used_whole():
    assert REST.spec("embed", "heads", "head_dim") == PartitionSpec("fsdp", "tensor", None)
    assert USE.spec("embed", "heads", "head_dim") == PartitionSpec(None, "tensor", None)
    assert USE.spec("batch", None) == PartitionSpec(("data", "fsdp"), None)


def test_params_are_split_at_rest_and_a_size_that_does_not_divide_is_named():
    mesh = make_mesh(fsdp=4, tensor=2)
    shapes, axes = transformer.param_shapes(CONFIG), transformer.param_axes(CONFIG)
    places = sharding.tree_shardings(mesh, axes, shapes)
    assert places["blocks"]["gate_DF"].shard_shape((2, 32, 64)) == (2, 8, 32)
    assert places["norm_D"].shard_shape((32,)) == (32,)
    with pytest.raises(ValueError, match="axis 'kv_heads' of size 2 can't be split over 4"):
        sharding.tree_shardings(make_mesh(tensor=4), axes, shapes)


def test_batches_are_split_by_row():
    mesh = make_mesh(data=2, fsdp=4)
    batch = sharding.put_batch(mesh, {"x": np.arange(16).reshape(16, 1)})
    assert batch["x"].sharding.shard_shape((16, 1)) == (2, 1)
    np.testing.assert_array_equal(batch["x"], np.arange(16).reshape(16, 1))


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((4, 4))
    assert sharding.constrain(x, "batch", "embed") is x


VOCAB = Vocab(
    image_offset=64, codebook_size=0, rows=64, mask=0,
    **dict.fromkeys(set(SPECIAL_TOKENS) - {"mask"}, 0),
)  # fmt: skip
RUN = ModelRun(
    program="model",
    steps=1,
    batch_size=8,
    mixture={"t2i": 4, "lm": 1, "lm_chat": 1, "mmu": 2},
    loss_chunk=24,
)


def rows(length=32, seed=0):
    """Eight rows of random tokens of all tasks, padded on the left."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 64, (8, length)).astype(np.int32)
    valid = np.arange(length) >= np.arange(8)[:, None]
    target = valid & (np.arange(length) >= length // 2)
    task = np.array([0, 0, 0, 0, 1, 2, 3, 3], np.int32)
    return layout.Batch(tokens, valid, target, np.zeros_like(target), task)


def gradients(config, mesh=None, batch=None):
    """Loss and gradients of the model's objective, on a mesh if there is one."""
    objective = model_objective(RUN, config, VOCAB)
    batch = rows() if batch is None else batch

    def run(params, batch):
        prepared = objective.prepare(jax.random.key(1), batch)
        return jax.value_and_grad(objective.loss, has_aux=True)(params, prepared)

    params = jax.jit(lambda key: transformer.init_params(key, config))(jax.random.key(0))
    if mesh is None:
        return jax.jit(run)(params, batch)
    places = sharding.tree_shardings(mesh, objective.axes, params)
    everywhere = sharding.replicated(mesh)
    with jax.set_mesh(mesh):
        split = jax.jit(
            run,
            in_shardings=(places, sharding.batch_sharding(mesh)),
            out_shardings=(everywhere, places),
        )
        return split(jax.device_put(params, places), batch)


@pytest.fixture(scope="module")
def of_one_device():
    return gradients(CONFIG)


def assert_equal(got, want):
    """Relative to the largest entry of each gradient."""

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.abs(b).max()))

    jax.tree.map(close, got, want)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 2, 1), (1, 4, 2), (2, 2, 2)])
def test_loss_and_gradients_are_those_of_one_device(sizes, of_one_device):
    got = gradients(CONFIG, make_mesh(*sizes))
    assert got[1]["blocks"]["up_DF"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert got[1]["head_DV"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert_equal(got, of_one_device)


def test_a_head_that_is_the_embedding_on_a_mesh():
    config = dataclasses.replace(CONFIG, tied=True)
    got = gradients(config, make_mesh(2, 2, 2))
    assert got[1]["embed_VD"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert_equal(got, gradients(config))


@pytest.mark.parametrize("implementation", ["tpu", "xla"])
def test_kernels_see_their_own_rows_and_heads(implementation, of_one_device):
    config = dataclasses.replace(CONFIG, attention=implementation)
    assert_equal(gradients(config, make_mesh(2, 2, 2)), of_one_device)


def test_platform_is_that_of_the_mesh_and_not_of_the_machine(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert sharding.platform() == "tpu"
    with jax.set_mesh(make_mesh()):
        assert sharding.platform() == "cpu"


def test_several_slices_need_a_data_axis_that_crosses_them():
    class Chip:
        """A device of one of two slices, as far as a mesh looks at it."""

        platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

        def __init__(self, i):
            self.id, self.slice_index, self.coords, self.core_on_chip = i, i // 4, (i % 4, 0, 0), 0

    devices = [Chip(i) for i in range(8)]
    mesh = make_mesh(devices=devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    for crossing in range(2):
        assert {d.slice_index for d in mesh.devices[crossing].flat} == {crossing}
    devices = [Chip(i) for i in range(16)]  # four slices
    with pytest.raises(ValueError, match="data=2 must be a multiple of the 4 slices"):
        make_mesh(data=2, devices=devices)


def test_the_memory_is_that_of_the_device_that_has_least_left():
    def mesh(*stats):
        devices = [types.SimpleNamespace(memory_stats=lambda of=of: of, process_index=0) for of in stats]
        return types.SimpleNamespace(local_devices=devices, devices=np.array(devices))

    full, free = {"bytes_limit": 1000, "bytes_in_use": 900}, {"bytes_limit": 1000}
    assert sharding.memory_left(mesh(free, full)) == 100
    assert sharding.memory_left(mesh(free, None)) is None
    assert sharding.memory_left(mesh(free, {})) is None
    assert sharding.memory_left(mesh()) is None  # of a process that has none of its devices
