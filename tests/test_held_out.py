"""masked_nll against its definition in numpy, on known models and on a mesh; pictures side by side."""

import dataclasses

import jax
import numpy as np
import pytest

from mmada_jax.devices import sharding
from mmada_jax.measure import held_out
from mmada_jax.nets import transformer
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import SPECIAL_TOKENS, Vocab

V = Vocab(40, 16, rows=64, **dict(zip(SPECIAL_TOKENS, range(12), strict=True)))
MAX_TEXT, N = 12, 16
LENGTH = MAX_TEXT + N + 3
CHAT = [V.start_header, 20, V.end_header, 21, V.start_header, 22, V.end_header, 23, 24]
MODEL = dataclasses.replace(transformer.PRESETS["tiny"], vocab=V.rows)
KEY = jax.random.key(3)
RATIOS = (0.15, 0.5, 0.85)
T2I = layout.TASKS.index("t2i")


def rows(n=1):
    """n rows of every task but lm_chat, with n different images."""
    rng = np.random.default_rng(0)
    images = [V.image_ids(rng.integers(0, 16, N)) for _ in range(n)]
    return layout.stack([
        row
        for image in images
        for row in (
            layout.t2i(V, [20, 21], image, MAX_TEXT),
            layout.lm(V, range(15, 35), LENGTH),
            layout.mmu(V, image, CHAT, MAX_TEXT),
            layout.r2i(V, CHAT, image, MAX_TEXT),
        )
    ])  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: transformer.init_params(key, MODEL))(jax.random.key(0))


def in_numpy(params, batch, ratio):
    """The definition: hide, take the log softmax, average by task."""
    noise = np.asarray(jax.random.uniform(jax.random.fold_in(KEY, 1), batch.tokens.shape))
    hidden = np.zeros_like(batch.target)
    for i, (target, task) in enumerate(zip(batch.target, batch.task, strict=True)):
        at = np.flatnonzero(target)
        if task == T2I:
            hidden[i, at[np.argsort(noise[i, at])][: max(1, round(N * ratio))]] = True
        else:
            hidden[i, at[noise[i, at] < ratio]] = True
    seen = np.where(hidden, V.mask, batch.tokens).astype(np.int32)
    h = np.asarray(transformer.hidden_states(params, MODEL, seen, batch.valid), np.float64)
    logits = h @ np.asarray(params["head_DV"], np.float64)
    top = logits.max(axis=-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    nll = -np.take_along_axis(logp, batch.tokens[..., None], -1)[..., 0]
    by_task = {}
    for task in sorted(set(batch.task.tolist())):
        of_task = hidden & (batch.task == task)[:, None]
        by_task[layout.TASKS[task]] = nll[of_task].mean()
    return by_task


@pytest.mark.parametrize("chunk", [7, 2048])
def test_it_is_the_mean_over_hidden_tokens(params, chunk):
    batch = rows(4)
    ours = held_out.masked_nll(params, MODEL, batch, V, RATIOS, KEY, chunk)
    assert set(ours) == {"t2i", "lm", "mmu", "r2i"}
    for ratio in RATIOS:
        for task, expected in in_numpy(params, batch, ratio).items():
            np.testing.assert_allclose(ours[task][ratio], expected, rtol=1e-5)


def test_a_model_that_knows_nothing_gives_the_logarithm_of_the_vocabulary(params):
    knows_nothing = params | {"head_DV": np.zeros_like(params["head_DV"])}
    for by_ratio in held_out.masked_nll(knows_nothing, MODEL, rows(), V, (0.3, 1.0)).values():
        np.testing.assert_allclose(list(by_ratio.values()), np.log(V.rows), rtol=1e-6)
    untrained = held_out.masked_nll(params, MODEL, rows(8), V, (0.5,))
    for by_ratio in untrained.values():
        assert 0.85 < by_ratio[0.5] / np.log(V.rows) < 1.3


def test_more_that_is_hidden_is_harder_for_a_model_that_counts_what_it_sees():
    # One layer adds the mean of all tokens to each; the head says what there is most of.
    model = dataclasses.replace(MODEL, n_layers=1)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), transformer.param_shapes(model))
    eye = np.eye(64, dtype=np.float32)
    params["embed_VD"], params["head_DV"], params["norm_D"] = eye, eye, np.ones(64, np.float32)
    params["blocks"]["attn_norm_D"] += 1
    params["blocks"]["v_DGK"] += eye.reshape(1, 64, 4, 16)
    params["blocks"]["o_HKD"] += eye.reshape(1, 4, 16, 64)
    batch = layout.stack([layout.lm(V, [V.bos, *[20] * (LENGTH - 1)], LENGTH)] * 8)
    by_ratio = held_out.masked_nll(params, model, batch, V, (0.1, 0.3, 0.5, 0.7, 0.9, 1.0))["lm"]
    nll = list(by_ratio.values())
    assert (np.diff(nll) > 0.1).all()
    assert nll[0] < 0.5 * np.log(V.rows) < np.log(V.rows) < nll[-1]


