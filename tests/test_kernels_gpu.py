"""The GPU's attention kernels: interpreted against the plain reference, and lowered for CUDA."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.kernels import gpu, reference

VALIDITY = {
    "all": lambda b, t, T: t >= 0,
    "left padding": lambda b, t, T: t >= b + T // 3,
    "right padding": lambda b, t, T: t < T - b - T // 3,
    "holes": lambda b, t, T: (t + b) % 3 != 0,
    "a long hole": lambda b, t, T: (t < 2) | (t >= T - 1 - b),
    "one key": lambda b, t, T: t == T // 2 + b,
    "an empty row": lambda b, t, T: (t >= 0) & (b == 0),
}


def validity(name, B, T):
    b, t = np.arange(B)[:, None], np.arange(T)[None]
    return np.broadcast_to(VALIDITY[name](b, t, T), (B, T))


def inputs(B=2, S=7, T=7, H=4, G=2, K=8, dtype=np.float32):
    """q, k, v and a cotangent of the result."""
    rng = np.random.default_rng(0)
    shapes = (B, S, H, K), (B, T, G, K), (B, T, G, K), (B, S, H, K)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def with_gradients(attention, q, k, v, dout, valid):
    out, pull = jax.vjp(lambda *x: attention(*x, valid), q, k, v)
    return out, *pull(dout)


def plain(q, k, v, valid):
    """The reference; in a row without valid keys no query counts either."""
    q_valid = jnp.broadcast_to(jnp.any(valid, axis=1, keepdims=True), q.shape[:2])
    v_BTM = v.reshape(*v.shape[:2], -1)
    out_BSM = reference.attention(jnp.moveaxis(q, 1, 2), jnp.moveaxis(k, 1, 2), v_BTM, q_valid, valid)
    return out_BSM.reshape(q.shape)


kernels = jax.jit(functools.partial(with_gradients, functools.partial(gpu.attention, interpret=True)))
expected = jax.jit(functools.partial(with_gradients, plain))


def check_float32(q, k, v, dout, valid):
    """Result and gradients agree; what isn't valid gets a gradient of exactly zero."""
    (out, *grads), (ref, *ref_grads) = (f(q, k, v, dout, valid) for f in (kernels, expected))
    np.testing.assert_allclose(out, ref, atol=2e-6)
    for grad, ref_grad in zip(grads, ref_grads, strict=True):
        np.testing.assert_allclose(grad, ref_grad, atol=1e-5 * max(1, np.abs(ref_grad).max()))
    for grad in grads[1:]:
        assert not np.any(np.asarray(grad)[~valid])
    empty = ~valid.any(axis=1)
    assert not np.any(np.asarray(out)[empty]) and not np.any(np.asarray(grads[0])[empty])


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("mask", VALIDITY)
def test_masks_and_heads(mask, heads):
    check_float32(*inputs(H=heads[0], G=heads[1]), validity(mask, 2, 7))


@pytest.mark.parametrize("mask", VALIDITY)
@pytest.mark.parametrize("lengths", [(1, 1), (129, 17), (3, 129), (387, 387)])
def test_lengths_that_no_block_divides(lengths, mask):
    S, T = lengths
    check_float32(*inputs(S=S, T=T, H=2, G=1, K=16), validity(mask, 2, T))


@pytest.mark.parametrize("mask", VALIDITY)
def test_few_queries_with_the_keys_in_parts(mask):
    S, T = 5, 1539
    assert gpu.count_parts(S, T, programs=2) > 4
    check_float32(*inputs(S=S, T=T, H=2, G=1, K=4), validity(mask, 2, T))


def test_keys_are_split_only_where_programs_are_few():
    assert gpu.count_parts(32, 4096, programs=8) == 16
    assert gpu.count_parts(32, 4096, programs=128) == 2
    assert gpu.count_parts(128, 4096, programs=256) == 1
    assert gpu.count_parts(128, 300, programs=1) == 1
    assert gpu.count_parts(1539, 1539, programs=8) == 1


@pytest.mark.parametrize("shape", [{}, {"B": 1, "S": 3, "T": 600, "G": 1}])
def test_what_is_not_valid_has_no_influence_even_if_it_is_huge(shape):
    q, k, v, dout = inputs(**shape)
    valid = validity("holes", *k.shape[:2])
    huge = [jnp.where(valid[:, :, None, None], x, x * np.float32(1e4)) for x in (k, v)]
    for result, same in zip(kernels(q, *huge, dout, valid), kernels(q, k, v, dout, valid), strict=True):
        np.testing.assert_array_equal(result, same)


