"""Decoding with stored keys and values: which part of a row a step computes, and what that part sees.

A row is its prompt, finished blocks, the current block, and what is still to come. The first pass over a
block computes the block with its surroundings and stores keys and values; further steps compute less and
read the rest from the cache:

    dual      the block alone
    prefix    the block and what follows it

With a window a block sees no more of what follows than so many places and the last place of the row, at
their true positions, and the first pass over a block computes the block before it, the block and the
window: what lies further to the left keeps the keys and values that it has (Streaming-dLLM). Without a
window the first pass computes the whole row (Fast-dLLM).

A step of a picture computes the codes that were just revealed and those whose logits say least, wherever
they lie, and reads the rest (`least_certain`).

What a row computes never depends on its company, nor on the padding behind it, but for rounding where
rows share a pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmada_jax.devices import sharding
from mmada_jax.nets import cache as caches
from mmada_jax.nets.cache import Cache


class Spot(NamedTuple):
    """The block that each row decodes: it lies in [first, end), and within the `size` places from `at` on,
    which don't reach beyond the row. `begins` says that its first pass is due, or another one over all that
    there is to compute; `mask` is the id of a hidden token."""

    tokens_BL: jax.Array
    valid_BL: jax.Array
    first_B: jax.Array
    end_B: jax.Array
    at_B: jax.Array
    begins_B: jax.Array
    mask_B: jax.Array


class Part(NamedTuple):
    """A part of each row that is computed: the places from `low` on and below `until`, which lie within the
    `size` places from `at` on; with `last` the last valid place of the row too."""

    low_B: jax.Array
    until_B: jax.Array
    at_B: jax.Array
    size: int
    last: bool


class Kept(NamedTuple):
    """What is stored of a picture: keys and values, the logits of each place when it was last computed, and
    whether it was revealed since then."""

    cache: Cache
    logits_BNV: jax.Array
    changed_BN: jax.Array


def begin(network: Any, rule: Any, size: int, spot: Spot, reach: int | None, share: int) -> Cache:
    """The cache before the first step, from a pass over each row up to the window of its first block.

    No row's window ends beyond `reach`. Every `share` rows that follow each other are equal, and share
    their pass."""
    L = spot.tokens_BL.shape[1]
    unique = jax.tree.map(lambda x_B: x_B[::share], spot)
    cache = network.empty_cache(len(unique.tokens_BL), L)
    _, cache = _compute_and_store(network, rule, size, unique, cache, _from_start(rule, unique, reach or L))
    return Cache(*(jnp.repeat(x_NB, share, axis=1) for x_NB in cache)) if share > 1 else cache


def join(
    network: Any,
    rule: Any,
    size: int,
    spot: Spot,
    reach: int | None,
    cache: Cache,
    number_R: jax.Array,
    fresh_R: jax.Array,
) -> Cache:
    """The cache of S slots in which the slot of each number has the first pass over its row, as `begin`
    makes it; rows come last whose number is beyond the slots. A row that isn't fresh equals the row before
    it, and shares its pass where rows are computed one by one."""
    if sharding.parts("batch") > 1:
        new = begin(network, rule, size, spot, reach, 1)
        put = lambda x_NS, x_NR: x_NS.at[:, number_R].set(x_NR, mode="drop")  # noqa: E731
        return jax.tree.map(put, cache, new)

    def put_row(i, caches_of):
        cache, one = caches_of
        row = jax.tree.map(lambda x_R: jax.lax.dynamic_slice_in_dim(x_R, i, 1), spot)
        fresh = functools.partial(begin, network, rule, size, row, reach, 1)
        one = jax.lax.cond(fresh_R[i], fresh, lambda: one)
        return caches.put_row(cache, one, number_R[i]), one

    n = jnp.sum(number_R < cache.k_NBGPK.shape[1])
    nothing = network.empty_cache(1, spot.tokens_BL.shape[1])
    return jax.lax.fori_loop(0, n, put_row, (cache, nothing))[0]


def hidden_states(
    network: Any,
    rule: Any,
    size: int,
    length: int,
    spot: Spot,
    active_B: jax.Array,
    cache: Cache,
    together: bool = False,
) -> tuple[jax.Array, Cache]:
    """The hidden states [B, N, D] of the block's places, and the cache with what first passes store.

    With a rule that verifies there are N more, of the shadows of these places; zeros after a first pass.
    With `together` rows often begin at the same time: where half of them do, one pass is over all."""
    first = functools.partial(_first_pass, network, rule, size)
    step = functools.partial(_step, network, rule, size, length)
    if len(spot.begins_B) == 1:
        return jax.lax.cond(spot.begins_B[0], first, lambda *given: (step(*given), given[1]), spot, cache)

    like = jax.eval_shape(step, spot, cache)
    nothing_BND = jnp.zeros(like.shape, like.dtype)
    passes = _one_by_one if not together else _by_number
    passes = _all_at_once if sharding.parts("batch") > 1 else passes
    first_BND, cache = jax.lax.cond(
        jnp.any(spot.begins_B),
        functools.partial(passes, first, nothing_BND),
        lambda _, cache: (nothing_BND, cache),
        spot,
        cache,
    )
    step_BND = jax.lax.cond(jnp.any(active_B & ~spot.begins_B), step, lambda *_: nothing_BND, spot, cache)
    return jnp.where(spot.begins_B[:, None, None], first_BND, step_BND), cache


def _one_by_one(first, h_BND, spot, cache):
    """The first passes of the rows that begin, and of no others: rows rarely begin together."""
    order_B = jnp.argsort(~spot.begins_B, stable=True)

    def pass_of_row(i, h_and_cache):
        h_BND, cache = h_and_cache
        row = order_B[i]
        one = jax.tree.map(lambda x_B: jax.lax.dynamic_slice_in_dim(x_B, row, 1), spot)
        h_1ND, of_row = first(one, caches.row(cache, row))
        h_BND = jax.lax.dynamic_update_slice_in_dim(h_BND, h_1ND, row, 0)
        return h_BND, caches.put_row(cache, of_row, row)

    return jax.lax.fori_loop(0, jnp.sum(spot.begins_B), pass_of_row, (h_BND, cache))


def _by_number(first, h_BND, spot, cache):
    """The same in one pass over all rows, if at least half of them begin."""
    many = 2 * jnp.sum(spot.begins_B) >= len(spot.begins_B)
    of_all, of_each = (functools.partial(passes, first) for passes in (_all_at_once, _one_by_one))
    return jax.lax.cond(many, of_all, of_each, h_BND, spot, cache)


def _all_at_once(first, _, spot, cache):
    """The same where each pass is over all rows, and the rows that don't begin keep what they have. Devices
    over which rows are spread compute in step."""
    h_BND, new = first(spot, cache)
    begins_B = spot.begins_B[:, None, None, None]
    return h_BND, Cache(*(jnp.where(begins_B, x, y) for x, y in zip(new, cache, strict=True)))


def _first_pass(network, rule, size, spot, cache):
    L = spot.tokens_BL.shape[1]
    if rule.window is None:
        part = _from_start(rule, spot, L)
    else:
        low_B, width = spot.first_B - size, min(2 * size + rule.window, L)
        part = Part(low_B, _reach(rule, spot), jnp.clip(low_B, 0, L - width), width, True)
    return _compute_and_store(network, rule, size, spot, cache, part)


def _step(network, rule, size, length, spot, cache):
    L = spot.tokens_BL.shape[1]
    if rule.cache == "dual":
        part = Part(spot.first_B, spot.end_B, spot.at_B, size, False)
    else:
        ahead = length - size if rule.window is None else rule.window
        width = min(size + ahead, L)
        at_B = jnp.minimum(spot.first_B, L - width)
        until_B = at_B + width if rule.window is None else _reach(rule, spot)
        part = Part(spot.first_B, until_B, at_B, width, rule.window is not None)
    h_BQD, _, _ = _compute(network, rule, spot, cache, part, size if rule.verify else 0)
    return _of_block(h_BQD, size, spot, part, rule)


def with_shadows(network: Any, rule: Any, size: int, spot: Spot) -> jax.Array:
    """The hidden states of the block's places and of their shadows [B, 2 N, D], without a cache."""
    part = _from_start(rule, spot, spot.tokens_BL.shape[1])
    h_BQD, _, _ = _compute(network, rule, spot, None, part, size)
    return _of_block(h_BQD, size, spot, part, rule)


