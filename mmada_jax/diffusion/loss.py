"""Token log-probabilities and the one weighted loss, without the [B, L, V] logits.

Every device takes its own rows, `chunk` positions at a time, and only those that count. The head is
gathered once, not once per chunk, and the loss's gradients are formed in the same pass: what would
be recomputed in the backward pass is the most expensive matrix product of the model.

N positions of a device, C positions of a chunk, beside the letters of transformer.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmada_jax.devices import sharding
from mmada_jax.devices.sharding import REST, USE


def token_log_probs(
    h_BLD: jax.Array,
    head_DV: jax.Array,
    targets_BL: jax.Array,
    wanted_BL: jax.Array,
    chunk: int | None = None,
) -> jax.Array:
    """log p(target), float32 [B, L], softmax over the whole vocabulary; 0 where it isn't `wanted`.

    `chunk` positions of a device have logits at a time; None takes all at once. Can't be
    differentiated; `of_log_probs` is, for functions of these.
    """
    weights_BL = jnp.where(wanted_BL, -1.0, 0.0).astype(jnp.float32)
    head_DV = head_DV.astype(h_BLD.dtype)
    return _run(h_BLD, head_DV, targets_BL, weights_BL, chunk, gradients=False).weighted_BL


def weighted_nll(
    h_BLD: jax.Array,
    head_DV: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The loss in nats, sum of weight * -log p(target) over all positions; and its share per row [B].

    Differentiable in h and the head, by the loss alone: the share per row is for looking at.
    """
    head_DV = head_DV.astype(h_BLD.dtype)
    loss, each_B = _weighted_nll(chunk, h_BLD, head_DV, targets_BL, weights_BL)
    return loss, jax.lax.stop_gradient(each_B)


def of_log_probs(
    f: Callable[[jax.Array], tuple[jax.Array, Any]],
    h_BLD: jax.Array,
    head_DV: jax.Array,
    targets_BL: jax.Array,
    wanted_BL: jax.Array,
    chunk: int | None = None,
) -> tuple[jax.Array, Any]:
    """f(token_log_probs) -> (value, anything); differentiable in h and the head, by the value alone.

    By the chain rule the gradient is that of `weighted_nll` with f's derivatives as weights.
    """
    still = jax.lax.stop_gradient((h_BLD, head_DV))
    logp_BL = token_log_probs(*still, targets_BL, wanted_BL, chunk)
    (value, other), slope_BL = jax.value_and_grad(f, has_aux=True)(logp_BL)
    linear, _ = weighted_nll(h_BLD, head_DV, targets_BL, -slope_BL, chunk)
    return value + (linear - jax.lax.stop_gradient(linear)), other


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_nll(chunk, h_BLD, head_DV, targets_BL, weights_BL):
    out = _run(h_BLD, head_DV, targets_BL, weights_BL, chunk, gradients=False)
    return jnp.sum(out.weighted_BL), jnp.sum(out.weighted_BL, axis=1)


def _weighted_nll_fwd(chunk, h_BLD, head_DV, targets_BL, weights_BL):
    out = _run(h_BLD, head_DV, targets_BL, weights_BL, chunk, gradients=True)
    return (jnp.sum(out.weighted_BL), jnp.sum(out.weighted_BL, axis=1)), (out.h_BLD, out.head_DV)


def _weighted_nll_bwd(chunk, gradients, cotangents):
    scale, _ = cotangents
    dh_BLD, dhead_DV = gradients
    return scale.astype(dh_BLD.dtype) * dh_BLD, scale.astype(dhead_DV.dtype) * dhead_DV, None, None


_weighted_nll.defvjp(_weighted_nll_fwd, _weighted_nll_bwd)


class _Out(NamedTuple):
    """weight * nll of every position, and the gradients of its sum (None without gradients)."""

    weighted_BL: jax.Array
    h_BLD: jax.Array | None
    head_DV: jax.Array | None


