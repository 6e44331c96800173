"""Decoding on a mesh: rows whose spans are to be filled -> the ids of the spans.

The loop of `denoise` is jitted once for a mesh, a rule and a shape of rows; prompts of all lengths share
that compilation. How rows are laid out is in `model.model`.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mmada_jax.devices import sharding
from mmada_jax.diffusion import denoise, rules
from mmada_jax.nets import cache as caches
from mmada_jax.nets import transformer
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import Vocab


@dataclasses.dataclass(frozen=True)
class Job:
    """Rows ready for the denoising loop, and the span of each that is to be filled.

    `length` is the number of tokens that the rule is meant for; a span has at most that many.
    `unconditional` are the second rows of guidance. `one` says that a single input was given, not in a
    list, so that the outcome is a single result too."""

    rows: layout.Batch
    start_B: np.ndarray
    length_B: np.ndarray
    length: int
    rule: rules.Rule
    unconditional: layout.Batch | None = None
    one: bool = False

    def spans(self, tokens_BL: np.ndarray) -> list[np.ndarray]:
        """The ids of the spans in decoded rows. Rows beyond those of the job, which only fill up the
        devices, are left out."""
        ends_B = self.start_B + self.length_B
        spans = zip(tokens_BL, self.start_B, ends_B, strict=False)
        return [tokens_L[start:end] for tokens_L, start, end in spans]


class Placed(NamedTuple):
    """A job on its devices, spread by rows, as the jitted functions take it. The key of a row is made of
    its `seed`, folded with its `number`."""

    tokens_BL: jax.Array
    valid_BL: jax.Array
    start_B: jax.Array
    length_B: jax.Array
    seed_B: jax.Array
    number_B: jax.Array
    other: tuple[jax.Array, jax.Array] | None


def run_spans(
    params: Any,
    config: transformer.ModelConfig,
    vocab: Vocab,
    mesh: jax.sharding.Mesh,
    jobs: Sequence[Job],
    seed: int | Sequence[int] = 0,
) -> list[list[np.ndarray]]:
    """Fills the spans of several jobs in the same steps. The jobs have the same rows, and each a span and a
    rule of its own. The ids of each job's spans."""
    of_jobs = tuple((job.length, job.rule) for job in jobs)
    fill = _spans_decoder(mesh, config, vocab, of_jobs, "lora" in params)
    placed = [put(mesh, job, seed) for job in jobs]
    with jax.set_mesh(mesh):
        tokens_BL = np.asarray(fill(params, placed))
    return [job.spans(tokens_BL) for job in jobs]


def put(mesh: jax.sharding.Mesh, job: Job, seed: int | Sequence[int] = 0) -> Placed:
    """A job on its devices, the last row repeated until the rows divide among them."""
    placed = rows_of(job, seed)
    more = -len(placed.tokens_BL) % sharding.row_parts(mesh)
    filled = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], more, axis=0)]), placed)
    return sharding.put_batch(mesh, filled)


def rows_of(job: Job, seed: int | Sequence[int] = 0) -> Placed:
    """The rows of a job with their seeds, arrays of the host. Raises ValueError for wrong seeds."""
    n = len(job.rows.tokens)
    if np.ndim(seed):
        if len(seed) != n:
            raise ValueError(f"{len(seed)} seeds for {n} rows; give one seed, or one for each row")
        seeds, places = list(seed), [0] * n
    else:
        seeds, places = [seed] * n, range(n)
    if wrong := [one for one in seeds if not isinstance(one, numbers.Integral)]:
        raise ValueError(f"the seed is {wrong[0]!r}; it must be an integer")
    other = job.unconditional
    return Placed(
        job.rows.tokens,
        job.rows.valid,
        np.asarray(job.start_B, np.int32),
        np.asarray(job.length_B, np.int32),
        np.array([one & 0xFFFFFFFF for one in seeds], np.uint32),
        np.array(places, np.int32),
        None if other is None else (other.tokens, other.valid),
    )


def padded(one: Placed, places: int, pad: int) -> Placed:
    """Rows with so many places; none of those that go is valid."""

    def fit(x_1L, value):
        more = max(0, places - x_1L.shape[1])
        return np.pad(x_1L[:, :places], ((0, 0), (0, more)), constant_values=value)

    other = one.other and (fit(one.other[0], pad), fit(one.other[1], False))
    return one._replace(tokens_BL=fit(one.tokens_BL, pad), valid_BL=fit(one.valid_BL, False), other=other)


