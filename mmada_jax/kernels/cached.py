"""Attention of a few queries to their own keys and to stored ones, for decoding with a cache."""

import jax
import jax.numpy as jnp
import numpy as np


def attention(
    q_BHSK: jax.Array,
    k_BGTK: jax.Array,
    v_BTM: jax.Array,
    valid_BT: jax.Array,
    seen_BS: jax.Array,
    past_k_BGPK: jax.Array | None = None,
    past_v_BGPK: jax.Array | None = None,
    past_seen_BP: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v in float32 over the valid keys T and the stored keys P that are seen;
    [B, S, H * K], zeros where a query isn't `seen`. Where `valid` is [B, S, T], each query has keys of its
    own.

    The two sets of keys share one softmax and aren't joined: that would copy what is stored, in every
    layer of every step.
    """
    (B, H, S, K), G = q_BHSK.shape, k_BGTK.shape[1]
    q_BGRSK = q_BHSK.reshape(B, G, H // G, S, K)
    v_BGTK = v_BTM.reshape(B, -1, G, K).swapaxes(1, 2)

    def scores(k_BGTK, seen_BT):
        scores_BGRST = jnp.einsum(
            "BGRSK,BGTK->BGRST", q_BGRSK, k_BGTK, preferred_element_type=jnp.float32
        ) * np.float32(K**-0.5)
        seen_BST = seen_BT if seen_BT.ndim == 3 else seen_BT[:, None]
        return jnp.where(seen_BST[:, None, None], scores_BGRST, jnp.finfo(jnp.float32).min)

    own_BGRST = scores(k_BGTK, valid_BT)
    if past_k_BGPK is None:
        past_k_BGPK = past_v_BGPK = jnp.zeros((B, G, 1, K), k_BGTK.dtype)
        past_seen_BP = jnp.zeros((B, 1), bool)
    past_BGRSP = scores(past_k_BGPK, past_seen_BP)
    most_BGRS1 = jnp.maximum(
        jnp.max(own_BGRST, axis=-1, keepdims=True), jnp.max(past_BGRSP, axis=-1, keepdims=True)
    )
    own_BGRST, past_BGRSP = jnp.exp(own_BGRST - most_BGRS1), jnp.exp(past_BGRSP - most_BGRS1)
    total_BGRS1 = jnp.sum(own_BGRST, axis=-1, keepdims=True) + jnp.sum(past_BGRSP, axis=-1, keepdims=True)
    # A division for each output is cheaper than one for each score; in 16 bits the scores are rounded
    # after it, as the other implementations do.
    exact = v_BGTK.dtype == jnp.float32
    share_BGRS1 = np.float32(1) if exact else 1 / total_BGRS1
    out_BGRSK = jnp.einsum(
        "BGRST,BGTK->BGRSK",
        (own_BGRST * share_BGRS1).astype(v_BGTK.dtype),
        v_BGTK,
        preferred_element_type=jnp.float32,
    )
    out_BGRSK += jnp.einsum(
        "BGRSP,BGPK->BGRSK",
        (past_BGRSP * share_BGRS1).astype(past_v_BGPK.dtype),
        past_v_BGPK,
        preferred_element_type=jnp.float32,
    )
    if exact:
        out_BGRSK *= 1 / total_BGRS1
    out_BSM = out_BGRSK.astype(q_BHSK.dtype).reshape(B, H, S, K).swapaxes(1, 2).reshape(B, S, H * K)
    return jnp.where(seen_BS[:, :, None], out_BSM, 0)
