import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax import loss

B, L, D, V = 2, 11, 6, 13
RNG = np.random.default_rng(0)
H = RNG.standard_normal((B, L, D)).astype(np.float32)
HEAD = RNG.standard_normal((D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, L), dtype=np.int32)
WEIGHTS = RNG.exponential(size=(B, L)).astype(np.float32)


def log_probs(h, head, targets):
    """log softmax at the targets, float64."""
    logits = np.asarray(h, np.float64) @ np.asarray(head, np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.take_along_axis(logp, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [None, 1, 3, 4, 10, 11, 50])
def test_token_log_probs(chunk):
    ours = loss.token_log_probs(lambda h: h @ HEAD, H, TARGETS, chunk)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, log_probs(H, HEAD, TARGETS), atol=1e-5)


@functools.partial(jax.jit, static_argnums=2)
def value_and_grad(h, head, chunk):
    def total(h, head):
        return loss.weighted_nll(lambda h: h @ head, h, TARGETS, WEIGHTS, chunk).sum()

    return jax.value_and_grad(total, argnums=(0, 1))(h, head)


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 50])
def test_chunks_change_neither_value_nor_gradient(chunk):
    value, grads = value_and_grad(H, HEAD, None)
    other, other_grads = value_and_grad(H, HEAD, chunk)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for a, b in zip(grads, other_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_gradient_is_weight_times_probability_minus_target():
    _, (grad_h, grad_head) = value_and_grad(H, HEAD, 4)
    logits = H.astype(np.float64) @ HEAD
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    error = WEIGHTS[..., None] * (p - np.eye(V)[TARGETS])
    np.testing.assert_allclose(grad_h, error @ HEAD.T, atol=1e-5)
    np.testing.assert_allclose(grad_head, np.einsum("BLD,BLV->DV", H, error), atol=1e-5)


def test_the_loss_is_per_row_and_blind_where_the_weight_is_zero():
    weights = WEIGHTS * (np.arange(L)[None] % 2)
    run = jax.jit(lambda h, t: loss.weighted_nll(lambda h: h @ HEAD, h, t, weights, 4))
    expected = -(weights * log_probs(H, HEAD, TARGETS)).sum(axis=1)
    np.testing.assert_allclose(run(H, TARGETS), expected, rtol=1e-5)
    silent = weights == 0
    other = np.where(silent[..., None], H + 1, H), np.where(silent, (TARGETS + 1) % V, TARGETS)
    np.testing.assert_array_equal(run(*other), run(H, TARGETS))


def test_half_precision_logits_are_summed_in_float32():
    h, head = jnp.zeros((1, 1, 2), jnp.bfloat16), jnp.zeros((2, 4099), jnp.bfloat16)
    ours = loss.token_log_probs(lambda h: h @ head, h, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(ours, -np.log(4099), rtol=1e-6)