def test_a_ratio_gives_the_same_whichever_others_are_asked_for(params):
    batch = rows(2)
    together = held_out.masked_nll(params, MODEL, batch, V, (0.2, 0.6), KEY)
    alone = held_out.masked_nll(params, MODEL, batch, V, (0.6,), KEY)
    assert {task: by_ratio[0.6] for task, by_ratio in together.items()} == {
        task: by_ratio[0.6] for task, by_ratio in alone.items()
    }


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_on_many_devices(params, sizes):
    batch = rows(2)
    here = held_out.masked_nll(params, MODEL, batch, V, RATIOS, KEY)
    mesh = sharding.make_mesh(*sizes)
    places = sharding.tree_shardings(mesh, transformer.param_axes(MODEL), transformer.param_shapes(MODEL))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, places), sharding.put_batch(mesh, batch)
        there = held_out.masked_nll(spread[0], MODEL, spread[1], V, RATIOS, KEY, chunk=5)
    assert set(there) == set(here)
    for task, by_ratio in here.items():
        np.testing.assert_allclose(list(there[task].values()), list(by_ratio.values()), rtol=1e-5)


def test_rows_that_cannot_be_spread_are_an_error(params):
    with (
        jax.set_mesh(sharding.make_mesh(8, 1, 1)),
        pytest.raises(ValueError, match="4 rows can't be spread over 8 data shards"),
    ):
        held_out.masked_nll(params, MODEL, rows(), V)


def test_one_compilation_serves_all_ratios(params):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    compiled = held_out._hidden_nll(mesh, MODEL, V, 2048, False)
    before = compiled._cache_size()
    for ratios in ((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)):
        held_out.masked_nll(params, MODEL, rows(3), V, ratios)
    assert compiled._cache_size() == before + 1


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_ratios_that_hide_nothing_or_more_than_there_is(params, ratio):
    with pytest.raises(ValueError, match="must be in"):
        held_out.masked_nll(params, MODEL, rows(), V, (0.5, ratio))


def test_nothing_hidden_is_no_number(params):
    batch = layout.stack([layout.mmu(V, V.image_ids(np.zeros(N, int)), CHAT, MAX_TEXT)])
    assert np.isnan(held_out.masked_nll(params, MODEL, batch, V, (1e-6,))["mmu"][1e-6])


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(channels):
    images = np.linspace(-1, 1, 5 * 4 * 6 * channels, dtype=np.float32).reshape(5, 4, 6, channels)
    picture = np.asarray(held_out.grid(images, 3))
    assert picture.shape[:2] == (2 * 6, 3 * 8)
    for i in range(6):
        tile = picture[6 * (i // 3) :, 8 * (i % 3) :][:6, :8]
        frame = tile.copy()
        if i < 5:
            unit = (images[i] + 1) / 2 * 255
            inner = tile[1:-1, 1:-1].reshape(images[i].shape)
            np.testing.assert_allclose(inner, unit, atol=1.001)
            frame[1:-1, 1:-1] = frame[0, 0]
        assert (frame == 63).all()
