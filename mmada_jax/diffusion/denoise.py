"""The reverse process: one loop that fills a span of hidden tokens, and the rules it can follow.

A span is the positions of a row from its start on, as many as its length. Positions of the span that are
not hidden at the start stay as they are: that is inpainting, and extrapolation, of text and images.
Every row has a block, a step and a key of its own, so what becomes of it doesn't depend on its company.

    TextRule    block after block from the left, the most certain tokens first (LLaDA, MMaDA)
    ImageRule   all positions at once, fewer and fewer sent back (MaskGIT, MMaDA)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.devices import sharding
from mmada_jax.diffusion import schedule
from mmada_jax.ranges import Positive, Range, Ranged, Share, Weight
from mmada_jax.tokens.vocab import Vocab

# (tokens [B, L], valid [B, L]) -> hidden states [B, L, D]
Hidden = Callable[[jax.Array, jax.Array], jax.Array]
# (hidden states [..., D], first id, number of ids or None) -> logits [..., ids]
Unembed = Callable[[jax.Array, int, int | None], jax.Array]

Steps = Annotated[int, Range(1, 1_000_000)]
Temperature = Annotated[float, Range(0, 1000)]
Guidance = Annotated[float, Range(0, 1e6)]
Token = Annotated[int, Range(0, 2**31 - 1)]
REMASKS = ("low_confidence", "largest", "margin", "entropy", "random")


@dataclasses.dataclass(frozen=True)
class TextRule(Ranged):
    """Semi-autoregressive decoding with low-confidence remasking.

    Blocks have `block` tokens, the last of a row what is left. `steps` are shared equally among the
    blocks; None reveals one token in each step. With `threshold` (every token at least that certain) or
    `factor` (the n most certain while each exceeds 1 - factor/(n+1)) a step reveals as many tokens as
    pass, at least one, and `steps` is not used. Tokens in `never` are not drawn; those in `defer` count as
    least certain, so that they come last. A row that has a `stop` at the end of a block ends there, and
    what is left of it becomes `stop`. With `remask` "largest" the order is that of the largest
    probability, whichever token was drawn: it doesn't depend on the draw.
    """

    steps: Steps | None = None
    block: Positive = 128
    temperature: Temperature = 0.0
    remask: Literal[REMASKS] = "low_confidence"
    guidance: Guidance = 0.0
    threshold: Share | None = None
    factor: Weight | None = None
    never: tuple[Token, ...] = ()
    defer: tuple[Token, ...] = ()
    stop: Token | None = None

    def check(self, length: int) -> None:
        """Raises ValueError if this rule can't fill spans of up to `length` tokens."""
        if self.remask not in REMASKS:
            raise ValueError(f"unknown remask {self.remask!r}; known: {', '.join(REMASKS)}")
        if length < 1:
            raise ValueError(f"a span has {length} tokens; it must have at least 1")
        blocks = -(-length // self.block)
        by_quota = self.threshold is None and self.factor is None and self.steps is not None
        if by_quota and (self.steps < blocks or self.steps % blocks):
            raise ValueError(
                f"steps {self.steps} are not divisible by the {blocks} blocks of {self.block} "
                f"tokens in a length of {length}; choose a multiple of {blocks}"
            )

    def vocabulary(self, vocab: Vocab) -> tuple[int, int | None]:
        """First id and number of ids that are drawn from: all of them, image codes too."""
        return 0, None

    def size(self, length: int) -> int:
        """Tokens of a block in spans of up to `length`."""
        return min(self.block, length)

    def patience(self, length: int) -> int:
        """Steps after which a block is left, whatever is still hidden: a model may draw the mask itself,
        which reveals nothing."""
        return 2 * max(self.size(length), self._steps_of_block(length))

    def _steps_of_block(self, length: int) -> int:
        return self.size(length) if self.steps is None else max(1, self.steps // -(-length // self.block))

    def reveal(self, key_BN, logits_BNV, hidden_BN, n_given_B, step_B, length: int):
        """Step `step` within a block: logits -> indices drawn, and which of the hidden ones to reveal.

        `n_given` counts what was hidden when the block began, `length` is that of `check`."""
        N = hidden_BN.shape[1]
        drawn_BNV = logits_BNV
        if self.temperature:
            drawn_BNV += np.float32(self.temperature) * _gumbel(key_BN, 0, logits_BNV.shape[2:])
        if self.never:
            drawn_BNV = drawn_BNV.at[..., np.array(self.never)].set(-jnp.inf)
        x0_BN = jnp.argmax(drawn_BNV, axis=-1)

        if self.defer:
            logits_BNV = logits_BNV.at[..., np.array(self.defer)].set(-jnp.inf)
        p_BNV = jax.nn.softmax(logits_BNV, axis=-1)
        if self.remask == "low_confidence":
            sure_BN = _pick(p_BNV, x0_BN)
        elif self.remask == "largest":
            sure_BN = jnp.max(p_BNV, axis=-1)
        elif self.remask == "margin":
            top_BN2 = jax.lax.top_k(p_BNV, 2)[0]
            sure_BN = top_BN2[..., 0] - top_BN2[..., 1]
        elif self.remask == "entropy":
            sure_BN = jnp.sum(p_BNV * jnp.log(p_BNV + np.float32(1e-10)), axis=-1)
        else:
            sure_BN = _uniform(key_BN, 1)
        sure_BN = jnp.where(hidden_BN, sure_BN, -jnp.inf)
        order_BN = jnp.argsort(-sure_BN, axis=1)
        rank_BN = jnp.argsort(order_BN, axis=1)

        if self.threshold is not None:
            pass_BN = (sure_BN >= np.float32(self.threshold)) | (rank_BN == 0)
        else:
            if self.factor is not None:
                sorted_BN = jnp.take_along_axis(sure_BN, order_BN, axis=1)
                floor_N = 1 - np.float32(self.factor) / np.arange(2, N + 2, dtype=np.float32)
                floor_N[0] = -1  # the best one always passes
                passed_BN = (sorted_BN >= floor_N[None]) & jnp.isfinite(sorted_BN)
                quota_B = jnp.sum(jnp.cumprod(passed_BN, axis=1), axis=1)
            else:
                quota_B = transfer_quota(n_given_B, self._steps_of_block(length), step_B)
            pass_BN = rank_BN < quota_B[:, None]
        return x0_BN, hidden_BN & pass_BN


@dataclasses.dataclass(frozen=True)
class ImageRule(Ranged):
    """Parallel decoding. All hidden codes are drawn in each of `steps` steps, the least certain ones
    are hidden again, as many as `schedule` says.

    `temperature` is the one of the noise in the order of certainty, annealed over the steps: by the
    running product of (1 - k/steps), as the reference has it, or `linear`. `quota` counts what stays
    hidden from all positions of the span (the reference; few known tokens change nothing) or from
    those hidden at the start, which spreads an inpainting over all steps. With `remask` "largest" a
    position is as certain as its most likely code, whichever was drawn: the order doesn't depend on
    the draw.
    """

    stop: ClassVar[None] = None

    steps: Steps = 15
    schedule: str = "cosine"
    temperature: Temperature = 1.0
    guidance: Guidance = 3.5
    draw: Literal["sample", "argmax"] = "sample"
    anneal: Literal["product", "linear"] = "product"
    quota: Literal["total", "hidden"] = "total"
    remask: Literal["low_confidence", "largest"] = "low_confidence"

    def check(self, length: int) -> None:
        """Raises ValueError if this rule can't fill a span of `length` tokens."""
        schedule.named(self.schedule)
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")

    def vocabulary(self, vocab: Vocab) -> tuple[int, int | None]:
        """First id and number of ids that are drawn from: the image codes."""
        return vocab.image_offset, vocab.codebook_size

    def size(self, length: int) -> int:
        """The whole span is one block."""
        return length

    def patience(self, length: int) -> int:
        """The steps, after which nothing is hidden."""
        return self.steps

    def reveal(self, key_BN, logits_BNV, hidden_BN, n_given_B, step_B, length: int):
        """Step `step`: logits over the codes -> indices drawn, and which of the hidden ones to reveal."""
        drawn_BNV = logits_BNV
        if self.draw == "sample":
            drawn_BNV += _gumbel(key_BN, 0, logits_BNV.shape[2:])
        x0_BN = jnp.argmax(drawn_BNV, axis=-1)
        p_BNV = jax.nn.softmax(logits_BNV, axis=-1)
        sure_BN = jnp.max(p_BNV, axis=-1) if self.remask == "largest" else _pick(p_BNV, x0_BN)

        ratio_T = np.arange(1, self.steps + 1) / self.steps
        tau_T = np.cumprod(1 - ratio_T) if self.anneal == "product" else 1 - ratio_T
        tau_B = jnp.asarray((self.temperature * tau_T).astype(np.float32))[step_B]
        score_BN = jnp.log(jnp.maximum(sure_BN, np.float32(1e-20)))
        score_BN += tau_B[:, None] * _gumbel(key_BN, 1)
        score_BN = jnp.where(hidden_BN, score_BN, jnp.inf)

        # Of U unknown tokens at most U - 1 and at least one stay hidden, until the last step.
        schedule_of = schedule.named(self.schedule)
        keep_B = jnp.asarray(schedule.hidden_counts(schedule_of, length, self.steps))[step_B]
        if self.quota == "hidden":
            gamma_T = schedule_of(ratio_T.astype(np.float32))
            gamma_B = jnp.asarray(gamma_T)[step_B]
            keep_B = jnp.floor(n_given_B.astype(jnp.float32) * gamma_B).astype(jnp.int32)
        unknown_B = jnp.sum(hidden_BN, axis=1)
        keep_B = jnp.maximum(1, jnp.minimum(unknown_B - 1, keep_B))
        cut_B1 = jnp.take_along_axis(jnp.sort(score_BN, axis=1), keep_B[:, None], axis=1)
        again_BN = (score_BN < cut_B1) & (step_B < self.steps - 1)[:, None]
        return x0_BN, hidden_BN & ~again_BN


Rule = TextRule | ImageRule


class Record(NamedTuple):
    """How the tokens of a decoding came about.

    `step` is that of its row in which a token was revealed, counted over all blocks: -1 where it was
    given, and the largest integer where it never was. `logp` is its log-probability then, `entropy` that
    of the distribution that it was drawn from, in nats; both over the rule's vocabulary, at temperature 1
    and without guidance; 0 where nothing was revealed.
    """

    step_BL: jax.Array
    logp_BL: jax.Array
    entropy_BL: jax.Array


NEVER = np.iinfo(np.int32).max


class Rows(NamedTuple):
    """What a decoding is given: rows, the span of each, its key. `other` are the unconditional rows of
    guidance and their validity."""

    tokens_BL: jax.Array
    valid_BL: jax.Array
    start_B: jax.Array
    length_B: jax.Array
    key_B: jax.Array
    other: tuple[jax.Array, jax.Array] | None = None


class State(NamedTuple):
    """Where each row of a decoding stands: its tokens, the current block of its span, the step within
    that; if asked for, its record so far and the number of steps in it."""

    tokens_BL: jax.Array
    block_B: jax.Array
    step_B: jax.Array
    record: Record | None = None
    steps_B: jax.Array | None = None


def denoise(
    hidden: Hidden,
    unembed: Unembed,
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
) -> Any:
    """Fills the hidden tokens of the spans; returns the rows [B, L], with `record` the pair of them and
    their Record.

    A span begins at `start`, that of all rows or one for each [B], and has `length` tokens, or as many of
    these as `lengths` [B] says. Guidance runs a second row beside each: `unconditional` = (tokens, valid)
    outside of the span, and within it what has been revealed so far; logits = u + (1 + guidance) (c - u).
    Without it the prompt of the second row is hidden, as LLaDA does for text. Draws are float32 Gumbel
    noise from the key of each row ([B], or one that is folded with the number of the row), folded with the
    step within the block and the place in the span. Wrap in `jax.jit` with `rule`, `vocab` and `length`
    static; one compilation serves every prompt.
    """
    rule.check(length)
    B, L = tokens_BL.shape
    if isinstance(start, int) and not 0 <= start <= start + length <= L:
        raise ValueError(f"span [{start}, {start + length}) is outside a row of {L} tokens")
    rows = Rows(
        jnp.asarray(tokens_BL, jnp.int32),
        jnp.asarray(valid_BL),
        jnp.broadcast_to(jnp.asarray(start, jnp.int32), (B,)),
        jnp.broadcast_to(jnp.asarray(length if lengths is None else lengths, jnp.int32), (B,)),
        key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B)),
        unconditional,
    )
    step = functools.partial(advance, hidden, unembed, rows, length=length, rule=rule, vocab=vocab)
    state = jax.lax.while_loop(
        lambda state: jnp.any(unfinished(rows, state, length, rule)), step, begin(rows, vocab, record)
    )
    return (state.tokens_BL, state.record) if record else state.tokens_BL


