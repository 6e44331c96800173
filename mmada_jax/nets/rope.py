"""Rotary positions (RoFormer, arXiv 2104.09864): heads are turned by angles that grow with the place.

Shape letters are those of `transformer`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.devices import sharding


def rope_table(length: int, d_head: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of RoPE's angles at the positions 0..length-1, each [L, K] float32, both halves of K
    the same.

    One table serves all layers. It is a constant of the program: XLA would compute the angles anew at each
    place where it reads them.
    """
    half = d_head // 2
    freq_K = np.float32(theta) ** (-np.tile(np.arange(half, dtype=np.float32), 2) / np.float32(half))
    angle_LK = np.arange(length, dtype=np.float32)[:, None] * freq_K[None]
    return np.cos(angle_LK), np.sin(angle_LK)


@jax.custom_vjp
def rope(x_BHLK: jax.Array, cos_B1LK: jax.Array, sin_B1LK: jax.Array) -> jax.Array:
    """Rotates the two halves of each head (not interleaved pairs) by position, in float32."""
    turned_BHLK = _turn(x_BHLK).astype(jnp.float32)
    rotated_BHLK = x_BHLK.astype(jnp.float32) * cos_B1LK + turned_BHLK * sin_B1LK
    return rotated_BHLK.astype(x_BHLK.dtype)


def _rope_fwd(x_BHLK, cos_B1LK, sin_B1LK):
    return rope(x_BHLK, cos_B1LK, sin_B1LK), (cos_B1LK, sin_B1LK)


def _rope_bwd(saved, grad_BHLK):
    cos_B1LK, sin_B1LK = saved
    return rope(grad_BHLK, cos_B1LK, -sin_B1LK), None, None  # back by the same angle


rope.defvjp(_rope_fwd, _rope_bwd)


def _turn(x_BHLK):
    """(a, b) -> (-b, a), the halves of each head."""
    K = x_BHLK.shape[-1]
    if sharding.platform() != "tpu":
        a_BHLk, b_BHLk = jnp.split(x_BHLK, 2, axis=-1)
        return jnp.concatenate((-b_BHLk, a_BHLk), axis=-1)
    # Moving halves of a vector register costs more than a product with a signed permutation, which
    # is exact in any dtype.
    eye_kk = np.eye(K // 2)
    turn_KK = np.block([[0 * eye_kk, eye_kk], [-eye_kk, 0 * eye_kk]])
    precision = jax.lax.Precision.HIGHEST if x_BHLK.dtype == jnp.float32 else None
    return jnp.einsum("BHLK,KJ->BHLJ", x_BHLK, turn_KK.astype(x_BHLK.dtype), precision=precision)
