import dataclasses

import jax
import numpy as np
import pytest

from mmada_jax.devices import sharding
from mmada_jax.diffusion import corrupt
from mmada_jax.diffusion.corrupt import LossConfig
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import LLADA as V

MAX_TEXT, N = 12, 16
CHAT = [V.start_header, 5, V.end_header, 7, V.start_header, 6, V.end_header, 9, 10]
IMAGE = V.image_ids(np.arange(N))
MAKE = {
    "t2i": lambda: layout.t2i(V, [3, 4], IMAGE, MAX_TEXT),
    "lm": lambda: layout.lm(V, range(20), MAX_TEXT + N + 3),
    "lm_chat": lambda: layout.lm_chat(V, CHAT, MAX_TEXT + N + 3),
    "mmu": lambda: layout.mmu(V, IMAGE, CHAT, MAX_TEXT),
    "r2i": lambda: layout.r2i(V, CHAT, IMAGE, MAX_TEXT),
}
MIXED = ("t2i", "t2i", "lm", "lm", "lm", "lm_chat", "mmu", "r2i")
COEFFICIENTS = {"t2i": 0.7, "lm": 0.3, "lm_chat": 1.1, "mmu": 1.3, "r2i": 0.9}
KEYS = [jax.random.key(i) for i in range(3)]


def batch_of(tasks):
    return layout.stack([MAKE[task]() for task in tasks])


def run(key, batch, config=LossConfig()):  # noqa: B008  frozen
    return jax.jit(corrupt.corrupt, static_argnums=(2, 3))(key, batch, V, config)


def times(key, rows):
    """The t that each row draws."""
    return np.asarray(jax.random.uniform(jax.random.fold_in(key, 0), (rows,)))


def hidden_in(batch, out):
    hidden = np.asarray(out.tokens_BL) == V.mask
    assert not (batch.tokens == V.mask).any()
    return hidden


@pytest.mark.parametrize("key", KEYS)
def test_hides_nothing_but_targets(key):
    batch = batch_of(MIXED * 8)
    out = run(key, batch)
    hidden = hidden_in(batch, out)
    assert hidden.any() and not (hidden & ~batch.target).any()
    np.testing.assert_array_equal(np.where(hidden, batch.tokens, out.tokens_BL), batch.tokens)
    np.testing.assert_array_equal(out.targets_BL, batch.tokens)


@pytest.mark.parametrize("key", KEYS)
def test_weight_stands_on_hidden_tokens_and_the_brackets_of_t2i(key):
    batch = batch_of(MIXED * 8)
    out = run(key, batch)
    np.testing.assert_array_equal(np.asarray(out.weights_BL) > 0, hidden_in(batch, out) | batch.shown)


