"""The one front door to attention: picks an implementation, the caller needn't know which."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmada_jax import sharding
from mmada_jax.kernels import KEPT, gpu, reference, tpu
from mmada_jax.sharding import USE

IMPLEMENTATIONS = ("auto", "plain", "xla", "cudnn", "tpu", "gpu")


def attention(
    q_BHSK: jax.Array,
    k_BGTK: jax.Array,
    v_BTM: jax.Array,
    valid_BT: jax.Array,
    q_valid_BS: jax.Array | None = None,
    *,
    implementation: str = "auto",
    soft: bool = False,
) -> jax.Array:
    """Bidirectional attention over valid positions; [B, S, H * K], zeros where a query isn't valid or
    its row has no valid key (but for `soft`, which hides nothing).

    Queries and keys come head by head, as RoPE leaves them; values, [B, T, G * K], and the result have
    the heads side by side, as the products around want them: a transpose is a pass over memory. The
    mask is the outer product of `q_valid` and `valid` and is never materialised by a caller.
    `q_valid` defaults to `valid` (queries and keys are the same row). G divides H (grouped-query
    attention). `soft` is the reference's additive training bias (see kernels/reference.py), in the
    plain implementation only. Under a mesh every device runs the kernel on its own rows and heads.
    """
    q_valid_BS = valid_BT if q_valid_BS is None else q_valid_BS
    rows_BS, rows_BT = ((x.shape[0], x.shape[2]) for x in (q_BHSK, k_BGTK))
    if q_valid_BS.shape != rows_BS or valid_BT.shape != rows_BT:
        raise ValueError(
            f"validity {q_valid_BS.shape} of queries {rows_BS} and {valid_BT.shape} of keys {rows_BT} "
            "must have equal shapes"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {implementation!r}; known: {IMPLEMENTATIONS}")
    if implementation == "auto":
        implementation = "plain" if soft else choose(q_BHSK, k_BGTK)
    seen_BS = q_valid_BS & jnp.any(valid_BT, axis=1, keepdims=True)
    if implementation == "plain":
        rows_BS = q_valid_BS if soft else seen_BS
        out_BSM = reference.attention(q_BHSK, k_BGTK, v_BTM, rows_BS, valid_BT, soft=soft)
        return checkpoint_name(out_BSM, KEPT)
    if soft:
        raise ValueError(f"soft padding needs implementation='plain', not {implementation!r}")

    run = sharding.on_each_device(
        functools.partial(_KERNELS[implementation], interpret=sharding.platform() != implementation),
        in_specs=(
            USE.spec("batch", "heads", "length", "head_dim"),
            USE.spec("batch", "kv_heads", "length", "head_dim"),
            USE.spec("batch", "length", "kv_heads"),
            USE.spec("batch", "length"),
            USE.spec("batch", "length"),
        ),
        out_specs=USE.spec("batch", "length", "heads"),
    )
    return run(q_BHSK, k_BGTK, v_BTM, valid_BT, seen_BS)


def choose(q_BHSK: jax.Array, k_BGTK: jax.Array) -> str:
    """The implementation for these shapes on the devices in use; why is in kernels/README.md."""
    platform, (S, K), T = sharding.platform(), q_BHSK.shape[2:], k_BGTK.shape[2]
    if platform == "tpu":
        return "tpu" if tpu.fits(S, T, K, q_BHSK.dtype) and K % tpu.LANES == 0 else "xla"
    if platform == "gpu":
        half = q_BHSK.dtype in (jnp.bfloat16, jnp.float16)
        return "cudnn" if half and K <= 128 and K % 8 == 0 and S > gpu.FEW_QUERIES else "gpu"
    return "plain"  # on a CPU XLA fuses the definition as well as anything


def _library(q_BHSK, k_BGTK, v_BTM, valid_BT, seen_BS, *, interpret: bool, implementation: str):
    """jax.nn's own; cuDNN takes no ranges, so the mask is a bias that XLA forms for it."""
    del interpret
    S = q_BHSK.shape[2]
    if implementation == "cudnn":  # its gradient with a bias wants even lengths
        q_BHSK, k_BGTK = (_even(x, 2) for x in (q_BHSK, k_BGTK))
        v_BTM, valid_BT = _even(v_BTM, 1), _even(valid_BT, 1)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own promotes bfloat16 to float32 silently
        out_BSHK = jax.nn.dot_product_attention(
            *_by_position(q_BHSK, k_BGTK, v_BTM),
            mask=valid_BT[:, None, None, :],
            implementation=implementation,
        )
    return _side_by_side(checkpoint_name(out_BSHK[:, :S], KEPT), seen_BS)


def _even(x, axis):
    """One more, of zeros, where the length is odd."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, x.shape[axis] % 2)
    return jnp.pad(x, pad)


def _gpu(q_BHSK, k_BGTK, v_BTM, valid_BT, seen_BS, *, interpret: bool):
    inputs = _by_position(q_BHSK, k_BGTK, v_BTM)
    return _side_by_side(gpu.attention(*inputs, valid_BT, interpret=interpret), seen_BS)


def _by_position(q_BHSK, k_BGTK, v_BTM):
    B, G, T, K = k_BGTK.shape
    return jnp.moveaxis(q_BHSK, 1, 2), jnp.moveaxis(k_BGTK, 1, 2), v_BTM.reshape(B, T, G, K)


def _side_by_side(out_BSHK, seen_BS):
    return jnp.where(seen_BS[:, :, None], out_BSHK.reshape(*out_BSHK.shape[:2], -1), 0)


_KERNELS = {
    "xla": functools.partial(_library, implementation="xla"),
    "cudnn": functools.partial(_library, implementation="cudnn"),
    "tpu": tpu.attention,
    "gpu": _gpu,
}
