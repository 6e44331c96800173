"""Rewards: what they give, what they can't be made to do, and how they fail."""

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import load_golden, write_clip

from mmada_jax.data import digits
from mmada_jax.train.rl import prompts as prompts_lib
from mmada_jax.train.rl.rewards import answers, functions, workers
from mmada_jax.train.rl.rewards.answers import answer_of
from mmada_jax.train.rl.rewards.functions import Combined
from mmada_jax.train.rl.rewards.workers import Unscored
from tests.answer_pairs import RIGHT, WRONG

math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs math-verify"
)


def score(reward, completions, answers=None, prompts=None, images=None):
    return reward(prompts or ["p"] * len(completions), completions, images, answers)


# ---- Answers and format --------------------------------------------------------------------------


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
    short, long = (min(_seconds(answer_of, text) for _ in range(3)) for text in texts)
    assert long < 64 * short + 0.05  # in quadratic time 256 times


def _seconds(function, *arguments):
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun


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


def scores_of(reward, completions, answers):
    """The scores, and the rows without one."""
    try:
        return score(reward, completions, answers), {}
    except Unscored as error:
        return error.scores, error.errors


@pytest.fixture(scope="module")
def correct():
    reward = functions.Correct(limit=60.0)
    yield reward
    reward.close()


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
        assert _seconds(answers.verdict, wanted, part * (200_000 // len(part))) < 5


@math_verify
def test_a_comparison_that_hangs_costs_its_row_alone():
    correct = functions.Correct(limit=1.0, workers=1)
    answers = ["9^{9^{8^9}}", "3", "9^{9^{8^9}}", "1/2"]
    completions = ["9^{9^{9^9}}", "3.0", "9^{9^{9^9}}", "0.5"]
    caught = []

    def work():  # not the main thread: a limit by signals wouldn't do
        try:
            score(correct, completions, answers)
        except Unscored as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    correct.close()
    (error,) = caught
    assert error.scores.tolist() == [0, 1, 0, 1]
    assert error.errors.keys() == {0, 2} and "longer than 1 s" in error.errors[0]


@math_verify
def test_a_batch_that_is_too_slow_keeps_the_rows_that_it_has():
    settings = {"correct": {"limit": 1.0, "workers": 1}}
    answers = ["3", *["9^{9^{8^9}}"] * 9, "2"]
    completions = ["3.0", *(f"9^{{9^{{9^{{9{i}}}}}}}" for i in range(9)), "2.0"]
    with Combined({"correct": 1.0}, settings, limit=5.0) as combined:
        combined(["p"], ["0.5"], None, ["1/2"])  # its process has started
        scores, _ = combined(["p"] * 11, completions, None, answers)
        assert scores[0] == 1
        assert combined.failures["correct"] >= 9
        scores, _ = combined(["p"], ["0.5"], None, ["1/2"])  # and the next batch is a new one
        assert scores.tolist() == [1]


def attacks(folder):
    """Texts that make a file in a folder where they run as Python."""
    file = f"{folder}/ran"
    return [
        f"__import__('os').system('touch {file}')",
        f"(lambda: open('{file}', 'w'))()",
        f"[open('{file}', 'w') for x in [1]]",
        f"().__class__.__base__.__subclasses__()[0] or open('{file}','w')",
        f"__builtins__['op'+'en']('{file}', 'w')",
        f"ｏｐｅｎ('{file}', 'w')",
        f'S(\'open("{file}", "w")\')',
        f"lambdify(x, open('{file}','w'))",
        f"preview(x, viewer='file', filename='{file}')",
    ]


@math_verify
@pytest.mark.parametrize(
    "form", ["{}", r"\boxed{{{}}}", "${}$", "The answer is {}", r"\text{{{}}} + x", "7 = {}"]
)
def test_no_answer_runs_as_code(correct, form, tmp_path):
    texts = [form.replace("{{", "{").replace("}}", "}").replace("{}", text) for text in attacks(tmp_path)]
    for wanted in ("3", "x+1=2"):
        got, _ = scores_of(correct, texts, [wanted] * len(texts))
        assert not got.any()
    assert not list(tmp_path.iterdir())


@math_verify
def test_what_libraries_compile_for_themselves_is_no_answer(correct):
    pairs = [
        ("2x+4y-3=0", r"y = -\frac{1}{2}x + \frac{3}{4}", 1), ("2x+4y=6", "x+2y=3", 1),
        ("x+y=3", "y=3-x", 1), ("x>2", r"(2,\infty)", 1), (r"m \ge \sqrt{2}", r"[\sqrt{2},\infty)", 1),
        ("x^2-y^2", "(x-y)(x+y)", 1), (r"\sin^2 x+\cos^2 x", "1", 1), ("2x+4y=6", "x+2y=4", 0),
        ("x^3-y^3", "(x-y)(x^2+xy+y^2)", 1), ("x>2", r"(3,\infty)", 0),
        (r"x^2+y^2+z^2=1", "z^2+y^2=1-x^2", 1),
    ]  # fmt: skip
    got = score(correct, [found for _, found, _ in pairs], [wanted for wanted, _, _ in pairs])
    assert got.tolist() == [right for _, _, right in pairs]


def run_guarded(source):
    """What a process that watches for code says to statements that use it (`guarded(function, *texts)`)."""
    head = (
        "import sys\nfrom mmada_jax.train.rl.rewards import verifier\nsys.addaudithook(verifier._watch)\n"
        "guarded = verifier._guarded\n"
    )
    return subprocess.run([sys.executable, "-c", head + source], capture_output=True, text=True)


def test_a_refusal_that_a_library_swallows_is_an_error_all_the_same(tmp_path):
    source = f"""
def caller(name):
    scope = {{'__name__': name}}
    exec('def run(text):\\n try:\\n  eval(text)\\n except Exception: pass\\n return 0.0', scope)
    return scope['run']

for name in ('sympy.parsing.sympy_parser', 'reasoning_gym.games.x', 'some.other.library'):
    run = caller(name)
    for attack in {[text for text in attacks(tmp_path) if text[:2] != "S("]!r}:
        try:
            guarded(run, attack)
            print('passed', name, attack)
        except verifier.Refused as error:
            assert 'refused' in str(error)
assert guarded(caller('sympy.parsing.sympy_parser'), 'Integer(3)*sqrt(2) + x') == 0
assert guarded(lambda text: exec('def f(a):\\n return (lambda b: frozenset(b))(a)') or 1, '3') == 1
try:
    guarded(lambda text: open({str(tmp_path / "ran")!r}, 'w') and 1, '3')
    print('wrote')
except verifier.Refused:
    pass
"""
    done = run_guarded(source)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("reward", "extra"), [("correct", "rl"), ("reasoning_gym:chain_sum", "gym")])
def test_without_a_library_its_extra_is_named(reward, extra, monkeypatch, tmp_path):
    # A Python that finds no packages at all.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def use():
        with Combined({reward: 2.0}) as combined:
            combined.check(["q"], ["1"])

    with pytest.raises((ValueError, ImportError), match=rf"mmada_jax\[{extra}\]"):
        use()


# ---- reasoning-gym -------------------------------------------------------------------------------


@pytest.mark.gym
def test_problems_are_functions_of_task_seed_and_index():
    a, b, c = (functions.ReasoningGym("list_functions", seed=seed, workers=1) for seed in (0, 0, 1))
    made = [a.problem(i) for i in (0, 1, 2)]
    assert [b.problem(i) for i in (2, 0, 1)] == [made[2], made[0], made[1]]
    assert made[0] != made[1] and c.problem(0) != made[0]
    entries = [entry for _, _, entry in made]
    got = score(c, [f"<think>x</think>{answer}" for _, answer, _ in made], entries)
    assert got.tolist() == [1, 1, 1]
    for gym in (a, b, c):
        gym.close()


@pytest.mark.gym
@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("spiral_matrix", "[{}]"), ("countdown", "{}"), ("polynomial_multiplication", "{}"),
        ("n_queens", "[{}]"), ("simple_integration", "{}"), ("intermediate_integration", "{} + x"),
        ("binary_matrix", "{}"), ("string_insertion", "{}"),
    ],
)  # fmt: skip
def test_verifiers_that_evaluate_answers_run_none_as_code(task, answer, tmp_path):
    gym = functions.ReasoningGym(task, workers=1)
    _, right, entry = gym.problem(0)
    texts = [right, *(answer.format(text) for text in attacks(tmp_path)), "yes"]
    got, errors = scores_of(gym, texts, [entry] * len(texts))
    gym.close()
    assert got[0] == 1 and (got[1:] < 0.1).all()
    assert not list(tmp_path.iterdir())
    # What was refused is counted, a word in place of a list is but wrong.
    assert 0 not in errors and len(texts) - 1 not in errors
    assert all("refused" in error for error in errors.values()) and len(errors) >= 6


