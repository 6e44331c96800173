"""What the measurement of UniGRPO on digits reports."""

import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest

from configs import unigrpo
from launch import bench
from launch.benchmarks import rl as benchmark_rl
from mmada_jax.config import from_dict
from mmada_jax.serve.api import MMaDA
from mmada_jax.train.rl.run import RLRun


def test_a_gain_is_the_paired_t_test_of_seeds():
    from scipy.stats import ttest_rel

    before, after = np.random.default_rng(0).normal(size=(2, 5))
    want = ttest_rel(after, before)
    found = benchmark_rl.gain(after - before)
    interval = want.confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high, found.p], [*interval, want.pvalue], rtol=1e-9)
    assert str(benchmark_rl.gain([0.125])) == "+12.5"  # one seed says nothing of others
    # Nor do seeds that happen to agree.
    same, none = (
        benchmark_rl.gain([444 / 600 - 433 / 600, 430 / 600 - 419 / 600]),
        benchmark_rl.gain([0.0] * 3),
    )
    assert (str(same), str(none)) == ("+1.8", "+0.0")
    assert np.isnan(same.p) and np.isnan(none.p)


def test_p_is_corrected_for_the_number_of_comparisons():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}  # the example of Holm's procedure
    gains = {name: benchmark_rl.Gain((0.0, 0.0), 0, 0, 0, value) for name, value in p.items()}
    found = {name: of.p_holm for name, of in benchmark_rl.holm(gains).items()}
    assert list(found) == list(p)
    np.testing.assert_allclose([found[name] for name in "abcd"], [0.03, 0.06, 0.06, 0.02])
    found = benchmark_rl.holm(gains | {"e": benchmark_rl.gain([0.5, 0.5])})  # one more was looked at
    np.testing.assert_allclose([found[name].p_holm for name in "abcd"], [0.04, 0.09, 0.09, 0.025])
    assert np.isnan(found["e"].p_holm)


def counts(*shares):
    return {f"m{i}": {"correct": x, "total": 10} for i, x in enumerate(shares)} | {"rewards": {"task": 1.0}}


def test_gains_are_paired_by_seed_and_drawn():
    results = {
        "exact": {0: (counts(1, 5), counts(5, 5)), 1: (counts(3, 5), counts(8, 6))},
        "full": {0: (counts(1, 5), counts(2, 5)), 1: (counts(3, 5), counts(4, 5))},
    }
    found = benchmark_rl.gains(results)
    np.testing.assert_allclose(found["m0"]["exact"].of_seeds, [0.4, 0.5])
    np.testing.assert_allclose(found["m0"]["full"].of_seeds, [0.1, 0.1])
    differences = benchmark_rl.gains(results, "exact")
    assert list(differences["m1"]) == ["full"]
    np.testing.assert_allclose(differences["m0"]["full"].of_seeds, [-0.3, -0.4])
    figure = benchmark_rl.intervals(results)
    assert [axis.get_title() for axis in figure.axes] == ["m0", "m1"]
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "."]
    np.testing.assert_allclose(dots[0].get_xdata(), [40, 50])
    for before, after in results["full"].values():  # a metric of fewer cases is in the tables alone
        before["m1"] = after["m1"] = {"correct": 1, "total": 2}
    assert [axis.get_title() for axis in benchmark_rl.intervals({"full": results["full"]}).axes] == ["m0"]


def test_a_report_has_differences_and_counts():
    results = {
        "exact": {0: (counts(1, 5), counts(5, 5)), 1: (counts(3, 5), counts(8, 6))},
        "full": {0: (counts(1, 5), counts(2, 5)), 1: (counts(3, 5), counts(4, 5))},
    }
    text = benchmark_rl.as_text(results)
    assert "| full | -35.0 (-98.5 to +28.5, p 0.09) |" in text
    assert "1 -> 5 of 10" in text


def test_measures_are_counts_and_mean_rewards(model_workdir):
    config = unigrpo.get_config("digits")
    result, pictures = benchmark_rl.measure_model(MMaDA.load(model_workdir), config, 10)
    assert set(result) == {*benchmark_rl.COUNTS, "rewards"}
    assert all(result[name]["total"] == 10 for name in benchmark_rl.COUNTS)
    assert 0 <= result["rewards"]["drawing"] <= 1
    assert 0 <= result["rewards"]["arithmetic"] <= 2.5
    assert len(pictures["sums"]) == len(pictures["drawn"][0]) == 10
    known = {name: {"correct": 7, "total": 9} for name in ("text_cot", "vqa_sum", "t2i_one")}
    again, _ = benchmark_rl.measure_model(MMaDA.load(model_workdir), config, 10, known=known)
    assert again == result | known
    lines = benchmark_rl.table({"exact": {3: (result, result), 5: (result, result)}})
    assert len(lines) == 5
    assert lines[2].startswith("| exact | 3 |")
    assert "| +0.0 |" in lines[4]


def test_long_sums_are_counted_by_their_last_total_and_as_a_whole(model_workdir):
    config = unigrpo.get_config("totals")
    config.tasks.totals.max_new = config.tasks.totals.text.block = 8
    result, answers = benchmark_rl.measure_totals(MMaDA.load(model_workdir), config, 3, few=2)
    cases = {"totals_sampled": 3, "chains_sampled": 3, "totals": 2, "chains": 2}
    assert list(result) == [*cases, "rewards"] and len(answers) == 3
    assert {name: result[name]["total"] for name in cases} == cases
    assert 0 <= result["rewards"]["totals"] <= 2.5


