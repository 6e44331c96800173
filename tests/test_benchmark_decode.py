"""The benchmark of decoding: its sides, its counts, what it writes, what it refuses."""

import json
import types

import jax
import numpy as np
import pytest

from launch import bench
from launch.benchmarks import cases, decode, decode_report, serving, timing
from mmada_jax.data import digits, totals
from mmada_jax.devices import sharding

TINY = ["--random", "32,1,64", "--new", "24", "--batch", "1", "--repeats", "2", "--block", "8",
        "--window", "8"]  # fmt: skip
OPTIONS = types.SimpleNamespace(
    only=None,
    block=8,
    window=8,
    threshold=0.9,
    relax=0.3,
    leap=0.7,
    draft=0.5,
    verify=0.8,
    factor=1.0,
    bound=0.1,
)


def run(*words):
    return bench.main(["decode", *map(str, words)])


def test_random_weights_are_timed_and_drawn(tmp_path, capsys):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    run(*TINY, "--only", "cache", "all", "--json", out, "--plot", plot)
    report = json.loads(out.read_text())
    plain, cache, both = report["rows"]
    assert [row["technique"] for row in report["rows"]] == ["plain", "cache", "all"]
    assert [row["steps"] for row in report["rows"]] == [24, 24, 6]
    assert plain["ratio"] == 1 and plain["equal"] == 1
    for row in (cache, both):
        assert row["ratio"] == plain["seconds"]["median"] / row["seconds"]["median"] > 0
        assert row["tokens_per_second"] == pytest.approx(24 / row["seconds"]["median"])
        assert 0 <= row["equal"] <= 1 and row["turns"] == 2 and row["compile_seconds"] > 0
    assert report["rules"]["24"]["all"].items() >= {"cache": "dual", "window": 8, "steps": 6}.items()
    assert report["machine"]["cores"] >= 1
    # They are of 512 and 1024 tokens, or weren't asked for.
    for name in ("cache_512", "all_512", "all_1024", "engine_16", "draw"):
        assert report[name] is None
    assert report["accuracy"] == {"plain": None, "fast": None} and report["cases"] is None
    shown = capsys.readouterr().out
    assert "batch 1, 24 new tokens" in shown and "random weights: " in shown
    assert "Random weights are never certain" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_engine_and_drawing_are_timed_by_themselves(monkeypatch, capsys):
    one = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda: one)
    monkeypatch.setattr(serving, "N_IMAGE", 16)
    report = run(
        "--random", "32,1,64", "--new", 16, "--batch", 2, "--repeats", 1, "--only", "engine", "draw"
    )
    assert report["rows"] == [] and report["engine_16"] is None
    for engine in report["engine"].values():
        assert engine["rows"] == 2 and engine["ratio"] > 0 and engine["equal"]
    first = report["first_token"]
    assert first["steps"] == first["seconds"] / first["step"] > 0
    assert report["draw"] == report["drawing"]["ratio"] > 0
    shown = capsys.readouterr().out
    assert (
        all(f"2 requests by `{x}`, one by one" in shown for x in ("cache", "all"))
        and "4 guided drawings of 16 tokens" in shown
    )


def test_what_is_measured_before_ctrl_c_is_reported(tmp_path, monkeypatch, capsys):
    time_sides = decode.time_sides

    def stop(subject, jobs, batch, new, args):
        if new == 16:
            raise KeyboardInterrupt
        return time_sides(subject, jobs, batch, new, args)

    monkeypatch.setattr(decode, "time_sides", stop)
    out = tmp_path / "out.json"
    run(*TINY, "--new", "24", "16", "--only", "cache", "--json", out)
    report = json.loads(out.read_text())
    assert report["stopped"] and [row["new"] for row in report["rows"]] == [24, 24]
    assert "stopped by Ctrl-C" in capsys.readouterr().out


