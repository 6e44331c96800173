"""Every implementation of attention against a dense softmax in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.kernels import reference, tpu
from mmada_jax.kernels.attention import attention


def dense(q, k, v, q_valid, valid, soft=False):
    """softmax(q k^T / sqrt(K)) v over the valid keys, head by head, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, H, S, K = q.shape
    v = v.reshape(B, -1, k.shape[1], K)
    out = np.zeros((B, S, H, K))
    for b, h in np.ndindex(q.shape[:2]):
        g = h // (q.shape[1] // k.shape[1])
        scores = q[b, h] @ k[b, g].T / np.sqrt(q.shape[3])
        pair = q_valid[b][:, None] & valid[b][None]
        scores = scores + pair if soft else np.where(pair, scores, -np.inf)
        rows = np.ones(len(scores), bool) if soft else pair.any(axis=1)
        p = np.exp(scores[rows] - scores[rows].max(axis=1, keepdims=True))
        out[b, rows, h] = p / p.sum(axis=1, keepdims=True) @ v[b, :, g]
    return out.reshape(B, S, H * K)


def inputs(B=2, S=7, T=7, H=4, G=4, K=8, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, H, S, K), (B, G, T, K), (B, T, G * K)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


VALIDITY = {
    "all": lambda b, t: t >= 0,
    "left padding": lambda b, t: t >= 2 * b,
    "right padding": lambda b, t: t < 5 - b,
    "holes": lambda b, t: (t + b) % 3 != 0,
    "an empty row": lambda b, t: (t >= 0) & (b == 0),
}


def validity(name, B, T):
    return np.stack([np.broadcast_to(VALIDITY[name](b, np.arange(T)), T) for b in range(B)])


def by_position(x_BHSK):
    return np.moveaxis(np.asarray(x_BHSK), 1, 2)


class AttentionChecks:
    """What every implementation must pass; subclass it and set `implementation`."""

    implementation: str

    def run(self, q, k, v, valid, q_valid=None):
        run = jax.jit(lambda *x: attention(*x, implementation=self.implementation))
        return run(q, k, v, valid, valid if q_valid is None else q_valid)

    @pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
    @pytest.mark.parametrize("mask", VALIDITY)
    def test_values(self, mask, heads):
        q, k, v = inputs(H=heads[0], G=heads[1])
        valid = validity(mask, len(q), q.shape[2])
        expected = dense(q, k, v, valid, valid)
        np.testing.assert_allclose(self.run(q, k, v, valid), expected, atol=2e-6)

    @pytest.mark.parametrize("length", [1, 3, 17, 129])
    def test_any_length(self, length):
        q, k, v = inputs(S=length, T=length, H=2, G=1)
        valid = validity("left padding", 2, length)
        np.testing.assert_allclose(self.run(q, k, v, valid), dense(q, k, v, valid, valid), atol=2e-6)

    def test_a_block_of_queries_against_a_whole_row(self):
        q, k, v = inputs(S=3, T=9)
        valid, q_valid = validity("holes", 2, 9), validity("holes", 2, 3)
        expected = dense(q, k, v, q_valid, valid)
        np.testing.assert_allclose(self.run(q, k, v, valid, q_valid), expected, atol=2e-6)

    def test_queries_without_a_valid_key_get_zeros(self):
        q, k, v = inputs(S=3, T=9)
        valid, q_valid = validity("an empty row", 2, 9), np.ones((2, 3), bool)
        out = np.asarray(self.run(q, k, v, valid, q_valid))
        assert not np.any(out[1])
        assert np.all(out[0])

    @pytest.mark.parametrize("mask", VALIDITY)
    def test_queries_that_are_not_valid_get_zeros(self, mask):
        q, k, v = inputs()
        valid = validity(mask, len(q), q.shape[2])
        assert not np.any(np.asarray(self.run(q, k, v, valid))[~valid])

    def test_what_is_not_valid_has_no_influence_even_if_it_is_huge(self):
        q, k, v = inputs()
        valid = validity("holes", len(q), q.shape[2])
        pads = ~valid[:, None, :, None]
        huge = [jnp.where(pads, x * np.float32(1e4), x) for x in (q, k)]
        huge.append(jnp.where(pads[:, 0], v * np.float32(1e4), v))
        np.testing.assert_array_equal(self.run(*huge, valid), self.run(q, k, v, valid))

    @pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
    @pytest.mark.parametrize("mask", VALIDITY)
    def test_gradients(self, mask, heads):
        q, k, v = inputs(S=5, T=5, H=heads[0], G=heads[1], K=4)
        valid = validity(mask, len(q), q.shape[2])
        cotangent = np.random.default_rng(1).standard_normal((*v.shape[:2], heads[0] * 4))
        cotangent = cotangent.astype(np.float32)
        _, pull = jax.vjp(lambda *x: self.run(*x, valid), q, k, v)
        grads = pull(jnp.asarray(cotangent))
        # Along random directions, against central differences of the float64 softmax.
        rng = np.random.default_rng(2)
        for i, grad in enumerate(grads):
            assert np.all(np.isfinite(grad))
            assert not np.any((np.asarray(grad) if i == 2 else by_position(grad))[~valid])
            for _ in range(3):
                at = [np.asarray(x, np.float64) for x in (q, k, v)]
                direction = rng.standard_normal(grad.shape)
                ends = []
                for sign in (1e-5, -1e-5):
                    moved = [*at[:i], at[i] + sign * direction, *at[i + 1 :]]
                    ends.append(np.sum(dense(*moved, valid, valid) * cotangent))
                expected = (ends[0] - ends[1]) / 2e-5
                size = np.linalg.norm(grad) * np.linalg.norm(direction)
                assert abs(np.sum(grad * direction) - expected) < 1e-5 * size + 1e-8

    def test_bfloat16(self):
        q, k, v = inputs(dtype=jnp.bfloat16, S=33, T=33)
        valid = validity("left padding", 2, 33)
        out = self.run(q, k, v, valid)
        assert out.dtype == jnp.bfloat16
        # Rounding of the probabilities and of the result: two units of 2^-8 of the largest value.
        error = np.abs(np.asarray(out, np.float64) - dense(q, k, v, valid, valid)).max()
        assert error < 2 * 2.0**-8 * np.abs(np.asarray(v, np.float64)).max()


