"""Rewards of one's own: a function in a file that is named, run in a process of its own."""

import os
import pathlib

import numpy as np
import pytest

from mmada_jax.train.rl.loop import train
from mmada_jax.train.rl.rewards.functions import Combined
from mmada_jax.train.rl.start import open_run
from tests.rl_toys import history, one_device, rl_config, toy_rewards  # noqa: F401

MINE = """
import os, time, beside

def letters(prompt, completion, answer, image):
    print("a file may print")
    return completion.count("a") + beside.MORE

def answered(prompt, completion, answer, image):
    return float(str(answer) in completion) if prompt != "wait" else time.sleep(60)

def bright(prompt, completion, answer, image):
    assert image.size == (6, 4)
    return image.convert("L").getpixel((0, 0)) / 255

def breaks(prompt, completion, answer, image):
    if completion == "end":
        os._exit(3)
    return 1 / completion.count("a")

def process(prompt, completion, answer, image):
    return os.getpid()
"""


@pytest.fixture(name="mine", scope="module")
def file_of_rewards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own rewards")
    (folder / "mine.py").write_text(MINE)
    (folder / "beside.py").write_text("MORE = 0.5")
    return str(folder / "mine.py")


def scores(mine, name, prompts, completions, images=None, answers=None, **settings):
    with Combined({name: 1.0}, {name: {"file": mine} | settings}) as combined:
        total, _ = combined(prompts, completions, images, answers)
        return total, combined


def test_functions_of_a_file_score_rows(mine):
    total, _ = scores(mine, "own:letters", ["x"] * 3, ["a", "banana", ""])
    np.testing.assert_array_equal(total, [1.5, 3.5, 0.5])
    total, _ = scores(mine, "own:answered", ["x", "y"], ["it is 7", "it is 8"], answers=["7", "9"])
    np.testing.assert_array_equal(total, [1, 0])
    pixels = np.full((2, 4, 6, 3), -1, np.float32)
    pixels[1] = 1
    total, _ = scores(mine, "own:bright", ["x"] * 2, [""] * 2, images=pixels)
    np.testing.assert_array_equal(total, [0, 1])
    total, _ = scores(mine, "own:process", ["x"], ["y"])
    assert total[0] != os.getpid()


def test_what_fails_or_takes_too_long_scores_0_and_is_counted(mine, capfd):
    total, combined = scores(mine, "own:breaks", ["x"] * 3, ["a", "b", "end"], workers=1)
    np.testing.assert_array_equal(total, [1, 0, 0])
    assert combined.failures == {"own:breaks": 2}
    assert "ZeroDivisionError" in combined.errors["own:breaks"]
    total, combined = scores(
        mine, "own:answered", ["wait", "x"], ["1", "1"], answers=["1", "1"], limit=0.5, workers=1
    )
    np.testing.assert_array_equal(total, [0, 1])
    assert "took longer than 0.5 s" in combined.errors["own:answered"]
    assert capfd.readouterr().err.count("warning: reward") == 2


def test_a_run_learns_by_it_and_code_that_is_not_allowed_does_not_run(config, mine, tmp_path):
    task = config["tasks"]["text"] | {"rewards": {"own:letters": 1.0}}
    config = config | {"tasks": {"text": task}, "iterations": 1}
    with pytest.raises(ValueError, match=r"'own:letters' is code of yours: .* --allow_code FILE\.py"):
        train(config, tmp_path / "run")
    named = config | {"tasks": {"text": task | {"reward_settings": {"own:letters": {"file": mine}}}}}
    for allowed in ("", mine):
        with pytest.raises(ValueError, match="code is allowed on the command line alone: leave it out"):
            train(named, tmp_path / "run", allowed)
    assert not (tmp_path / "run").exists()
    train(config, tmp_path / "run", mine)
    assert history(tmp_path / "run", "text/reward_own:letters")[0] >= 0.5


@pytest.mark.parametrize(
    ("reward", "content", "message"),
    [
        ("own:score", None, "there is no such file"),
        ("own:absent", MINE, "has no attribute 'absent'"),
        ("own:letters", "1 /", "SyntaxError"),
        ("own:", MINE, "name the function as own:NAME"),
    ],
)
def test_what_is_wrong_with_the_file_is_told_before_anything_is_computed(
    config, tmp_path, reward, content, message
):
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
        pathlib.Path(tmp_path / "beside.py").write_text("MORE = 1")
    task = config["tasks"]["text"] | {"rewards": {reward: 1.0}}
    with pytest.raises(ValueError, match=message):
        train(config | {"tasks": {"text": task}}, tmp_path / "run", str(file))
    assert not (tmp_path / "run").exists()


def test_open_run_gives_the_file_to_no_other_reward(config, mine):
    _, _, _, rewards = open_run(config, "nowhere", mine)
    assert set(rewards["text"].rewards) == {"sevens", "format"}