def test_a_workdir_is_of_one_model_and_one_configuration(model_workdir, tmp_path, monkeypatch):
    measured = []

    def measure(*args, few):
        measured.append(args)
        raise InterruptedError

    monkeypatch.setattr(benchmark_rl, "measure_model", measure)
    words = ["rl", "--init", str(model_workdir), "--workdir", str(tmp_path / "run")]
    with pytest.raises(InterruptedError):
        bench.main(words)
    digits = unigrpo.get_config("digits,full")
    digits.optim.lr = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unigrpo, "get_config", lambda _: digits)
        with pytest.raises(ValueError, match=r"lr is 0\.0001 there and 1"):
            bench.main(words)
    monkeypatch.setattr(benchmark_rl, "fingerprint", lambda _: "another")
    with pytest.raises(ValueError, match="holds another model"):
        bench.main(words)
    assert len(measured) == 1


def test_a_variant_changes_the_objective_or_ahead():
    config = benchmark_rl.changed(
        unigrpo.get_config("totals"), "unigrpo:hidden=(0.6,1.0):spread=even:ahead=1"
    )
    assert list(config.tasks) == ["totals"]
    run = from_dict(RLRun, config.to_dict())
    assert run.objective.masking == "unigrpo" and run.objective.hidden == (0.6, 1.0)
    assert run.objective.spread == "even" and run.ahead == 1
    with pytest.raises(ValueError, match="coupled:mu=3: objective: mu is 3; coupled masks"):
        benchmark_rl.changed(config, "coupled:mu=3")


@pytest.mark.parametrize("preset", ["digits", "totals"])
def test_what_is_set_is_trained_and_measured(model_workdir, tmp_path, monkeypatch, preset):
    trained = []

    def train(config, workdir):
        trained.append(run := from_dict(RLRun, config.to_dict()))
        pathlib.Path(workdir).mkdir()
        (pathlib.Path(workdir) / "metrics.jsonl").write_text('{"step": 1, "task/reward": 1.0}\n')
        return types.SimpleNamespace(step=run.iterations * run.objective.mu)

    name = "measure_totals" if preset == "totals" else "measure_model"
    monkeypatch.setattr(
        benchmark_rl, name, lambda *_, few: (counts(3, 4) | {"rewards": {"task": 1.0}}, None)
    )
    monkeypatch.setattr(benchmark_rl, "train", train)
    monkeypatch.setattr(benchmark_rl.MMaDA, "load", lambda _: None)
    words = ["rl", "--preset", preset, "--init", str(model_workdir), "--workdir", str(tmp_path / "run")]
    words += ["--seeds", "5", "5", "--maskings", "exact", "exact", "exact:ahead=1"]
    # A group that the preset doesn't name, and values as --config takes them.
    words += ["--set", "optim.b2=0.9", "lora.rank=4", "iterations=4e1"]
    bench.main([*words, "--set", "objective.normalise=false"])
    first, second = trained
    assert (first.seed, first.iterations, first.optim.b2, first.lora.rank) == (5, 40, 0.9, 4)
    assert (first.objective.masking, first.objective.normalise, first.ahead) == ("exact", False, 0)
    assert first == dataclasses.replace(second, ahead=0)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert {masking: list(runs) for masking, runs in report.items()} == {
        "exact": ["5"], "exact:ahead=1": ["5"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--maskings", "exact", "luck"], "invalid choice: 'luck'"),
        (["--maskings", "exact:ahead"], "'ahead' must be FIELD=VALUE"),
        (["--maskings", "exact:luck=1"], "luck"),
        (["--maskings", "exact:mu=0"], "mu is 0"),
        (["--set", "luck=1"], "luck"),
        (["--set", "iterations=many"], "iterations is 'many'"),
        (["--set", "optim=3"], "optim is 3; it must be a group of keys"),
        (["--set", "iterations.x=1"], "iterations is no group of keys"),
        (["--maskings", "exact:mu.x=1"], "objective.mu is no group of keys"),
        (["--set", "iterations=0"], "iterations is 0"),
        (["--set", "iterations"], "'iterations' must be FIELD=VALUE"),
        (["--set", "seed=7"], "'seed=7' has an option of its own; use --seeds"),
        (["--set", "objective.masking=full"], "use --maskings"),
        (["--maskings", "exact:masking=full"], "names two maskings"),
        (["--maskings", "exact", "coupled:mu=3"], "coupled:mu=3: objective: mu is 3"),
        (["--seeds", "-1"], "-1 is no seed; it must be an integer from 0 to 2147483647"),
        (["--n", "0"], "argument --n: 0 is too few"),
        (["--init", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_at_once(model_workdir, tmp_path, capsys, flags, message):
    workdir = tmp_path / "run"
    words = ["rl", "--init", str(model_workdir), "--workdir", str(workdir), *flags]
    with pytest.raises((SystemExit, OSError, ValueError)) as error:
        bench.main(words)
    assert message in capsys.readouterr().err + str(error.value)
    assert not workdir.exists()


def test_curves_leave_out_the_rows_of_the_other_task():
    run = [{"step": 2 * i + 1 + t, f"{task}/reward": float(i)} for i in range(8)
           for t, task in enumerate(("arithmetic", "drawing"))]  # fmt: skip
    figure = benchmark_rl.curves({"exact": [run, run[:8]]})
    for axis in figure.axes:
        thick = axis.lines[-1]
        assert len(thick.get_xdata()) == len(thick.get_ydata())
        np.testing.assert_allclose(thick.get_ydata(), np.mean([0, 1, 2, 3]))
