"""A small model with grouped-query attention that looks at its tokens, and rows for it to fill."""

import dataclasses

import jax
import numpy as np

from mmada_jax.devices import sharding
from mmada_jax.diffusion import decode
from mmada_jax.diffusion.rules import TextRule
from mmada_jax.nets import transformer
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import SPECIAL_TOKENS, Vocab

V = Vocab(96, 32, rows=128, **dict(zip(SPECIAL_TOKENS, range(12), strict=True)))
MODEL = dataclasses.replace(
    transformer.PRESETS["tiny"], vocab=V.rows, d_model=32, d_mlp=48, n_kv_heads=2, max_len=128
)
# Fresh weights hardly look at other tokens; these do, and are certain of some of what they say.
PARAMS = jax.tree.map_with_path(
    lambda path, x: x * {"o_HKD": 6, "down_FD": 3, "head_DV": 3}.get(path[-1].key, 1),
    transformer.init_params(jax.random.key(0), MODEL),
)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(16, 90, n).tolist() for n in (7, 20, 12, 7)]
NEW = [24, 21, 30, 17]
LENGTH, BLOCK = 30, 8
SEEDS = [5, 6, 7, 8]
NEVER = (V.mask,)
# Rows whose tokens are certain at different times, so that their blocks begin at different times.
KINDS = {
    "dual": TextRule(block=BLOCK, cache="dual", threshold=0.5),
    "prefix": TextRule(block=BLOCK, cache="prefix", threshold=0.5),
    "dual, window": TextRule(block=BLOCK, cache="dual", threshold=0.5, window=6),
    "prefix, window": TextRule(block=BLOCK, cache="prefix", threshold=0.5, window=6),
    "dual, window, refreshed": TextRule(block=BLOCK, cache="dual", threshold=0.5, window=6, refresh=2),
}


def job(rule, rows=range(4), length=64):
    """Rows of the prompts of these numbers."""
    prompts, new = [PROMPTS[i] for i in rows], [NEW[i] for i in rows]
    batch = layout.answers(V, prompts, new, length)
    return decode.Job(batch, np.array([*map(len, prompts)]), np.array(new), LENGTH, rule)


def drawing_job(rule, rows=range(2)):
    """Rows of a text slot and 16 codes, with unconditional rows if the rule is guided."""
    made = [layout.t2i_generation(V, PROMPTS[i][:4], 16, 8) for i in rows]
    other = layout.stack([layout.drop_condition(V, row, 8) for row in made]) if rule.guidance else None
    start, length = np.full((2, len(rows)), [[10], [16]])
    return decode.Job(layout.stack(made), start, length, 16, rule, other)


def one_device():
    """A mesh of one device."""
    return sharding.make_mesh(devices=jax.devices()[:1])


def fill(rule, rows=range(4), length=64, mesh=None, config=MODEL):
    """The spans of the job, filled."""
    return run_whole(job(rule, rows, length), [SEEDS[i] for i in rows], mesh, config)


def run_whole(job, seed, mesh=None, config=MODEL, params=PARAMS):
    """The spans of a job, filled by one jitted loop over all of its rows."""
    mesh = mesh or one_device()
    params = sharding.put_params(params, decode.param_shardings(mesh, config))
    loop = decode.decoder(mesh, config, V, job.length, job.rule, **decode.first_pass(mesh, job))
    with jax.set_mesh(mesh):
        return job.spans(np.asarray(loop(params, decode.put(mesh, job, seed))))


def assert_equal(a, b):
    """The same spans."""
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)
