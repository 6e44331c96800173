"""The one front door to attention: picks an implementation, the caller needn't know which."""

import jax
import jax.numpy as jnp

from mmada_jax.kernels import reference

IMPLEMENTATIONS = ("auto", "plain", "xla", "cudnn")


def attention(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    valid_BT: jax.Array,
    q_valid_BS: jax.Array | None = None,
    *,
    implementation: str = "auto",
    soft: bool = False,
) -> jax.Array:
    """Bidirectional attention over valid positions; [B, S, H, K], zeros where a query isn't valid.

    The mask is the outer product of `q_valid` and `valid` and is never materialised by a caller.
    `q_valid` defaults to `valid` (queries and keys are the same row). `soft` is the reference's
    additive training bias (see kernels/reference.py), in the plain implementation only.
    """
    q_valid_BS = valid_BT if q_valid_BS is None else q_valid_BS
    if q_valid_BS.shape != q_BSHK.shape[:2] or valid_BT.shape != k_BTGK.shape[:2]:
        raise ValueError(
            f"validity {q_valid_BS.shape} of queries {q_BSHK.shape[:2]} and {valid_BT.shape} of "
            f"keys {k_BTGK.shape[:2]} must have equal shapes"
        )
    if implementation == "auto":
        # On a CPU XLA fuses the plain form as well as its own; the GPU and TPU kernels come here.
        implementation = "plain" if soft or jax.default_backend() == "cpu" else "xla"
    if implementation == "plain":
        return reference.attention(q_BSHK, k_BTGK, v_BTGK, q_valid_BS, valid_BT, soft=soft)
    if soft:
        raise ValueError(f"soft padding needs implementation='plain', not {implementation!r}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {implementation!r}; known: {IMPLEMENTATIONS}")
    with jax.numpy_dtype_promotion("standard"):  # JAX's own promotes bfloat16 to float32 silently
        out_BSHK = jax.nn.dot_product_attention(
            q_BSHK,
            k_BTGK,
            v_BTGK,
            mask=(q_valid_BS[:, :, None] & valid_BT[:, None, :])[:, None],
            implementation=implementation,
        )
    return jnp.where(q_valid_BS[:, :, None, None], out_BSHK, 0)
