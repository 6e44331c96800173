"""A made-up network whose logits are a function of the tokens, rows for it, and rules of many kinds."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.diffusion.denoise import (
    Draft,
    advance,
    begin,
    denoise,
    unfinished,
)
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.tokens.vocab import Vocab

V, D, B, L = 40, 8, 3, 20
VOCAB = Vocab(
    image_offset=24, codebook_size=16, rows=V, bos=0, eos=1, mask=2, pad=3, soi=4, eoi=5, t2i=6, mmu=7,
    r2i=8, start_header=9, end_header=10, end_turn=11,
)  # fmt: skip
START, LENGTH = 6, 12
RNG = np.random.default_rng(0)
EMBED_VD = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
# The mask and the pad are never the most likely tokens.
HEAD_DV = jnp.asarray(RNG.normal(size=(D, V)), jnp.float32).at[:, 2:4].set(0)
MIX_LL = jnp.asarray(RNG.normal(size=(L, L)), jnp.float32)

TEXT_RULES = {
    "greedy": TextRule(steps=12, block=12),
    "blocks": TextRule(steps=6, block=4),
    "largest": TextRule(steps=6, block=6, temperature=1.0, remask="largest"),
    "margin": TextRule(steps=4, block=12, remask="margin"),
    "entropy": TextRule(steps=6, block=6, remask="entropy"),
    "random": TextRule(steps=6, block=6, remask="random"),
    "hot": TextRule(steps=6, block=6, temperature=0.7),
    "guided": TextRule(steps=6, block=6, guidance=1.5),
    "threshold": TextRule(block=6, threshold=0.6),
    "factor": TextRule(block=12, factor=1.5),
    "relaxed": TextRule(block=6, threshold=0.6, relax=0.3),
    "leap": TextRule(block=12, threshold=0.6, leap=0.4, radius=2),
    "bound": TextRule(block=12, bound=0.8),
    "stop": TextRule(steps=6, block=4, stop=11),
    "shorter last block": TextRule(steps=6, block=5),
    "one a step": TextRule(block=5),
}
IMAGE_RULES = {
    "cosine": ImageRule(steps=5, guidance=0.0),
    "guided": ImageRule(steps=5, guidance=3.0),
    "guided now and then": ImageRule(steps=5, guidance=3.0, guide_every=2),
    "argmax": ImageRule(steps=4, guidance=0.0, draw="argmax"),
    "linear": ImageRule(steps=5, guidance=0.0, schedule="linear", anneal="linear"),
    "hidden": ImageRule(steps=4, guidance=0.0, quota="hidden"),
    "one step": ImageRule(steps=1, guidance=0.0),
    "largest": ImageRule(steps=5, guidance=0.0, remask="largest"),
    "halton": ImageRule(steps=5, guidance=0.0, order="halton", columns=4, schedule="arccos"),
    "emerge": ImageRule(steps=5, guidance=0.0, order="emerge"),
}
RULES = {f"text {k}": r for k, r in TEXT_RULES.items()} | {f"image {k}": r for k, r in IMAGE_RULES.items()}


def hidden(tokens_BL, valid_BL):
    mixed = jnp.einsum("LM,BMD->BLD", MIX_LL, jnp.where(valid_BL[..., None], EMBED_VD[tokens_BL], 0))
    return jnp.tanh(mixed)


def unembed(h_BLD, first=0, size=None):
    head = HEAD_DV[:, first:] if size is None else HEAD_DV[:, first : first + size]
    return h_BLD @ head


# Trunk and head; tests that need another head replace it.
NETWORK = types.SimpleNamespace(hidden_states=hidden, unembed=unembed)


def with_head(unembed):
    return types.SimpleNamespace(hidden_states=hidden, unembed=unembed)


def rows(known=()):
    """Rows with a hidden span, some of whose tokens are `known`."""
    tokens = np.random.default_rng(1).integers(12, 24, size=(B, L)).astype(np.int32)
    tokens[:, START : START + LENGTH] = VOCAB.mask
    tokens[:, [START + i for i in known]] = 30
    valid = np.ones((B, L), bool)
    valid[1, :3] = False
    return tokens, valid


def settings(rule, seed=0):
    other = None
    if isinstance(rule, ImageRule) and rule.guidance:
        tokens, valid = rows()
        other = (np.where(np.arange(L) < START, 12, tokens).astype(np.int32), valid)
    return {"start": START, "length": LENGTH, "rule": rule, "vocab": VOCAB, "key": jax.random.key(seed),
            "unconditional": other}  # fmt: skip


def denoise_steps(network, tokens, valid, *, start, length, rule, vocab, key, unconditional):
    """The decoding as a Python loop: the rows after every step."""
    n = len(tokens)
    draft = Draft(
        jnp.asarray(tokens), jnp.asarray(valid), jnp.full(n, start), jnp.full(n, length),
        jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n)), unconditional,
    )  # fmt: skip
    step = jax.jit(lambda state: advance(
        network, draft, state, length=length, rule=rule, vocab=vocab
    ))  # fmt: skip
    state = begin(network, draft, length=length, rule=rule, vocab=vocab)
    while unfinished(draft, state, length, rule).any():
        state = step(state)
        yield state.tokens_BL


def run(rule, tokens_valid=None, seed=0):
    call = jax.jit(lambda t, v: denoise(NETWORK, t, v, **settings(rule, seed)))
    return np.asarray(call(*(tokens_valid or rows())))
