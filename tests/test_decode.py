"""What the compiled decoding moves between devices."""

import dataclasses

import jax
import numpy as np
import pytest

from mmada_jax.devices import hlo, sharding
from mmada_jax.diffusion import decode
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.nets import transformer
from mmada_jax.tokens.vocab import SPECIAL_TOKENS, Vocab

V = Vocab(64, 1024, rows=1088, **dict(zip(SPECIAL_TOKENS, range(12), strict=True)))
MODEL = dataclasses.replace(transformer.PRESETS["tiny"], vocab=V.rows, d_model=32, d_mlp=32, n_layers=2)
B, L, N = 16, 80, 64


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("rule", [
    ImageRule(steps=4, guidance=2.0),
    TextRule(steps=N, block=N, temperature=1.0, guidance=2.0),
], ids=["image", "text"])  # fmt: skip
def test_logits_stay_where_they_are(sizes, rule):
    mesh = sharding.make_mesh(*sizes)
    places = sharding.tree_shardings(mesh, transformer.param_axes(MODEL), transformer.param_shapes(MODEL))
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        transformer.param_shapes(MODEL),
        places,
    )
    rows = [jax.ShapeDtypeStruct((B, L), kind) for kind in (np.int32, bool)]
    of_rows = [jax.ShapeDtypeStruct((B,), kind) for kind in (np.int32, np.int32, np.uint32, np.int32)]
    with jax.set_mesh(mesh):
        fill = decode.decoder(mesh, MODEL, V, N, rule)
        text = fill.lower(params, decode.Placed(*rows, *of_rows, tuple(rows))).compile().as_text()
    # Those that a device has of one row of each pair. Hidden states and weights are much smaller here.
    ids = rule.vocabulary(V)[1] or V.rows
    logits = B * N * ids * 4 // mesh.size
    found = [
        (c.kind, c.bytes) for c in hlo.CompiledProgram(text, trips=4).collectives() if c.bytes >= logits
    ]
    assert not found, found
