"""The reverse process: one loop that fills a span of hidden tokens.

A span is the positions of a row from its start on, as many as its length. Positions of the span that are
not hidden at the start stay as they are: that is inpainting, and extrapolation, of text and images.
Every row has a block, a step and a key of its own, so what becomes of it doesn't depend on its company.

How a step reveals tokens is in `rules`. Networks are in `nets`, meshes and jitted functions in
`decode`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.devices import sharding
from mmada_jax.diffusion import cached, rules
from mmada_jax.diffusion.rules import Rule
from mmada_jax.tokens.vocab import Vocab


class Denoiser(Protocol):
    """What predicts hidden tokens: a trunk and a head, as `nets.transformer.Network` has them."""

    def hidden_states(self, tokens_BL: jax.Array, valid_BL: jax.Array) -> jax.Array:
        """Tokens and their validity [B, L] -> hidden states [B, L, D]."""

    def unembed(self, h_BLD: jax.Array, first: int = 0, size: int | None = None) -> jax.Array:
        """Hidden states [..., D] -> logits [..., size] of `size` ids from `first` on, by default all."""


class Record(NamedTuple):
    """How the tokens of a decoding came about.

    `step` counts the steps of a row, over all its blocks, until a token was revealed; it is -1 for a
    token that was given, and NEVER for one that stayed hidden. `logp` is the log-probability of the token
    when it was revealed, `entropy` the entropy of the distribution that it was drawn from, in nats. Both
    are over the rule's vocabulary, at temperature 1 and without guidance, and 0 where nothing was
    revealed.
    """

    step_BL: jax.Array
    logp_BL: jax.Array
    entropy_BL: jax.Array


NEVER = LONG = np.iinfo(np.int32).max


class Draft(NamedTuple):
    """What a decoding is given: rows, the span of each that is to be filled, its key. `other` are the
    unconditional rows of guidance and their validity."""

    tokens_BL: jax.Array
    valid_BL: jax.Array
    start_B: jax.Array
    length_B: jax.Array
    key_B: jax.Array
    other: tuple[jax.Array, jax.Array] | None = None


class State(NamedTuple):
    """Where each row of a decoding stands: its tokens, the number of the current block of its span, the
    number of the step within the block, and its steps over all blocks. If a record is kept, the record so
    far. If the rule has caches, the stored keys and values of all layers; the caches of a row stand side
    by side. `kept` are logits [B, N, V] for the next steps: if the rule reuses guidance, how far the
    conditional ones were from the unconditional ones when both were last computed; if steps compute a part
    of the places, those that each place had when it was last computed. Then `changed` [B, N] says which
    places were revealed since."""

    tokens_BL: jax.Array
    block_B: jax.Array
    step_B: jax.Array
    steps_B: jax.Array
    record: Record | None = None
    cache: Any = None
    kept: jax.Array | None = None
    changed: jax.Array | None = None


def denoise(
    network: Denoiser,
    tokens_BL: jax.Array,
    valid_BL: jax.Array,
    *,
    start: int | jax.Array,
    length: int,
    rule: Rule,
    vocab: Vocab,
    key: jax.Array,
    lengths: jax.Array | None = None,
    unconditional: tuple[jax.Array, jax.Array] | None = None,
    record: bool = False,
    reach: int | None = None,
    share: int = 1,
) -> Any:
    """Fills the hidden tokens of the spans; returns the rows [B, L], with `record` the pair of them and
    their Record.

    A span begins at `start`, one number for all rows or one for each [B]. It has `length` tokens, or
    where `lengths` [B] is given that many of them. Guidance runs a second row beside each, and combines
    the logits of the conditional row c and the unconditional row u: u + (1 + guidance) (c - u). Outside
    of the span the second row is `unconditional` = (tokens, valid); without that, its tokens are hidden,
    as LLaDA does for text. Within the span it is what has been revealed so far. Draws are float32 Gumbel
    noise from the key of each row ([B], or one key that is folded with the number of the row), folded
    with the step within the block and the place in the span. Wrap in `jax.jit` with `rule`, `vocab` and
    `length` static; one compilation serves every prompt.
    """
    rule.check_length(length)
    B, L = tokens_BL.shape
    if isinstance(start, int) and not 0 <= start <= start + length <= L:
        raise ValueError(f"span [{start}, {start + length}) is outside a row of {L} tokens")
    draft = Draft(
        jnp.asarray(tokens_BL, jnp.int32),
        jnp.asarray(valid_BL),
        jnp.broadcast_to(jnp.asarray(start, jnp.int32), (B,)),
        jnp.broadcast_to(jnp.asarray(length if lengths is None else lengths, jnp.int32), (B,)),
        key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B)),
        unconditional,
    )
    of_rule = {"length": length, "rule": rule, "vocab": vocab}
    state = jax.lax.while_loop(
        lambda state: jnp.any(unfinished(draft, state, length, rule)),
        functools.partial(advance, network, draft, **of_rule, together=True),
        begin(network, draft, **of_rule, record=record, reach=reach, share=share),
    )
    return (state.tokens_BL, state.record) if record else state.tokens_BL


class Span(NamedTuple):
    """A part of each row that is filled by a rule of its own: `start` and `length` [B] of each row, and the
    `longest` of all, for which the rule is meant. `other` are the unconditional rows of guidance."""

    start_B: jax.Array
    length_B: jax.Array
    longest: int
    rule: Rule
    other: tuple[jax.Array, jax.Array] | None = None


def denoise_spans(
    network: Denoiser,
    tokens_BL: jax.Array,
    valid_BL: jax.Array,
    spans: Sequence[Span],
    *,
    vocab: Vocab,
    key_B: jax.Array,
) -> jax.Array:
    """Fills several spans of each row in the same steps, as in thinking while drawing (MMaDA-Parallel);
    returns the rows [B, L].

    In each step all spans see the row as the step before has left it, and take part until they are
    filled. Spans without guidance share the pass over the rows. The key of a span is the key of its row,
    folded with the number of the span. Raises ValueError for a rule with a cache, since a stored key or
    value would miss what the other spans become, and for one that verifies.
    """
    for span in spans:
        span.rule.check_length(span.longest)
        for name, needed in (("cache", "none"), ("verify", None), ("recompute", 1.0)):
            value = getattr(span.rule, name)
            if value != needed:
                raise ValueError(f"{name} is {value!r}; rows with several spans need {needed!r}")
    keys = [jax.vmap(jax.random.fold_in, (0, None))(key_B, number) for number in range(len(spans))]
    drafts = [
        Draft(tokens_BL, valid_BL, span.start_B, span.length_B, key_B, span.other)
        for span, key_B in zip(spans, keys, strict=True)
    ]
    fields = [{"length": span.longest, "rule": span.rule, "vocab": vocab} for span in spans]
    parts = list(zip(drafts, fields, strict=True))

    def going(states):
        left = (
            jnp.any(unfinished(draft, state, of["length"], of["rule"]))
            for (draft, of), state in zip(parts, states, strict=True)
        )
        return functools.reduce(jnp.logical_or, left)

    def step(states):
        once, tokens_BL = _Once(network), states[0].tokens_BL
        states = [state._replace(tokens_BL=tokens_BL) for state in states]
        states = [
            advance(once, draft, state, **of) for (draft, of), state in zip(parts, states, strict=True)
        ]
        tokens_BL = states[0].tokens_BL
        for draft, state in zip(drafts[1:], states[1:], strict=True):
            tokens_BL = jnp.where(_in_span(draft), state.tokens_BL, tokens_BL)
        return [state._replace(tokens_BL=tokens_BL) for state in states]

    states = [begin(network, draft, **of) for draft, of in parts]
    return jax.lax.while_loop(going, step, states)[0].tokens_BL


class _Once:
    """A denoiser that computes rows once, however often a step asks for them."""

    def __init__(self, network: Denoiser):
        self.unembed, self._network, self._made = network.unembed, network, []

    def hidden_states(self, tokens_BL, valid_BL):
        for tokens, valid, h_BLD in self._made:
            if tokens is tokens_BL and valid is valid_BL:
                return h_BLD
        h_BLD = self._network.hidden_states(tokens_BL, valid_BL)
        self._made.append((tokens_BL, valid_BL, h_BLD))
        return h_BLD


def begin(
    network: Denoiser,
    draft: Draft,
    *,
    length: int,
    rule: Rule,
    vocab: Vocab,
    record: bool = False,
    reach: int | None = None,
    share: int = 1,
) -> State:
    """The state before the first step. The arguments are those of `denoise`. Raises ValueError if a record
    is wanted of a rule that hides tokens again, or draws from logits of earlier steps."""
    if record and rule.verify:
        raise ValueError(f"verify {rule.verify} hides tokens again, of which no record is kept")
    if record and rule.recompute < 1:
        raise ValueError(
            f"recompute {rule.recompute} draws from logits of earlier steps, of which no record is kept"
        )
    state = blank(network, draft.tokens_BL, length, rule, vocab)
    if rule.cache != "none":
        at, size = spot(draft, state, length, rule, vocab), rule.size(length)
        state = state._replace(cache=cached.begin(network, rule, size, at, reach, share))
    if not record:
        return state
    to_fill_BL = _in_span(draft) & (draft.tokens_BL == vocab.mask)
    zero_BL = jnp.zeros(draft.tokens_BL.shape, jnp.float32)
    of_tokens = Record(jnp.where(to_fill_BL, jnp.int32(NEVER), -1), zero_BL, zero_BL)
    return state._replace(record=of_tokens)


def blank(network: Denoiser, tokens_BL: jax.Array, length: int, rule: Rule, vocab: Vocab) -> State:
    """The state of rows for which nothing has been computed."""
    B, L = tokens_BL.shape
    zero_B = jnp.zeros(B, jnp.int32)
    cache = network.empty_cache(B * rule.caches, L) if rule.caches else None
    kept = None
    if rule.keeps_logits:
        n_ids = rule.vocabulary(vocab)[1] or vocab.rows
        kept = jnp.zeros((B, rule.size(length), n_ids), jnp.float32)
    changed = jnp.zeros((B, rule.size(length)), bool) if rule.recompute < 1 else None
    return State(tokens_BL, zero_B, zero_B, zero_B, cache=cache, kept=kept, changed=changed)


def unfinished(draft: Draft, state: State, length: int, rule: Rule) -> jax.Array:
    """Which rows still have a block to fill, bool [B]."""
    return state.block_B * rule.size(length) < draft.length_B


def advance(
    network: Denoiser,
    draft: Draft,
    state: State,
    *,
    length: int,
    rule: Rule,
    vocab: Vocab,
    together: bool = False,
) -> State:
    """One step of every row that isn't finished. `together` is that of `cached.hidden_states`."""
    size, at = rule.size(length), spot(draft, state, length, rule, vocab)
    place_BN = at.at_B[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    in_block_BN = (place_BN >= at.first_B[:, None]) & (place_BN < at.end_B[:, None])
    take = functools.partial(cached.take, at_B=at.at_B, size=size)
    put = functools.partial(_put, at_B=at.at_B)
    now_BN = take(state.tokens_BL)
    hidden_BN = in_block_BN & (now_BN == vocab.mask)
    n_given_B = jnp.sum(in_block_BN & (take(draft.tokens_BL) == vocab.mask), axis=1)
    active_B = unfinished(draft, state, length, rule)
    cache, kept_BNV, changed_BN = state.cache, state.kept, state.changed
    if rule.cache != "none":
        h_BND, cache = cached.hidden_states(network, rule, size, length, at, active_B, cache, together)
        logits_BNV = plain_BNV = _unembed(network, h_BND, rule, vocab)
    elif rule.verify:
        logits_BNV = plain_BNV = _unembed(
            network, cached.with_shadows(network, rule, size, at), rule, vocab
        )
    elif rule.recompute < 1:
        kept = _some_anew(network, draft, state, at, hidden_BN, active_B, rule, vocab)
        cache, kept_BNV, changed_BN = kept
        logits_BNV = plain_BNV = kept_BNV
    elif rule.guidance:
        logits_BNV, plain_BNV, kept_BNV = _guided(network, draft, state, at.at_B, size, rule, vocab)
    else:
        h_BLD = network.hidden_states(state.tokens_BL, draft.valid_BL)
        logits_BNV = plain_BNV = _unembed(network, take(h_BLD), rule, vocab)
    if rule.verify:
        logits_BNV, shadow_BNV = logits_BNV[:, :size], logits_BNV[:, size:]
    fold, within_BN = jax.vmap(jax.random.fold_in), place_BN - draft.start_B[:, None]
    key_BN = jax.vmap(fold, (None, 1), 1)(fold(draft.key_B, state.step_B), within_BN)
    index_BN, reveal_BN = rule.reveal(key_BN, logits_BNV, hidden_BN, n_given_B, state.step_B, length)
    first_id, _ = rule.vocabulary(vocab)
    new_BN = jnp.where(reveal_BN, (index_BN + first_id).astype(now_BN.dtype), now_BN)
    # The mask itself may be drawn; then its place is still hidden.
    reveal_BN &= new_BN != vocab.mask
    left_BN = hidden_BN & ~reveal_BN
    if rule.verify:
        shown_BN = in_block_BN & ~hidden_BN & (take(draft.tokens_BL) == vocab.mask)
        shown_BN &= (active_B & ~at.begins_B)[:, None]  # a first pass computes no shadows
        again_BN = rule.revise(shadow_BNV, now_BN, shown_BN, reveal_BN)
        new_BN = jnp.where(again_BN, jnp.int32(vocab.mask), new_BN)
        left_BN |= again_BN
    tokens_BL = put(state.tokens_BL, new_BN)

    done_B = ~jnp.any(left_BN, axis=1) | (state.step_B + 1 >= rule.patience(length))
    block_B = state.block_B + (active_B & done_B).astype(jnp.int32)
    if rule.stop is not None:
        in_span_BL = _in_span(draft)
        ended_B = jnp.any(in_span_BL & (tokens_BL == rule.stop), axis=1)
        block_B = jnp.where(done_B & ended_B, -(-draft.length_B // size), block_B)
        over_B = block_B * size >= draft.length_B
        left_BL = over_B[:, None] & in_span_BL & (tokens_BL == vocab.mask)
        tokens_BL = jnp.where(left_BL, jnp.int32(rule.stop), tokens_BL)
    record = state.record
    if record is not None:
        logp_BNV = jax.nn.log_softmax(plain_BNV, axis=-1)
        values = Record(
            jnp.broadcast_to(state.steps_B[:, None], reveal_BN.shape),
            rules.pick(logp_BNV, index_BN),
            -jnp.sum(jnp.exp(logp_BNV) * logp_BNV, axis=-1),
        )
        record = jax.tree.map(
            lambda x_BL, new_BN: put(x_BL, jnp.where(reveal_BN, new_BN, take(x_BL))), record, values
        )
    step_B = jnp.where(done_B, 0, state.step_B + 1)
    steps_B = state.steps_B + active_B.astype(jnp.int32)
    changed_BN = None if changed_BN is None else changed_BN | reveal_BN
    return State(tokens_BL, block_B, step_B, steps_B, record, cache, kept_BNV, changed_BN)


def spot(draft: Draft, state: State, length: int, rule: Rule, vocab: Vocab) -> cached.Spot:
    """The block that each row decodes now."""
    size, L = rule.size(length), draft.tokens_BL.shape[1]
    first_B = draft.start_B + state.block_B * size
    end_B = jnp.minimum(first_B + size, draft.start_B + draft.length_B)
    begins_B = unfinished(draft, state, length, rule)
    if rule.recompute < 1:
        begins_B &= rule.all_anew(state.step_B)
    else:
        begins_B &= state.step_B % (rule.refresh or LONG) == 0
        begins_B &= state.block_B + state.step_B > 0  # `begin` has made the very first pass
    # The places of a block can't reach beyond the row: the last block of a span is shorter, and they may
    # begin before it.
    at_B = jnp.minimum(first_B, L - size)
    mask_B = jnp.full_like(first_B, vocab.mask)
    return cached.Spot(state.tokens_BL, draft.valid_BL, first_B, end_B, at_B, begins_B, mask_B)


def _guided(network, draft, state, at_B, size, rule, vocab):
    """Logits [B, N, V], guided; those of the conditional rows alone; what the state keeps of them.

    With `guide_every` n the unconditional rows are computed in every n-th step of a row; the distance is
    kept in between."""

    def alone():
        h_BLD = network.hidden_states(state.tokens_BL, draft.valid_BL)
        return _unembed(network, cached.take(h_BLD, at_B, size), rule, vocab)

    def both():
        h_BLD = network.hidden_states(*_with_other(draft, state, vocab))
        return _of_pairs(_unembed(network, cached.take(h_BLD, _pairs(at_B, at_B), size), rule, vocab))

    if rule.guide_every == 1:
        c_BNV, u_BNV = both()
        return _combined(c_BNV, u_BNV, rule), c_BNV, None

    def both_apart():
        c_BNV, u_BNV = both()
        return c_BNV, c_BNV - u_BNV

    due_B = state.step_B % rule.guide_every == 0
    c_BNV, apart_BNV = jax.lax.cond(jnp.any(due_B), both_apart, lambda: (alone(), state.kept))
    apart_BNV = jnp.where(due_B[:, None, None], apart_BNV, state.kept)
    return c_BNV + np.float32(rule.guidance) * apart_BNV, c_BNV, apart_BNV


def _some_anew(network, draft, state, at, hidden_BN, active_B, rule, vocab):
    """What is kept after a step that computes a part of it (`cached.least_certain`)."""
    rows = _with_other(draft, state, vocab) if rule.guidance else (state.tokens_BL, draft.valid_BL)

    def logits_of(h_RND):
        logits_RNV = _unembed(network, h_RND, rule, vocab)
        return _combined(*_of_pairs(logits_RNV), rule) if rule.guidance else logits_RNV

    count, kept = rule.n_anew(hidden_BN.shape[1]), cached.Kept(state.cache, state.kept, state.changed)
    return cached.least_certain(network, logits_of, count, at, rows, hidden_BN, active_B, kept)


def _with_other(draft, state, vocab):
    """Tokens and validity of all rows as they stand, each with its unconditional row behind it.

    The two rows of a pair stand side by side, so they are on one device, and so are their logits."""
    hidden_BL = jnp.full_like(state.tokens_BL, vocab.mask)
    other_BL, other_valid_BL = draft.other or (hidden_BL, draft.valid_BL)
    other_BL = jnp.where(_in_span(draft), state.tokens_BL, other_BL)
    return _pairs(state.tokens_BL, other_BL), _pairs(draft.valid_BL, other_valid_BL)


def _combined(c_BNV, u_BNV, rule):
    return u_BNV + np.float32(1 + rule.guidance) * (c_BNV - u_BNV)


def _unembed(network, h_BND, rule, vocab):
    return network.unembed(h_BND, *rule.vocabulary(vocab)).astype(jnp.float32)


def _pairs(a_B, b_B):
    """[a0, b0, a1, b1, ...]."""
    x_B = jnp.stack([a_B, b_B], axis=1).reshape(-1, *a_B.shape[1:])
    return sharding.constrain(x_B, "batch", *(None,) * (x_B.ndim - 1))


def _of_pairs(x_R):
    """The first of each pair, and the second ones."""
    x_B2 = x_R.reshape(-1, 2, *x_R.shape[1:])
    return x_B2[:, 0], x_B2[:, 1]


def _in_span(draft: Draft) -> jax.Array:
    place_1L = jnp.arange(draft.tokens_BL.shape[1])[None]
    start_B1, end_B1 = draft.start_B[:, None], (draft.start_B + draft.length_B)[:, None]
    return (place_1L >= start_B1) & (place_1L < end_B1)


def _put(x_BL, new_BN, at_B):
    """Rows with new entries from `at` on."""
    return jax.vmap(lambda x_L, new_N, at: jax.lax.dynamic_update_slice_in_dim(x_L, new_N, at, 0))(
        x_BL, new_BN, at_B
    )
