"""Matrices in 8 bits: what they are, how far off they make a model, and as the base of adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.devices import sharding
from mmada_jax.nets import int8, lora, transformer
from mmada_jax.serve.api import MMaDA
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.lazy import in_memory, lazy
from mmada_jax.weights.quantized import in_8_bits
from tests.merged import merge
from tests.test_lora import CONFIG, TOKENS, random_adapters, random_params, states  # noqa: F401

HELD = dataclasses.replace(CONFIG, weights="int8")


@pytest.fixture(scope="module", name="held")
def held_params(params):
    return in_memory(in_8_bits(lazy(jax.device_get(params))))


@pytest.mark.parametrize("name", int8.INPUTS)
def test_every_output_has_its_own_scale_and_the_error_is_half_a_step(params, name):
    w = np.asarray(params["blocks"][name], np.float32).copy()
    w[1] *= 100  # a layer of another size loses nothing of the others
    w[(0, *(slice(None),) * int8.INPUTS[name])][..., 0] = 0
    held = int8.quantize(w, name)
    axes = tuple(range(1, 1 + int8.INPUTS[name]))
    assert held["scale"].shape == tuple(1 if axis in axes else n for axis, n in enumerate(w.shape))
    assert held["int8"].dtype == np.int8 and np.abs(held["int8"]).max() == 127
    back = np.asarray(int8.value(held, jnp.float32))
    assert np.all(np.abs(back - w) <= 0.5001 * held["scale"])
    np.testing.assert_array_equal(np.abs(back).max(axis=axes) > 0, np.abs(w).max(axis=axes) > 0)


def test_a_piece_is_that_of_the_whole(params, held):
    pieces = in_8_bits(lazy(jax.device_get(params)))["blocks"]["o_HKD"]
    for part, index in (("int8", np.s_[1:2, 2:4]), ("int8", np.s_[:, :, 1:3, 4:9]), ("scale", np.s_[0:2])):
        np.testing.assert_array_equal(pieces[part][index], held["blocks"]["o_HKD"][part][index])
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), transformer.param_shapes(HELD))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), held) == shapes


def test_states_are_near_and_equal_those_of_the_rounded_matrices(params, held):
    near = states(held, HELD)
    rounded = params | {"blocks": {name: int8.value(w, jnp.float32) for name, w in held["blocks"].items()}}
    np.testing.assert_allclose(near, states(rounded), atol=1e-5)
    plain = states(params)
    error = np.linalg.norm(near - plain) / np.linalg.norm(plain)
    assert 1e-4 < error < 0.02


def test_adapters_stand_beside_it_and_merge_with_what_it_stands_for(params, held):
    config = lora.LoraConfig(4, 8.0)
    adapters = random_adapters(config)
    merged = merge(held, adapters, config)
    assert merged["blocks"]["q_DHK"].shape == params["blocks"]["q_DHK"].shape
    np.testing.assert_allclose(states(lora.beside(held, adapters, config), HELD), states(merged), atol=2e-5)
    with pytest.raises(ValueError, match="weights are 'int8'; only 'plain' ones are trained"):
        transformer.init_params(jax.random.key(0), HELD)


@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_model_is_loaded_and_does_what_it_did(model_workdir, sizes):
    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if sizes is None else sharding.make_mesh(**sizes)
    held = MMaDA.load(model_workdir, mesh, weights="int8")
    plain = MMaDA.load(model_workdir, mesh)
    bytes_of = [sum(x.nbytes for x in jax.tree.leaves(model.params["blocks"])) for model in (held, plain)]
    assert bytes_of[0] < 0.3 * bytes_of[1]  # a quarter of float32, and the scales
    job = held.text_job(["1+1"], max_new=4, block=4)
    assert len(held.run(job)[0]) == 4
    assert held.draw("a handwritten one", steps=2).codes.shape == plain.grid
    source = open_folder(model_workdir)
    want = in_memory(in_8_bits(source.params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(held.params), want)
    with pytest.raises(ValueError, match="weights is 'int4'; it must be plain or int8"):
        MMaDA.load(model_workdir, mesh, weights="int4")
