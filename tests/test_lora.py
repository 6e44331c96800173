"""Adapters: beside the weights and merged they give the same; what is trained, saved, opened, exchanged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.devices import sharding
from mmada_jax.nets import lora, transformer
from mmada_jax.nets.lora import LoraConfig
from tests.merged import merge

CONFIG = transformer.ModelConfig(
    d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_mlp=48, vocab=64, max_len=32, dtype="float32"
)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)
VALID = np.arange(12)[None] < np.array([[12], [9]])


@pytest.fixture(scope="module", name="params")
def random_params():
    return jax.jit(lambda: transformer.init_params(jax.random.key(0), CONFIG))()


def random_adapters(config):
    adapters = lora.init_adapters(jax.random.key(1), CONFIG, config)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32), adapters)


def states(params, config=CONFIG):
    return jax.jit(lambda params: transformer.hidden_states(params, config, TOKENS, VALID))(params)


@pytest.mark.parametrize("targets", ["+".join(lora.MATRICES), "q_proj+ff_out", "k_proj", "attn_out"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_beside_the_weights_and_merged_is_the_same(params, targets, platform, monkeypatch):
    # The products of accelerators have other layouts, which a CPU computes too.
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    config = LoraConfig(4, 6.0, targets)
    adapters = random_adapters(config)
    plain = dataclasses.replace(CONFIG, attention="plain")
    merged = states(merge(params, adapters, config), plain)
    np.testing.assert_allclose(states(lora.beside(params, adapters, config), plain), merged, atol=2e-5)
    assert np.abs(merged - states(params, plain)).max() > 0.01


def test_new_adapters_change_nothing(params):
    config = LoraConfig(3)
    adapters = lora.init_adapters(jax.random.key(1), CONFIG, config)
    np.testing.assert_array_equal(states(lora.beside(params, adapters, config)), states(params))
    assert set(adapters) == {"q_DHK", "k_DGK", "v_DGK", "o_HKD", "gate_DF", "up_DF", "down_FD"}
    assert adapters["k_DGK"]["a_NIR"].shape == (3, 32, 3)
    assert adapters["k_DGK"]["b_NRO"].shape == (3, 3, 16)  # two heads of eight
    assert np.abs(adapters["down_FD"]["a_NIR"]).max() <= 48**-0.5


def test_the_sum_is_that_of_the_formula(params):
    config = LoraConfig(2, 5.0, "q_proj")
    adapters = random_adapters(config)
    merged = merge(params, adapters, config)["blocks"]["q_DHK"]
    for layer in range(3):
        a, b = adapters["q_DHK"]["a_NIR"][layer], adapters["q_DHK"]["b_NRO"][layer]
        want = np.asarray(params["blocks"]["q_DHK"][layer]).reshape(32, 32) + 2.5 * a @ b
        np.testing.assert_allclose(merged[layer].reshape(32, 32), want, atol=1e-6)


def test_gradients_are_those_of_the_merged_weights(params):
    config = LoraConfig(4, 8.0)
    adapters = random_adapters(config)

    def loss(of, adapters):
        joined = of(params, adapters, config)
        return jnp.sum(jnp.square(transformer.hidden_states(joined, CONFIG, TOKENS, VALID)))

    beside, merged = (
        jax.jit(jax.grad(lambda adapters, of=of: loss(of, adapters)))(adapters)
        for of in (lora.beside, merge)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), beside, merged)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"targets": ""}, "targets are ''; it must be some of q_proj, "),
        ({"targets": "q_proj+q_proj"}, "each once"),
        ({"targets": "qproj"}, "targets are 'qproj'; it must be some of"),
        ({"rank": 33}, "lora.rank is 33, q_proj has 32 rows or columns; choose at most 32"),
        ({"rank": 20, "targets": "ff_out+k_proj"}, "k_proj has 16 rows or columns; choose at most 16"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(values, message):
    with pytest.raises(ValueError, match=message):
        lora.check(CONFIG, LoraConfig(**{"rank": 2} | values))
