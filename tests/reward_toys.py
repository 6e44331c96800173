"""Calls of rewards, and the reward `correct`: what the tests of rewards share."""

import importlib.util
import time

import pytest

from mmada_jax.train.rl.rewards import functions
from mmada_jax.train.rl.rewards.workers import Unscored

math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs math-verify"
)


def score(reward, completions, answers=None, prompts=None, images=None):
    return reward(prompts or ["p"] * len(completions), completions, images, answers)


def scores_of(reward, completions, answers):
    """The scores, and the rows without one."""
    try:
        return score(reward, completions, answers), {}
    except Unscored as error:
        return error.scores, error.errors


def seconds(function, *arguments):
    """CPU time of a call, which other programs on the machine don't change."""
    begun = time.thread_time()
    function(*arguments)
    return time.thread_time() - begun


@pytest.fixture(scope="module", name="correct")
def correct_reward():
    reward = functions.Correct(limit=60.0)
    yield reward
    reward.close()