@pytest.mark.gym
def test_problems_of_all_tasks_are_the_same_in_every_process_and_order():
    one, two = (workers.Workers("reasoning_gym", 60.0, 1) for _ in range(2))
    tasks = [task for task in one.ask("tasks") if task not in functions.LEFT_OUT]
    assert len(tasks) > 100
    # A few draw from generators that nobody has seeded, not in each problem.
    keys = [
        (task, seed, {}) for task in tasks for seed in ((5, 6) if task != "list_functions" else range(60))
    ]
    made = {str(key): one.ask("problem", *key) for key in keys}
    again = {str(key): two.ask("problem", *key) for key in reversed(keys)}
    assert [key for key in made if made[key] != again[key]] == []
    # Their own answers get full marks, and what their verifiers evaluate isn't refused.
    first = [key for key in keys if key[1] == 5 and made[str(key)][1] is not None]
    wrong = [key[0] for key in first if one.ask("score", *key, made[str(key)][1]) != 1]
    one.close()
    two.close()
    assert not wrong


@pytest.mark.gym
@pytest.mark.parametrize("task", ["puzzle24", "game_of_life_halting", "chain_sum"])
def test_tasks_that_give_full_marks_to_wrong_answers(task, monkeypatch, capsys):
    name = f"reasoning_gym:{task}"
    if task in functions.LEFT_OUT:
        with pytest.raises(ValueError, match=f"task '{task}' is left out: its verifier gives full marks"):
            Combined({name: 1.0})
    # One that nobody has listed is named at the start.
    monkeypatch.setattr(functions, "LEFT_OUT", {})
    with Combined({name: 1.0}, {name: {"workers": 1}}) as combined:
        problems = [combined.rewards[name].problem(i) for i in range(4)]
        combined.check([question for question, _, _ in problems], [entry for _, _, entry in problems])
    printed = capsys.readouterr().err
    assert (f"reward '{name}' gives full marks to" in printed) == (task != "chain_sum")


