"""Attention for CPUs: the definition, with a gradient of its own.

XLA's own gradient of the definition passes over the scores a dozen times. This one keeps the probabilities,
and takes the sums of the softmax's gradient from the output, which is smaller (section 3.1 of
arXiv 2205.14135).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mmada_jax.kernels import KEPT


@jax.custom_vjp
def attention(
    q_BHSK: jax.Array, k_BGTK: jax.Array, v_BTM: jax.Array, valid_BT: jax.Array, seen_BS: jax.Array
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the valid keys, in float32; zeros where a query isn't `seen`."""
    out_BSM, _ = _forward(q_BHSK, k_BGTK, v_BTM, valid_BT, seen_BS)
    return out_BSM


def _forward(q_BHSK, k_BGTK, v_BTM, valid_BT, seen_BS):
    (B, H, S, K), G = q_BHSK.shape, k_BGTK.shape[1]
    q_BGRSK, v_BGTK = q_BHSK.reshape(B, G, H // G, S, K), _by_head(v_BTM, G)
    scores_BGRST = jnp.einsum(
        "BGRSK,BGTK->BGRST", q_BGRSK, k_BGTK, preferred_element_type=jnp.float32
    ) * np.float32(K**-0.5)
    scores_BGRST = jnp.where(valid_BT[:, None, None, None], scores_BGRST, jnp.finfo(jnp.float32).min)
    e_BGRST = jnp.exp(scores_BGRST - jnp.max(scores_BGRST, axis=-1, keepdims=True))
    # One division for each query is cheaper than one for each score.
    p_BGRST = (e_BGRST * (1 / jnp.sum(e_BGRST, axis=-1, keepdims=True))).astype(v_BGTK.dtype)
    out_BGRSK = jnp.einsum("BGRST,BGTK->BGRSK", p_BGRST, v_BGTK)
    out_BSM = _side_by_side(out_BGRSK.reshape(B, H, S, K))
    out_BSM = checkpoint_name(jnp.where(seen_BS[:, :, None], out_BSM, 0), KEPT)
    return out_BSM, (q_BGRSK, k_BGTK, v_BGTK, p_BGRST, out_BSM, seen_BS)


def _backward(saved, grad_BSM):
    """With dp = grad v^T and ds = p (dp - sum over T of p dp): that sum is the one over K of grad * out."""
    q_BGRSK, k_BGTK, v_BGTK, p_BGRST, out_BSM, seen_BS = saved
    B, G, R, S, K = q_BGRSK.shape
    grad_BSM = jnp.where(seen_BS[:, :, None], grad_BSM, 0)
    product_BSHK = (grad_BSM * out_BSM).astype(jnp.float32).reshape(B, S, G * R, K)
    sum_BGRS1 = jnp.sum(product_BSHK, axis=-1).swapaxes(1, 2).reshape(B, G, R, S, 1)
    grad_BGRSK = _by_head(grad_BSM, G * R).reshape(B, G, R, S, K)
    dp_BGRST = jnp.einsum("BGRSK,BGTK->BGRST", grad_BGRSK, v_BGTK, preferred_element_type=jnp.float32)
    ds_BGRST = p_BGRST.astype(jnp.float32) * (dp_BGRST - sum_BGRS1) * np.float32(K**-0.5)
    ds_BGRST = ds_BGRST.astype(q_BGRSK.dtype)
    dq_BGRSK = jnp.einsum("BGRST,BGTK->BGRSK", ds_BGRST, k_BGTK)
    dk_BGTK = jnp.einsum("BGRST,BGRSK->BGTK", ds_BGRST, q_BGRSK)
    dv_BGTK = jnp.einsum("BGRST,BGRSK->BGTK", p_BGRST, grad_BGRSK)
    return dq_BGRSK.reshape(B, G * R, S, K), dk_BGTK, _side_by_side(dv_BGTK), None, None


attention.defvjp(_forward, _backward)


def _by_head(x_BTM, heads):
    """[B, T, heads * K] -> [B, heads, T, K]."""
    B, T, M = x_BTM.shape
    return x_BTM.reshape(B, T, heads, M // heads).swapaxes(1, 2)


def _side_by_side(x_BHTK):
    """[B, H, T, K] -> [B, T, H * K]."""
    B, H, T, K = x_BHTK.shape
    return x_BHTK.swapaxes(1, 2).reshape(B, T, H * K)
