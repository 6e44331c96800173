"""The reverse process: one loop that fills a span of hidden tokens, and the rules it can follow.

A span is `length` positions from `start` on, the same in every row. Positions of the span that are
not hidden at the start stay as they are: that is inpainting, and extrapolation, of text and images.

    TextRule    block after block from the left, the most certain tokens first (LLaDA, MMaDA)
    ImageRule   all positions at once, fewer and fewer sent back (MaskGIT, MMaDA)
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax import schedule
from mmada_jax.ranges import Positive, Range, Ranged, Share, Weight
from mmada_jax.vocab import Vocab

# (tokens [B, L], valid [B, L]) -> hidden states [B, L, D]
Hidden = Callable[[jax.Array, jax.Array], jax.Array]
# (hidden states [..., D], first id, number of ids or None) -> logits [..., ids]
Unembed = Callable[[jax.Array, int, int | None], jax.Array]

Steps = Annotated[int, Range(1, 1_000_000)]
Temperature = Annotated[float, Range(0, 1000)]
Guidance = Annotated[float, Range(0, 1e6)]
Token = Annotated[int, Range(0, 2**31 - 1)]


@dataclasses.dataclass(frozen=True)
class TextRule(Ranged):
    """Semi-autoregressive decoding with low-confidence remasking.

    `steps` are shared equally among the blocks. With `threshold` (every token at least that
    certain) or `factor` (the n most certain while each exceeds 1 - factor/(n+1)) a step reveals as
    many tokens as pass, at least one, and `steps` is not used. Tokens in `never` are not drawn;
    those in `defer` count as least certain, so that they come last. When every row has a `stop` at the
    end of a block, decoding ends and what is left becomes `stop`. With `remask` "largest" the order is
    that of the largest probability, whichever token was drawn: it doesn't depend on the draw.
    """

    steps: Steps = 128
    block: Positive = 128
    temperature: Temperature = 0.0
    remask: Literal["low_confidence", "largest", "margin", "entropy", "random"] = "low_confidence"
    guidance: Guidance = 0.0
    threshold: Share | None = None
    factor: Weight | None = None
    never: tuple[Token, ...] = ()
    defer: tuple[Token, ...] = ()
    stop: Token | None = None

    def check(self, length: int) -> None:
        """Raises ValueError if this rule can't fill a span of `length` tokens."""
        if length < 1 or self.block < 1 or length % self.block:
            raise ValueError(
                f"length {length} is not divisible by block {self.block}; "
                f"choose a block that divides it, as {divisor(length, self.block)}"
            )
        blocks = length // self.block
        by_quota = self.threshold is None and self.factor is None
        if by_quota and (self.steps < blocks or self.steps % blocks):
            raise ValueError(
                f"steps {self.steps} are not divisible by the {blocks} blocks of {self.block} "
                f"tokens in a length of {length}; choose a multiple of {blocks}"
            )

    def vocabulary(self, vocab: Vocab) -> tuple[int, int | None]:
        """First id and number of ids that are drawn from: all of them, image codes too."""
        return 0, None

    def reveal(self, key, logits_BNV, now_BN, given_BN, step, blocks: int, vocab: Vocab):
        """Step `step` within a block: logits and tokens -> tokens with some more revealed."""
        hidden_BN, N = now_BN == vocab.mask, now_BN.shape[1]
        noise_key, order_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        drawn_BNV = logits_BNV
        if self.temperature:
            noise = jax.random.gumbel(noise_key, logits_BNV.shape)
            drawn_BNV = drawn_BNV + np.float32(self.temperature) * noise
        if self.never:
            drawn_BNV = drawn_BNV.at[..., np.array(self.never)].set(-jnp.inf)
        x0_BN = jnp.argmax(drawn_BNV, axis=-1).astype(now_BN.dtype)

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
        elif self.remask == "random":
            sure_BN = jax.random.uniform(order_key, x0_BN.shape)
        else:
            raise ValueError(f"unknown remask {self.remask!r}; known: low_confidence, largest, "
                             "margin, entropy, random")  # fmt: skip
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
                n_hidden_B = jnp.sum(given_BN == vocab.mask, axis=1)
                quota_B = transfer_quota(n_hidden_B, self.steps // blocks, step)
            pass_BN = rank_BN < quota_B[:, None]
        return jnp.where(hidden_BN & pass_BN, x0_BN, now_BN)


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

    def reveal(self, key, logits_BNV, now_BN, given_BN, step, blocks: int, vocab: Vocab):
        """Step `step`: logits over the codes and tokens -> tokens, fewer of them hidden."""
        hidden_BN, N = now_BN == vocab.mask, now_BN.shape[1]
        noise_key, order_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        drawn_BNV = logits_BNV
        if self.draw == "sample":
            drawn_BNV = drawn_BNV + jax.random.gumbel(noise_key, logits_BNV.shape)
        x0_BN = jnp.argmax(drawn_BNV, axis=-1)
        p_BNV = jax.nn.softmax(logits_BNV, axis=-1)
        sure_BN = jnp.max(p_BNV, axis=-1) if self.remask == "largest" else _pick(p_BNV, x0_BN)
        x0_BN = (x0_BN + vocab.image_offset).astype(now_BN.dtype)

        ratio_T = np.arange(1, self.steps + 1) / self.steps
        tau_T = np.cumprod(1 - ratio_T) if self.anneal == "product" else 1 - ratio_T
        tau = jnp.asarray((self.temperature * tau_T).astype(np.float32))[step]
        score_BN = jnp.log(jnp.maximum(sure_BN, np.float32(1e-20)))
        score_BN += tau * jax.random.gumbel(order_key, score_BN.shape)
        score_BN = jnp.where(hidden_BN, score_BN, jnp.inf)

        # Of U unknown tokens at most U - 1 and at least one stay hidden, until the last step.
        ratio_kept = schedule.hidden_counts(schedule.named(self.schedule), N, self.steps)
        keep_B = jnp.broadcast_to(jnp.asarray(ratio_kept)[step], now_BN.shape[:1])
        if self.quota == "hidden":
            gamma_T = schedule.named(self.schedule)(ratio_T.astype(np.float32))
            n_given_B = jnp.sum(given_BN == vocab.mask, axis=1).astype(jnp.float32)
            keep_B = jnp.floor(n_given_B * jnp.asarray(gamma_T)[step]).astype(jnp.int32)
        unknown_B = jnp.sum(hidden_BN, axis=1)
        keep_B = jnp.maximum(1, jnp.minimum(unknown_B - 1, keep_B))
        cut_B1 = jnp.take_along_axis(jnp.sort(score_BN, axis=1), keep_B[:, None], axis=1)
        again_BN = (score_BN < cut_B1) & (step < self.steps - 1)
        return jnp.where(hidden_BN & ~again_BN, x0_BN, now_BN)


Rule = TextRule | ImageRule


class Record(NamedTuple):
    """How the tokens of a decoding came about.

    `step` is that in which a token was revealed, counted over all blocks: -1 where it was given, and
    the largest integer where it never was. `logp` is its log-probability then, `entropy` that of the
    distribution that it was drawn from, in nats; both over the rule's vocabulary, at temperature 1 and
    without guidance; 0 where nothing was revealed.
    """

    step_BL: jax.Array
    logp_BL: jax.Array
    entropy_BL: jax.Array


NEVER = np.iinfo(np.int32).max


class State(NamedTuple):
    """Where a decoding stands: the rows, the current block of the span, the step within it; if asked
    for, the record so far and the number of steps in it."""

    tokens_BL: jax.Array
    block: jax.Array
    step: jax.Array
    record: Record | None = None
    steps: jax.Array | None = None


def denoise(
    hidden: Hidden,
    unembed: Unembed,
    tokens_BL: jax.Array,
    valid_BL: jax.Array,
    *,
    start: int,
    length: int,
    rule: Rule,
    vocab: Vocab,
    key: jax.Array,
    unconditional: tuple[jax.Array, jax.Array] | None = None,
    record: bool = False,
) -> Any:
    """Fills the hidden tokens of the span [start, start + length); returns the rows [B, L], with
    `record` the pair of them and their Record.

    Guidance runs a second row beside each: `unconditional` = (tokens, valid) outside of the span,
    and within it what has been revealed so far; logits = u + (1 + guidance) (c - u). Without it the
    prompt of the second row is hidden, as LLaDA does for text. Draws are float32 Gumbel noise from
    `key`, folded with the block and the step. Wrap in `jax.jit` with `rule`, `vocab`, `start` and
    `length` static; one compilation serves every prompt of that length.
    """
    state, unfinished, advance = _program(
        hidden, unembed, tokens_BL, valid_BL, start, length, rule, vocab, key, unconditional, record
    )
    state = jax.lax.while_loop(unfinished, advance, state)
    tokens_BL = _finish(state.tokens_BL, start, length, rule, vocab)
    return (tokens_BL, state.record) if record else tokens_BL


def denoise_steps(
    hidden: Hidden,
    unembed: Unembed,
    tokens_BL: jax.Array,
    valid_BL: jax.Array,
    *,
    start: int,
    length: int,
    rule: Rule,
    vocab: Vocab,
    key: jax.Array,
    unconditional: tuple[jax.Array, jax.Array] | None = None,
) -> Iterator[jax.Array]:
    """The same decoding as a Python loop: yields the rows after every step (to look at them)."""
    state, unfinished, advance = _program(
        hidden, unembed, tokens_BL, valid_BL, start, length, rule, vocab, key, unconditional
    )
    advance = jax.jit(advance)
    while unfinished(state):
        state = advance(state)
        last = not unfinished(state)
        yield _finish(state.tokens_BL, start, length, rule, vocab) if last else state.tokens_BL


def transfer_quota(n_hidden_B: jax.Array, steps: int, step: jax.Array) -> jax.Array:
    """How many tokens step `step` of `steps` reveals of n: n // steps, and one more in the first
    n % steps steps."""
    return n_hidden_B // steps + (step < n_hidden_B % steps).astype(n_hidden_B.dtype)


def _program(
    hidden, unembed, tokens_BL, valid_BL, start, length, rule, vocab, key, unconditional, record=False
):
    """The loop's parts: first state, whether to go on, one step."""
    rule.check(length)
    if not 0 <= start <= start + length <= tokens_BL.shape[1]:
        raise ValueError(
            f"span [{start}, {start + length}) is outside a row of {tokens_BL.shape[1]} tokens"
        )
    size = rule.block if isinstance(rule, TextRule) else length
    blocks = length // size
    given_BL = jnp.asarray(tokens_BL, jnp.int32)
    position_1L = jnp.arange(given_BL.shape[1])[None]
    in_span_1L = (position_1L >= start) & (position_1L < start + length)
    if rule.guidance:
        if unconditional is None:
            unconditional = jnp.full_like(given_BL, vocab.mask), valid_BL
        other_BL, other_valid_BL = unconditional
        both_valid_2BL = jnp.concatenate([valid_BL, other_valid_BL])

    def logits_at(state, first):
        tokens, valid = state.tokens_BL, valid_BL
        if rule.guidance:
            tokens = jnp.concatenate([tokens, jnp.where(in_span_1L, tokens, other_BL)])
            valid = both_valid_2BL
        h = jax.lax.dynamic_slice_in_dim(hidden(tokens, valid), first, size, axis=1)
        logits = unembed(h, *rule.vocabulary(vocab)).astype(jnp.float32)
        if rule.guidance:
            c, u = jnp.split(logits, 2)
            return u + np.float32(1 + rule.guidance) * (c - u), c
        return logits, logits

    def advance(state):
        first = start + state.block * size
        now_BN = jax.lax.dynamic_slice_in_dim(state.tokens_BL, first, size, axis=1)
        given_BN = jax.lax.dynamic_slice_in_dim(given_BL, first, size, axis=1)
        step_key = jax.random.fold_in(jax.random.fold_in(key, state.block), state.step)
        logits_BNV, plain_BNV = logits_at(state, first)
        before_BN = now_BN
        now_BN = rule.reveal(step_key, logits_BNV, now_BN, given_BN, state.step, blocks, vocab)
        tokens_BL = jax.lax.dynamic_update_slice_in_dim(state.tokens_BL, now_BN, first, axis=1)
        done = ~jnp.any(now_BN == vocab.mask)
        if isinstance(rule, TextRule):
            # A model may draw the mask itself, which reveals nothing; no block waits for it for ever.
            done |= state.step + 1 >= 2 * max(size, rule.steps)
        block = state.block + done.astype(jnp.int32)
        if isinstance(rule, TextRule) and rule.stop is not None:
            ended_B = jnp.any(in_span_1L & (tokens_BL == rule.stop), axis=1)
            block = jnp.where(done & jnp.all(ended_B), blocks, block)
        seen, steps = state.record, state.steps
        if record:
            first_id, _ = rule.vocabulary(vocab)
            new_BN = (before_BN == vocab.mask) & (now_BN != vocab.mask)
            seen = _write(seen, first, new_BN, steps, plain_BNV, jnp.where(new_BN, now_BN - first_id, 0))
            steps += 1
        return State(tokens_BL, block, jnp.where(done, 0, state.step + 1), seen, steps)

    def unfinished(state):
        return state.block < blocks

    begin = State(given_BL, jnp.int32(0), jnp.int32(0))
    if record:
        step_BL = jnp.where(in_span_1L & (given_BL == vocab.mask), jnp.int32(NEVER), -1)
        zero_BL = jnp.zeros(given_BL.shape, jnp.float32)
        begin = begin._replace(record=Record(step_BL, zero_BL, zero_BL), steps=jnp.int32(0))
    return begin, unfinished, advance


def _write(record: Record, first, new_BN, steps, logits_BNV, index_BN) -> Record:
    """The record with the tokens that this step revealed."""
    logp_BNV = jax.nn.log_softmax(logits_BNV, axis=-1)
    values = Record(
        jnp.broadcast_to(steps, new_BN.shape),
        _pick(logp_BNV, index_BN),
        -jnp.sum(jnp.exp(logp_BNV) * logp_BNV, axis=-1),
    )

    def put(x_BL, value_BN):
        x_BN = jax.lax.dynamic_slice_in_dim(x_BL, first, new_BN.shape[1], axis=1)
        x_BN = jnp.where(new_BN, value_BN, x_BN)
        return jax.lax.dynamic_update_slice_in_dim(x_BL, x_BN, first, axis=1)

    return jax.tree.map(put, record, values)


def _finish(tokens_BL, start, length, rule, vocab):
    if not isinstance(rule, TextRule) or rule.stop is None:
        return tokens_BL
    span_BN = tokens_BL[:, start : start + length]
    return tokens_BL.at[:, start : start + length].set(
        jnp.where(span_BN == vocab.mask, jnp.int32(rule.stop), span_BN)
    )


def _pick(values_BNV, index_BN):
    return jnp.take_along_axis(values_BNV, index_BN[..., None], axis=-1)[..., 0]


def divisor(length: int, near: int) -> int:
    """The largest divisor of `length` that is at most `near`: a block size."""
    return next(b for b in range(max(1, min(near, length)), 0, -1) if length % b == 0)