def _run(h_BLD, head_DV, targets_BL, weights_BL, chunk, gradients: bool) -> _Out:
    """Every device on its own rows, and on its own part of the vocabulary if that is split."""
    rows, hidden = USE.spec("batch", "length"), USE.spec("batch", "length", "embed")
    run = functools.partial(_on_device, chunk=chunk, gradients=gradients)
    run = sharding.on_each_device(
        run,
        in_specs=(hidden, USE.spec("embed", "vocab"), rows, rows),
        out_specs=_Out(rows, hidden, REST.spec("embed", "vocab")) if gradients else _Out(rows, None, None),
    )
    return run(h_BLD, head_DV, targets_BL, weights_BL)


def _on_device(h_BLD, head_DV, targets_BL, weights_BL, *, chunk, gradients: bool) -> _Out:
    B, L, D = h_BLD.shape
    V, N = head_DV.shape[1], B * L
    n_chunks = -(-N // (chunk or N))
    C = -(-N // n_chunks)
    h_ND, targets_N, weights_N = (x.reshape(N, *x.shape[2:]) for x in (h_BLD, targets_BL, weights_BL))

    # Positions that count come first, then the loop ends where they do. All devices take as many
    # chunks as the one that has most: they would wait for it anyway.
    order_N = jnp.argsort(weights_N == 0)  # stable
    place_N = jnp.argsort(order_N)
    order_M = jnp.pad(order_N, (0, n_chunks * C - N), constant_values=N)  # N: no position
    n_counting = sharding.all_max(jnp.sum(weights_N != 0), "batch")
    first_id = sharding.first_of(V, "vocab")

    def take(i, out):
        at_C = jax.lax.dynamic_slice_in_dim(order_M, i * C, C)
        h_CD, targets_C, weights_C = (
            jnp.take(x, at_C, axis=0, mode="fill", fill_value=0) for x in (h_ND, targets_N, weights_N)
        )
        logits_CV = jnp.einsum("CD,DV->CV", h_CD, head_DV, preferred_element_type=jnp.float32)
        is_target_CV = jnp.arange(V)[None] + first_id == targets_C[:, None]
        max_C = sharding.all_max(jnp.max(logits_CV, axis=1), "vocab")
        sum_C = sharding.all_sum(jnp.sum(jnp.exp(logits_CV - max_C[:, None]), axis=1), "vocab")
        picked_C = sharding.all_sum(jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=1), "vocab")
        lse_C = max_C + jnp.log(sum_C)
        weighted_M = jax.lax.dynamic_update_slice_in_dim(
            out.weighted_BL, weights_C * (lse_C - picked_C), i * C, 0
        )
        if not gradients:
            return _Out(weighted_M, None, None)
        p_CV = jnp.exp(logits_CV - lse_C[:, None])
        dlogits_CV = ((p_CV - is_target_CV.astype(jnp.float32)) * weights_C[:, None]).astype(h_ND.dtype)
        dh_CD = jnp.einsum("CV,DV->CD", dlogits_CV, head_DV, preferred_element_type=jnp.float32)
        dh_CD = sharding.all_sum(dh_CD, "vocab").astype(h_ND.dtype)
        dhead_DV = jnp.einsum("CD,CV->DV", h_CD, dlogits_CV, preferred_element_type=jnp.float32)
        return _Out(
            weighted_M,
            jax.lax.dynamic_update_slice_in_dim(out.h_BLD, dh_CD, i * C, 0),
            out.head_DV + dhead_DV,
        )

    M = n_chunks * C
    out = _Out(jnp.zeros(M, jnp.float32), None, None)
    if gradients:
        out = _Out(out.weighted_BL, jnp.zeros((M, D), h_ND.dtype), jnp.zeros((D, V), jnp.float32))
    n_needed = -(-n_counting // C)
    out = take(0, out) if n_chunks == 1 else jax.lax.fori_loop(0, n_needed, take, out)

    weighted_BL = out.weighted_BL[place_N].reshape(B, L)
    if not gradients:
        return _Out(weighted_BL, None, None)
    dhead_DV = sharding.scatter_sum(out.head_DV.astype(head_DV.dtype))
    return _Out(weighted_BL, out.h_BLD[place_N].reshape(B, L, D), dhead_DV)