def test_plain_decoding_that_takes_too_long_is_left_out(capsys):
    report = run(*TINY, "--only", "steps", "--most", "0")
    plain, steps = report["rows"]
    assert plain["seconds"] is None and plain["expected_seconds"] > 0
    assert steps["seconds"]["median"] > 0 and steps["ratio"] is None
    assert "not timed: a call would take about" in capsys.readouterr().out


def test_a_trained_model_is_judged_on_the_same_cases(model_workdir, monkeypatch, capsys):
    asked = []

    def questions(n, new):
        asked.append((n, new))
        return [question for question, _ in digits.sums("test")[:n]]

    monkeypatch.setitem(cases.TASKS, "digits", cases.Task(questions, lambda asked, said: "+" in asked))
    report = run("--model", model_workdir, "--new", 8, "--batch", 2, "--only", "all", "--block", 4,
                 "--repeats", 1, "--cases", 5, "--threshold", 0.01)  # fmt: skip
    right = sum("+" in question for question, _ in digits.sums("test")[:5])
    assert set(asked) == {(2, 8), (5, 8)}
    assert report["accuracy"] == {key: {"correct": right, "total": 5} for key in ("plain", "fast")}
    assert report["cases"]["techniques"]["all"].items() >= {"only_plain": 0, "only_it": 0, "p": 1}.items()
    assert report["rows"][1]["steps"] <= 2, "all tokens of a block are certain enough"
    shown = capsys.readouterr().out
    assert "held-out cases of digits" in shown and "5 held-out cases, 8 new" in shown


def test_without_a_task_prompts_come_from_a_file(model_workdir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+2\n\nwhat is this?\n")
    words = ["--model", model_workdir, "--new", 4, "--batch", 3, "--block", 4, "--repeats", 1]
    report = run(*words, "--prompts", prompts, "--only", "plain")
    assert report["cases"] is None
    assert report["model"]["prompts"] == f"the lines of {prompts}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--only", "cahce"], r"argument --only: invalid choice: 'cahce'"),
        (["--cases", "0"], "argument --cases: 0 is too few; at least 1"),
        (["--random", "32,1"], "argument --random: 32,1 must be three numbers"),
    ],
)
def test_what_means_nothing_is_one_line(words, line, capsys):
    with pytest.raises(SystemExit):
        run(*words)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}") and error.count("\n") == 1


def test_what_does_not_fit_ends_before_anything_is_compiled(model_workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "Side", None)
    model = ["--model", model_workdir]
    for words, error in (
        ([*model, "--new", "4096"], "4096 new ones don't fit"),
        ([*model, "--random", "32,1,64"], "name different models"),
        ([*model, "--plot", tmp_path / "none" / "x.png"], "no folder"),
        (["--train", "--random", "32,1,64"], "--random and --train name"),
        (["--prompts", tmp_path / "x.txt"], "give --model too"),
        (["--random", "32,1,64", "--only", "draw", "--plot", "x.png"], "names none"),
        (["--random", "32,1,64", "--only", "relax"], "relax needs a model that is certain"),
        (["--random", "30,1,64"], "the width must be a multiple of 16"),
    ):
        with pytest.raises(ValueError, match=error):
            run(*words)
    with pytest.raises(FileNotFoundError):
        run("--model", tmp_path)


def test_techniques_are_those_that_the_options_name(model_workdir):
    subject = decode.Subject(decode.random_model((32, 1, 64), 256), {}, is_random=False)
    names = decode.chosen(OPTIONS, subject)
    assert tuple(names) == bench.DECODINGS
    by_chance = decode.chosen(OPTIONS, decode.Subject(subject.model, {}, is_random=True))
    assert set(bench.DECODINGS) - set(by_chance) == set(decode.BY_CERTAINTY)
    assert decode.rules(OPTIONS, subject, 20, decode.BESIDE) == {}
    by_name = decode.rules(OPTIONS, subject, 20, names)
    assert (*by_name, *decode.BESIDE) == bench.DECODINGS
    for name, rule in by_name.items():
        assert subject.job(1, 20, rule).rule == rule, (
            "no field is added, so that ratios are of what is named"
        )
        assert (rule.stop is not None) == (name in ("stop", "all"))


