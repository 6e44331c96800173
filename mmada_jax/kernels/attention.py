"""The one front door to attention: picks an implementation, the caller needn't know which."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmada_jax.devices import sharding
from mmada_jax.devices.sharding import USE
from mmada_jax.kernels import KEPT, cached, cpu, reference, tpu

IMPLEMENTATIONS = ("auto", "plain", "cpu", "xla", "cudnn", "tpu")


def attention(
    q_BHSK: jax.Array,
    k_BGTK: jax.Array,
    v_BTM: jax.Array,
    valid_BT: jax.Array,
    q_valid_BS: jax.Array | None = None,
    *,
    implementation: str = "auto",
    soft: bool = False,
    past: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Bidirectional attention over valid positions; [B, S, H * K], zeros where a query isn't valid or
    its row has no valid key (but for `soft`, which hides nothing).

    Queries and keys come head by head, as RoPE leaves them; values, [B, T, G * K], and the result have
    the heads side by side, as the products around want them: a transpose is a pass over memory. The
    mask is the outer product of `q_valid` and `valid` and is never materialised by a caller.
    `q_valid` defaults to `valid` (queries and keys are the same row). G divides H (grouped-query
    attention). `soft` is the reference's additive training bias (see kernels/reference.py), in the
    plain implementation only. Under a mesh every device runs the kernel on its own rows and heads.

    `past` are stored keys and values of other places of the rows, both [B, G, P, K], and which of them
    are seen [B, P]; queries attend to these and to the T keys. It is for inference: a few queries against
    many keys need no kernel, so `implementation` isn't asked. Neither is it where each query has keys of
    its own, `valid` [B, S, T].
    """
    q_valid_BS = valid_BT if q_valid_BS is None else q_valid_BS
    rows_BS, rows_BT = ((x.shape[0], x.shape[2]) for x in (q_BHSK, k_BGTK))
    by_query = valid_BT.ndim == 3
    if q_valid_BS.shape != rows_BS or valid_BT.shape != ((*rows_BS, rows_BT[1]) if by_query else rows_BT):
        raise ValueError(
            f"validity {q_valid_BS.shape} of queries {rows_BS} and {valid_BT.shape} of keys {rows_BT} "
            "must have equal shapes"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {implementation!r}; known: {IMPLEMENTATIONS}")
    if implementation == "auto":
        implementation = "plain" if soft else choose(q_BHSK, k_BGTK)
    if past is not None or by_query:
        if soft:
            raise ValueError("stored keys and values don't go with soft padding; use pad='hard'")
        few = _on_devices(cached.attention, by_query, len(past or ()))
        return few(q_BHSK, k_BGTK, v_BTM, valid_BT, q_valid_BS, *(past or ()))
    seen_BS = q_valid_BS & jnp.any(valid_BT, axis=1, keepdims=True)
    if implementation == "plain":
        rows_BS = q_valid_BS if soft else seen_BS
        out_BSM = reference.attention(q_BHSK, k_BGTK, v_BTM, rows_BS, valid_BT, soft=soft)
        return checkpoint_name(out_BSM, KEPT)
    if soft:
        raise ValueError(f"soft padding needs implementation='plain', not {implementation!r}")

    return _on_devices(_KERNELS[implementation])(q_BHSK, k_BGTK, v_BTM, valid_BT, seen_BS)


def _on_devices(kernel, by_query=False, n_past=0):
    """The kernel, run by every device on its own rows and heads."""
    keys = USE.spec("batch", "kv_heads", "length", "head_dim")
    rows = USE.spec("batch", "length")
    return sharding.on_each_device(
        kernel,
        in_specs=(
            USE.spec("batch", "heads", "length", "head_dim"),
            keys,
            USE.spec("batch", "length", "kv_heads"),
            USE.spec("batch", "length", None) if by_query else rows,
            rows,
            *(keys, keys, rows)[:n_past],
        ),
        out_specs=USE.spec("batch", "length", "heads"),
    )


def choose(q_BHSK: jax.Array, k_BGTK: jax.Array) -> str:
    """The implementation for these shapes on the devices in use; why is in kernels/README.md."""
    platform, (S, K), T = sharding.platform(), q_BHSK.shape[2:], k_BGTK.shape[2]
    if platform == "tpu":
        return "tpu" if tpu.fits(S, T, K, q_BHSK.dtype) and K % tpu.LANES == 0 else "xla"
    if platform == "gpu":
        half = q_BHSK.dtype in (jnp.bfloat16, jnp.float16)
        return "cudnn" if half and K <= 128 and K % 8 == 0 else "xla"
    return "cpu"


def _tpu(*inputs):
    """Ours, interpreted off TPUs."""
    return tpu.attention(*inputs, interpret=sharding.platform() != "tpu")


def _xla(q_BHSK, k_BGTK, v_BTM, valid_BT, seen_BS):
    """XLA's products and softmax, through jax.nn."""
    return _library(q_BHSK, k_BGTK, v_BTM, seen_BS, "xla", mask=valid_BT[:, None, None, :])


def _cudnn(q_BHSK, k_BGTK, v_BTM, valid_BT, seen_BS):
    """cuDNN's kernel, through jax.nn; off GPUs XLA computes the same.

    cuDNN hides the keys after the first n of a row. (It hides others by a bias of [S, T] scores alone,
    whose gradient it computes too.) No order of the keys changes a result, so the valid ones go first.
    """
    order_BT = jnp.argsort(~valid_BT, axis=1, stable=True)
    n_B = jnp.maximum(jnp.sum(valid_BT, axis=1, dtype=jnp.int32), 1)  # it has no rows without a key
    # Zeros, whatever lay there: the select gives those keys a gradient of exactly zero, too.
    first_BT = jnp.arange(valid_BT.shape[1])[None] < n_B[:, None]
    k_BGTK = jnp.where(first_BT[:, None, :, None], _reorder(k_BGTK, order_BT, 1), 0)
    v_BTM = jnp.where(first_BT[:, :, None], _reorder(v_BTM, order_BT, 0), 0)
    # Its gradient wants even lengths.
    S, T = q_BHSK.shape[2], k_BGTK.shape[2]
    q_BHSK = jnp.pad(q_BHSK, ((0, 0), (0, 0), (0, S % 2), (0, 0)))
    k_BGTK = jnp.pad(k_BGTK, ((0, 0), (0, 0), (0, T % 2), (0, 0)))
    v_BTM = jnp.pad(v_BTM, ((0, 0), (0, T % 2), (0, 0)))
    name = "cudnn" if sharding.platform() == "gpu" else "xla"
    return _library(q_BHSK, k_BGTK, v_BTM, seen_BS, name, key_value_seq_lengths=n_B)


def _library(q_BHSK, k_BGTK, v_BTM, seen_BS, implementation, **hidden):
    """jax.nn's attention, which has the positions before the heads."""
    (B, G, T, K), S = k_BGTK.shape, seen_BS.shape[1]
    with jax.numpy_dtype_promotion("standard"):  # JAX's own promotes bfloat16 to float32 silently
        out_BSHK = jax.nn.dot_product_attention(
            jnp.moveaxis(q_BHSK, 1, 2),
            jnp.moveaxis(k_BGTK, 1, 2),
            v_BTM.reshape(B, T, G, K),
            implementation=implementation,
            **hidden,
        )
    return jnp.where(seen_BS[:, :, None], checkpoint_name(out_BSHK[:, :S], KEPT).reshape(B, S, -1), 0)


def _reorder(x, order_BT, axis):
    """The keys of each row in its order; `axis` is that of the keys within a row. An order names every
    key once, so the gradient needs no atomic sums."""

    def row(x, order_T):
        return x.at[(slice(None),) * axis + (order_T,)].get(unique_indices=True, mode="promise_in_bounds")

    return jax.vmap(row)(x, order_BT)


_KERNELS = {"cpu": cpu.attention, "xla": _xla, "cudnn": _cudnn, "tpu": _tpu}
