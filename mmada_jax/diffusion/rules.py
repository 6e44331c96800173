"""How a step of decoding reveals tokens: the rules that the loop of `denoise` can follow.

    TextRule    block after block from the left, the most certain tokens first (LLaDA, MMaDA)
    ImageRule   all positions at once, fewer and fewer sent back (MaskGIT, MMaDA)

The loop asks a rule, and never which rule it is: its vocabulary, the size of its blocks, when a block
ends, and which tokens a step reveals. So a new way of decoding is one more class with these methods.
"""

import dataclasses
import functools
import math
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.diffusion import schedule
from mmada_jax.ranges import Positive, Range, Ranged, Weight
from mmada_jax.tokens.vocab import Vocab

Steps = Annotated[int, Range(1, 1_000_000)]
Temperature = Annotated[float, Range(0, 1000)]
Guidance = Annotated[float, Range(0, 1e6)]
Passing = Annotated[float, Range(0, 1, above=True)]
Token = Annotated[int, Range(0, 2**31 - 1)]
CACHES = ("none", "prefix", "dual")
ORDERS = ("certainty", "halton", "emerge")
REMASKS = ("low_confidence", "largest", "margin", "entropy", "random")
# Drawing with `recompute`: the share of the steps at the start that compute all tokens, and how often a
# step does after them.
WARM_UP, ANEW_EVERY = 0.3, 5