@pytest.mark.parametrize("min_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_an_image_hides_an_exact_number(name, min_ratio):
    batch = batch_of(["t2i"] * 256)
    hidden = hidden_in(batch, run(KEYS[0], batch, LossConfig(schedule=name, min_ratio=min_ratio)))
    t = times(KEYS[0], 256).astype(np.float64)
    ratio = np.cos(np.pi / 2 * t) if name == "cosine" else 1 - t
    exact = N * np.maximum(ratio, min_ratio)
    expected = np.maximum(1, np.round(exact))
    clear = np.abs(exact % 1 - 0.5) > 1e-4  # rounding decides elsewhere
    assert clear.sum() > 200
    np.testing.assert_array_equal(hidden.sum(axis=1)[clear], expected[clear])
    assert hidden.sum(axis=1).min() >= 1


def test_images_hide_every_position_equally_often_and_each_row_its_own():
    rows = 4096
    batch = batch_of(["t2i"] * rows)
    hidden = hidden_in(batch, run(KEYS[1], batch))[batch.target].reshape(rows, N)
    share = hidden.sum(axis=1) / N  # given its number, a row hides each position with this chance
    deviation = np.sqrt((share * (1 - share)).sum())
    assert np.abs(hidden.sum(axis=0) - share.sum()).max() < 5 * deviation
    assert len({row.tobytes() for row in hidden}) > rows / 2


@pytest.mark.parametrize("task", ["lm", "lm_chat", "mmu", "r2i"])
def test_text_hides_each_token_with_probability_p(task):
    rows, eps = 4096, 0.1
    batch = batch_of([task] * rows)
    hidden = hidden_in(batch, run(KEYS[2], batch, LossConfig(eps=eps)))
    hidden = hidden[batch.target].reshape(rows, -1)
    p = (1 - eps) * times(KEYS[2], rows) + eps
    deviation = np.sqrt((p * (1 - p)).sum())
    assert np.abs(hidden.sum(axis=0) - p.sum()).max() < 5 * deviation  # at every position
    # Independently of each other: the variance of a row's count is the binomial one. A square
    # error's own deviation is below sqrt(3) of that for these sizes; five of them, over all rows.
    n = hidden.shape[1]
    variance = n * p * (1 - p)
    excess = (hidden.sum(axis=1) - n * p) ** 2 - variance
    assert abs(excess.sum()) < 5 * np.sqrt((3 * variance**2 + variance).sum())


def test_keys_make_draws_and_equal_keys_equal_draws():
    batch = batch_of(MIXED)
    a, b, c = run(KEYS[0], batch), run(KEYS[0], batch), run(KEYS[1], batch)
    np.testing.assert_array_equal(a.tokens_BL, b.tokens_BL)
    assert np.any(a.tokens_BL != c.tokens_BL)


def reductions(batch, hidden, p, nll, config):
    """The reference's losses as it writes them (section 3.3), in float64, by task."""
    task = np.array(layout.TASKS)[batch.task]
    losses = {}
    for name in set(task):
        rows = task == name
        masked = np.where(hidden[rows], nll[rows] / p[rows, None], 0)
        if name == "t2i":
            losses[name] = nll[rows][hidden[rows] | batch.shown[rows]].mean()
        elif name == "lm" and config.lm_per == "token":
            losses[name] = masked.sum() / (rows.sum() * masked.shape[1])
        else:
            length = batch.target[rows].sum(axis=1)
            losses[name] = (masked.sum(axis=1) / length).sum() / rows.sum()
    return losses


@pytest.mark.parametrize("lm_per", ["token", "answer"])
@pytest.mark.parametrize("tasks", [MIXED, ("t2i",), ("lm", "mmu"), ("r2i", "t2i", "r2i"), ("lm_chat",) * 3])
def test_weights_reproduce_the_reductions_of_the_reference(tasks, lm_per):
    config = LossConfig(lm_per=lm_per, **COEFFICIENTS)
    batch = batch_of(tasks)
    nll = np.random.default_rng(0).exponential(size=batch.tokens.shape)
    for key in KEYS:
        out = run(key, batch, config)
        p = (1 - config.eps) * times(key, len(tasks)).astype(np.float64) + config.eps
        losses = reductions(batch, hidden_in(batch, out), p, nll, config)
        expected = sum(COEFFICIENTS[name] * loss for name, loss in losses.items())
        ours = np.sum(np.asarray(out.weights_BL, np.float64) * nll)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_tasks_without_rows_leave_no_trace():
    config = LossConfig(**COEFFICIENTS)
    batch = batch_of(("lm", "mmu"))
    other = dataclasses.replace(config, t2i=1e9, lm_chat=1e9, r2i=1e9)
    weights = [np.asarray(run(KEYS[0], batch, c).weights_BL) for c in (config, other)]
    np.testing.assert_array_equal(*weights)
    assert np.isfinite(weights[0]).all()


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1)])
def test_row_counts_are_those_of_the_whole_batch_on_many_devices(sizes):
    mesh = sharding.make_mesh(*sizes)
    batch = batch_of(MIXED * 2)
    here = run(KEYS[0], batch)
    with jax.set_mesh(mesh):
        there = run(KEYS[0], sharding.put_batch(mesh, batch))
    np.testing.assert_array_equal(here.tokens_BL, there.tokens_BL)
    np.testing.assert_allclose(here.weights_BL, there.weights_BL, rtol=1e-6)


def test_unknown_schedules_are_errors_at_once():
    with pytest.raises(ValueError, match="unknown schedule 'cosin'"):
        LossConfig(schedule="cosin")


# ---- Hidden as decoding meets it -------------------------------------------------------------------

PREFIX = LossConfig(answer_mask="prefix", prefix_next=3, **COEFFICIENTS)


def parts_of(batch):
    """Text targets up to the first EOS, all text targets, image targets."""
    image = batch.target & (batch.tokens >= V.image_offset)
    text = batch.target & ~image
    eos = text & (batch.tokens == V.eos)
    return text & (np.cumsum(eos, axis=1) - eos == 0), text, image


