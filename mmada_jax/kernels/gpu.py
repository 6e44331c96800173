"""Bidirectional flash attention for NVIDIA GPUs: Pallas kernels that Triton compiles.

softmax(q k^T / sqrt(K)) v without an [S, T] array in memory (FlashAttention-2, arXiv:2307.08691), the
keys spread over programs where there are few queries (Flash-Decoding, Dao et al. 2023).

Letters: B rows of the batch, S queries, T keys, H query heads, G key heads, K head width. The R = H / G
query heads that share a key head form one matrix in the kernels: line i of its I = S * R is head i % R
of query i // R. So a block of keys is read once for all of them, and dk and dv come out summed over
them. N is the number of parts that the keys are split into. Logsumexps are in base 2.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mmada_jax.kernels import KEPT

LOG2_E = float(np.log2(np.e))  # the hardware's exponential is exp2

# Scores of keys that aren't valid are -inf but a maximum starts here, finite: a line that has seen no
# valid key yet computes exp2(-inf - FLOOR) = 0, never -inf + inf.
FLOOR = -1e30


class Blocks(typing.NamedTuple):
    """Lines and keys of one program's tile, and Triton's warps and pipeline stages."""

    lines: int
    keys: int
    warps: int
    stages: int


# Blocks by the head width K up to which they hold. They are what Triton compiles for an A100 and an H100
# with hardly a register spilled; which are the fastest hasn't been measured on hardware. In shared memory
# a program holds `lines` heads, twice that for gradients (q and dout), and 2 * stages * `keys` heads (k
# and v), with lines and keys swapped for dk and dv. At 2 bytes a number that is 128 KB forward and 96 KB
# backward for K = 128, 160 KB for K = 256; an A100 has 163 KB, an H100 227 KB.
FORWARD_BLOCKS = {128: Blocks(128, 64, 8, 3), 256: Blocks(64, 64, 8, 2)}
BACKWARD_BLOCKS = {128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 2)}
# Products of float32 don't run on tensor cores and keep whole tiles in registers.
FLOAT32_BLOCKS = {64: Blocks(32, 32, 4, 2), 256: Blocks(16, 16, 4, 2)}
WIDEST = 256

# Up to FEW_QUERIES the keys are split into parts of PART_KEYS or more, as many as bring the programs to
# PROGRAMS: two for each multiprocessor of an H100.
FEW_QUERIES, PART_KEYS, PROGRAMS = 128, 256, 256


def attention(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    valid_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the valid keys, never causal; [B, S, H, K] in q's dtype.

    G divides H: query head h reads key head h // (H / G). Softmax and sums are in float32, products
    take the inputs' dtype. Keys that aren't valid have no influence and get zero gradients, in any
    pattern; those before a row's first or after its last valid key aren't even read. A row without
    valid keys gets zeros. `interpret` runs the kernels on any device, slowly.

    Raises:
        ValueError: shapes or dtypes that don't fit each other, or K above 256.
    """
    check(q_BSHK, k_BTGK, v_BTGK, valid_BT)
    K = q_BSHK.shape[-1]
    # Triton multiplies matrices whose sides are powers of two from 16 up. Zeros change no score.
    pad = [(0, 0), (0, 0), (0, 0), (0, padded(K) - K)]
    q_BSHK, k_BTGK, v_BTGK = (jnp.pad(x, pad) for x in (q_BSHK, k_BTGK, v_BTGK))
    return flash(K**-0.5, interpret, q_BSHK, k_BTGK, v_BTGK, valid_BT)[..., :K]


def check(q_BSHK, k_BTGK, v_BTGK, valid_BT):
    """Raise a ValueError for inputs that the kernels would misread."""
    B, _, H, K = q_BSHK.shape
    T, G = k_BTGK.shape[1:3]
    if not k_BTGK.shape == v_BTGK.shape == (B, T, G, K) or valid_BT.shape != (B, T) or H % G:
        raise ValueError(
            f"q {q_BSHK.shape} needs k and v [B, T, G, K] with G a divisor of H and validity [B, T], not "
            f"{k_BTGK.shape}, {v_BTGK.shape} and {valid_BT.shape}"
        )
    if not q_BSHK.dtype == k_BTGK.dtype == v_BTGK.dtype:
        raise ValueError(f"cast q {q_BSHK.dtype}, k {k_BTGK.dtype} and v {v_BTGK.dtype} to one dtype")
    if K > WIDEST:
        raise ValueError(
            f"head width K = {K} is over {WIDEST}, which outgrows a GPU's shared memory; use another "
            "implementation of attention or more, narrower heads"
        )