def first_pass(mesh: jax.sharding.Mesh, job: Job) -> dict[str, Any]:
    """`reach` and `share` of `denoise` for a rule whose cache is made before its first step: how far the
    first pass computes, how many rows that follow each other are equal."""
    if job.rule.cache == "none":
        return {}
    first = {"reach": reach_of(job.rule, job.length, int(job.start_B.max()), job.rows.tokens.shape[1])}
    if sharding.row_parts(mesh) == 1:
        fresh_B = fresh(job.rows.tokens, job.rows.valid, job.start_B, job.length_B)
        first["share"] = int(np.gcd.reduce([*np.flatnonzero(fresh_B), len(fresh_B)]))
    return first


def fresh(
    tokens_BL: np.ndarray, valid_BL: np.ndarray, start_B: np.ndarray, length_B: np.ndarray
) -> np.ndarray:
    """Which rows differ from the row before them in more than their seed, bool [B]; the first does."""
    rows_BX = np.concatenate((tokens_BL, valid_BL, start_B[:, None], length_B[:, None]), axis=1)
    return np.append(True, (rows_BX[1:] != rows_BX[:-1]).any(axis=1))


def reach_of(rule: rules.Rule, length: int, start: int, places: int) -> int | None:
    """How far the first pass over rows of so many places computes, if no span begins after `start`. None if
    the rule has no window: over the whole rows."""
    if rule.window is None:
        return None
    return min(layout.bucket(start + rule.size(length) + rule.window), places)


@functools.cache
def decoder(
    mesh: jax.sharding.Mesh,
    config: transformer.ModelConfig,
    vocab: Vocab,
    length: int,
    rule: rules.Rule,
    reach: int | None = None,
    share: int = 1,
) -> Callable[[Any, Placed], jax.Array]:
    """The jitted (params, placed) -> tokens [B, L], which every process gets whole. `reach` and `share` are
    those of `denoise`."""

    def fill(params, placed):
        return denoise.denoise(
            transformer.Network(params, config),
            placed.tokens_BL,
            placed.valid_BL,
            start=placed.start_B,
            length=length,
            lengths=placed.length_B,
            rule=rule,
            vocab=vocab,
            key=_keys(placed),
            unconditional=placed.other,
            reach=reach,
            share=share,
        )

    everywhere = sharding.replicated(mesh)
    return sharding.jit(
        mesh,
        fill,
        in_shardings=(param_shardings(mesh, config), sharding.batch_sharding(mesh)),
        out_shardings=everywhere,
    )


@functools.cache
def _spans_decoder(mesh, config, vocab, of_jobs, adapted):
    """The jitted (params, the placed rows of each job) -> tokens [B, L], which every process gets whole."""

    def fill(params, placed):
        spans = [
            denoise.Span(of.start_B, of.length_B, length, rule, of.other)
            for of, (length, rule) in zip(placed, of_jobs, strict=True)
        ]
        first, network = placed[0], transformer.Network(params, config)
        rows = first.tokens_BL, first.valid_BL
        return denoise.denoise_spans(network, *rows, spans, vocab=vocab, key_B=_keys(first))

    return sharding.jit(
        mesh,
        fill,
        in_shardings=(param_shardings(mesh, config, adapted), sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )


def state_shardings(mesh: jax.sharding.Mesh, rule: rules.Rule) -> denoise.State:
    """Where the state of a decoding lies on a mesh."""
    rows = sharding.batch_sharding(mesh)
    cache = caches.shardings(mesh) if rule.caches else None
    kept = rows if rule.keeps_logits else None
    changed = rows if rule.recompute < 1 else None
    return denoise.State(rows, rows, rows, rows, cache=cache, kept=kept, changed=changed)


def draft_of(placed: Placed) -> denoise.Draft:
    """What the loop is given, with the key of each row."""
    return denoise.Draft(*placed[:4], _keys(placed), placed.other)


def _keys(placed: Placed) -> jax.Array:
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(placed.seed_B), placed.number_B)


def param_shardings(mesh: jax.sharding.Mesh, config: transformer.ModelConfig, adapted: bool = False) -> Any:
    """Where the params of a model rest on a mesh; with `adapted` there are adapters beside them, whole on
    every device. Raises ValueError for a mesh that doesn't divide the params."""
    axes, shapes = transformer.param_axes(config), transformer.param_shapes(config)
    places = sharding.tree_shardings(mesh, axes, shapes)
    return places | ({"lora": sharding.replicated(mesh)} if adapted else {})
