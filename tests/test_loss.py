import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.devices import sharding
from mmada_jax.diffusion import loss

B, L, D, V = 2, 11, 6, 13
RNG = np.random.default_rng(0)
H = RNG.standard_normal((B, L, D)).astype(np.float32)
HEAD = RNG.standard_normal((D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, L), dtype=np.int32)
WEIGHTS = RNG.exponential(size=(B, L)).astype(np.float32)
ALL = np.ones((B, L), bool)
HALF = WEIGHTS * (np.arange(L)[None] % 2)
CHUNKS = [None, 1, 3, 4, 10, 11, 22, 50]


def log_probs(h, head, targets):
    """log softmax at the targets, float64."""
    logits = np.asarray(h, np.float64) @ np.asarray(head, np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.take_along_axis(logp, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_log_probs(chunk):
    ours = loss.token_log_probs(H, HEAD, TARGETS, ALL, chunk)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, log_probs(H, HEAD, TARGETS), atol=1e-5)


def test_token_log_probs_are_zero_where_they_are_not_wanted():
    wanted = HALF > 0
    ours = loss.token_log_probs(H, HEAD, TARGETS, wanted, 4)
    expected = np.where(wanted, log_probs(H, HEAD, TARGETS), 0)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@functools.partial(jax.jit, static_argnums=3)
def value_and_grad(h, head, weights, chunk):
    def total(h, head):
        return loss.weighted_nll(h, head, TARGETS, weights, chunk)

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(h, head)


@pytest.mark.parametrize("weights", [WEIGHTS, HALF, 0 * WEIGHTS, WEIGHTS * (np.arange(L) == 3)])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_value_and_gradient(weights, chunk):
    (value, each_B), (grad_h, grad_head) = value_and_grad(H, HEAD, weights, chunk)
    expected_B = -(weights * log_probs(H, HEAD, TARGETS)).sum(axis=1)
    np.testing.assert_allclose(value, expected_B.sum(), rtol=1e-6)
    np.testing.assert_allclose(each_B, expected_B, rtol=1e-6)
    logits = H.astype(np.float64) @ HEAD
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    error = weights[..., None] * (p - np.eye(V)[TARGETS])
    np.testing.assert_allclose(grad_h, error @ HEAD.T, atol=1e-5)
    np.testing.assert_allclose(grad_head, np.einsum("BLD,BLV->DV", H, error), atol=1e-5)


def test_no_row_is_lost_however_the_weights_lie():
    # The loop ends where the positions that count do: in the first chunk, the last, or nowhere.
    for seed in range(20):
        rng = np.random.default_rng(seed)
        weights = WEIGHTS * (rng.random((B, L)) < rng.random())
        (value, _), _ = value_and_grad(H, HEAD, weights, 4)
        expected = -(weights * log_probs(H, HEAD, TARGETS)).sum()
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_scales_with_what_follows():
    grad = jax.grad(lambda h: 3 * loss.weighted_nll(h, HEAD, TARGETS, WEIGHTS, 4)[0])(H)
    once = jax.grad(lambda h: loss.weighted_nll(h, HEAD, TARGETS, WEIGHTS, 4)[0])(H)
    np.testing.assert_allclose(grad, 3 * once, rtol=1e-6)


def test_the_loss_is_blind_where_the_weight_is_zero():
    run = jax.jit(lambda h, t: loss.weighted_nll(h, HEAD, t, HALF, 4)[1])
    silent = HALF == 0
    other = np.where(silent[..., None], H + 1, H), np.where(silent, (TARGETS + 1) % V, TARGETS)
    np.testing.assert_array_equal(run(*other), run(H, TARGETS))


def test_half_precision_logits_are_summed_in_float32():
    h, head = jnp.zeros((1, 1, 2), jnp.bfloat16), jnp.zeros((2, 4099), jnp.float32)
    targets = jnp.zeros((1, 1), jnp.int32)
    ours = loss.token_log_probs(h, head, targets, jnp.ones((1, 1), bool))
    np.testing.assert_allclose(ours, -np.log(4099), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize("chunk", [None, 5])
def test_split_over_devices(sizes, chunk):
    rng = np.random.default_rng(1)
    h = rng.standard_normal((8, 9, 16)).astype(np.float32)
    head = rng.standard_normal((16, 24)).astype(np.float32)
    targets = rng.integers(0, 24, (8, 9), dtype=np.int32)
    # Devices have unequally many positions that count, one of them none.
    weights = (rng.random((8, 9)) * (np.arange(9) < np.arange(8)[:, None])).astype(np.float32)

    def run(h, head, targets, weights):
        f = functools.partial(loss.weighted_nll, chunk=chunk)
        return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(h, head, targets, weights)

    want = jax.jit(run)(h, head, targets, weights)
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        rows = sharding.batch_sharding(mesh)
        at_rest = jax.NamedSharding(mesh, sharding.REST.spec("embed", "vocab"))
        got = jax.jit(run, in_shardings=(rows, at_rest, rows, rows))(h, head, targets, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
