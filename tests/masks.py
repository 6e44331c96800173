"""A rollout of random tokens, revealed in a random order, and its masks: what tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.train.rl.unigrpo import Rollout, UniGRPOConfig, hide

R, L, START, MASK = 64, 24, 10, 99
SIZES = 1 + np.arange(R) % (L - START)  # tokens up to the end of text
RNG = np.random.default_rng(0)
CONFIG = UniGRPOConfig(mu=4)


def rollout():
    place = np.arange(L)[None]
    response = (place >= START) & (place < START + SIZES[:, None])
    generated = np.broadcast_to(place >= START, (R, L))
    # Revealed in a random order, two at a time.
    order = np.stack([RNG.permutation(L - START) // 2 for _ in range(R)])
    step = np.full((R, L), -1)
    step[:, START:] = order
    return Rollout(
        jnp.asarray(RNG.integers(0, MASK, (R, L)), jnp.int32),
        jnp.asarray(np.broadcast_to(place >= 2, (R, L))),
        jnp.asarray(response),
        jnp.asarray(step, jnp.int32),
        jnp.asarray(np.where(generated, -RNG.exponential(size=(R, L)), 0), jnp.float32),
        jnp.asarray(np.where(generated, RNG.exponential(size=(R, L)), 0), jnp.float32),
    )


ROLLOUT = rollout()


@functools.partial(jax.jit, static_argnames=("masking", "config", "image"))
def hide_jit(seed, n, masking, config=CONFIG, image=False):
    return hide(jax.random.key(seed), ROLLOUT, n, MASK, masking, config, image)