def padded(size: int) -> int:
    """The least size of a matrix' side, from this one up, that Triton can multiply."""
    return max(16, pl.next_power_of_2(size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def flash(scale, interpret, q_BSHK, k_BTGK, v_BTGK, valid_BT):
    """Attention of heads whose width needs no padding."""
    return run_forward(scale, interpret, q_BSHK, k_BTGK, v_BTGK, valid_BT)[0]


def save_for_backward(scale, interpret, q_BSHK, k_BTGK, v_BTGK, valid_BT):
    """The result, and what the gradients need."""
    out_BSHK, lse_BGI = run_forward(scale, interpret, q_BSHK, k_BTGK, v_BTGK, valid_BT)
    out_BSHK, lse_BGI = checkpoint_name(out_BSHK, KEPT), checkpoint_name(lse_BGI, KEPT)
    return out_BSHK, (q_BSHK, k_BTGK, v_BTGK, valid_BT, out_BSHK, lse_BGI)


def run_forward(scale, interpret, q_BSHK, k_BTGK, v_BTGK, valid_BT):
    """The result, and the logsumexp of each line's scores."""
    B, S, H, K = q_BSHK.shape
    T, G = k_BTGK.shape[1:3]
    I = S * H // G
    blocks = choose_blocks(FORWARD_BLOCKS, I, T, K, q_BSHK.dtype)
    line_blocks = pl.cdiv(I, blocks.lines)
    N = count_parts(S, T, line_blocks * G * B)
    out_NBSGRK, lse_NBGI = call(
        functools.partial(forward_kernel, scale, blocks, N),
        (line_blocks, N, G, B),
        blocks,
        interpret,
        [
            ("B2", valid_span(valid_BT)),
            ("BT", key_bias(valid_BT)),
            ("BSGRK", group_heads(q_BSHK, G)),
            ("BTGK", k_BTGK),
            ("BTGK", v_BTGK),
        ],
        [
            # Parts stay in float32 until they are merged.
            ("NBSGRK", (N, B, S, G, H // G, K), q_BSHK.dtype if N == 1 else jnp.float32),
            ("NBGI", (N, B, G, I), jnp.float32),
        ],
    )
    out_BSGRK, lse_BGI = (out_NBSGRK[0], lse_NBGI[0]) if N == 1 else merge_parts(out_NBSGRK, lse_NBGI)
    return out_BSGRK.reshape(B, S, H, K).astype(q_BSHK.dtype), lse_BGI


def merge_parts(out_NBSGRK, lse_NBGI):
    """The softmax over all keys from those over each part; a part without valid keys weighs nothing."""
    N, B, S, G, R, _ = out_NBSGRK.shape
    high_1BGI = jnp.max(lse_NBGI, axis=0, keepdims=True)
    lse_1BGI = high_1BGI + jnp.log2(jnp.sum(jnp.exp2(lse_NBGI - high_1BGI), axis=0, keepdims=True))
    weight_NBGSR = jnp.exp2(lse_NBGI - lse_1BGI).reshape(N, B, G, S, R)
    return jnp.sum(out_NBSGRK * weight_NBGSR.swapaxes(2, 3)[..., None], axis=0), lse_1BGI[0]


def run_backward(scale, interpret, saved, dout_BSHK):
    """Gradients of q, k and v; the probabilities are computed again from the logsumexps."""
    q_BSHK, k_BTGK, v_BTGK, valid_BT, out_BSHK, lse_BGI = saved
    B, S, H, K = q_BSHK.shape
    T, G = k_BTGK.shape[1:3]
    I = S * H // G
    # The gradient of a score is p (dp - delta), and delta is the line's mean of dp.
    delta_BSH = jnp.sum(out_BSHK.astype(jnp.float32) * dout_BSHK.astype(jnp.float32), axis=-1)
    delta_BGI = delta_BSH.reshape(B, S, G, H // G).swapaxes(1, 2).reshape(B, G, I)
    blocks = choose_blocks(BACKWARD_BLOCKS, I, T, K, q_BSHK.dtype)
    inputs = [
        ("BT", key_bias(valid_BT)),
        ("BSGRK", group_heads(q_BSHK, G)),
        ("BTGK", k_BTGK),
        ("BTGK", v_BTGK),
        ("BSGRK", group_heads(dout_BSHK, G)),
        ("BGI", lse_BGI),
        ("BGI", delta_BGI),
    ]
    [dq_BSGRK] = call(
        functools.partial(dq_kernel, scale, blocks),
        (pl.cdiv(I, blocks.lines), 1, G, B),
        blocks,
        interpret,
        [("B2", valid_span(valid_BT)), *inputs],
        [("BSGRK", (B, S, G, H // G, K), q_BSHK.dtype)],
    )
    dk_BTGK, dv_BTGK = call(
        functools.partial(dkdv_kernel, scale, blocks),
        (pl.cdiv(T, blocks.keys), 1, G, B),
        blocks,
        interpret,
        inputs,
        [("BTGK", k_BTGK.shape, k_BTGK.dtype), ("BTGK", v_BTGK.shape, v_BTGK.dtype)],
    )
    return dq_BSGRK.reshape(q_BSHK.shape), dk_BTGK, dv_BTGK, None


flash.defvjp(save_for_backward, run_backward)


def choose_blocks(table, I, T, K, dtype) -> Blocks:
    """The table's blocks for heads of K numbers, no larger than I lines and T keys need."""
    table = FLOAT32_BLOCKS if dtype == jnp.float32 else table
    blocks = next(blocks for widest, blocks in table.items() if widest >= K)
    return blocks._replace(lines=min(blocks.lines, padded(I)), keys=min(blocks.keys, padded(T)))


def count_parts(S, T, programs) -> int:
    """Into how many parts the keys are split so that few queries, too, fill a GPU."""
    return max(1, min(PROGRAMS // programs, T // PART_KEYS)) if S <= FEW_QUERIES else 1


def group_heads(x_BSHK, G):
    """[B, S, G, R, K]: the query heads of each key head."""
    B, S, H, K = x_BSHK.shape
    return x_BSHK.reshape(B, S, G, H // G, K)


def valid_span(valid_BT):
    """[B, 2]: the first valid key and the one after the last; an empty span where there is none."""
    t_1T = jnp.arange(valid_BT.shape[1], dtype=jnp.int32)[None]
    end_B1 = jnp.max(jnp.where(valid_BT, t_1T + 1, 0), axis=1, keepdims=True)
    begin_B1 = jnp.min(jnp.where(valid_BT, t_1T, end_B1), axis=1, keepdims=True)
    return jnp.concatenate([begin_B1, end_B1], axis=1)


def key_bias(valid_BT):
    """[B, T]: what is added to the scores of a key, 0 or -inf."""
    return jnp.where(valid_BT, jnp.float32(0), -jnp.inf)


def call(kernel, grid, blocks, interpret, inputs, outputs):
    """Run a kernel on a grid (block, N, G, B): inputs (letters, array), outputs (letters, shape, dtype).

    A program sees its own n, g and b of the axes N, G and B and all of the other axes, of which it
    reads and writes its blocks: no length has to be a multiple of a block's.
    """

    def view(letters, shape):
        sizes = [None if x in "NGB" else size for x, size in zip(letters, shape, strict=True)]
        return pl.BlockSpec(
            tuple(sizes), lambda i, n, g, b: tuple({"N": n, "G": g, "B": b}.get(x, 0) for x in letters)
        )

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[view(letters, array.shape) for letters, array in inputs],
        out_specs=[view(letters, shape) for letters, shape, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
        # Their type selects Triton; without it Pallas would take Mosaic GPU.
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
    )(*(array for _, array in inputs))


def forward_kernel(scale, blocks, N, span_ref, bias_ref, q_ref, k_ref, v_ref, out_ref, lse_ref):
    """A block of lines against one part of the keys: their softmax and its logsumexp."""
    I, K = lse_ref.shape[0], k_ref.shape[1]
    start = pl.program_id(0) * blocks.lines
    q = load_lines(q_ref, start, blocks.lines)
    begin, end = part_of_span(span_ref, pl.program_id(1), N, blocks.keys)

    def add_keys(j, carry):
        acc, high, total = carry
        at = begin + j * blocks.keys
        k, v = (load(ref, at, blocks.keys, end) for ref in (k_ref, v_ref))
        scores = score(q, k, scale) + load(bias_ref, at, blocks.keys, end, -jnp.inf)[None]
        new_high = jnp.maximum(high, jnp.max(scores, axis=1))
        shrink = jnp.exp2(high - new_high)
        p = jnp.exp2(scores - new_high[:, None])
        acc = acc * shrink[:, None] + multiply(p.astype(v.dtype), v)
        return acc, new_high, total * shrink + jnp.sum(p, axis=1)

    acc, high, total = lax.fori_loop(
        0,
        lax.div(end - begin + blocks.keys - 1, blocks.keys),
        add_keys,
        (
            jnp.zeros((blocks.lines, K), jnp.float32),
            jnp.full(blocks.lines, FLOOR, jnp.float32),
            jnp.zeros(blocks.lines, jnp.float32),
        ),
    )
    total = jnp.where(total > 0, total, 1.0)  # without valid keys: zeros, and a logsumexp of FLOOR
    store_lines(out_ref, start, acc / total[:, None])
    store(lse_ref, start, high + jnp.log2(total), I)


def dq_kernel(scale, blocks, span_ref, bias_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref):
    """The gradient of a block of lines of q, over all keys."""
    I, K = lse_ref.shape[0], k_ref.shape[1]
    start = pl.program_id(0) * blocks.lines
    q, dout = (load_lines(ref, start, blocks.lines) for ref in (q_ref, dout_ref))
    lse, delta = (load(ref, start, blocks.lines, I)[:, None] for ref in (lse_ref, delta_ref))
    begin, end = part_of_span(span_ref, 0, 1, blocks.keys)

    def add_keys(j, dq):
        at = begin + j * blocks.keys
        k, v = (load(ref, at, blocks.keys, end) for ref in (k_ref, v_ref))
        scores = score(q, k, scale) + load(bias_ref, at, blocks.keys, end, -jnp.inf)[None]
        dscores = jnp.exp2(scores - lse) * (multiply(dout, v, trans_b=True) - delta)
        return dq + multiply(dscores.astype(k.dtype), k)

    dq = lax.fori_loop(
        0,
        lax.div(end - begin + blocks.keys - 1, blocks.keys),
        add_keys,
        jnp.zeros((blocks.lines, K), jnp.float32),
    )
    store_lines(dq_ref, start, dq * scale)


def dkdv_kernel(scale, blocks, bias_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref):
    """The gradients of a block of keys and values, over all lines; scores are [keys, lines] here."""
    I, (T, K) = lse_ref.shape[0], k_ref.shape
    start = pl.program_id(0) * blocks.keys
    k, v = (load(ref, start, blocks.keys, T) for ref in (k_ref, v_ref))
    bias = load(bias_ref, start, blocks.keys, T, -jnp.inf)

    def add_lines(j, carry):
        dk, dv = carry
        at = j * blocks.lines
        q, dout = (load_lines(ref, at, blocks.lines) for ref in (q_ref, dout_ref))
        lse, delta = (load(ref, at, blocks.lines, I)[None] for ref in (lse_ref, delta_ref))
        p = jnp.exp2(score(k, q, scale) + bias[:, None] - lse)
        dscores = p * (multiply(v, dout, trans_b=True) - delta)
        dv += multiply(p.astype(dout.dtype), dout)
        return dk + multiply(dscores.astype(q.dtype), q), dv

    any_valid = (jnp.max(bias) == 0).astype(jnp.int32)  # a block without valid keys has no work
    zeros = jnp.zeros((blocks.keys, K), jnp.float32)
    dk, dv = lax.fori_loop(0, any_valid * pl.cdiv(I, blocks.lines), add_lines, (zeros, zeros))
    store(dk_ref, start, dk * scale, T)
    store(dv_ref, start, dv, T)


def part_of_span(span_ref, n, N, block):
    """Begin and end of part n of N of the valid keys: whole blocks, but for the last."""
    begin, end = span_ref[0], span_ref[1]
    size = lax.div(end - begin + N * block - 1, N * block) * block
    return begin + n * size, jnp.minimum(begin + (n + 1) * size, end)


def score(a, b, scale):
    """Base-2 scores a b^T."""
    return multiply(a, b, trans_b=True) * (scale * LOG2_E)


def multiply(a, b, trans_b=False):
    """Matrix product in float32 of the inputs as they are: Triton would round float32 to TF32."""
    return triton.dot(a, b, trans_b=trans_b, precision=lax.Precision.HIGHEST)


def load(ref, start, size, end, other=0.0):
    """ref[start : start + size], a vector or a matrix; `other` from `end` on."""
    index, mask = index_slice(ref, start, size, end)
    return triton.load(ref.at[index], mask=mask, other=jnp.asarray(other, ref.dtype))


def store(ref, start, value, end):
    """The counterpart of `load`."""
    index, mask = index_slice(ref, start, value.shape[0], end)
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def index_slice(ref, start, size, end):
    """Where a slice is in a vector or a matrix, and what of it is before `end`."""
    inside = start + jnp.arange(size, dtype=jnp.int32) < end
    return pl.ds(start, size), inside.reshape(size, *[1] * (ref.ndim - 1))


def load_lines(ref, start, size):
    """Lines start : start + size of the [S, R, K] of a group; zeros beyond the last."""
    index, mask = index_lines(ref, start, size)
    return triton.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def store_lines(ref, start, value):
    """The counterpart of `load_lines`."""
    index, mask = index_lines(ref, start, value.shape[0])
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def index_lines(ref, start, size):
    """Where lines are in [S, R, K], and which exist; both broadcast to [size, K]."""
    S, R, K = ref.shape
    i = start + jnp.arange(size, dtype=jnp.int32)[:, None]
    return (lax.div(i, R), lax.rem(i, R), jnp.arange(K, dtype=jnp.int32)[None]), i < S * R
