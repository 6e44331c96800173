"""Token log-probabilities without the [B, L, V] logits, and the one weighted loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def token_log_probs(
    unembed: Callable[[jax.Array], jax.Array],
    h_BLD: jax.Array,
    targets_BL: jax.Array,
    chunk: int | None = None,
) -> jax.Array:
    """log p(target) at every position, float32 [B, L], softmax over the whole vocabulary.

    `unembed` maps hidden states [..., D] to logits [..., V]. They are formed for `chunk` positions
    of every row at a time and formed anew in the backward pass; None takes all positions at once.
    """
    B, L, D = h_BLD.shape

    def log_probs(h, targets):
        logits = unembed(h).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    if chunk is None or chunk >= L:
        return log_probs(h_BLD, targets_BL)
    n = -(-L // chunk)
    pad = ((0, 0), (0, n * chunk - L))
    h_nBcD = jnp.moveaxis(jnp.pad(h_BLD, (*pad, (0, 0))).reshape(B, n, chunk, D), 1, 0)
    targets_nBc = jnp.moveaxis(jnp.pad(targets_BL, pad).reshape(B, n, chunk), 1, 0)
    body = jax.checkpoint(lambda _, x: (None, log_probs(*x)), prevent_cse=False)
    _, logp_nBc = jax.lax.scan(body, None, (h_nBcD, targets_nBc))
    return jnp.moveaxis(logp_nBc, 0, 1).reshape(B, n * chunk)[:, :L]


def weighted_nll(
    unembed: Callable[[jax.Array], jax.Array],
    h_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int | None = None,
) -> jax.Array:
    """sum over positions of weight * -log p(target), per row [B]; its sum is the loss, in nats."""
    return -jnp.sum(weights_BL * token_log_probs(unembed, h_BLD, targets_BL, chunk), axis=1)