class TestPlain(AttentionChecks):
    implementation = "plain"


class TestCpu(AttentionChecks):
    implementation = "cpu"


class TestXla(AttentionChecks):
    implementation = "xla"


class TestCudnn(AttentionChecks):
    implementation = "cudnn"  # XLA stands in for its kernel, but for GPUs: what it is given is the same

    @pytest.fixture(autouse=True)
    def _only_what_it_takes(self, request):
        if jax.default_backend() == "gpu" and request.node.originalname not in (
            "test_bfloat16",
            "test_gradients_of_odd_lengths",
        ):
            pytest.skip("cuDNN takes 16 bits only")

    @pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is there on GPUs only")
    def test_gradients_of_odd_lengths(self):
        q, k, v = inputs(dtype=jnp.bfloat16, S=387, T=387, K=128)
        valid = validity("left padding", 2, 387)
        out, pull = jax.vjp(lambda *x: self.run(*x, valid), q, k, v)
        plain, pull_plain = jax.vjp(lambda *x: reference.attention(*x, valid, valid), q, k, v)
        for got, want in zip((out, *pull(out)), (plain, *pull_plain(plain)), strict=True):
            got, want = (np.asarray(x, np.float64) for x in (got, want))
            assert np.linalg.norm(got - want) < 2e-2 * np.linalg.norm(want)


class TestTpu(AttentionChecks):
    implementation = "tpu"  # in interpret mode, but for TPUs

    @pytest.mark.parametrize("lengths", [(1100, 1100), (1024, 700), (512, 2100), (33, 1100)])
    def test_several_blocks_of_queries_and_a_rest(self, lengths):
        S, T = lengths
        q, k, v = inputs(B=1, S=S, T=T, H=2, G=1, K=8)
        valid, q_valid = np.arange(T)[None] >= 100, np.arange(S)[None] < S - 5
        cotangent = inputs(B=1, S=1, T=S, H=2, G=2, K=8, seed=1)[2]
        out, pull = jax.vjp(lambda *x: self.run(*x, valid, q_valid), q, k, v)
        want, pull_plain = jax.vjp(lambda *x: reference.attention(*x, q_valid, valid), q, k, v)
        np.testing.assert_allclose(out, want, atol=2e-6)
        for grad, expected in zip(pull(cotangent), pull_plain(cotangent), strict=True):
            np.testing.assert_allclose(grad, expected, atol=2e-5)

    def test_too_many_keys_are_an_error(self):
        q, k, v = inputs(B=1, S=1, T=2049, H=1, G=1, K=128)
        with pytest.raises(
            ValueError, match="2049 keys of 128 float32 don't fit into VMEM, the limit is 2048"
        ):
            self.run(q, k, v, np.ones((1, 2049), bool), np.ones((1, 1), bool))

    def test_narrow_heads_are_an_error_on_the_hardware(self):
        q, k, v = inputs(B=1, S=1, T=1, H=1, G=1, K=64)
        with pytest.raises(ValueError, match="heads are 64 wide and must be a multiple of 128"):
            tpu.attention(q, k, v, np.ones((1, 1), bool), np.ones((1, 1), bool))


