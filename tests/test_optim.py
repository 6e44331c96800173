"""Learning rate, AdamW, Muon, clipping, and the guard around them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmada_jax.nets import transformer, vq
from mmada_jax.train import optim

CONFIG = transformer.ModelConfig(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_mlp=32, vocab=64, max_len=16, dtype="float32"
)


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_cosine_rises_falls_and_ends_at_its_floor(floor):
    factor = np.array([optim.cosine_factor(step, 100, 10, floor) for step in range(0, 131)])
    assert factor[0] == 0
    assert factor[10] == 1
    np.testing.assert_allclose(factor[5], 0.5)
    np.testing.assert_allclose(factor[55], floor + (1 - floor) / 2, rtol=1e-5)
    np.testing.assert_allclose(factor[100:], floor, atol=1e-6)
    assert (np.diff(factor[10:]) <= 1e-7).all()


def test_without_warm_up_the_first_step_is_whole():
    assert optim.cosine_factor(0, 10, 0) == 1


def test_adamw_is_that_of_the_textbook():
    config = optim.OptimConfig(lr=0.1, warmup=0, floor=1.0, b1=0.8, b2=0.9, weight_decay=0.1, clip=0)
    optimizer = optim.make(config, 10)
    params = {"w": jnp.array([1.0, -2.0])}
    opt_state = optimizer.init(params)
    w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for t, g in enumerate(np.array([[0.5, 1.0], [-1.0, 3.0]]), 1):
        updates, opt_state = optimizer.update({"w": jnp.asarray(g, jnp.float32)}, opt_state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        w = w - 0.1 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8) + 0.1 * w)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    config = optim.OptimConfig(lr=1.0, warmup=0, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, clip=1.0)
    update = optim.make(config, 10).update
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    updates, _ = update(grads, optim.make(config, 10).init(params), params)
    # With b1 = b2 = 0 and eps = 1 the update is g / (|g| + 1), of g clipped to norm 1.
    np.testing.assert_allclose([-updates["a"][0], -updates["b"][0]], [0.6 / 1.6, 0.8 / 1.8], rtol=1e-5)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: transformer.init_params(jax.random.key(0), CONFIG))()


def test_muon_orthogonalises_every_matrix_of_the_blocks_and_adamw_does_the_rest(params):
    config = optim.OptimConfig(name="muon", lr=1.0, warmup=0, weight_decay=0.0, clip=0)
    optimizer = optim.make(config, 10)
    rng = np.random.default_rng(0)
    merged = {"q_DHK": (16, 16), "o_HKD": (16, 16), "gate_DF": (16, 32), "down_FD": (32, 16)}

    def gradient(path, x):
        if path[-1].key not in merged:
            return jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        # Singular values from 1 to 5.
        u, _, v = np.linalg.svd(rng.normal(size=(2, *merged[path[-1].key])), full_matrices=False)
        return jnp.asarray(((u * np.linspace(1, 5, 16)) @ v).reshape(x.shape), jnp.float32)

    grads = jax.tree.map_with_path(gradient, params)
    updates, _ = jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params), params)
    for name, shape in merged.items():
        for layer in np.asarray(updates["blocks"][name]).reshape(2, *shape):
            s = np.linalg.svd(layer, compute_uv=False)
            # Newton-Schulz brings singular values near 1, times 0.2 sqrt(max(fan in, fan out)).
            assert s.max() < 1.4 * 0.2 * max(shape) ** 0.5, name
            assert s.min() > 0.4 * 0.2 * max(shape) ** 0.5, name
    for name in ("embed_VD", "head_DV", "norm_D"):  # AdamW's first update is the sign, with Nesterov
        np.testing.assert_allclose(np.abs(updates[name]), 1 + 0.9 / 1.9, rtol=1e-3)


def test_muon_orthogonalises_the_convolutions_within_an_image_tokenizer():
    shapes = jax.eval_shape(lambda: vq.init_params(jax.random.key(0), vq.PRESETS["digits"]))["encoder"]
    shapes = {name: shapes[name] for name in ("conv_in_w", "conv_out_w", "conv_in_b", "mid_block_1")}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
    optimizer = optim.make(optim.OptimConfig(name="muon", lr=1.0, warmup=0, weight_decay=0.0, clip=0), 10)
    updates, _ = jax.jit(optimizer.update)(params, jax.jit(optimizer.init)(params), params)
    for name, update in updates["mid_block_1"].items():
        if name.endswith("_w"):
            s = np.linalg.svd(np.asarray(update).reshape(-1, update.shape[-1]), compute_uv=False)
            size = 0.2 * max(update.size // update.shape[-1], update.shape[-1]) ** 0.5
            assert 0.4 * size < s.min() and s.max() < 1.4 * size, name
    for name in ("conv_in_w", "conv_out_w", "conv_in_b"):
        np.testing.assert_allclose(np.abs(updates[name]), 1 + 0.9 / 1.9, rtol=1e-3)


def test_eps_reaches_the_params_that_muon_leaves_to_adamw(params):
    updates = []
    for eps in (1e-8, 1.0):
        optimizer = optim.make(optim.OptimConfig(name="muon", lr=1.0, warmup=0, eps=eps, clip=0), 10)
        update = jax.jit(optimizer.update)
        updates.append(update(params, jax.jit(optimizer.init)(params), params)[0]["embed_VD"])
    assert np.abs(updates[1]).max() < 0.9 * np.abs(updates[0]).max()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_rest_in_the_dtype_that_is_asked_for(params, name):
    config = optim.OptimConfig(name=name, moments="bfloat16")
    shapes = jax.eval_shape(optim.make(config, 10).init, params)
    assert np.dtype(jnp.bfloat16) in {x.dtype for x in jax.tree.leaves(shapes)}
    config = dataclasses.replace(config, moments="float32")
    shapes = jax.eval_shape(optim.make(config, 10).init, params)
    assert np.dtype(jnp.bfloat16) not in {x.dtype for x in jax.tree.leaves(shapes)}


# ---- The guard -------------------------------------------------------------------------------------


def run(config, norms):
    """The optimizer on gradients of these norms; yields (params before, after, state before, after)."""
    optimizer = optim.make(config, 1000)
    params = {"w": jnp.array([3.0, -0.0]), "b": jnp.ones((2, 2))}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for norm in norms:
        grads = {"w": jnp.array([norm, 0]), "b": jnp.zeros((2, 2))}
        updates, new_state = update(grads, state, params)
        new_params = optax.apply_updates(params, updates)
        yield params, new_params, state, new_state
        params, state = new_params, new_state


def same_bits(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad):
    config = optim.OptimConfig(warmup=0, lr=0.1)
    first, second, third = run(config, [1.0, bad, 1.0])
    before, after, state, new_state = second
    assert same_bits(before, after)
    assert same_bits(state.inner, new_state.inner)
    assert [int(optim.skipped(s)) for *_, s in (first, second, third)] == [0, 1, 1]
    assert [int(s.streak) for *_, s in (first, second, third)] == [0, 1, 0]
    assert not same_bits(third[0], third[1])


def test_a_spike_is_skipped_once_there_is_a_mean_to_compare_it_with():
    config = optim.OptimConfig(warmup=0, lr=0.1, spike=3.0, spike_window=4)
    norms = [1.0, 50.0, 1.0, 1.0, 1.0, 100.0, 1.0, 9.0, 100.0]
    steps = list(run(config, norms))
    # Mean of the first four: 13.25. Then it moves a quarter of the way: 10.2, 7.9, 8.2.
    assert [same_bits(a, b) for a, b, *_ in steps] == [norm == 100 for norm in norms]
    means = [float(s.mean_norm) for *_, s in steps]
    np.testing.assert_allclose(means[3:6], [53 / 4, 53 / 4 + (1 - 53 / 4) / 4, means[4]], rtol=1e-6)
    assert int(steps[-1][-1].accepted) == 7
    assert not any(same_bits(a, b) for a, b, *_ in run(optim.OptimConfig(warmup=0, lr=0.1), norms))


def test_a_run_ends_after_so_many_in_a_row():
    config = optim.OptimConfig(max_skipped=3)
    *_, (*_, two) = run(config, [1.0, np.nan, 1.0, np.nan, np.nan])
    assert optim.check_streak(config, two, lambda accepted: 7) == 2
    *_, (*_, three) = run(config, [1.0, np.nan, 1.0] + [np.nan] * 3)
    with pytest.raises(FloatingPointError, match=r"^3 updates .* 4 in all: .*finite; .*run resumes at 2\."):
        optim.check_streak(config, three, lambda accepted: f"resumes at {accepted}")
    *_, (*_, later) = run(config, [1.0] + [np.nan] * 3 + [1.0, 1.0])
    with pytest.raises(FloatingPointError, match=r"^3 updates in a row were skipped"):
        optim.check_streak(config, later, lambda accepted: "")
    with pytest.raises(FloatingPointError, match=r"than 9 times the usual; "):
        optim.check_streak(dataclasses.replace(config, spike=9.0), three, lambda accepted: "")


def test_the_learning_rate_is_that_of_the_update():
    config = optim.OptimConfig(lr=2.0, warmup=10, b1=0, b2=0, eps=1e-30, weight_decay=0, clip=0)
    for before, after, _, state in run(config, [1.0, 1.0, np.nan, 1.0]):
        if int(state.streak) == 0:  # Adam without memory takes the sign of the gradient
            step = float(before["w"][0] - after["w"][0])
            np.testing.assert_allclose(step, optim.learning_rate(config, 1000, state), atol=1e-6)
    assert optim.learning_rate(config, 1000, state) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"spike": 0.5}, "spike is 0.5"), ({"spike_window": 0}, "window is 0"), ({"max_skipped": 0}, "is 0")],
)
def test_settings_of_the_guard_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        optim.OptimConfig(**change)