@dataclasses.dataclass(frozen=True)
class TextRule(Ranged):
    """Semi-autoregressive decoding with low-confidence remasking.

    A block has `block` tokens, the last block of a span what is left. `remask` says how certain a drawn
    token is: by its own probability ("low_confidence"), by the largest probability at its place
    ("largest", which doesn't depend on the draw), by the distance of the two largest ("margin"), by the
    negative entropy ("entropy"), or by chance ("random"). Tokens in `never` are not drawn. Tokens in
    `defer` count as least certain, so that they come last. A row that has a `stop` when a block ends is
    finished, and its hidden tokens become `stop`.

    How many of the most certain tokens a step reveals, at least one:

    - by `steps`, which are shared equally among the blocks; None reveals one token in each step;
    - with `threshold` every token that is at least that certain. `relax` a lowers the threshold to
      threshold (1 - a (1 - r)), with r the share that is still hidden of the tokens that were hidden when
      the block began (Streaming-dLLM).
      `leap` is a lower threshold for places up to `radius` from a token that passes (LocalLeap).
      With `verify` these tokens are a draft, at most max(0.7 m, 5) of m hidden ones and at most 20. Each
      step also asks how likely a token of the block is, given all else, and hides those below `verify`
      again, fewer than it reveals (WINO, arXiv 2507.18578). A step that stores anew judges nothing;
    - with `factor` f the n most certain tokens, as long as each exceeds 1 - f/(n+1) (Fast-dLLM);
    - with `bound` the tokens of least entropy, as long as the entropies of those before, in nats, sum up
      to at most that much (EB-Sampler, arXiv 2505.24857).

    With a `cache` steps compute the current block ("dual") or the block and what follows it ("prefix"), and
    read stored keys and values of the rest, which is faster and not exact; see `cached`. `window` is how
    many places after the block it sees, None all. `refresh` stores anew after so many steps within a
    block; None at each new block only.
    """

    modality: ClassVar[str] = "text"
    guide_every: ClassVar[int] = 1
    recompute: ClassVar[float] = 1.0
    keeps_logits: ClassVar[bool] = False

    steps: Steps | None = None
    block: Positive = 128
    temperature: Temperature = 0.0
    remask: Literal[REMASKS] = "low_confidence"
    guidance: Guidance = 0.0
    threshold: Passing | None = None
    relax: Annotated[float, Range(0, 1, below=True)] = 0.0
    leap: Passing | None = None
    radius: Positive = 4
    verify: Passing | None = None
    factor: Weight | None = None
    bound: Weight | None = None
    never: tuple[Token, ...] = ()
    defer: tuple[Token, ...] = ()
    stop: Token | None = None
    cache: Literal[CACHES] = "none"
    window: Positive | None = None
    refresh: Positive | None = None

    def __post_init__(self):
        super().__post_init__()
        given = [name for name in ("threshold", "factor", "bound") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} both say how many tokens a step reveals; give one of them"
            )
        for name, does in (("relax", "lowers"), ("leap", "lowers"), ("verify", "judges what passes")):
            if getattr(self, name) and self.threshold is None:
                raise ValueError(f"{name} {getattr(self, name)} {does} a threshold; give threshold too")
        if self.leap is not None and self.leap > self.threshold:
            raise ValueError(f"leap {self.leap} is above threshold {self.threshold}; it must be lower")
        for name in ("window", "refresh"):
            if self.cache == "none" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} {getattr(self, name)} is for decoding with a cache; give cache='dual' or "
                    "'prefix' too"
                )
        for name, value in (("cache", self.cache != "none" and self.cache), ("verify", self.verify)):
            if value and self.guidance:
                raise ValueError(
                    f"guidance {self.guidance} doesn't go with {name} {value!r}; leave out one of them"
                )

    def check_length(self, length: int) -> None:
        """Raises ValueError if this rule can't fill spans of up to `length` tokens."""
        if self.cache not in CACHES:
            raise ValueError(f"unknown cache {self.cache!r}; known: {', '.join(CACHES)}")
        if self.remask not in REMASKS:
            raise ValueError(f"unknown remask {self.remask!r}; known: {', '.join(REMASKS)}")
        if length < 1:
            raise ValueError(f"a span has {length} tokens; it must have at least 1")
        blocks = -(-length // self.block)
        if self.by_quota and self.steps is not None and (self.steps < blocks or self.steps % blocks):
            raise ValueError(
                f"steps {self.steps} are not divisible by the {blocks} blocks of {self.block} "
                f"tokens in a length of {length}; choose a multiple of {blocks}"
            )

    @property
    def caches(self) -> int:
        """How many rows of stored keys and values belong to a row."""
        return int(self.cache != "none")

    @property
    def by_quota(self) -> bool:
        """Whether `steps` say how many tokens a step reveals."""
        return self.threshold is None and self.factor is None and self.bound is None

    def vocabulary(self, vocab: Vocab) -> tuple[int, int | None]:
        """First id and number of ids that are drawn from: all of them, image codes too."""
        return 0, None

    def size(self, length: int) -> int:
        """Tokens of a block in spans of up to `length`."""
        return min(self.block, length)

    def patience(self, length: int) -> int:
        """Steps after which a block ends even if tokens are still hidden: a model may draw the mask itself,
        which reveals nothing."""
        return 2 * max(self.size(length), self._steps_of_block(length))

    def _steps_of_block(self, length: int) -> int:
        return self.size(length) if self.steps is None else max(1, self.steps // -(-length // self.block))

    def reveal(self, key_BN, logits_BNV, hidden_BN, n_given_B, step_B, length: int):
        """A step within a block: logits -> indices drawn [B, N], and which of the hidden places to reveal.

        `step_B` counts the steps of each row within its block, `n_given_B` the tokens that were hidden
        when the block began, `length` is the one of `check_length`."""
        drawn_BNV = logits_BNV
        if self.temperature:
            drawn_BNV += np.float32(self.temperature) * _gumbel(key_BN, 0, logits_BNV.shape[2:])
        if self.never:
            drawn_BNV = drawn_BNV.at[..., np.array(self.never)].set(-jnp.inf)
        x0_BN = jnp.argmax(drawn_BNV, axis=-1)

        if self.defer:
            logits_BNV = logits_BNV.at[..., np.array(self.defer)].set(-jnp.inf)
        p_BNV = jax.nn.softmax(logits_BNV, axis=-1)
        if self.bound is not None or self.remask == "entropy":
            sure_BN = jnp.sum(p_BNV * jnp.log(p_BNV + np.float32(1e-10)), axis=-1)
        elif self.remask == "low_confidence":
            sure_BN = pick(p_BNV, x0_BN)
        elif self.remask == "largest":
            sure_BN = jnp.max(p_BNV, axis=-1)
        elif self.remask == "margin":
            top_BN2 = jax.lax.top_k(p_BNV, 2)[0]
            sure_BN = top_BN2[..., 0] - top_BN2[..., 1]
        else:
            sure_BN = _uniform(key_BN, 1)
        sure_BN = jnp.where(hidden_BN, sure_BN, -jnp.inf)
        pass_BN = self._passing(sure_BN, hidden_BN, n_given_B, step_B, length)
        return x0_BN, hidden_BN & pass_BN

    def revise(self, logits_BNV, now_BN, shown_BN, reveal_BN):
        """Which of the tokens that are shown are hidden again: the least likely of those below `verify` by
        the logits of their shadows, fewer than a step reveals."""
        p_BN = pick(jax.nn.softmax(logits_BNV, axis=-1), now_BN)
        p_BN = jnp.where(shown_BN, p_BN, jnp.inf)
        rank_BN = jnp.argsort(jnp.argsort(p_BN, axis=1), axis=1)
        return (p_BN < np.float32(self.verify)) & (rank_BN < jnp.sum(reveal_BN, axis=1)[:, None] - 1)

    def _passing(self, sure_BN, hidden_BN, n_given_B, step_B, length):
        """Which tokens are certain enough; the most certain one always is."""
        N = hidden_BN.shape[1]
        order_BN = jnp.argsort(-sure_BN, axis=1)
        rank_BN = jnp.argsort(order_BN, axis=1)
        if self.threshold is not None:
            threshold_B = jnp.full(len(sure_BN), np.float32(self.threshold))
            if self.relax:
                n_hidden_B = jnp.sum(hidden_BN, axis=1).astype(jnp.float32)
                share_B = n_hidden_B / jnp.maximum(n_given_B, 1).astype(jnp.float32)
                threshold_B *= 1 - np.float32(self.relax) * (1 - share_B)
            pass_BN = sure_BN >= threshold_B[:, None]
            if self.leap is not None:
                near_NN = np.abs(np.subtract.outer(np.arange(N), np.arange(N))) <= self.radius
                near_BN = jnp.any(pass_BN[:, None] & near_NN[None], axis=2)
                pass_BN |= near_BN & (sure_BN >= np.float32(self.leap))
            if self.verify:
                most_B = jnp.clip(7 * jnp.sum(hidden_BN, axis=1) // 10, 5, 20)
                pass_BN &= rank_BN < most_B[:, None]
            return pass_BN | (rank_BN == 0)
        if self.by_quota:
            quota_B = transfer_quota(n_given_B, self._steps_of_block(length), step_B)
            return rank_BN < quota_B[:, None]
        sorted_BN = jnp.take_along_axis(sure_BN, order_BN, axis=1)
        finite_BN = jnp.isfinite(sorted_BN)
        if self.factor is not None:
            floor_N = 1 - np.float32(self.factor) / np.arange(2, N + 2, dtype=np.float32)
            passed_BN = sorted_BN >= floor_N[None]
        else:
            # The sum over the tokens before; zero for the first one.
            sum_BN = jnp.cumsum(jnp.where(finite_BN, -sorted_BN, 0), axis=1)
            passed_BN = sum_BN + jnp.where(finite_BN, sorted_BN, 0) <= np.float32(self.bound)
        passed_BN = finite_BN & (passed_BN | (np.arange(N) == 0)[None])
        quota_B = jnp.sum(jnp.cumprod(passed_BN, axis=1), axis=1)
        return rank_BN < quota_B[:, None]


@dataclasses.dataclass(frozen=True)
class ImageRule(Ranged):
    """Parallel decoding. In each of `steps` steps all hidden codes are drawn, and the least certain of
    them are hidden again, as many as `schedule` says.

    `temperature` scales noise that is added to the order of certainty. It falls over the steps: by the
    running product of (1 - k/steps), as in the reference, or with `anneal` "linear" by 1 - k/steps. The
    number of codes that stay hidden is a share of all positions of the span with `quota` "total" (as in
    the reference), or of the positions that were hidden at the start with "hidden", which spreads an
    inpainting over all steps. With `remask` "largest" a position is as certain as its most likely code,
    whichever was drawn: the order doesn't depend on the draw.

    `order` says which codes stay. By "certainty", as above; "halton": a fixed order that spreads over the
    picture, of which `columns` is the number of codes in a row (Halton-MaskGIT, arXiv 2503.17076);
    "emerge": each hidden code stays with the same probability, which makes the share of hidden codes
    follow `schedule` (MaskGRPO, arXiv 2510.02880). In the latter two no code is judged, and the order
    doesn't depend on the draw; `temperature` and `remask` have no effect.

    With `guide_every` n guidance computes its unconditional row in every n-th step, and keeps in between
    how far the two rows were apart (LazyMAR, arXiv 2503.12450): up to twice as fast, and not exact.

    With `recompute` below 1 most steps compute that share of the codes anew: those that were revealed since
    they were last computed, then the hidden ones whose largest logit is lowest. All other tokens keep their
    keys, values and logits (after the ML-Cache of Lumina-DiMOO, arXiv 2510.06308). All tokens are computed
    in the first WARM_UP of the steps and in every ANEW_EVERYth after them. It is not exact: most codes are
    drawn from logits that don't know of the latest ones.
    """

    modality: ClassVar[str] = "image"
    stop: ClassVar[None] = None
    verify: ClassVar[None] = None
    cache: ClassVar[str] = "none"
    window: ClassVar[None] = None
    refresh: ClassVar[None] = None

    steps: Steps = 15
    schedule: str = "cosine"
    temperature: Temperature = 1.0
    guidance: Guidance = 3.5
    draw: Literal["sample", "argmax"] = "sample"
    anneal: Literal["product", "linear"] = "product"
    quota: Literal["total", "hidden"] = "total"
    remask: Literal["low_confidence", "largest"] = "low_confidence"
    order: Literal[ORDERS] = "certainty"
    columns: Positive | None = None
    guide_every: Positive = 1
    recompute: Annotated[float, Range(0, 1, above=True)] = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.recompute < 1 and self.guide_every > 1:
            raise ValueError(
                f"guide_every {self.guide_every} doesn't go with recompute {self.recompute}; leave out one "
                "of them"
            )

    def check_length(self, length: int) -> None:
        """Raises ValueError if this rule can't fill a span of `length` tokens."""
        schedule.named(self.schedule)
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r}; known: {', '.join(ORDERS)}")
        if self.order == "halton" and (self.columns is None or length % self.columns):
            raise ValueError(
                f"columns is {self.columns}; with order 'halton' it must be the number of codes in a row "
                f"of the picture, and divide its {length} codes"
            )
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")

    @property
    def caches(self) -> int:
        """How many rows of stored keys and values belong to a row: with guidance one of the unconditional
        row too."""
        return 0 if self.recompute == 1 else 2 if self.guidance else 1

    @property
    def keeps_logits(self) -> bool:
        """Whether a step keeps logits for the next ones."""
        return self.recompute < 1 or (self.guidance > 0 and self.guide_every > 1)

    def all_anew(self, step_B: jax.Array) -> jax.Array:
        """Which rows compute all of their tokens in these steps, bool [B]."""
        after_B = step_B - _ceil(WARM_UP * self.steps)
        return (after_B < 0) | (after_B % ANEW_EVERY == ANEW_EVERY - 1)

    def n_anew(self, length: int) -> int:
        """How many codes of a span the other steps compute."""
        return _ceil(self.recompute * length)

    def vocabulary(self, vocab: Vocab) -> tuple[int, int | None]:
        """First id and number of ids that are drawn from: the image codes."""
        return vocab.image_offset, vocab.codebook_size

    def size(self, length: int) -> int:
        """The whole span is one block."""
        return length

    def patience(self, length: int) -> int:
        """The number of steps; the last one leaves nothing hidden."""
        return self.steps

    def reveal(self, key_BN, logits_BNV, hidden_BN, n_given_B, step_B, length: int):
        """A step: logits over the codes -> indices drawn [B, N], and which of the hidden places to reveal.
        The arguments are those of TextRule."""
        drawn_BNV = logits_BNV
        if self.draw == "sample":
            drawn_BNV += _gumbel(key_BN, 0, logits_BNV.shape[2:])
        x0_BN = jnp.argmax(drawn_BNV, axis=-1)
        if self.order == "emerge":
            return x0_BN, hidden_BN & (_uniform(key_BN, 1) < self._emerging()[step_B][:, None])

        # Of U unknown tokens at most U - 1 and at least one stay hidden, until the last step.
        ratio_T = np.arange(1, self.steps + 1) / self.steps
        schedule_of = schedule.named(self.schedule)
        keep_B = jnp.asarray(schedule.hidden_counts(schedule_of, length, self.steps))[step_B]
        if self.quota == "hidden":
            gamma_T = schedule_of(ratio_T.astype(np.float32))
            gamma_B = jnp.asarray(gamma_T)[step_B]
            keep_B = jnp.floor(n_given_B.astype(jnp.float32) * gamma_B).astype(jnp.int32)
        unknown_B = jnp.sum(hidden_BN, axis=1)
        keep_B = jnp.maximum(1, jnp.minimum(unknown_B - 1, keep_B))
        is_last_B1 = (step_B >= self.steps - 1)[:, None]
        if self.order == "halton":
            rank_N = halton_order(length // self.columns, self.columns).argsort().astype(np.int32)
            rank_BN = jnp.where(hidden_BN, rank_N[None], length).argsort(axis=1).argsort(axis=1)
            return x0_BN, hidden_BN & ((rank_BN < (unknown_B - keep_B)[:, None]) | is_last_B1)

        p_BNV = jax.nn.softmax(logits_BNV, axis=-1)
        sure_BN = jnp.max(p_BNV, axis=-1) if self.remask == "largest" else pick(p_BNV, x0_BN)
        tau_T = np.cumprod(1 - ratio_T) if self.anneal == "product" else 1 - ratio_T
        tau_B = jnp.asarray((self.temperature * tau_T).astype(np.float32))[step_B]
        score_BN = jnp.log(jnp.maximum(sure_BN, np.float32(1e-20)))
        score_BN += tau_B[:, None] * _gumbel(key_BN, 1)
        score_BN = jnp.where(hidden_BN, score_BN, jnp.inf)
        cut_B1 = jnp.take_along_axis(jnp.sort(score_BN, axis=1), keep_B[:, None], axis=1)
        return x0_BN, hidden_BN & ~((score_BN < cut_B1) & ~is_last_B1)

    def _emerging(self):
        """The probability that a hidden code is revealed, in each step."""
        t = (np.arange(self.steps + 1) / self.steps).astype(np.float32)
        hidden = np.clip(schedule.named(self.schedule)(t), 1e-6, 1)
        return jnp.asarray(np.append(1 - hidden[1:-1] / hidden[:-2], 1).astype(np.float32))


@functools.cache
def halton_order(rows: int, columns: int) -> np.ndarray:
    """The places of a grid, int [rows * columns], in the order in which the Halton sequence of bases 2 and
    3 first comes to each: every part of the grid is visited early."""

    def van_der_corput(n, base):
        """The digits of n in this base, mirrored at the point."""
        value, unit = np.zeros(len(n)), 1.0
        while n.any():
            unit /= base
            value += unit * (n % base)
            n = n // base
        return value

    found, first, count = np.zeros(0, int), 1, 4 * rows * columns
    while len(found) < rows * columns:
        n = np.arange(first, first + count)
        i, j = (van_der_corput(n, 2) * rows).astype(int), (van_der_corput(n, 3) * columns).astype(int)
        places = np.append(found, i * columns + j)
        found = places[np.sort(np.unique(places, return_index=True)[1])]
        first += count
    return found


Rule = TextRule | ImageRule

# Settings by one name, for each modality: what they trade is in docs/decoding.md.
PRESETS = {
    "text": {
        "exact": {},
        "cached": {"cache": "dual"},
        "fast": {"cache": "dual", "threshold": 0.95},
    },
    "image": {"exact": {}, "fast": {"guide_every": 4}},
}


def transfer_quota(n_hidden_B: jax.Array, steps: int, step: jax.Array) -> jax.Array:
    """Tokens that a step reveals, of n that were hidden when its block of `steps` steps began: n //
    steps, and one more in each of the first n % steps steps."""
    return n_hidden_B // steps + (step < n_hidden_B % steps).astype(n_hidden_B.dtype)


def _ceil(share: float) -> int:
    """A share of a number, rounded up, but not for an error of floats (0.07 * 100 is more than 7)."""
    return math.ceil(round(share, 6))


def _gumbel(key_BN, stream, shape=()):
    """Noise [B, N, *shape] from the key of each place; `stream` tells one draw of a step from another."""
    return _drawn(jax.random.gumbel, key_BN, stream, shape)


def _uniform(key_BN, stream):
    return _drawn(jax.random.uniform, key_BN, stream, ())


def _drawn(draw, key_BN, stream, shape):
    one = lambda key: draw(jax.random.fold_in(key, stream), shape)  # noqa: E731
    return jax.vmap(jax.vmap(one))(key_BN)


def pick(values_BNV: jax.Array, index_BN: jax.Array) -> jax.Array:
    """The entry of each place at its index [B, N]."""
    return jnp.take_along_axis(values_BNV, index_BN[..., None], axis=-1)[..., 0]
