"""Rewards of images, several rewards together, and how they fail."""

import threading
import time

import numpy as np
import pytest
from conftest import load_golden, write_clip

from mmada_jax.data import digits
from mmada_jax.train.rl.rewards import functions, pictures
from mmada_jax.train.rl.rewards.functions import Combined
from tests.reward_toys import score


def test_the_digit_reward_reads_held_out_scans():
    pytest.importorskip("sklearn")
    scans = digits.load("validation")
    canvases = np.stack([digits.canvas(scan) for scan in scans.pixels])
    reward = pictures.digit_probability()
    right = score(reward, [""] * len(canvases), None, [digits.caption(d) for d in scans.labels], canvases)
    wrong = [digits.caption((d + 1) % 10) for d in scans.labels]
    other = score(reward, [""] * len(canvases), None, wrong, canvases)
    assert right.mean() > 0.9 and other.mean() < 0.05
    assert right.dtype == np.float32 and ((right >= 0) & (right <= 1)).all()
    # Pixels out of range are clamped, as where drawn digits are counted.
    np.testing.assert_array_equal(
        right, score(reward, [""] * len(canvases), None, [digits.caption(d) for d in scans.labels],
                     np.where(abs(canvases) == 1, 3 * canvases, canvases)))  # fmt: skip


@pytest.mark.parametrize("prompt", ["a cat", digits.caption(3, 5)])
def test_the_digit_reward_refuses_other_prompts(prompt):
    pytest.importorskip("sklearn")
    with (
        Combined({"digit": 1.0}) as combined,
        pytest.raises(ValueError, match=r"reward 'digit' failed.* must name one digit"),
    ):
        combined.check([prompt], images=np.zeros((1, 8, 16, 1), np.float32))


def test_clip_scores_follow_image_and_prompt_in_any_batch(tmp_path):
    settings, arrays = load_golden("clip")
    write_clip(settings["models"][0], tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, settings["score_images"]).astype(np.float32)
    reward = pictures.ClipScore(tmp_path, batch=2)
    got = score(reward, [""] * len(images), None, settings["score_prompts"], images)
    np.testing.assert_allclose(got, arrays["score"], atol=1e-4)
    assert got.shape == (5,) and got.dtype == np.float32
    assert reward._image._cache_size() == 1 and reward._text._cache_size() == 1
    with pytest.raises(ValueError, match="'clip' needs a model"):
        Combined({"clip": 0.1})


@pytest.fixture
def listed(monkeypatch):
    """Lists a reward as `mine`, by its scores for (completions)."""

    def put(function):
        monkeypatch.setitem(functions.REWARDS, "mine", lambda: lambda p, c, i, a: function(c))

    return put


def test_several_rewards_are_summed_by_weight_and_kept_apart():
    combined = Combined({"exact": 2.0, "format": 0.5})
    completions = ["<think>a</think>12", "12", "<think>a</think>13", "13"]
    total, parts = combined(["q"] * 4, completions, None, ["12"] * 4)
    assert total.tolist() == [2.5, 2.0, 0.5, 0.0] and total.dtype == np.float32
    assert parts["exact"].tolist() == [1, 1, 0, 0] and parts["format"].tolist() == [1, 0, 1, 0]
    assert combined.failures == {"exact": 0, "format": 0} and not combined.errors


def _raise(completions):
    raise RuntimeError("no luck")


def _hang(completions):
    time.sleep(5)