def least_certain(
    network: Any,
    logits_of: Callable[[jax.Array], jax.Array],
    count: int,
    spot: Spot,
    rows: tuple[jax.Array, jax.Array],
    hidden_BN: jax.Array,
    active_B: jax.Array,
    kept: Kept,
) -> Kept:
    """What is kept after a step. Rows that begin compute all of their tokens, the others `count` places of
    the block, and keep what they have of all else.

    Places that have changed come first: without them a hidden token would see nothing new, and become what
    it was. Then come hidden tokens, those whose largest logit is lowest. `rows` are the tokens
    and the validity [R, L] of what is computed, as many for each of the B rows as the cache has for it,
    side by side; `logits_of` makes logits [B, ...] of their hidden states [R, ...]."""
    (B, N), R = hidden_BN.shape, len(rows[0])
    each = functools.partial(jnp.repeat, repeats=R // B, axis=0)
    tokens_RL, valid_RL = rows

    def whole(cache, kept_BNV, changed_BN):
        place_RL = jnp.broadcast_to(jnp.arange(tokens_RL.shape[1], dtype=jnp.int32), tokens_RL.shape)
        h_RLD, new = network.hidden_block(tokens_RL, place_RL, valid_RL)
        logits_BNV = logits_of(take(h_RLD, each(spot.at_B), N))
        begins_R = each(spot.begins_B)[None, :, None, None, None]
        cache = Cache(*(jnp.where(begins_R, x, y) for x, y in zip(new, cache, strict=True)))
        kept_BNV = jnp.where(spot.begins_B[:, None, None], logits_BNV, kept_BNV)
        return Kept(cache, kept_BNV, changed_BN & ~spot.begins_B[:, None])

    def part(cache, kept_BNV, changed_BN):
        place_BN = spot.at_B[:, None] + jnp.arange(N, dtype=jnp.int32)[None]
        outside_BN = (place_BN < spot.first_B[:, None]) | (place_BN >= spot.end_B[:, None])
        order_BN = jnp.lexsort((jnp.max(kept_BNV, axis=-1), ~hidden_BN, ~changed_BN, outside_BN))
        index_BQ = order_BN[:, :count]
        own_BQ = ~jnp.take_along_axis(outside_BN, index_BQ, axis=1) & (active_B & ~spot.begins_B)[:, None]
        place_RQ, own_RQ = each(jnp.take_along_axis(place_BN, index_BQ, axis=1)), each(own_BQ)
        own_RQ &= jnp.take_along_axis(valid_RL, place_RQ, axis=1)
        # Places that aren't computed go beyond the row, where they are dropped.
        hide = jax.vmap(lambda seen_L, place_Q: seen_L.at[place_Q].set(False, mode="drop"))
        seen_RL = hide(valid_RL, jnp.where(own_RQ, place_RQ, valid_RL.shape[1]))
        tokens_RQ = jnp.take_along_axis(tokens_RL, place_RQ, axis=1)
        h_RQD, new = network.hidden_block(tokens_RQ, place_RQ, own_RQ, cache, seen_RL)
        put = jax.vmap(lambda old_N, index_Q, new_Q: old_N.at[index_Q].set(new_Q, mode="drop"))
        index_BQ = jnp.where(own_BQ, index_BQ, N)
        kept_BNV = put(kept_BNV, index_BQ, logits_of(h_RQD))
        changed_BN = put(changed_BN, index_BQ, jnp.zeros_like(own_BQ))
        return Kept(caches.store_at(cache, new, place_RQ, own_RQ), kept_BNV, changed_BN)

    def same(*given):
        return Kept(*given)

    kept = jax.lax.cond(jnp.any(spot.begins_B), whole, same, *kept)
    return jax.lax.cond(jnp.any(active_B & ~spot.begins_B), part, same, *kept)


def _of_block(h_BQD, size, spot, part, rule):
    """The hidden states of the block's places, with those of their shadows behind them."""
    h_BND = take(h_BQD, spot.at_B - part.at_B, size)
    if not rule.verify:
        return h_BND
    shadow_BND = h_BQD[:, -size:] if h_BQD.shape[1] > part.size + part.last else jnp.zeros_like(h_BND)
    return jnp.concatenate([h_BND, shadow_BND], axis=1)


def _from_start(rule, spot, width):
    zero_B = jnp.zeros_like(spot.first_B)
    if rule.window is None:
        return Part(zero_B, zero_B + width, zero_B, width, False)
    return Part(zero_B, _reach(rule, spot), zero_B, width, True)


def _reach(rule, spot):
    """The place after the window of each row's block."""
    return spot.end_B + rule.window


def _compute_and_store(network, rule, size, spot, cache, part):
    """The hidden states of the block's places, and the cache with the keys and values of the part."""
    h_BQD, new, own_BQ = _compute(network, rule, spot, cache, part)
    width = part.size
    cache = caches.store(cache, Cache(*(x[..., :width, :] for x in new)), part.at_B, own_BQ[:, :width])
    if part.last:
        of_last = Cache(*(x[..., width:, :] for x in new))
        cache = caches.store(cache, of_last, _last(spot.valid_BL), own_BQ[:, width:])
    return _of_block(h_BQD, size, spot, part, rule), cache


def _compute(network, rule, spot, cache, part, shadows=0):
    """Hidden states, keys and values of a part, and which of its places were computed. The last of them
    are those of as many `shadows`, masks at the places of the block.

    The part sees itself and, in the cache, the places of its row that are seen and lie outside of it."""
    L = spot.tokens_BL.shape[1]
    low_B1, until_B1, last_B1 = (x[:, None] for x in (part.low_B, part.until_B, _last(spot.valid_BL)))
    place_BQ = part.at_B[:, None] + jnp.arange(part.size, dtype=jnp.int32)[None]
    own_BQ = (place_BQ >= low_B1) & (place_BQ < until_B1)
    if part.last:
        # It has a column of its own, unless it lies in the part anyway.
        place_BQ = jnp.concatenate([place_BQ, last_B1], axis=1)
        own_BQ = jnp.concatenate([own_BQ, last_B1 >= until_B1], axis=1)
    own_BQ &= jnp.take_along_axis(spot.valid_BL, place_BQ, axis=1)
    tokens_BQ = jnp.take_along_axis(spot.tokens_BL, place_BQ, axis=1)
    if shadows:
        block_BN = spot.at_B[:, None] + jnp.arange(shadows, dtype=jnp.int32)[None]
        place_BQ = jnp.concatenate([place_BQ, block_BN], axis=1)
        in_block_BN = (block_BN >= spot.first_B[:, None]) & (block_BN < spot.end_B[:, None])
        own_BQ = jnp.concatenate([own_BQ, in_block_BN], axis=1)
        mask_BN = jnp.broadcast_to(spot.mask_B[:, None], block_BN.shape).astype(tokens_BQ.dtype)
        tokens_BQ = jnp.concatenate([tokens_BQ, mask_BN], axis=1)

    place_1L = jnp.arange(L, dtype=jnp.int32)[None]
    seen_BL = spot.valid_BL & ~((place_1L >= low_B1) & (place_1L < until_B1))
    if part.last:
        seen_BL &= place_1L != last_B1
    if rule.window is not None:
        seen_BL &= (place_1L < _reach(rule, spot)[:, None]) | (place_1L == last_B1)
    whole = part.size == L and rule.window is None
    stored = () if whole else (cache, seen_BL)
    h_BQD, new = network.hidden_block(tokens_BQ, place_BQ, own_BQ, *stored, shadows=shadows)
    return h_BQD, new, own_BQ


def _last(valid_BL):
    """The last valid place of each row."""
    L = valid_BL.shape[1]
    return L - 1 - jnp.argmax(valid_BL[:, ::-1], axis=1).astype(jnp.int32)


def take(x_BL: jax.Array, at_B: jax.Array, size: int) -> jax.Array:
    """The `size` entries of each row from `at` on."""
    return jax.vmap(lambda x_L, at: jax.lax.dynamic_slice_in_dim(x_L, at, size))(x_BL, at_B)
