import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.nets import rope, transformer

TINY = transformer.ModelConfig(
    d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_mlp=24, vocab=40, dtype="float32"
)
B, L = 3, 6
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab, (B, L), dtype=np.int32)
VALID = np.arange(L)[None] >= np.array([[0], [2], [L]])  # no, two and only pads


init = jax.jit(transformer.init_params, static_argnums=1)


@pytest.fixture(scope="module")
def params():
    return init(jax.random.key(0), TINY)


@functools.partial(jax.jit, static_argnums=1)
def hidden(params, config, tokens, valid, positions=None):
    return transformer.hidden_states(params, config, tokens, valid, positions)


def influence(params, tokens, valid):
    """|gradient| of every output position with respect to every input embedding, [B, L, L]."""
    # Each position reads a row of the table of its own, so a row's gradient is that of one input.
    own = np.arange(tokens.size, dtype=np.int32).reshape(tokens.shape)
    config = dataclasses.replace(TINY, vocab=tokens.size)
    table = params["embed_VD"][tokens].reshape(tokens.size, -1)

    def outputs(table):
        swapped = params | {"embed_VD": table, "head_DV": jnp.zeros(table.shape[::-1])}
        return transformer.hidden_states(swapped, config, own, valid)

    @jax.jit
    def gradient(table, cotangent):
        return jax.vjp(outputs, table)[1](cotangent)[0]

    # One position at a time: jit(jacrev(...)) of x * sum(x) is wrong on CPUs with jaxlib 0.10.2.
    weights = np.random.default_rng(1).standard_normal(TINY.d_model).astype(np.float32)
    seen = np.zeros((tokens.size, tokens.size))
    for position in range(tokens.size):
        cotangent = np.zeros((tokens.size, TINY.d_model), np.float32)
        cotangent[position] = weights
        seen[position] = np.abs(gradient(table, cotangent.reshape(*tokens.shape, -1))).sum(axis=1)
    return seen.reshape(*tokens.shape, *tokens.shape)


def test_every_valid_position_sees_every_valid_one_of_its_row_and_nothing_else(params):
    seen = influence(params, TOKENS, VALID) > 0
    expected = np.zeros(seen.shape, bool)
    for b in range(B):
        expected[b, :, b] = VALID[b][:, None] & VALID[b][None]
        # A pad's own residual stream goes on; it gets nothing from others and gives nothing.
        expected[b, :, b] |= np.diag(~VALID[b])
    np.testing.assert_array_equal(seen, expected)


def test_pads_change_nothing(params):
    other = np.where(VALID, TOKENS, (TOKENS + 1) % TINY.vocab)
    h, h_other = hidden(params, TINY, TOKENS, VALID), hidden(params, TINY, other, VALID)
    np.testing.assert_array_equal(np.asarray(h)[VALID], np.asarray(h_other)[VALID])
    assert np.isfinite(h).all()


def test_left_padding_is_invisible(params):
    # RoPE is relative: shifting a row to the right, behind padding, changes only rounding.
    row, pads = TOKENS[:1], 4
    padded = np.pad(row, ((0, 0), (pads, 0)))
    valid = np.arange(L + pads)[None] >= pads
    h = hidden(params, TINY, padded, valid)[:, pads:]
    plain = hidden(params, TINY, row, np.ones(row.shape, bool))
    np.testing.assert_allclose(h, plain, atol=1e-4)


def test_positions_are_those_of_the_row_by_default(params):
    positions = np.tile(np.arange(L), (B, 1))
    explicit = hidden(params, TINY, TOKENS, VALID, positions)
    np.testing.assert_array_equal(explicit, hidden(params, TINY, TOKENS, VALID))
    spread = hidden(params, TINY, TOKENS, VALID, positions * 2)
    assert np.abs(spread - explicit)[VALID].max() > 1e-3


@functools.partial(jax.jit, static_argnums=1)
@jax.value_and_grad
def loss_and_gradients(params, config):
    h = transformer.hidden_states(params, config, TOKENS, VALID)
    logits = transformer.unembed(params, config, h)
    return jnp.mean(jnp.square(logits) * VALID[..., None].astype(np.float32))


CHANGES = [
    {"remat": "full"},
    {"remat": "attention+middle+qkv+mlp"},
    {"remat": "middle+mlp", "attention": "tpu"},
    {"unroll": 3},
    {"attention": "xla"},
]


@pytest.mark.parametrize("change", CHANGES)
def test_remat_unrolling_and_attention_change_nothing(params, change):
    value, grads = loss_and_gradients(params, TINY)
    other_value, other_grads = loss_and_gradients(params, dataclasses.replace(TINY, **change))
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        if "attention" in change:  # sums in another order, as near as test_attention.py asks of gradients
            assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)
        else:
            np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(a).max()) + 1e-7)
        assert np.isfinite(a).all() and np.any(a)


def test_an_embedding_is_used_as_often_as_its_token_is_valid(params):
    # A gradient reaches the rows of tokens that stand somewhere valid, and no other row.
    def loss(table):
        h = transformer.hidden_states(params | {"embed_VD": table}, TINY, TOKENS, VALID)
        return jnp.sum(jnp.square(h) * jnp.arange(16.0)[None, None] * VALID[..., None].astype(np.float32))

    grads = jax.jit(jax.grad(loss))(params["embed_VD"])
    used = np.isin(np.arange(TINY.vocab), TOKENS[VALID])
    np.testing.assert_array_equal(np.any(grads, axis=1), used)


