"""Stored keys and values of rows that are decoded: N layers, B rows, G heads, P places, K head width."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmada_jax.devices import sharding
from mmada_jax.devices.sharding import USE

AXES = ("layers", "batch", "kv_heads", "length", "head_dim")


class Cache(NamedTuple):
    """Keys (after RoPE) and values of all layers, in the dtype of the computation.

    Both lie head by head, as attention reads them, so that nothing stored is moved in a step."""

    k_NBGPK: jax.Array
    v_NBGPK: jax.Array


def empty(layers: int, rows: int, kv_heads: int, places: int, d_head: int, dtype: Any) -> Cache:
    """Room for rows of so many places."""
    zero = jnp.zeros((layers, rows, kv_heads, places, d_head), dtype)
    return Cache(*(sharding.constrain(zero, *AXES) for _ in range(2)))


def row_bytes(layers: int, kv_heads: int, places: int, d_head: int, dtype: Any) -> int:
    """Bytes of a row with so many places, on all devices that share it."""
    return 2 * layers * kv_heads * places * d_head * jnp.dtype(dtype).itemsize


def shardings(mesh: jax.sharding.Mesh) -> Cache:
    """Where a cache lies on a mesh: rows and heads are split as in the computation."""
    place = jax.sharding.NamedSharding(mesh, USE.spec(*AXES))
    return Cache(place, place)


def by_head(v_BPM: jax.Array, kv_heads: int) -> jax.Array:
    """Values with the heads side by side [B, P, G * K] -> head by head [B, G, P, K]."""
    B, P, M = v_BPM.shape
    return v_BPM.reshape(B, P, kv_heads, M // kv_heads).swapaxes(1, 2)


def row(cache: Cache, number: jax.Array) -> Cache:
    """One row of the cache, as a cache of one row."""
    return Cache(*(jax.lax.dynamic_slice_in_dim(x, number, 1, axis=1) for x in cache))


def put_row(cache: Cache, one: Cache, number: jax.Array) -> Cache:
    """The cache with another row in the place of one of its rows."""
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=number, axis=1)
    return Cache(*(put(x, y) for x, y in zip(cache, one, strict=True)))


def store_at(cache: Cache, new: Cache, place_BQ: jax.Array, keep_BQ: jax.Array) -> Cache:
    """The cache with the keys and values of Q places, all different and in any order, where `keep` says
    so."""
    place_BQ = jnp.where(keep_BQ, place_BQ, cache.k_NBGPK.shape[3])  # beyond the row, so that it is dropped

    def put(old_NGPK, new_NGQK, place_Q):
        return old_NGPK.at[:, :, place_Q].set(new_NGQK, mode="drop")

    put = jax.vmap(put, in_axes=(1, 1, 0), out_axes=1)
    return Cache(*(put(x, y, place_BQ) for x, y in zip(cache, new, strict=True)))


def store(cache: Cache, new: Cache, at_B: jax.Array, keep_BQ: jax.Array) -> Cache:
    """The cache with the keys and values of Q successive places from `at` on, where `keep` says so."""

    def put(old_NGPK, new_NGQK, at, keep_Q):
        before_NGQK = jax.lax.dynamic_slice_in_dim(old_NGPK, at, keep_Q.shape[0], axis=2)
        new_NGQK = jnp.where(keep_Q[:, None], new_NGQK, before_NGQK)
        return jax.lax.dynamic_update_slice_in_dim(old_NGPK, new_NGQK, at, axis=2)

    if len(at_B) == 1:  # no scatter is needed
        parts = ((x[:, 0], y[:, 0]) for x, y in zip(cache, new, strict=True))
        return Cache(*(put(x, y, at_B[0], keep_BQ[0])[:, None] for x, y in parts))
    put = jax.vmap(put, in_axes=(1, 1, 0, 0), out_axes=1)
    return Cache(*(put(x, y, at_B, keep_BQ) for x, y in zip(cache, new, strict=True)))
