"""Decoding on a mesh: rows whose spans are to be filled -> their ids. Jitted once for a mesh, a rule and a
shape; how long a prompt is changes neither."""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.devices import sharding
from mmada_jax.diffusion import denoise
from mmada_jax.nets import transformer
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import Vocab


@dataclasses.dataclass(frozen=True)
class Job:
    """Rows ready for the denoising loop, and the span of each that is to be filled.

    `length` is that of the longest span that the rule is meant for; a span has at most so many tokens.
    `one` says that its only row was asked for by itself, so that a result is given and no list."""

    rows: layout.Batch
    start_B: np.ndarray
    length_B: np.ndarray
    length: int
    rule: denoise.Rule
    unconditional: layout.Batch | None = None
    one: bool = False

    def spans(self, tokens_BL: np.ndarray) -> list[np.ndarray]:
        """Of rows, those of this job first, the ids of their spans."""
        ends_B = self.start_B + self.length_B
        spans = zip(tokens_BL, self.start_B, ends_B, strict=False)
        return [tokens_L[start:end] for tokens_L, start, end in spans]


class Given(NamedTuple):
    """What the jitted functions take of a job, all of it spread over the devices by rows. A row draws from
    its `seed`, folded with its `number`."""

    tokens_BL: jax.Array
    valid_BL: jax.Array
    start_B: jax.Array
    length_B: jax.Array
    seed_B: jax.Array
    number_B: jax.Array
    other: tuple[jax.Array, jax.Array] | None


def run(
    params: Any,
    config: transformer.Config,
    vocab: Vocab,
    mesh: jax.sharding.Mesh,
    job: Job,
    seed: int | Sequence[int] = 0,
) -> list[np.ndarray]:
    """Fills the spans of a job; the ids of each. With one seed for all, what a row draws depends on its
    place among the rows; with one for each it depends on nothing but that."""
    fill, given = decoder(mesh, config, vocab, job.length, job.rule), put(mesh, job, seed)
    with jax.set_mesh(mesh):
        tokens_BL = fill(params, given)
    return job.spans(np.asarray(tokens_BL))


def steps(
    params: Any,
    config: transformer.Config,
    vocab: Vocab,
    mesh: jax.sharding.Mesh,
    job: Job,
    seed: int | Sequence[int] = 0,
) -> Iterator[list[np.ndarray]]:
    """The same as a Python loop: yields the ids of all spans after every step."""
    step, given = stepper(mesh, config, vocab, job.length, job.rule), put(mesh, job, seed)
    zero_B = np.zeros(len(given.tokens_BL), np.int32)
    state = denoise.State(given.tokens_BL, *sharding.put_batch(mesh, (zero_B, zero_B)))
    going = True
    while going:
        with jax.set_mesh(mesh):  # between two steps it is the caller's
            state, tokens_BL, going = step(params, given, state)
        yield job.spans(np.asarray(tokens_BL))
        going = bool(going)


def put(mesh: jax.sharding.Mesh, job: Job, seed: int | Sequence[int] = 0) -> Given:
    """A job on its devices, the last row repeated until the rows divide among them."""
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
    given = Given(
        job.rows.tokens,
        job.rows.valid,
        np.asarray(job.start_B, np.int32),
        np.asarray(job.length_B, np.int32),
        np.array([one & 0xFFFFFFFF for one in seeds], np.uint32),
        np.array(places, np.int32),
        None if other is None else (other.tokens, other.valid),
    )
    more = -n % (mesh.shape["data"] * mesh.shape["fsdp"])
    filled = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], more, axis=0)]), given)
    return sharding.put_batch(mesh, filled)


@functools.cache
def decoder(
    mesh: jax.sharding.Mesh, config: transformer.Config, vocab: Vocab, length: int, rule: denoise.Rule
) -> Callable[[Any, Given], jax.Array]:
    """The jitted (params, given) -> tokens [B, L], which every process gets whole."""

    def fill(params, given):
        return denoise.denoise(
            functools.partial(transformer.hidden_states, params, config),
            functools.partial(transformer.unembed, params, config),
            given.tokens_BL,
            given.valid_BL,
            start=given.start_B,
            length=length,
            lengths=given.length_B,
            rule=rule,
            vocab=vocab,
            key=_keys(given),
            unconditional=given.other,
        )

    everywhere = sharding.replicated(mesh)
    return jax.jit(
        fill,
        in_shardings=(_of_params(mesh, config), sharding.batch_sharding(mesh)),
        out_shardings=everywhere,
        compiler_options=sharding.compiler_options(mesh),
    )


@functools.cache
def stepper(
    mesh: jax.sharding.Mesh, config: transformer.Config, vocab: Vocab, length: int, rule: denoise.Rule
) -> Callable[[Any, Given, denoise.State], tuple[denoise.State, jax.Array, jax.Array]]:
    """The jitted (params, given, state) -> (state after a step, its tokens [B, L], whether to go on); the
    latter two every process gets whole."""

    def step(params, given, state):
        rows = denoise.Rows(*given[:4], _keys(given), given.other)
        state = denoise.advance(
            functools.partial(transformer.hidden_states, params, config),
            functools.partial(transformer.unembed, params, config),
            rows,
            state,
            length=length,
            rule=rule,
            vocab=vocab,
        )
        return state, state.tokens_BL, jnp.any(denoise.unfinished(rows, state, length, rule))

    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(_of_params(mesh, config), rows, rows),
        out_shardings=(rows, everywhere, everywhere),
        compiler_options=sharding.compiler_options(mesh),
    )


def _keys(given: Given) -> jax.Array:
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(given.seed_B), given.number_B)


def _of_params(mesh, config):
    return sharding.tree_shardings(mesh, transformer.param_axes(config), transformer.param_shapes(config))
