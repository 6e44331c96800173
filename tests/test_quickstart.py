"""What the quickstart says of its results: floors, what is missed, and how seeds differ."""

import numpy as np
import pytest

from launch import quickstart_stages as quickstart
from launch.benchmarks import seeds


def result(*shares, total=100):
    counts = {f"m{i}": {"correct": round(share * total), "total": total} for i, share in enumerate(shares)}
    return {"stages": {"pretrain": counts}, "seconds": {"pretrain": 1.0}}


def floors(n, floor=0.5):
    return {"pretrain": {f"m{i}": floor for i in range(n)}}


@pytest.fixture
def finish(monkeypatch, tmp_path, capsys):
    """Calls `finish` without its table; what it printed."""
    monkeypatch.setattr(quickstart, "table", lambda result: [])

    def run(shares, floors):
        quickstart.finish(tmp_path, result(*shares), floors)
        return capsys.readouterr().out

    return run


def test_reached_floors_are_no_news(finish):
    assert "missed" not in finish((0.5, 0.9, 1.0), floors(3))
    assert "missed" not in finish((0.0,), {})


def test_few_missed_floors_are_named_and_most_are_an_error(finish):
    out = finish((0.49, 0.5), floors(2))
    assert "1 of 2 floors" in out
    assert "pretrain m0: 49/100 (49.0 %), the floor is 50%" in out
    assert "m1" not in out
    with pytest.raises(SystemExit, match="most of what this run should reach"):
        finish((0.49, 0.5, 0.49), floors(3))


def test_a_workdir_has_one_form_and_one_seed(tmp_path):
    what = {"form": "fast", "seed": 0}
    quickstart.claim(tmp_path / "a", what)
    quickstart.claim(tmp_path / "a", what)
    for other in ({"form": "fast", "seed": 1}, {"form": "default", "seed": 0}):
        with pytest.raises(ValueError, match=r"a holds the runs of .*'seed': 0.*choose another --workdir"):
            quickstart.claim(tmp_path / "a", other)
    (tmp_path / "old" / "pretrain").mkdir(parents=True)
    with pytest.raises(ValueError, match="old holds the runs of an older version's"):
        quickstart.claim(tmp_path / "old", what)


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_a_floor_is_below_its_share_and_nearer_with_more_cases(n):
    shares = np.linspace(0, 1, 11)
    of_shares = [seeds.floor(share, n) for share in shares]
    assert all(0 <= floor <= share for floor, share in zip(of_shares, shares, strict=True))
    assert of_shares[-1] < 1
    assert all(
        seeds.floor(share, 4 * n) > floor for share, floor in zip(shares, of_shares, strict=True) if floor
    )
    # Three standard errors of a share of one half are 1.5/sqrt(n).
    assert seeds.floor(0.5, n) == pytest.approx(max(0, 0.5 - 1.5 / n**0.5))


def test_the_table_of_seeds_has_mean_least_and_deviation():
    lines = seeds.table([result(0.5, 1.0), result(0.7, 1.0), result(0.9, 1.0)])
    rows = {
        line.split("|")[2].strip(): [cell.strip() for cell in line.split("|")[3:-1]] for line in lines[2:4]
    }
    assert rows["m0"] == ["100", "70.0", "50.0", "20.0", "35.0"]
    assert rows["m1"][:4] == ["100", "100.0", "100.0", "0.0"]
    assert lines[-1].startswith("3 seeds")