def on_gpu(monkeypatch):
    """What this process would choose and lower if its devices were GPUs with cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def lower_for_cuda(f, B, S, T, H, G, K, dtype):
    """The program of f(q, k, v, valid, q_valid)."""
    shapes = [(B, H, S, K), (B, G, T, K), (B, T, G * K)]
    x = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    x += [jax.ShapeDtypeStruct(shape, jnp.bool_) for shape in ((B, T), (B, S))]
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's own gradients promote silently
        return jax.jit(f).trace(*x).lower(lowering_platforms=("cuda",)).as_text()


def gradients(q, k, v, valid, q_valid):
    out, pull = jax.vjp(lambda *x: attention(*x, valid, q_valid), q, k, v)
    return pull(out)


CUSTOM_CALL = re.compile(r"custom_call @(\S+?)\(")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "shape", [(4, 1539, 1539, 32, 8, 128), (2, 387, 387, 4, 4, 64), (1, 32, 4095, 8, 8, 128)]
)
def test_16_bits_on_a_gpu_are_cudnns_without_a_matrix_of_scores(shape, dtype, monkeypatch):
    on_gpu(monkeypatch)
    forward = lower_for_cuda(attention, *shape, dtype)
    assert CUSTOM_CALL.findall(forward) == ["__cudnn$fmhaSoftmax"]
    both = lower_for_cuda(gradients, *shape, dtype)
    assert CUSTOM_CALL.findall(both) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert f"{shape[1]}x{shape[2]}x" not in forward + both


@pytest.mark.parametrize(("K", "dtype"), [(128, jnp.float32), (256, jnp.bfloat16), (12, jnp.bfloat16)])
def test_the_rest_on_a_gpu_is_xlas(K, dtype, monkeypatch):
    on_gpu(monkeypatch)
    for f in (attention, gradients):
        assert not CUSTOM_CALL.findall(lower_for_cuda(f, 2, 387, 387, 4, 2, K, dtype))


def test_soft_padding_adds_one_and_hides_nothing():
    q, k, v = inputs(G=2)
    valid = validity("left padding", len(q), q.shape[2])
    out = attention(q, k, v, valid, soft=True)
    np.testing.assert_allclose(out, dense(q, k, v, valid, valid, soft=True), atol=2e-6)
    changed = v.at[1, 0].add(1)
    assert not valid[1, 0]
    assert np.all(np.abs(attention(q, k, changed, valid, soft=True) - out)[1] > 0)


def test_without_padding_soft_and_hard_are_equal():
    q, k, v = inputs()
    valid = validity("all", len(q), q.shape[2])
    soft = attention(q, k, v, valid, soft=True)
    np.testing.assert_allclose(soft, attention(q, k, v, valid), atol=2e-6)


def test_validity_of_queries_defaults_to_that_of_the_keys():
    q, k, v = inputs()
    valid = validity("holes", len(q), q.shape[2])
    np.testing.assert_array_equal(attention(q, k, v, valid), reference.attention(q, k, v, valid, valid))


def test_errors():
    q, k, v = inputs(S=3)
    valid = validity("all", 2, 7)
    with pytest.raises(ValueError, match=r"validity \(2, 7\) of queries \(2, 3\)"):
        attention(q, k, v, valid)
    q, k, v = inputs()
    with pytest.raises(ValueError, match="unknown attention 'flash'"):
        attention(q, k, v, valid, implementation="flash")
    with pytest.raises(ValueError, match="soft padding needs implementation='plain'"):
        attention(q, k, v, valid, implementation="xla", soft=True)
