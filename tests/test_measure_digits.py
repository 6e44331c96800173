"""What evaluation counts, on a model that is always right and on one that is always wrong."""

import dataclasses
import types

import numpy as np
import pytest
import scipy.stats

from mmada_jax.data import digits
from mmada_jax.diffusion.rules import TextRule
from mmada_jax.measure import digits as measured

SCANS = digits.load("test")


class Reader:
    """A model that sees scans by their pixels, thinks, and says and draws `error` too much."""

    vocab = types.SimpleNamespace(eos=0)

    def __init__(self, error):
        self.error = error
        pairs = zip(SCANS.pixels, SCANS.labels, strict=True)
        self.known = {scan.tobytes(): int(digit) for scan, digit in pairs}

    def say(self, *numbers):
        total = sum(numbers) + self.error
        return types.SimpleNamespace(text=f"<think>{digits.thought(*numbers)}</think>{total}")

    def generate(self, questions, rule, max_new, seed):
        wanted = (None, 1) if max_new is None else (12, 2)
        assert (rule.steps, rule.block, rule.stop) == (*wanted, self.vocab.eos)
        return [self.say(*map(int, question.split("+"))) for question in questions]

    def answer(self, canvases, questions, rule, seed):
        assert set(questions) == {digits.ASK_SUM}
        return [self.say(*(self.known[s.tobytes()] for s in digits.cut(c, 2))) for c in canvases]

    def think_and_draw(self, prompts, text_rule, image_rule, seed):
        made = []
        for prompt in prompts:
            a, b = map(int, prompt.removeprefix("draw ").split("+"))
            scan = SCANS.pixels[np.flatnonzero(SCANS.labels == (a + b + self.error) % 10)[0]]
            thought = types.SimpleNamespace(text=f"<think>{a}+{b}={a + b + self.error}</think>")
            made.append((thought, types.SimpleNamespace(codes=digits.canvas(scan))))
        return made

    def decode(self, codes):
        return codes


@pytest.fixture(scope="module")
def judge():
    return measured.Judge()


@pytest.mark.parametrize("error", [0, 1])
def test_thoughts_are_judged_by_what_follows_them(judge, error):
    model, right = Reader(error), 0 if error else 40
    count, rows = measured.text_cot(model, 40)
    assert dataclasses.astuple(count) == (right, 40)
    assert all(eval(question) == int(want) for question, _, want in rows)
    assert measured.text_cot(model, 40, rule=TextRule(steps=12, block=2), max_new=24)[0] == count
    count, rows = measured.vqa_sum(model, 40)
    assert dataclasses.astuple(count) == (right, 40)
    assert rows[0][0].shape == (8, 16, 1)
    counts, pixels, rows = measured.draw_sums(model, judge, 40)
    assert {name: dataclasses.astuple(count) for name, count in counts.items()} == {
        "r2i_thought": (right, 40),
        "r2i_image": (right, 40),
    }
    assert pixels.shape == (40, 8, 16, 1)
    assert len({prompt for prompt, _ in rows}) == len(digits.pairs("test"))


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (50, 100), (1, 1), (311, 359)])
def test_the_interval_of_a_share_is_scipys(correct, total):
    want = scipy.stats.binomtest(correct, total).proportion_ci(method="wilson")
    assert measured.Count(correct, total).interval == pytest.approx((want.low, want.high), abs=1e-4)
