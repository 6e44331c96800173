"""Meshes on eight fake devices: shapes, rules, placing, and that sharding changes no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mmada_jax import sharding, transformer
from mmada_jax.sharding import REST, USE, make_mesh

CONFIG = transformer.Config(
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


@pytest.mark.parametrize("sizes", [(4, 2, 1), (1, 4, 2)])
def test_value_and_gradient_are_those_of_one_device(sizes):
    params = transformer.init_params(jax.random.key(0), CONFIG)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)
    valid = np.arange(16) >= np.arange(8)[:, None]

    def loss(params, tokens, valid):
        h = transformer.hidden_states(params, CONFIG, tokens, valid)
        return jnp.sum(jnp.where(valid, jax.nn.logsumexp(transformer.unembed(params, CONFIG, h), -1), 0))

    want = jax.jit(jax.value_and_grad(loss))(params, tokens, valid)
    mesh = make_mesh(*sizes)
    places = sharding.tree_shardings(mesh, transformer.param_axes(CONFIG), params)
    with jax.set_mesh(mesh):
        split = jax.jit(
            jax.value_and_grad(loss),
            in_shardings=(places, sharding.batch_sharding(mesh), sharding.batch_sharding(mesh)),
            out_shardings=(sharding.replicated(mesh), places),
        )
        got = split(jax.device_put(params, places), tokens, valid)
    assert got[1]["blocks"]["up_DF"].sharding.spec == PartitionSpec(None, "fsdp", REST.mlp)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
