"""What the measurement of UniGRPO on digits reports."""

import numpy as np
import pytest

from configs import unigrpo
from launch import bench
from launch.benchmarks import rl as benchmark_rl
from mmada_jax.serve.api import MMaDA


@pytest.mark.parametrize(
    ("before", "after"), [((310, 400), (338, 400)), ((5, 9), (2, 8)), ((4, 4), (4, 4))]
)
def test_the_test_for_two_proportions_is_that_of_the_chi_square(before, after):
    from scipy.stats import chi2_contingency

    z, p = benchmark_rl.two_proportions(before, after)
    if before[0] == before[1] and after[0] == after[1]:
        assert (z, p) == (0, 1)
        return
    counts = [[x, n - x] for x, n in (before, after)]
    want = chi2_contingency(counts, correction=False)
    np.testing.assert_allclose([z**2, p], [want.statistic, want.pvalue], rtol=1e-9)
    assert np.sign(z) == np.sign(after[0] / after[1] - before[0] / before[1])


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
    assert "z +0.0, p 1" in lines[4]


def test_a_workdir_is_of_one_model_and_one_configuration(model_workdir, tmp_path, monkeypatch):
    measured = []

    def measure(*args):
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--maskings", "exact", "luck"], "invalid choice: 'luck'"),
        (["--n", "0"], "argument --n: 0 is too few"),
        (["--init", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_at_once(model_workdir, tmp_path, capsys, flags, message):
    workdir = tmp_path / "run"
    words = ["rl", "--init", str(model_workdir), "--workdir", str(workdir), *flags]
    with pytest.raises((SystemExit, OSError)) as error:
        bench.main(words)
    assert message in capsys.readouterr().err + str(error.value)
    assert not workdir.exists()


def test_curves_leave_out_the_rows_of_the_other_task():
    run = [{"step": 2 * i + 1 + t, f"{task}/reward": float(i)} for i in range(8)
           for t, task in enumerate(benchmark_rl.TASKS)]  # fmt: skip
    figure = benchmark_rl.curves({"exact": [run, run[:8]]})
    for axis in figure.axes:
        thick = axis.lines[-1]
        assert len(thick.get_xdata()) == len(thick.get_ydata())
        np.testing.assert_allclose(thick.get_ydata(), np.mean([0, 1, 2, 3]))