@pytest.mark.gym
def test_tasks_settings_and_entries_that_do_not_fit():
    with pytest.raises(ValueError, match="did you mean 'reasoning_gym:chain_sum'"):
        Combined({"reasoning_gym:chainsum": 1.0})
    with pytest.raises(ValueError, match="'codeio' is left out: it runs programs"):
        Combined({"reasoning_gym:codeio": 1.0})
    name = "reasoning_gym:chain_sum"
    settings = {name: {"settings": {"min_terms": 2, "max_terms": 2}}}
    with Combined({name: 1.0, "exact": 0.5, "format": 0.1}, settings) as combined:
        question, answer, entry = combined.rewards[name].problem(0)
        assert question.count("+") + question.count(" - ") == 1
        combined.check([question], [entry])
        total, parts = combined([question], [answer], None, [entry])
        assert total.tolist() == [1.5] and parts["format"].tolist() == [0]
        with pytest.raises(ValueError, match="row 0 is no entry of reasoning_gym:chain_sum"):
            combined.check([question], [answer])


# ---- Images --------------------------------------------------------------------------------------


@pytest.mark.gym
def test_problems_are_judged_by_the_settings_that_they_were_made_with():
    config = prompts_lib.Config(
        "chain_sum", "reasoning_gym", count=3, seed=7, settings={"min_terms": 2, "max_terms": 2}
    )
    prompts = prompts_lib.open_prompts(config)
    assert all(prompt.text.count("+") + prompt.text.count("-") <= 3 for prompt in prompts)
    answers = [prompt.answer for prompt in prompts]
    with Combined({"reasoning_gym:chain_sum": 1.0}) as combined:
        right = [f"<think>.</think>{answer['answer']}" for answer in answers]
        scores, _ = combined([p.text for p in prompts], right, None, answers)
    assert scores.tolist() == [1, 1, 1]
    other = prompts_lib.open_prompts(dataclasses.replace(config, seed=8))
    assert [p.text for p in other] != [p.text for p in prompts]


def test_the_digit_reward_reads_held_out_scans():
    pytest.importorskip("sklearn")
    scans = digits.load("validation")
    canvases = np.stack([digits.canvas(scan) for scan in scans.pixels])
    reward = functions.digit_probability()
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
    reward = functions.ClipScore(tmp_path, batch=2)
    got = score(reward, [""] * len(images), None, settings["score_prompts"], images)
    np.testing.assert_allclose(got, arrays["score"], atol=1e-4)
    assert got.shape == (5,) and got.dtype == np.float32
    assert reward._image._cache_size() == 1 and reward._text._cache_size() == 1
    with pytest.raises(ValueError, match="'clip' needs a model"):
        Combined({"clip": 0.1})


# ---- Several, and failures -----------------------------------------------------------------------


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


def test_the_verifier_stands_alone():
    # It runs as a file where this package may not be found.
    source = pathlib.Path(workers.verifier.__file__).read_text()
    assert "mmada_jax" not in source