@pytest.mark.parametrize("task", ["lm_chat", "mmu", "r2i"])
@pytest.mark.parametrize("key", KEYS)
def test_a_prefix_is_clean_and_all_behind_it_hidden(task, key):
    rows = 512
    batch = batch_of([task] * rows)
    out = run(key, batch, PREFIX)
    hidden, scored = hidden_in(batch, out), np.asarray(out.weights_BL) > 0
    answer, text, image = parts_of(batch)
    cut = np.argmax(hidden & text, axis=1)
    drawn = ~(hidden & text).any(axis=1)  # the thought is clean
    position = np.arange(hidden.shape[1])
    for i in range(rows):
        if drawn[i]:
            np.testing.assert_array_equal(scored[i], hidden[i])
            assert 1 <= hidden[i].sum() <= N
        else:
            assert answer[i, cut[i]]
            np.testing.assert_array_equal(hidden[i], (text[i] & (position >= cut[i])) | image[i])
            np.testing.assert_array_equal(
                scored[i], text[i] & (position >= cut[i]) & (position < cut[i] + 3)
            )
    share = 0.5 if task == "r2i" else 0
    assert abs(drawn.mean() - share) < 5 * np.sqrt(0.25 / rows) * (share > 0) + 1e-9
    # Every cut equally often.
    n = answer[0].sum()
    counts = np.array([(cut[~drawn] == p).sum() for p in np.flatnonzero(answer[0])])
    expected = (~drawn).sum() / n
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_share_of_the_cut_rows_shows_tokens_that_would_be_scored(share):
    batch = batch_of(["lm_chat"] * 2048)
    wide = dataclasses.replace(PREFIX, prefix_next=6)
    whole, out = (run(KEYS[0], batch, dataclasses.replace(wide, prefix_shown=x)) for x in (0.0, share))
    hidden, scored = hidden_in(batch, out), np.asarray(out.weights_BL) > 0
    all_hidden, all_scored = hidden_in(batch, whole), np.asarray(whole.weights_BL) > 0
    # Behind the next tokens all is hidden as before, and what is shown isn't scored.
    np.testing.assert_array_equal(hidden, all_hidden & ~(all_scored & ~hidden))
    np.testing.assert_array_equal(scored, all_scored & hidden)
    n, shown = all_scored.sum(axis=1), (all_scored & ~hidden).sum(axis=1)
    full = n == 6
    assert full.sum() > 300
    # With p uniform, each number of shown tokens is as likely, in the rows that show any at all.
    counts = np.bincount(shown[full], minlength=7) / full.sum()
    wanted = np.full(7, share / 7)
    wanted[0] += 1 - share
    assert np.abs(counts - wanted).max() < 5 * np.sqrt(0.25 / full.sum())
    # The place doesn't matter.
    first, last = (np.take_along_axis(
        all_scored & ~hidden, (np.argmax(all_scored, axis=1) + i)[:, None], axis=1)[full].mean()
        for i in (0, 5))  # fmt: skip
    assert abs(first - last) < 5 * np.sqrt(0.5 / full.sum())


@pytest.mark.parametrize("shown", [0.0, 0.7])
def test_prefix_rows_weigh_the_mean_of_what_they_score(shown):
    batch = batch_of(MIXED * 4)
    out = run(KEYS[0], batch, dataclasses.replace(PREFIX, prefix_shown=shown))
    weights = np.asarray(out.weights_BL, np.float64).sum(axis=1)
    for task in ("lm_chat", "mmu", "r2i"):
        rows = batch.task == layout.TASKS.index(task)
        weighed = weights[rows] > 0  # if all that would be scored is shown, nothing is
        assert weighed.mean() > (0.5 if shown else 0.99)
        np.testing.assert_allclose(weights[rows][weighed], COEFFICIENTS[task] / rows.sum(), rtol=1e-5)


def test_the_image_of_a_clean_thought_is_hidden_by_number():
    batch = batch_of(["r2i"] * 512)
    out = run(KEYS[0], batch, PREFIX)
    hidden = hidden_in(batch, out)
    drawn = ~(hidden & parts_of(batch)[1]).any(axis=1)
    t = times(KEYS[0], 512).astype(np.float64)
    exact = N * np.cos(np.pi / 2 * t)
    clear = drawn & (np.abs(exact % 1 - 0.5) > 1e-4)
    np.testing.assert_array_equal(hidden.sum(axis=1)[clear], np.maximum(1, np.round(exact))[clear])


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_a_mixture_cuts_its_share_of_the_answers_and_nothing_else(share):
    batch = batch_of(MIXED * 128)
    config = LossConfig(answer_mask="mixture", prefix_rows=share, **COEFFICIENTS)
    plain, mixed = run(KEYS[1], batch, LossConfig(**COEFFICIENTS)), run(KEYS[1], batch, config)
    prefix = run(KEYS[1], batch, dataclasses.replace(config, answer_mask="prefix"))
    same = (np.asarray(plain.tokens_BL) == mixed.tokens_BL).all(axis=1)
    answers = np.isin(batch.task, [layout.TASKS.index(t) for t in ("lm_chat", "mmu", "r2i")])
    assert same[~answers].all()
    weights = [np.asarray(out.weights_BL)[~answers] for out in (plain, mixed)]
    # Both are programs of their own, whose compiler may round differently.
    np.testing.assert_array_equal(*(weight > 0 for weight in weights))
    np.testing.assert_array_max_ulp(*weights, maxulp=4)
    changed = (~same[answers]).mean()
    assert share - 0.15 < changed < share + 0.1
    if share == 1:
        np.testing.assert_array_equal(mixed.tokens_BL, prefix.tokens_BL)


def test_shares_and_numbers_that_mean_nothing_are_errors():
    with pytest.raises(ValueError, match=r"prefix_rows is 1\.5; it must be a share"):
        LossConfig(prefix_rows=1.5)
    with pytest.raises(ValueError, match="prefix_next is 0; it must be at least 1"):
        LossConfig(prefix_next=0)