FAILURES = {
    "raises": (_raise, "RuntimeError: no luck", 3),
    "hangs": (_hang, "no scores within 0.3 s", 3),
    "nan": (lambda c: [1.0, np.nan, 1.0][: len(c)], "returned nan for row 1", 1),
    "infinite": (lambda c: np.array([1.0, np.inf, 1.0])[: len(c)], "returned inf for row 1", 1),
    "length": (lambda c: np.ones(len(c) + 1), r"of shape (4,) for 3 rows", 3),
    "column": (lambda c: np.ones((len(c), 1)), r"of shape (3, 1) for 3 rows", 3),
    "scalar": (lambda c: 1.0, "of shape () for 3 rows", 3),
    "nothing": (lambda c: None, "returned nan for row 0|returned no numbers|of shape", 3),
    "words": (lambda c: ["good"] * len(c), "returned no numbers", 3),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_reward_that_fails_scores_nothing_and_is_counted(kind, listed):
    function, text, rows = FAILURES[kind]
    listed(function)
    combined = Combined({"mine": 1.0, "exact": 2.0}, limit=0.3)
    for times in (1, 2):
        total, parts = combined(["q"] * 3, ["12"] * 3, None, ["12"] * 3)
        assert np.isfinite(total).all() and total.sum() == 6 + 3 - rows
        assert parts["mine"].sum() == 3 - rows and parts["exact"].tolist() == [1, 1, 1]
        assert combined.failures == {"mine": times * rows, "exact": 0}
    assert any(part in combined.errors["mine"] for part in text.split("|"))
    assert "exact" not in combined.errors


def test_a_limit_is_that_of_the_batch_not_of_each_reward(monkeypatch):
    done = threading.Event()
    names = ("one", "two", "three")
    for name in names:
        monkeypatch.setitem(functions.REWARDS, name, lambda: lambda p, c, i, a: done.wait(20))
    combined = Combined(dict.fromkeys((*names, "exact"), 1.0), limit=0.6)
    begun = time.monotonic()
    total, parts = combined(["q"], ["1"], None, ["1"])
    took = time.monotonic() - begun
    done.set()
    assert total.tolist() == [1] and list(parts) == [*names, "exact"]
    assert combined.failures == {"one": 1, "two": 1, "three": 1, "exact": 0}
    assert took < 1.2  # three limits, one after the other, are 1.8


@pytest.mark.parametrize("kind", FAILURES)
def test_a_reward_that_fails_is_named_before_training(kind, listed):
    listed(FAILURES[kind][0])
    combined = Combined({"mine": 1.0}, limit=0.3)
    with pytest.raises(ValueError, match="reward 'mine' failed on a probe"):
        combined.check(["q"] * 3)


def test_a_few_rows_are_tried(listed):
    seen = []
    listed(lambda completions: seen.append(len(completions)) or np.zeros(len(completions)))
    Combined({"mine": 1.0, "exact": 1.0}).check(["q"] * 100, ["1"] * 100)
    assert seen == [8]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "no reward is named"),
        ({"corect": 1.0}, "unknown reward 'corect'; did you mean 'correct'"),
        ({"correct:sum": 1.0}, "unknown reward 'correct:sum'"),
        ({"exact": "2"}, "weight of reward 'exact' is '2'"),
        ({"exact": float("nan")}, "weight of reward 'exact' is nan"),
    ],
)
def test_unknown_rewards_and_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        Combined(weights)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"settings are given for .*correct"):
        Combined({"exact": 1.0}, {"correct": {"limit": 1.0}})
    with pytest.raises(ValueError, match="settings of reward 'exact' don't fit"):
        Combined({"exact": 1.0}, {"exact": {"limit": 1.0}})


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        (["q", " "], ["1", "1"], "row 1 has an empty prompt"),
        (["q", "q"], ["1", None], "row 1 has no answer, and reward 'exact' compares"),
        (["q", "q"], ["", "1"], "row 0 has no answer"),
        (["q", "q"], None, "row 0 has no answer"),
        (["q", "q"], ["1"], "2 completions and 1 answers"),
    ],
)
def test_rows_that_can_not_be_scored(prompts, answers, message):
    with pytest.raises(ValueError, match=message):
        Combined({"exact": 1.0}).check(prompts, answers)


@pytest.mark.parametrize("name", ["digit", "clip"])
def test_rewards_of_images_need_images(name, monkeypatch):
    monkeypatch.setitem(functions.REWARDS, name, functions.exact)
    with pytest.raises(ValueError, match=f"reward '{name}' scores images"):
        Combined({name: 1.0}).check(["q"])


def test_long_and_repeated_answers_are_punished():
    with Combined({"length": 1.0}, {"length": {"most": 4, "over": 8}}) as combined:
        total, _ = combined(["?"] * 4, ["abcd", "abcdef", "a" * 12, "a" * 99], None, None)[:2]
    np.testing.assert_allclose(total, [0, -0.25, -1, -1])
    with Combined({"repetition": 2.0}, {"repetition": {"n": 2}}) as combined:
        texts = ["a b c d", "a b a b a b", "a", ""]
        total, _ = combined(["?"] * 4, texts, None, None)[:2]
    np.testing.assert_allclose(total, [0, -2 * (1 - 2 / 5), 0, 0], rtol=1e-6)
    for name, settings in (("length", {"over": 0}), ("repetition", {"n": 0})):
        with pytest.raises(ValueError, match=f"reward '{name}' has"):
            Combined({name: 1.0}, {name: settings})


def test_a_reward_that_teaches_nothing_is_told_once():
    from mmada_jax.train.rl.report import remarks

    told = set()
    flat, alive = np.ones(40, np.float32), np.arange(40, dtype=np.float32)
    some = np.ones(40, np.float32)
    some[:8] = np.arange(8)  # two of ten groups differ
    [line] = remarks("sums", {"format": flat, "correct": alive, "exact": some}, 10, told)
    assert "'format' is the same for all responses in 10 of 10 groups" in line
    assert "temperature" in line
    assert not remarks("sums", {"format": flat}, 10, told)
    assert remarks("drawing", {"format": flat}, 10, told)
