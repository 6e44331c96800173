"""State dicts <-> params: bit-exact there and back, and every offender is named."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from mmada_jax.nets import transformer, vq
from mmada_jax.weights import llada_keys, magvit_keys

LM = transformer.Config(
    d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_mlp=48, vocab=40, max_len=32, dtype="float32"
)
VQ = vq.PRESETS["digits"]


def random_state(table, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(rule.torch_shape).astype(dtype) for key, rule in table.items()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("module", "config"), [(llada_keys, LM), (magvit_keys, VQ)], ids=["llada", "magvit"]
)
def test_there_and_back_is_bit_exact(module, config, dtype):
    state = random_state(module.key_table(config), dtype)
    back = module.params_to_torch(module.params_from_torch(state, config), config)
    for key, array in state.items():
        assert back[key].dtype == array.dtype
        assert back[key].tobytes() == array.tobytes()
    extra = back.keys() - state.keys()
    assert extra == ({"quantize.embedding", "quantize.power_vals"} if module is magvit_keys else set())


def test_the_tables_cover_exactly_the_params():
    shapes = transformer.param_shapes(LM)
    ours = llada_keys.params_from_torch(random_state(llada_keys.key_table(LM), np.float32), LM)
    assert jax.tree.map(np.shape, ours) == jax.tree.map(lambda x: x.shape, shapes)
    shapes = jax.eval_shape(lambda: vq.init_params(jax.random.key(0), VQ))
    ours = magvit_keys.params_from_torch(random_state(magvit_keys.key_table(VQ), np.float32), VQ)
    assert jax.tree.map(np.shape, ours) == jax.tree.map(lambda x: x.shape, shapes)


def test_every_offender_is_listed_in_one_error():
    state = random_state(llada_keys.key_table(LM), np.float32)
    first = "model.transformer.blocks.0.q_proj.weight"
    state["lm_head.weight"] = state.pop("model.transformer.ff_out.weight")
    state[first] = state[first][:-1]
    with pytest.raises(ValueError, match=r"\(3 problems\)") as error:
        llada_keys.params_from_torch(state, LM)
    for part in ("missing model.transformer.ff_out.weight", "unexpected lm_head.weight",
                 f"{first} has shape (31, 32), expected (32, 32)"):  # fmt: skip
        assert part in str(error.value)


def test_long_lists_are_cut_and_counted():
    with pytest.raises(ValueError, match=r"\(30 problems\).* and 20 more"):
        llada_keys.params_from_torch({}, LM)


def test_params_of_another_model_are_refused():
    params = llada_keys.params_from_torch(random_state(llada_keys.key_table(LM), np.float32), LM)
    deeper = dataclasses.replace(LM, n_layers=4)
    with pytest.raises(ValueError, match="q_DHK has shape"):
        llada_keys.params_to_torch(params, deeper)
    del params["norm_D"]
    with pytest.raises(ValueError, match="missing norm_D"):
        llada_keys.params_to_torch(params, LM)


def test_the_quantisers_constants_are_checked():
    state = random_state(magvit_keys.key_table(VQ), np.float32)
    params = magvit_keys.params_from_torch(state, VQ)
    whole = magvit_keys.params_to_torch(params, VQ)
    np.testing.assert_array_equal(whole["quantize.power_vals"], [32, 16, 8, 4, 2, 1])
    assert set(np.unique(whole["quantize.embedding"])) == {-1, 1}
    magvit_keys.params_from_torch(whole, VQ)
    whole["quantize.power_vals"] = whole["quantize.power_vals"][::-1]
    with pytest.raises(ValueError, match="power_vals isn't that of a 6-bit"):
        magvit_keys.params_from_torch(whole, VQ)