@pytest.mark.parametrize("shape", [{"S": 33, "T": 33}, {"B": 1, "S": 9, "T": 600, "H": 2, "G": 1}])
def test_bfloat16(shape):
    x = inputs(K=32, dtype=jnp.bfloat16, **shape)
    valid = validity("left padding", *x[1].shape[:2])
    results = kernels(*x, valid)
    assert all(result.dtype == jnp.bfloat16 for result in results)
    out, *grads = (np.asarray(result, np.float64) for result in results)
    ref, *ref_grads = (
        np.asarray(y, np.float64) for y in expected(*(y.astype(np.float32) for y in x), valid)
    )
    # A rounding to bfloat16 is off by 2^-9 at most. The result has two: of the probabilities, whose sum
    # is one, and its own. The gradients have up to four: of the result that delta is computed from, of
    # the probabilities or of the scores' gradients, and their own.
    assert np.abs(out - ref).max() < 2 * 2.0**-9 * np.abs(np.asarray(x[2], np.float64)).max()
    for grad, ref_grad in zip(grads, ref_grads, strict=True):
        assert np.linalg.norm(grad - ref_grad) < 4 * 2.0**-9 * np.linalg.norm(ref_grad)


def test_errors():
    q, k, v, _ = inputs()
    valid = validity("all", 2, 7)
    with pytest.raises(ValueError, match=r"G a divisor of H .* not \(2, 7, 2, 8\)"):
        gpu.attention(q[:, :, :3], k, v, valid)
    with pytest.raises(ValueError, match=r"\(2, 7, 2, 8\) and \(2, 6\)"):
        gpu.attention(q, k, v, valid[:, 1:])
    with pytest.raises(ValueError, match="cast q bfloat16, k float32"):
        gpu.attention(q.astype(jnp.bfloat16), k, v, valid)
    with pytest.raises(ValueError, match="head width K = 264 is over 256"):
        gpu.attention(*(jnp.tile(x, 33) for x in (q, k, v)), valid)


@pytest.mark.parametrize("table", [gpu.FORWARD_BLOCKS, gpu.BACKWARD_BLOCKS, gpu.FLOAT32_BLOCKS])
def test_blocks_fit_the_shared_memory_of_an_a100(table):
    size = 4 if table is gpu.FLOAT32_BLOCKS else 2
    held = 1 if table is gpu.FORWARD_BLOCKS else 2
    for K, blocks in table.items():
        for fixed, streamed in [(blocks.lines, blocks.keys), (blocks.keys, blocks.lines)][:held]:
            heads = held * fixed + 2 * blocks.stages * streamed
            assert heads * K * size <= 163 * 1024


def lower_for_cuda(f, B, S, T, H, G, K):
    shapes = (B, S, H, K), (B, T, G, K), (B, T, G, K), (B, S, H, K)
    x = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    valid = jax.ShapeDtypeStruct((B, T), jnp.bool_)
    return jax.jit(f).trace(*x, valid).lower(lowering_platforms=("cuda",)).as_text()


def count_triton_calls(text):
    return len(re.findall(r"custom_call @\S*triton", text))


@pytest.mark.parametrize("G", [32, 8])
@pytest.mark.parametrize("length", [1539, 387])
def test_lowers_to_triton_without_a_matrix_of_scores(length, G):
    shape = dict(B=4, S=length, T=length, H=32, G=G, K=128)
    text = lower_for_cuda(lambda q, k, v, _, valid: gpu.attention(q, k, v, valid), **shape)
    assert count_triton_calls(text) == 1
    text = lower_for_cuda(functools.partial(with_gradients, gpu.attention), **shape)
    assert count_triton_calls(text) == 3
    assert f"{length}x{length}x" not in text


def test_few_queries_lower_to_triton():
    text = lower_for_cuda(
        lambda q, k, v, _, valid: gpu.attention(q, k, v, valid), B=1, S=32, T=4096, H=32, G=8, K=128
    )
    assert count_triton_calls(text) == 1
    assert "tensor<16x1x32x8x4x128xf32>" in text  # sixteen parts
