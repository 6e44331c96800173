"""Bidirectional flash attention for TPU, forward and backward, in Pallas (Mosaic).

The rows of this model are short (at most a few thousand tokens), so the keys and values of one head
lie in VMEM whole: the softmax of a block of queries is one pass, nothing is rescaled, and the
backward pass is one kernel with five products instead of two kernels with seven.

Scores are kept transposed, keys on the sublanes and queries on the lanes ([T, b]):
- per query there is a row (maximum, sum, logsumexp), which broadcasts over the sublanes for nothing;
- no product needs a transposed block of scores;
- a row of 1539 keys is padded to 1544 and not to 1664.

Letters: B rows, S queries, T keys, H query heads, G key/value heads, K head width, M all heads' widths
side by side, b queries of a block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmada_jax.kernels import KEPT

HIDDEN = -1e30  # added to the score of a key that doesn't count; finite, so that no NaN can come of it
LANES = 128
MAX_ROW_BYTES = 4096 * 128 * 2  # of a head's queries or keys; more don't fit into VMEM beside their scores


def attention(q_BHSK, k_BGTK, v_BTM, valid_BT, seen_BS, *, interpret: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the valid keys, in float32; [B, S, H * K] in q's dtype.

    G divides H: query head h reads key head h // (H / G). Any S, a block of a few queries included.
    Queries that aren't `seen` get zeros; those of a row without a valid key mustn't be. Raises
    ValueError for rows that are longer than VMEM holds, and heads that aren't a multiple of 128 wide.
    """
    (S, K), T = q_BHSK.shape[2:], k_BGTK.shape[2]
    if not fits(S, T, K, q_BHSK.dtype):
        limit = MAX_ROW_BYTES // (K * q_BHSK.dtype.itemsize)
        raise ValueError(
            f"{S} queries and {T} keys of {K} {q_BHSK.dtype.name} don't fit into VMEM, the limit is "
            f"{limit}; use attention='xla'"
        )
    if K % LANES and not interpret:
        raise ValueError(f"heads are {K} wide and must be a multiple of {LANES}; use attention='xla'")
    bias_B1T = jnp.where(valid_BT, 0.0, HIDDEN).astype(jnp.float32)[:, None]
    seen_B1S = seen_BS.astype(jnp.float32)[:, None]
    return _attention(interpret, q_BHSK, k_BGTK, v_BTM, bias_B1T, seen_B1S)


def fits(S: int, T: int, K: int, dtype) -> bool:
    """Whether S queries and T keys of K numbers are short enough for VMEM."""
    return max(S, T) * K * np.dtype(dtype).itemsize <= MAX_ROW_BYTES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(interpret, q_BHSK, k_BGTK, v_BTM, bias_B1T, seen_B1S):
    return _forward(interpret, q_BHSK, k_BGTK, v_BTM, bias_B1T, seen_B1S)[0]


def _attention_fwd(interpret, q_BHSK, k_BGTK, v_BTM, bias_B1T, seen_B1S):
    out_BSM, lse_BH1S = _forward(interpret, q_BHSK, k_BGTK, v_BTM, bias_B1T, seen_B1S)
    out_BSM = checkpoint_name(out_BSM, KEPT)
    lse_BH1S = checkpoint_name(lse_BH1S, KEPT)
    return out_BSM, (q_BHSK, k_BGTK, v_BTM, bias_B1T, out_BSM, lse_BH1S)


def _attention_bwd(interpret, saved, dout_BSM):
    return *_backward(interpret, *saved, dout_BSM), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


# ---- The blocks of a row ------------------------------------------------------------------------


