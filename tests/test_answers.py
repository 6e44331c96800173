"""Which part of a completion is its answer, and whether it means the same as the expected one."""

import numpy as np
import pytest

from mmada_jax.train.rl.rewards import answers, functions
from mmada_jax.train.rl.rewards.extract import answer_of
from tests.answer_pairs import RIGHT, WRONG
from tests.reward_toys import correct_reward, math_verify, score, scores_of, seconds  # noqa: F401


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("12", "12"),
        ("<think>13</think> 12\n", "12"),
        ("<think>a</think>b</think>c", "c"),
        (r"so \boxed{12}", "12"),
        (r"<think>\boxed{13}</think>it is 12", "it is 12"),
        (r"\boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{\frac{1}{2}", "1"),
        (r"\boxed {a{b}c} d", "a{b}c"),
        (r"\boxed5", "5"),
        (r"\boxed{\left\{ x \right.} is it", r"\left\{ x \right."),
        (r"\fbox{7}", "7"),
        ("3 * 6 = 18\n#### 18", "18"),
        ("#### Answer\n18", "#### Answer\n18"),
        ("<think>x</think><answer>\n18\n</answer> done", "18"),
        (r"<answer>\boxed{18}</answer>", "18"),
        ("<answer>17</answer> or <answer> 18", "18"),
        ("<think>unfinished", "<think>unfinished"),
        ("<think>x</think>", ""),
        ("", ""),
    ],
)
def test_the_answer_of_a_completion(completion, answer):
    assert answer_of(completion) == answer


@pytest.mark.parametrize("end", ["", "}"])
@pytest.mark.parametrize("part", [r"\boxed{", r"\boxed{1}, ", "{", "}", r"\boxed1 ", "<answer>", "\n"])
def test_the_answer_of_a_long_completion_is_found_in_linear_time(part, end):
    texts = [part * n + end * n for n in (4_000, 64_000)]
    short, long = (min(seconds(answer_of, text) for _ in range(3)) for text in texts)
    assert long < 64 * short + 0.05  # in quadratic time 256 times


def test_exact_compares_strings():
    got = score(functions.exact(), ["12", "<think>1</think> 12", "12.0", ""], ["12", 12, "12", "12"])
    np.testing.assert_array_equal(got, [1, 1, 0, 0])
    assert got.dtype == np.float32


@pytest.mark.parametrize(
    ("completion", "good"),
    [
        ("<think>a</think>b", True),
        (" \n<think>\na\n</think>\nb", True),
        ("<think></think>b", True),
        ("<think>a</think>  ", False),
        ("a</think>b", False),
        ("<think>a b", False),
        ("<think>a<think>b</think>c", False),
        ("<think>a</think>b</think>c", False),
        ("</think>a<think>b", False),
        ("first <think>a</think>b", False),
        ("b", False),
    ],
)
def test_format(completion, good):
    assert score(functions.well_formed(), [completion])[0] == good


@math_verify
def test_correct_compares_what_answers_mean(correct):
    cases = [
        ("12", "12.0", 1), ("12", "<think>13</think>The answer is 12.", 1), ("12", "13", 0), ("12", "", 0),
        ("1/2", r"\boxed{\frac{1}{2}}", 1), ("0.5", r"$\frac12$", 1), ("1,234", "1234", 1),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}", 1), ("x^2+2x+1", "(x+1)^2", 1), ("50%", "0.5", 1),
        ("$12$", "so 3 times 4 = 12", 1), ("-7", "7", 0), ("1/3", "0.33", 0), ("12", "10 11 12", 0),
        ("yes", "Yes", 1), ("seven", "six", 0),
    ]  # fmt: skip
    got = score(correct, [found for _, found, _ in cases], [want for want, _, _ in cases])
    assert got.tolist() == [want for _, _, want in cases]
    assert got.dtype == np.float32


def test_correct_knows_the_letters_of_choices():
    # No process is needed for them.
    cases = [
        ("B", "B", 1), ("B", "(B)", 1), ("(B)", "B. 12 cm", 1), ("B", "The answer is (B).", 1),
        ("B", r"\boxed{\text{B}}", 1), ("B", "Answer: **B**", 1), ("B", "C", 0), ("B", "A B C", 0),
        ("B", "Both", 0), ("A", "A dog", 0), ("B", "(C) not B", 0),
    ]  # fmt: skip
    got = score(functions.Correct(), [found for _, found, _ in cases], [want for want, _, _ in cases])
    assert got.tolist() == [want for _, _, want in cases]


@math_verify
@pytest.mark.parametrize(("pairs", "right"), [(RIGHT, 1), (WRONG, 0)], ids=["right", "wrong"])
def test_answers_as_models_write_them(correct, pairs, right):
    assert len(pairs) > 200
    got, errors = scores_of(correct, [found for _, found in pairs], [wanted for wanted, _ in pairs])
    assert not errors
    assert [pair for pair, one in zip(pairs, got, strict=True) if one != right] == []


@pytest.mark.parametrize("part", ["1,", "1 ", "$", "*a", "one ", "the answer is ", "A, ", "½"])
def test_answers_of_any_length_are_read_soon(part):
    for wanted in ("18", "B", "blue", "x^2"):
        assert seconds(answers.verdict, wanted, part * (200_000 // len(part))) < 5