def test_unembed_slices_the_vocabulary(params):
    h = np.random.default_rng(1).standard_normal((2, 5, TINY.d_model), np.float32)
    logits = transformer.unembed(params, TINY, h)
    np.testing.assert_allclose(logits, h @ np.asarray(params["head_DV"]), atol=1e-5)
    part = transformer.unembed(params, TINY, h, first=7, size=9)
    np.testing.assert_allclose(part, logits[..., 7:16], atol=1e-6)


def test_parameter_count_of_the_published_model():
    config = transformer.PRESETS["llada-8b"]
    assert transformer.param_count(config) == 8_082_690_048
    assert transformer.param_count(dataclasses.replace(config, vocab=126464)) == 8_015_581_184


@pytest.mark.parametrize("config", [TINY, *transformer.PRESETS.values()])
def test_axes_have_the_shape_of_the_parameters(config):
    shapes, axes = transformer.param_shapes(config), transformer.param_axes(config)
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    assert jax.tree.structure(axes, is_leaf=is_axes) == jax.tree.structure(shapes)
    jax.tree.map(lambda a, s: pytest.fail(f"{a} {s}") if len(a) != s.ndim else None,
                 axes, shapes, is_leaf=is_axes)  # fmt: skip
    assert {s.dtype for s in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_initial_scales():
    config = dataclasses.replace(TINY, d_model=64, d_mlp=128, n_layers=4, vocab=256)
    params = init(jax.random.key(3), config)
    blocks, truncated = params["blocks"], 0.98658  # std of a unit normal cut at 3 deviations
    width, depth = 64**-0.5, (2 * np.arange(1, 5)) ** -0.5
    expected = {
        "q_DHK": width, "k_DGK": width, "v_DGK": width, "gate_DF": width, "up_DF": width,
        "o_HKD": width * depth, "down_FD": 128**-0.5 * depth,
    }  # fmt: skip
    for name, std in expected.items():
        w = np.asarray(blocks[name])
        measured = w.std(axis=(*range(1, w.ndim),))
        # At least 2048 draws a layer: the deviation of the measured one is below 1.6%.
        np.testing.assert_allclose(measured, np.broadcast_to(std, 4) * truncated, rtol=0.08)
        assert (np.abs(w) <= 3.001 * np.reshape(np.broadcast_to(std, 4), (4, *[1] * (w.ndim - 1)))).all()
    for name in ("embed_VD", "head_DV"):
        np.testing.assert_allclose(np.std(params[name]), width * truncated, rtol=0.08)
    for w in (params["norm_D"], blocks["attn_norm_D"], blocks["mlp_norm_D"]):
        assert np.all(np.asarray(w) == 1)


def test_layers_differ_at_the_start(params):
    w = np.asarray(params["blocks"]["q_DHK"])
    assert np.abs(w[0] - w[1]).max() > 0.1


def test_rms_norm():
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((2, 3, 8)) * 5, rng.standard_normal(8)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 0.1) * scale
    ours = transformer.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 0.1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_is_computed_in_float32():
    x = jnp.full((1, 4096), 300, jnp.bfloat16)  # the sum of squares has no room in 8 bits
    norm = transformer.rms_norm(x, jnp.ones(4096), 1e-5)
    assert norm.dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm.astype(jnp.float32), 1)


def test_rope_turns_pairs_of_halves():
    rng = np.random.default_rng(0)
    x, positions, theta = rng.standard_normal((2, 3, 5, 8)), rng.integers(0, 99, (2, 5)), 100.0
    z = x[..., :4] + 1j * x[..., 4:]
    angle = positions[..., None] * theta ** (-2 * np.arange(4) / 8)
    turned = z * np.exp(1j * angle)[:, None]
    table = (x[positions][:, None] for x in rope.rope_table(99, 8, theta))
    ours = rope.rope(jnp.asarray(x, jnp.float32), *table)
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], -1), atol=5e-5)


def test_bfloat16_is_near_float32(params):
    config = dataclasses.replace(TINY, dtype="bfloat16")
    h16, h32 = hidden(params, config, TOKENS, VALID), hidden(params, TINY, TOKENS, VALID)
    assert h16.dtype == jnp.bfloat16 and h32.dtype == jnp.float32
    difference = (np.asarray(h16, np.float32) - np.asarray(h32))[VALID]
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.05  # outputs have an rms of 1
    assert transformer.unembed(params, config, h16).dtype == jnp.float32
    _, grads = loss_and_gradients(params, config)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 3}, "d_model=16 must divide by n_heads=3"),
        ({"n_kv_heads": 3}, "by n_kv_heads=3"),
        ({"n_heads": 16, "n_kv_heads": 16}, "even head width, not 1"),
    ],
)
def test_impossible_shapes_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_what_is_kept_is_not_computed_again(params):
    def products(remat):
        config = dataclasses.replace(TINY, remat=remat)
        return str(
            jax.make_jaxpr(jax.grad(lambda p: jnp.sum(hidden(p, config, TOKENS, VALID))))(params)
        ).count("dot_general")

    nothing_again = products("none")
    # Scores; the output of attention; the product after it; gate and up, one product on a CPU; q, k and v,
    # another one.
    assert products("attention+middle+qkv+mlp") == nothing_again + 1
    assert products("middle+qkv+mlp") == nothing_again + 2
    assert products("attention+qkv+mlp") == nothing_again + 2
    assert products("qkv+mlp") == nothing_again + 3
    assert products("qkv") == nothing_again + 4
    assert products("full") == nothing_again + 5


def test_unknown_names_of_what_is_kept_are_an_error():
    with pytest.raises(ValueError, match="remat 'qvk' names qvk; it must be 'none', 'full', or some of"):
        dataclasses.replace(TINY, remat="qvk")