def test_sums_are_as_long_as_their_answers_may_be():
    questions, is_right = cases.TASKS["totals"]
    for new, rounds in ((16, 1), (128, 1), (256, 2), (512, 4), (1024, 4)):
        asked = questions(3, new)
        chains = [totals.parse(question) for question in asked]
        assert len(set(asked)) == 3
        assert all(chain.rounds == rounds and chain.split == "test" for chain in chains)
        assert is_right(asked[0], chains[0].answer) and not is_right(asked[0], chains[1].answer)


def test_without_a_name_the_model_is_that_of_the_sums(model_workdir, monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "TRAINED", tmp_path / "totals")
    assert cases.trained(train=False) is None
    monkeypatch.setattr(cases, "TRAINED", model_workdir)
    monkeypatch.setattr(decode, "PROMPT", 8)
    report = run("--new", 4, "--batch", 1, "--block", 4, "--repeats", 1, "--only", "plain")
    assert report["model"]["name"] == str(model_workdir)


def test_training_goes_through_both_stages(monkeypatch, tmp_path):
    trained = []

    def train(config, workdir):
        trained.append((workdir, config["init"], config.get("image_tokenizer", "")))
        return types.SimpleNamespace(step=config["steps"] if len(trained) < 4 else 1)

    monkeypatch.setattr("mmada_jax.train.supervised.train", train)
    monkeypatch.setattr(cases, "TRAINED", tmp_path / "sums")
    cases.trained(train=True)
    first = ("../sums_short", "../sums_short/image_tokenizer")
    assert trained == [(tmp_path / "sums_short", "", ""), (tmp_path / "sums", *first)]
    with pytest.raises(SystemExit, match="143"):
        cases.trained(train=True)


def test_tokens_count_up_to_the_end_of_an_answer():
    vocab = types.SimpleNamespace(eos=1, end_turn=2)
    plain = [np.array([5, 6, 2, 9, 9]), np.array([5, 5, 5, 5, 5])]
    other = [np.array([5, 7, 2, 8, 8]), np.array([5, 5, 5, 1, 5])]
    assert [len(decode.answer(ids, vocab)) for ids in (*plain, *other)] == [3, 5, 3, 4]
    assert decode.equal(plain, other, vocab) == (2 + 4) / 8


def test_steps_that_a_rule_fixes_are_those_that_are_taken():
    subject = decode.Subject(decode.random_model((32, 1, 64), 256), {}, is_random=True)
    for rule in decode.rules(OPTIONS, subject, 20, ["steps"]).values():
        side = decode.Side.__new__(decode.Side)
        side.model, side.job = subject.model, subject.job(1, 20, rule)
        assert side.steps() == sum(1 for _ in subject.model.engine.steps(side.job))


def test_fewer_repeats_are_spread_over_the_turns():
    called = []
    runs = {name: lambda name=name: called.append(name) for name in "ab"}
    told = []
    times = timing.take_turns(runs, {"a": 4, "b": 2}, warm_up=0, called=told.append)
    assert called == told == [*"ba", "a", *"ba", "a"]
    assert set(times) == {"a", "b"}


def test_a_figure_has_a_line_for_each_technique():
    rows = [
        {"batch": batch, "new": new, "technique": name, "ratio": new / 100}
        for batch in (1, 16)
        for new in (128, 512)
        for name in ("plain", "cache", "all")
    ]
    panels = decode_report.figure({"rows": rows, "model": {"name": "random weights"}}).axes
    assert [axis.get_title() for axis in panels] == ["batch 1, random weights", "batch 16, random weights"]
    assert all([line.get_label() for line in axis.lines[:2]] == ["cache", "all"] for axis in panels)
