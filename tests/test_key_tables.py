"""Key tables: there and back to the bit, exactly the params; and the fields of a config.json."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from folders import CONFIG, VALUES, VQ

from mmada_jax.nets import transformer, vq
from mmada_jax.weights import llada_keys, magvit_keys

LM = transformer.ModelConfig(
    d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_mlp=48, vocab=40, max_len=32, dtype="float32"
)


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


def test_config_from_hf():
    assert CONFIG.n_kv_heads == 2
    assert CONFIG.d_mlp == 200
    published = {
        "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
        "mlp_hidden_size": 12288, "mlp_ratio": 4, "activation_type": "silu", "block_type": "llama",
        "block_group_size": 1, "vocab_size": 126464, "embedding_size": 126464, "alibi": False,
        "max_sequence_length": 4096, "rope": True, "rope_theta": 500000.0, "rope_full_precision": True,
        "layer_norm_type": "rms", "rms_norm_eps": 1e-05, "layer_norm_with_affine": True,
        "attention_layer_norm": False, "include_bias": False, "include_qkv_bias": False,
        "bias_for_layer_norm": False, "input_emb_norm": False, "scale_logits": False,
        "weight_tying": False, "flash_attention": False, "init_fn": "mitchell", "use_cache": False,
    }  # fmt: skip
    want = dataclasses.replace(transformer.PRESETS["llada-8b"], vocab=126464, remat="none")
    assert llada_keys.config_from_hf(published) == want
    bare = {k: v for k, v in published.items() if k not in ("n_kv_heads", "mlp_hidden_size")}
    assert llada_keys.config_from_hf(bare).n_kv_heads == 32
    assert llada_keys.config_from_hf(bare).d_mlp == 4 * 4096
    assert llada_keys.config_from_hf(bare | {"multi_query_attention": True}).n_kv_heads == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alibi", True), ("rope", False), ("include_bias", True), ("include_qkv_bias", True),
        ("bias_for_layer_norm", True), ("block_type", "sequential"), ("activation_type", "swiglu"),
        ("layer_norm_type", "default"), ("scale_logits", True),
        ("input_emb_norm", True), ("attention_layer_norm", True), ("block_group_size", 4),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"\(1 problems\): {field} is {value!r}, only .* is implemented"):
        llada_keys.config_from_hf(VALUES | {field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_model", None, "d_model is missing"), ("d_model", 96.0, "d_model is 96.0"),
        ("d_model", "96", "d_model is '96', it must be a positive int"),
        ("n_heads", 0, "n_heads is 0"), ("n_heads", True, "n_heads is True"),
        ("n_kv_heads", 0, "n_kv_heads is 0"), ("n_layers", "2", "n_layers is '2'"),
        ("rope_theta", "x", "rope_theta is 'x', it must be a positive float"),
        ("codebook_size", -5, "codebook_size is -5"), ("codebook_size", "64", "codebook_size is '64'"),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_kind_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        llada_keys.config_from_hf(VALUES | {field: value})


def test_all_that_is_wrong_with_a_config_is_one_error():
    values = {"model_type": "llada", "n_layers": 1, "n_heads": 1, "mlp_ratio": 4, "alibi": True}
    wrong = r"\(3 problems\): alibi is True.*; d_model is missing; embedding_size or vocab_size is missing"
    with pytest.raises(ValueError, match=wrong):
        llada_keys.config_from_hf(values)
    with pytest.raises(ValueError, match="model_type 'llama'; known: llada, mmada"):
        llada_keys.config_from_hf(VALUES | {"model_type": "llama"})
