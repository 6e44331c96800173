"""Processes that compare answers: they recover from hangs, and run no answer as code."""

import dataclasses
import pathlib
import subprocess
import sys
import threading

import pytest

from mmada_jax.train.rl import prompts as prompts_lib
from mmada_jax.train.rl.rewards import functions, workers
from mmada_jax.train.rl.rewards.functions import Combined
from mmada_jax.train.rl.rewards.workers import Unscored
from tests.reward_toys import correct_reward, math_verify, score, scores_of  # noqa: F401


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


@pytest.mark.gym
def test_problems_are_judged_by_the_settings_that_they_were_made_with():
    config = prompts_lib.PromptsConfig(
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


def test_the_verifier_stands_alone():
    # It runs as a file where this package may not be found.
    source = pathlib.Path(workers.verifier.__file__).read_text()
    assert "mmada_jax" not in source