def begin(rows: Rows, vocab: Vocab, record: bool = False) -> State:
    """The state before the first step."""
    zero_B = jnp.zeros(len(rows.tokens_BL), jnp.int32)
    state = State(rows.tokens_BL, zero_B, zero_B)
    if not record:
        return state
    to_fill_BL = _in_span(rows) & (rows.tokens_BL == vocab.mask)
    zero_BL = jnp.zeros(rows.tokens_BL.shape, jnp.float32)
    of_tokens = Record(jnp.where(to_fill_BL, jnp.int32(NEVER), -1), zero_BL, zero_BL)
    return state._replace(record=of_tokens, steps_B=zero_B)


def unfinished(rows: Rows, state: State, length: int, rule: Rule) -> jax.Array:
    """Which rows still have a block to fill, bool [B]."""
    return state.block_B * rule.size(length) < rows.length_B


def advance(
    hidden: Hidden, unembed: Unembed, rows: Rows, state: State, *, length: int, rule: Rule, vocab: Vocab
) -> State:
    """One step of every row that isn't finished."""
    size, L = rule.size(length), rows.tokens_BL.shape[1]
    first_B = rows.start_B + state.block_B * size
    end_B = jnp.minimum(first_B + size, rows.start_B + rows.length_B)
    # A window of the row that holds the block, which is shorter at the end of the span.
    window_B = jnp.minimum(first_B, L - size)
    place_BN = window_B[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    in_block_BN = (place_BN >= first_B[:, None]) & (place_BN < end_B[:, None])
    take, put = functools.partial(_take, at_B=window_B, size=size), functools.partial(_put, at_B=window_B)
    now_BN = take(state.tokens_BL)
    hidden_BN = in_block_BN & (now_BN == vocab.mask)
    n_given_B = jnp.sum(in_block_BN & (take(rows.tokens_BL) == vocab.mask), axis=1)

    logits_BNV, plain_BNV = _logits(hidden, unembed, rows, state, window_B, size, rule, vocab)
    fold = jax.vmap(jax.random.fold_in)
    key_BN = jax.vmap(fold, (None, 1), 1)(fold(rows.key_B, state.step_B), place_BN - rows.start_B[:, None])
    index_BN, reveal_BN = rule.reveal(key_BN, logits_BNV, hidden_BN, n_given_B, state.step_B, length)
    first_id, _ = rule.vocabulary(vocab)
    new_BN = jnp.where(reveal_BN, (index_BN + first_id).astype(now_BN.dtype), now_BN)
    # A token that was drawn may be the mask.
    reveal_BN &= new_BN != vocab.mask
    tokens_BL = put(state.tokens_BL, new_BN)

    active_B = unfinished(rows, state, length, rule)
    done_B = ~jnp.any(hidden_BN & ~reveal_BN, axis=1) | (state.step_B + 1 >= rule.patience(length))
    block_B = state.block_B + (active_B & done_B).astype(jnp.int32)
    if rule.stop is not None:
        in_span_BL = _in_span(rows)
        ended_B = jnp.any(in_span_BL & (tokens_BL == rule.stop), axis=1)
        block_B = jnp.where(done_B & ended_B, -(-rows.length_B // size), block_B)
        over_B = block_B * size >= rows.length_B
        left_BL = over_B[:, None] & in_span_BL & (tokens_BL == vocab.mask)
        tokens_BL = jnp.where(left_BL, jnp.int32(rule.stop), tokens_BL)
    record, steps_B = state.record, state.steps_B
    if record is not None:
        logp_BNV = jax.nn.log_softmax(plain_BNV, axis=-1)
        values = Record(
            jnp.broadcast_to(steps_B[:, None], reveal_BN.shape),
            _pick(logp_BNV, index_BN),
            -jnp.sum(jnp.exp(logp_BNV) * logp_BNV, axis=-1),
        )
        record = jax.tree.map(
            lambda x_BL, new_BN: put(x_BL, jnp.where(reveal_BN, new_BN, take(x_BL))), record, values
        )
        steps_B += active_B.astype(jnp.int32)
    step_B = jnp.where(done_B, 0, state.step_B + 1)
    return State(tokens_BL, block_B, step_B, record, steps_B)


def transfer_quota(n_hidden_B: jax.Array, steps: int, step: jax.Array) -> jax.Array:
    """How many tokens step `step` of `steps` reveals of n: n // steps, and one more in the first
    n % steps steps."""
    return n_hidden_B // steps + (step < n_hidden_B % steps).astype(n_hidden_B.dtype)


def _logits(hidden, unembed, rows, state, window_B, size, rule, vocab):
    """Logits [B, N, V] of the windows, guided, and those of the conditional rows alone."""
    tokens_BL, valid_BL = state.tokens_BL, rows.valid_BL
    if rule.guidance:
        # The two rows of a pair stand side by side, so they are on one device, and so are their logits.
        hidden_BL = jnp.full_like(tokens_BL, vocab.mask)
        other_BL, other_valid_BL = rows.other or (hidden_BL, valid_BL)
        other_BL = jnp.where(_in_span(rows), tokens_BL, other_BL)
        tokens_BL, valid_BL = _pairs(tokens_BL, other_BL), _pairs(valid_BL, other_valid_BL)
        window_B = _pairs(window_B, window_B)
    h_BND = _take(hidden(tokens_BL, valid_BL), window_B, size)
    logits_BNV = unembed(h_BND, *rule.vocabulary(vocab)).astype(jnp.float32)
    if not rule.guidance:
        return logits_BNV, logits_BNV
    logits_B2NV = logits_BNV.reshape(-1, 2, *logits_BNV.shape[1:])
    c_BNV, u_BNV = logits_B2NV[:, 0], logits_B2NV[:, 1]
    return u_BNV + np.float32(1 + rule.guidance) * (c_BNV - u_BNV), c_BNV


def _pairs(a_B, b_B):
    """[a0, b0, a1, b1, ...]."""
    x_B = jnp.stack([a_B, b_B], axis=1).reshape(-1, *a_B.shape[1:])
    return sharding.constrain(x_B, "batch", *(None,) * (x_B.ndim - 1))


def _in_span(rows: Rows) -> jax.Array:
    place_1L = jnp.arange(rows.tokens_BL.shape[1])[None]
    start_B1, end_B1 = rows.start_B[:, None], (rows.start_B + rows.length_B)[:, None]
    return (place_1L >= start_B1) & (place_1L < end_B1)


def _take(x_BL, at_B, size):
    """Of each row `size` entries from `at` on."""
    return jax.vmap(lambda x_L, at: jax.lax.dynamic_slice_in_dim(x_L, at, size))(x_BL, at_B)


def _put(x_BL, new_BN, at_B):
    """Rows with new entries from `at` on."""
    return jax.vmap(lambda x_L, new_N, at: jax.lax.dynamic_update_slice_in_dim(x_L, new_N, at, 0))(
        x_BL, new_BN, at_B
    )


def _gumbel(key_BN, stream, shape=()):
    """Noise [B, N, *shape] from the key of each place; `stream` tells one draw of a step from another."""
    return _drawn(jax.random.gumbel, key_BN, stream, shape)


def _uniform(key_BN, stream):
    return _drawn(jax.random.uniform, key_BN, stream, ())


def _drawn(draw, key_BN, stream, shape):
    one = lambda key: draw(jax.random.fold_in(key, stream), shape)  # noqa: E731
    return jax.vmap(jax.vmap(one))(key_BN)


def _pick(values_BNV, index_BN):
    return jnp.take_along_axis(values_BNV, index_BN[..., None], axis=-1)[..., 0]
