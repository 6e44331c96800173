"""How likely a model holds a continuation, by the Monte-Carlo bound of masked diffusion (LLaDA, arXiv
2502.09992).

With x of the L tokens of a continuation hidden, x and the places uniform,

    log p(continuation | context)  >=  E [ L / x * sum of log p(token | what is shown) ]

The mean over draws estimates the right side without a bias. The numbers x of a continuation's draws are
spread evenly over 1..L, which lowers the variance. A single token needs one draw and is exact.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from mmada_jax.devices import sharding
from mmada_jax.diffusion import decode, loss
from mmada_jax.nets import transformer
from mmada_jax.serve.api import MMaDA
from mmada_jax.tokens import layout

DRAWS = 128
CHUNK = 2048  # positions of a device that have logits at a time


class Pair(NamedTuple):
    """Token ids of a context and of what continues it."""

    context: Sequence[int]
    continuation: Sequence[int]


class _Row(NamedTuple):
    """A draw: the tokens with some hidden, the true ones, which are hidden, and the factor of their sum."""

    pair: int
    seen_L: np.ndarray
    tokens_L: np.ndarray
    hidden_L: np.ndarray
    factor: float


def log_likelihoods(
    model: MMaDA,
    pairs: Sequence[Pair],
    draws: int = DRAWS,
    seed: int = 0,
    rows: int = 32,
    progress: Callable[[int, float], None] = lambda number, value: None,
) -> np.ndarray:
    """The bound for each pair, in nats, [n]. `rows` go through the model at a time. What a pair gets
    doesn't depend on the others. `progress` is told each pair's number and value, in order.

    Raises ValueError for an empty context or continuation, and for a pair that is longer than the model
    takes."""
    limit = model.config.max_len
    for number, pair in enumerate(pairs):
        if not len(pair.context) or not len(pair.continuation):
            raise ValueError(f"pair {number} has an empty context or continuation; give each a token")
        if (length := len(pair.context) + len(pair.continuation)) > limit:
            raise ValueError(f"pair {number} has {length} tokens, the model takes {limit}; shorten it")
    rows = sharding.whole_rows(model.mesh, rows)
    of_pair = [1 if len(pair.continuation) == 1 else draws for pair in pairs]
    values, left, told = np.zeros(len(pairs)), list(of_pair), 0
    for batch in _batches(model, pairs, of_pair, seed, rows):
        for row, log_prob in zip(batch, _scores(model, batch, rows), strict=True):
            values[row.pair] += row.factor * log_prob / of_pair[row.pair]
            left[row.pair] -= 1
        while told < len(pairs) and not left[told]:
            progress(told, values[told])
            told += 1
    return values


def hidden_numbers(length: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How many of `length` tokens each draw hides, from 1 to `length`, spread evenly."""
    first = rng.integers(1, length + 1)
    return (first - 1 + np.round(np.arange(draws) * length / draws).astype(int)) % length + 1


def _batches(model, pairs, of_pair, seed, rows) -> Iterator[list[_Row]]:
    """Draws of neighbouring pairs together, `rows` at a time; `of_pair` counts those of each."""
    batch: list[_Row] = []
    for number, pair in enumerate(pairs):
        rng = np.random.default_rng([seed, *map(int, pair.context), *map(int, pair.continuation)])
        tokens_L = np.array([*pair.context, *pair.continuation], np.int32)
        start, L = len(pair.context), len(pair.continuation)
        for x in hidden_numbers(L, of_pair[number], rng):
            hidden_L = np.zeros(len(tokens_L), bool)
            hidden_L[start + rng.permutation(L)[:x]] = True
            seen_L = np.where(hidden_L, model.vocab.mask, tokens_L).astype(np.int32)
            batch.append(_Row(number, seen_L, tokens_L, hidden_L, L / x))
            if len(batch) == rows:
                yield batch
                batch = []
    if batch:
        yield batch


def _scores(model: MMaDA, batch: list[_Row], rows: int) -> np.ndarray:
    """The sum of the log-probabilities of the hidden tokens of each row."""
    longest = max(len(row.tokens_L) for row in batch)
    length = min(layout.bucket(longest), model.config.max_len)
    padded = [*batch, *[batch[-1]] * (rows - len(batch))]  # one compilation for all batches

    def stack(name, value):
        out = np.full((rows, length), value, getattr(batch[0], name).dtype)
        for i, row in enumerate(padded):
            out[i, : len(row.tokens_L)] = getattr(row, name)
        return out

    valid = np.arange(length)[None] < np.array([len(row.tokens_L) for row in padded])[:, None]
    arrays = (
        stack("seen_L", model.vocab.eos),
        valid,
        stack("tokens_L", model.vocab.eos),
        stack("hidden_L", False),
    )
    with jax.set_mesh(model.mesh):
        params = model.all_params
        score = _scorer(model.mesh, model.config, "lora" in params)
        sums_B = score(params, *(sharding.put_batch(model.mesh, x) for x in arrays))
    return np.asarray(sums_B)[: len(batch)]


@functools.cache
def _scorer(mesh, config, adapted):
    def score(params, seen_BL, valid_BL, tokens_BL, hidden_BL):
        h_BLD = transformer.hidden_states(params, config, seen_BL, valid_BL)
        logp_BL = loss.token_log_probs(h_BLD, transformer.head(params), tokens_BL, hidden_BL, CHUNK)
        return logp_BL.sum(axis=1)

    rows = sharding.batch_sharding(mesh)
    places = decode.param_shardings(mesh, config, adapted)
    return sharding.jit(mesh, score, (places, rows, rows, rows, rows), sharding.replicated(mesh))