def _block(S: int, T: int) -> int:
    """Queries of a block: wide enough to fill the matrix units, and its scores fit into VMEM."""
    return min(512 if T <= 2048 else 256, -(-S // LANES) * LANES)


def _each_block(S: int, T: int, run) -> None:
    """Calls `run(start, size)` for the blocks of S queries; the last one has its own, static size."""
    b = _block(S, T)
    full = S // b

    def body(i, _):
        run(pl.multiple_of(i * b, b), b)
        return 0

    if full == 1:
        run(0, b)
    elif full:
        jax.lax.fori_loop(0, full, body, 0)
    if S % b:
        run(full * b, S % b)


def _dot(x, y, contract: tuple[int, int]):
    """Product over axis contract[0] of x and contract[1] of y, in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=jnp.float32)


def _column(row_1T):
    """A row [1, T] -> [T, LANES], the same on every lane."""
    return jnp.broadcast_to(row_1T, (LANES, row_1T.shape[1])).T


def _over_lanes(column_TN, b: int):
    """A column as `_column` makes it -> [T, b]."""
    return jnp.concatenate([column_TN] * -(-b // LANES), axis=1)[:, :b]


# ---- Forward ------------------------------------------------------------------------------------


def _forward_kernel(q_SK, k_TK, v_TK, bias_1T, seen_1S, out_SK, lse_1S, bias_TN, v_KT):
    S, K = q_SK.shape
    T = k_TK.shape[0]
    scale = np.float32(K**-0.5)
    bias_TN[...] = _column(bias_1T[...])
    v_KT[...] = v_TK[...].T

    def run(start, b):
        at = pl.ds(start, b)
        s_Tb = _dot(k_TK[...], q_SK[at, :], (1, 1)) * scale + _over_lanes(bias_TN[...], b)
        max_1b = jnp.max(s_Tb, axis=0, keepdims=True)
        p_Tb = jnp.exp(s_Tb - max_1b)
        sum_1b = jnp.sum(p_Tb, axis=0, keepdims=True)
        seen_1b = seen_1S[:, at]
        out_Kb = _dot(v_KT[...], p_Tb.astype(v_KT.dtype), (1, 0)) * (seen_1b / sum_1b)
        out_SK[at, :] = out_Kb.T.astype(out_SK.dtype)
        # So large that the backward pass finds probabilities of zero, and so no gradients.
        lse_1S[:, at] = jnp.where(seen_1b > 0, max_1b + jnp.log(sum_1b), -HIDDEN)

    _each_block(S, T, run)


def _forward(interpret, q_BHSK, k_BGTK, v_BTM, bias_B1T, seen_B1S):
    B, H, S, K = q_BHSK.shape
    G, T = k_BGTK.shape[1:3]
    queries = pl.BlockSpec((None, None, S, K), lambda b, h: (b, h, 0, 0))
    keys = pl.BlockSpec((None, None, T, K), lambda b, h: (b, h // (H // G), 0, 0))
    values = pl.BlockSpec((None, T, K), lambda b, h: (b, 0, h // (H // G)))
    return pl.pallas_call(
        _forward_kernel,
        grid=(B, H),
        in_specs=[
            queries,
            keys,
            values,
            pl.BlockSpec((None, 1, T), lambda b, h: (b, 0, 0)),
            pl.BlockSpec((None, 1, S), lambda b, h: (b, 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, S, K), lambda b, h: (b, 0, h)),
            pl.BlockSpec((None, None, 1, S), lambda b, h: (b, h, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, S, H * K), q_BHSK.dtype),
            jax.ShapeDtypeStruct((B, H, 1, S), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((T, LANES), jnp.float32), pltpu.VMEM((K, T), v_BTM.dtype)],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(q_BHSK, k_BGTK, products=2),
        name="mmada_attention_forward",
        interpret=interpret,
    )(q_BHSK, k_BGTK, v_BTM, bias_B1T, seen_B1S)


# ---- Backward -----------------------------------------------------------------------------------


def _backward_kernel(
    q_SK, k_TK, v_TK, bias_1T, out_SK, lse_1S, dout_SK, dq_SK, dk_TK, dv_TK, bias_TN, k_KT, dk32_TK, dv32_TK
):
    S, K = q_SK.shape
    T = k_TK.shape[0]
    scale = np.float32(K**-0.5)
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(first)
    def _():
        bias_TN[...] = _column(bias_1T[...])
        k_KT[...] = k_TK[...].T
        dk32_TK[...] = jnp.zeros_like(dk32_TK)
        dv32_TK[...] = jnp.zeros_like(dv32_TK)

    def run(start, b):
        at = pl.ds(start, b)
        q_bK, dout_bK = q_SK[at, :], dout_SK[at, :]
        # sum over K of out * dout, as a row: a product with ones.
        both_bK = out_SK[at, :].astype(jnp.float32) * dout_bK.astype(jnp.float32)
        delta_1b = _dot(jnp.ones((8, K), jnp.float32), both_bK, (1, 1))[:1]
        s_Tb = _dot(k_TK[...], q_bK, (1, 1)) * scale + _over_lanes(bias_TN[...], b)
        p_Tb = jnp.exp(s_Tb - lse_1S[:, at])
        dv32_TK[...] += _dot(p_Tb.astype(dout_bK.dtype), dout_bK, (1, 0))
        dp_Tb = _dot(v_TK[...], dout_bK, (1, 1))
        ds_Tb = (p_Tb * (dp_Tb - delta_1b)).astype(q_bK.dtype)
        dk32_TK[...] += _dot(ds_Tb, q_bK, (1, 0))
        dq_SK[at, :] = (_dot(k_KT[...], ds_Tb, (1, 0)) * scale).T.astype(dq_SK.dtype)

    _each_block(S, T, run)

    @pl.when(last)
    def _():
        dk_TK[...] = (dk32_TK[...] * scale).astype(dk_TK.dtype)
        dv_TK[...] = dv32_TK[...].astype(dv_TK.dtype)


def _backward(interpret, q_BHSK, k_BGTK, v_BTM, bias_B1T, out_BSM, lse_BH1S, dout_BSM):
    B, H, S, K = q_BHSK.shape
    G, T = k_BGTK.shape[1:3]
    R = H // G
    # The query heads of one key head follow each other: its gradients are summed in VMEM.
    queries = pl.BlockSpec((None, None, S, K), lambda b, g, r: (b, g * R + r, 0, 0))
    keys = pl.BlockSpec((None, None, T, K), lambda b, g, r: (b, g, 0, 0))
    values = pl.BlockSpec((None, T, K), lambda b, g, r: (b, 0, g))
    outs = pl.BlockSpec((None, S, K), lambda b, g, r: (b, 0, g * R + r))
    row = pl.BlockSpec((None, None, 1, S), lambda b, g, r: (b, g * R + r, 0, 0))
    bias = pl.BlockSpec((None, 1, T), lambda b, g, r: (b, 0, 0))
    return pl.pallas_call(
        _backward_kernel,
        grid=(B, G, R),
        in_specs=[queries, keys, values, bias, outs, row, outs],
        out_specs=[queries, keys, values],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BHSK, k_BGTK, v_BTM)],
        scratch_shapes=[
            pltpu.VMEM((T, LANES), jnp.float32),
            pltpu.VMEM((K, T), k_BGTK.dtype),
            pltpu.VMEM((T, K), jnp.float32),
            pltpu.VMEM((T, K), jnp.float32),
        ],
        compiler_params=_compiler_params(),
        cost_estimate=_cost(q_BHSK, k_BGTK, products=5),
        name="mmada_attention_backward",
        interpret=interpret,
    )(q_BHSK, k_BGTK, v_BTM, bias_B1T, out_BSM, lse_BH1S, dout_BSM)


def _compiler_params():
    return pltpu.CompilerParams(vmem_limit_bytes=64 * 2**20)


def _cost(q_BHSK, k_BGTK, products: int):
    """For the compiler's scheduler: the products of [S, K] and [T, K], and one pass over all."""
    B, H, S, K = q_BHSK.shape
    T = k_BGTK.shape[2]
    return pl.CostEstimate(
        flops=products * 2 * B * H * S * T * K,
        transcendentals=B * H * S * T,
        bytes_accessed=products * (q_BHSK.size + k_BGTK.size) * q_BHSK.dtype.itemsize,
    )
