"""How a step of decoding reveals tokens: the rules that the loop of `denoise` can follow.

    TextRule    block after block from the left, the most certain tokens first (LLaDA, MMaDA)
    ImageRule   all positions at once, fewer and fewer sent back (MaskGIT, MMaDA)

The loop asks a rule, and never which rule it is: its vocabulary, the size of its blocks, when a block
ends, and which tokens a step reveals. So a new way of decoding is one more class with these methods.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.diffusion import schedule
from mmada_jax.ranges import Positive, Range, Ranged, Share, Weight
from mmada_jax.tokens.vocab import Vocab

Steps = Annotated[int, Range(1, 1_000_000)]
Temperature = Annotated[float, Range(0, 1000)]
Guidance = Annotated[float, Range(0, 1e6)]
Token = Annotated[int, Range(0, 2**31 - 1)]
REMASKS = ("low_confidence", "largest", "margin", "entropy", "random")


@dataclasses.dataclass(frozen=True)
class TextRule(Ranged):
    """Semi-autoregressive decoding with low-confidence remasking.

    A block has `block` tokens, the last block of a span what is left. `steps` are shared equally among
    the blocks; None reveals one token in each step. With `threshold` a step reveals every token that is
    at least that certain, with `factor` the n most certain tokens, as long as each exceeds 1 -
    factor/(n+1); in both cases at least one token, and `steps` is not used. Tokens in `never` are not
    drawn. Tokens in `defer` count as least certain, so that they come last. A row that has a `stop` when
    a block ends is finished, and its hidden tokens become `stop`. `remask` says how certain a drawn token
    is: by its own probability ("low_confidence"), by the largest probability at its place ("largest",
    which doesn't depend on the draw), by the distance of the two largest ("margin"), by the negative
    entropy ("entropy"), or by chance ("random").
    """

    modality: ClassVar[str] = "text"

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

    def check_length(self, length: int) -> None:
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
        """Steps after which a block ends even if tokens are still hidden: a model may draw the mask itself,
        which reveals nothing."""
        return 2 * max(self.size(length), self._steps_of_block(length))

    def _steps_of_block(self, length: int) -> int:
        return self.size(length) if self.steps is None else max(1, self.steps // -(-length // self.block))

    def reveal(self, key_BN, logits_BNV, hidden_BN, n_given_B, step_B, length: int):
        """A step within a block: logits -> indices drawn [B, N], and which of the hidden places to reveal.

        `step_B` counts the steps of each row within its block, `n_given_B` the tokens that were hidden
        when the block began, `length` is the one of `check_length`."""
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
            sure_BN = pick(p_BNV, x0_BN)
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
    """Parallel decoding. In each of `steps` steps all hidden codes are drawn, and the least certain of
    them are hidden again, as many as `schedule` says.

    `temperature` scales noise that is added to the order of certainty. It falls over the steps: by the
    running product of (1 - k/steps), as in the reference, or with `anneal` "linear" by 1 - k/steps. The
    number of codes that stay hidden is a share of all positions of the span with `quota` "total" (as in
    the reference), or of the positions that were hidden at the start with "hidden", which spreads an
    inpainting over all steps. With `remask` "largest" a position is as certain as its most likely code,
    whichever was drawn: the order doesn't depend on the draw.
    """

    modality: ClassVar[str] = "image"
    stop: ClassVar[None] = None

    steps: Steps = 15
    schedule: str = "cosine"
    temperature: Temperature = 1.0
    guidance: Guidance = 3.5
    draw: Literal["sample", "argmax"] = "sample"
    anneal: Literal["product", "linear"] = "product"
    quota: Literal["total", "hidden"] = "total"
    remask: Literal["low_confidence", "largest"] = "low_confidence"

    def check_length(self, length: int) -> None:
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
        """The number of steps; the last one leaves nothing hidden."""
        return self.steps

    def reveal(self, key_BN, logits_BNV, hidden_BN, n_given_B, step_B, length: int):
        """A step: logits over the codes -> indices drawn [B, N], and which of the hidden places to reveal.
        The arguments are those of TextRule."""
        drawn_BNV = logits_BNV
        if self.draw == "sample":
            drawn_BNV += _gumbel(key_BN, 0, logits_BNV.shape[2:])
        x0_BN = jnp.argmax(drawn_BNV, axis=-1)
        p_BNV = jax.nn.softmax(logits_BNV, axis=-1)
        sure_BN = jnp.max(p_BNV, axis=-1) if self.remask == "largest" else pick(p_BNV, x0_BN)

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


def transfer_quota(n_hidden_B: jax.Array, steps: int, step: jax.Array) -> jax.Array:
    """Tokens that a step reveals, of n that were hidden when its block of `steps` steps began: n //
    steps, and one more in each of the first n % steps steps."""
    return n_hidden_B // steps + (step < n_hidden_B % steps).astype(n_hidden_B.dtype)


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
