"""Plain attention: the definition that every other implementation is tested against."""

import jax
import jax.numpy as jnp
import numpy as np


def attention(
    q_BHSK: jax.Array,
    k_BGTK: jax.Array,
    v_BTM: jax.Array,
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
    B, H, S, K = q_BHSK.shape
    G = k_BGTK.shape[1]
    v_BGTK = v_BTM.reshape(B, -1, G, K).swapaxes(1, 2)
    q_BGRSK = q_BHSK.reshape(B, G, H // G, S, K)
    scores_BGRST = jnp.einsum(
        "BGRSK,BGTK->BGRST", q_BGRSK, k_BGTK, preferred_element_type=jnp.float32
    ) * np.float32(K**-0.5)
    pair_B11ST = (q_valid_BS[:, :, None] & valid_BT[:, None, :])[:, None, None]
    if soft:
        scores_BGRST += pair_B11ST.astype(jnp.float32)
    else:
        scores_BGRST = jnp.where(pair_B11ST, scores_BGRST, jnp.finfo(jnp.float32).min)
    p_BGRST = jax.nn.softmax(scores_BGRST, axis=-1).astype(v_BGTK.dtype)
    out_BGRSK = jnp.einsum("BGRST,BGTK->BGRSK", p_BGRST, v_BGTK)
    out_BSM = out_BGRSK.reshape(B, H, S, K).swapaxes(1, 2).reshape(B, S, H * K)
    return out_BSM if soft else jnp.where(q_valid_BS[:, :, None], out_BSM, 0)
