"""Plain attention: the definition that every other implementation is tested against."""

import jax
import jax.numpy as jnp
import numpy as np


def attention(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    q_valid_BS: jax.Array,
    valid_BT: jax.Array,
    *,
    soft: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the valid keys, in float32, never causal.

    G divides H (grouped-query attention): query head h reads key head h // (H / G). A query that is
    not valid gets zeros. `soft` reproduces the additive bias that the reference trains with instead
    of a mask: +1 where query and key are both valid, 0 elsewhere, nothing is hidden.
    """
    B, S, H, K = q_BSHK.shape
    G = k_BTGK.shape[2]
    q_BSGRK = q_BSHK.reshape(B, S, G, H // G, K)
    scores_BGRST = jnp.einsum(
        "BSGRK,BTGK->BGRST", q_BSGRK, k_BTGK, preferred_element_type=jnp.float32
    ) * np.float32(K**-0.5)
    pair_B11ST = (q_valid_BS[:, :, None] & valid_BT[:, None, :])[:, None, None]
    if soft:
        scores_BGRST += pair_B11ST.astype(jnp.float32)
    else:
        scores_BGRST = jnp.where(pair_B11ST, scores_BGRST, jnp.finfo(jnp.float32).min)
    p_BGRST = jax.nn.softmax(scores_BGRST, axis=-1).astype(v_BTGK.dtype)
    out_BSHK = jnp.einsum("BGRST,BTGK->BSGRK", p_BGRST, v_BTGK).reshape(B, S, H, K)
    return out_BSHK if soft else jnp.where(q_valid_BS[:, :, None, None], out_BSHK, 0)
