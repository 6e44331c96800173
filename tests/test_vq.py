import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.nets import vq

TINY = vq.VQConfig(
    channels=32,
    encoder_mult=(1, 2),
    encoder_blocks=(1, 1),
    decoder_mult=(1, 2),
    decoder_blocks=(1, 1),
    bits=5,
    pixel_channels=2,
)
PIXELS = np.random.default_rng(0).uniform(-1, 1, (2, 4, 6, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(vq.init_params, static_argnums=1)(jax.random.key(0), TINY)


@pytest.mark.parametrize("bits", [1, 5, 13])
def test_quantize_inverts_dequantize(bits):
    codes = jnp.arange(2**bits).reshape(2, -1)
    z = vq.dequantize(codes, bits)
    assert z.shape == (*codes.shape, bits) and z.dtype == jnp.float32
    assert np.all(np.abs(z) == 1)
    np.testing.assert_array_equal(vq.quantize(z), codes)
    np.testing.assert_array_equal(vq.quantize(z * 1e-30), codes)  # signs, not sizes


def test_channel_0_is_the_highest_bit_and_zero_is_bit_0():
    z = np.array([[1, -1, -1], [-1, -1, 1], [0, 0, 0], [-0.0, 0, 1e-37], [1, 1, 1]], np.float32)
    assert vq.quantize(jnp.asarray(z)).tolist() == [4, 1, 0, 1, 7]
    assert vq.quantize(jnp.asarray(z)).dtype == jnp.int32


def test_shapes_and_what_a_token_covers(params):
    codes = jax.jit(vq.encode, static_argnums=1)(params, TINY, PIXELS)
    assert codes.shape == (2, 2, 3) and codes.dtype == jnp.int32
    assert np.all((codes >= 0) & (codes < TINY.codebook_size))
    assert jax.jit(vq.decode, static_argnums=1)(params, TINY, codes).shape == PIXELS.shape
    assert vq.VQConfig().downsampling == 16 and vq.VQConfig().codebook_size == 8192


def test_images_do_not_touch_each_other(params):
    latents = jax.jit(vq.latents, static_argnums=1)
    both, one = latents(params, TINY, PIXELS), latents(params, TINY, PIXELS[1:])
    np.testing.assert_allclose(both[1:], one, atol=1e-5)
    turned = latents(params, TINY, PIXELS[::-1])
    np.testing.assert_allclose(both, turned[::-1], atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 5, 2), (1, 3, 4, 2), (1, 4, 4, 3)])
def test_images_of_another_size_are_errors(params, shape):
    message = f"{shape[1]}x{shape[2]} pixels and {shape[3]} channels doesn't fit"
    with pytest.raises(ValueError, match=message):
        vq.encode(params, TINY, np.zeros(shape, np.float32))


def test_impossible_architectures_are_errors():
    with pytest.raises(ValueError, match="the same number of levels"):
        dataclasses.replace(TINY, encoder_blocks=(1, 1, 1))
    with pytest.raises(ValueError, match="channels=48 must be a multiple of 32"):
        dataclasses.replace(TINY, channels=48)


def scaled(params, factor):
    """Params whose latents are `factor` times as large."""
    encoder = params["encoder"]
    last = {name: encoder[name] * np.float32(factor) for name in encoder if "quant_conv" in name}
    assert len(last) == 2
    return params | {"encoder": encoder | last}


@pytest.fixture(scope="module")
def value_and_grad():
    def total(params):
        terms = vq.rebuild(params, TINY, PIXELS).terms
        return sum(terms.values()), terms

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.mark.parametrize("factor", [0, 1, 1e3, 1e8])
def test_losses_and_gradients_are_finite_for_latents_of_any_size(params, value_and_grad, factor):
    (_, terms), grads = value_and_grad(scaled(params, factor))
    assert all(np.isfinite(term) for term in terms.values())
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_losses_are_what_they_say(params, value_and_grad):
    terms = value_and_grad(params)[0][1]
    z = np.asarray(vq.latents(params, TINY, PIXELS), np.float64)
    q = np.where(z > 0, 1, -1)
    out = vq.decode(params, TINY, vq.encode(params, TINY, PIXELS))
    np.testing.assert_allclose(terms["reconstruction"], np.mean((out - PIXELS) ** 2), rtol=1e-4)
    np.testing.assert_allclose(terms["commitment"], np.mean((z - q) ** 2), rtol=1e-4)
    # p(bit) by its definition: a softmax over the negative squared distances to -1 and 1.
    weights = np.exp(-((z[..., None] - np.array([-1, 1])) ** 2))
    p = weights / weights.sum(axis=-1, keepdims=True)
    mean = p.mean(axis=(0, 1, 2))
    entropy = -(p * np.log(p)).sum(-1).mean() + (mean * np.log(mean)).sum(-1).mean()
    np.testing.assert_allclose(terms["entropy"], entropy, rtol=1e-4)


def test_the_gradient_passes_straight_through_the_signs(params):
    def reconstruction(params):
        return vq.rebuild(params, TINY, PIXELS).terms["reconstruction"]

    grads = jax.jit(jax.grad(reconstruction))(params)
    assert np.any(np.asarray(grads["encoder"]["conv_in_w"]))
    assert np.any(np.asarray(grads["decoder"]["conv_in_w"]))


def test_to_uint8_clamps_and_truncates():
    pixels = np.array([-9, -1, -0.999, 0, 0.999, 1, 9], np.float32)
    assert vq.to_uint8(pixels).tolist() == [0, 0, 0, 127, 254, 255, 255]
