"""RL training: rewards rise, one compilation, ways of masking, sharding, and what a run shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax.config import from_dict
from mmada_jax.devices import sharding
from mmada_jax.diffusion import rules
from mmada_jax.serve.api import MMaDA
from mmada_jax.train import metrics
from mmada_jax.train.rl import loop
from mmada_jax.train.rl.loop import train
from mmada_jax.train.rl.rewards import functions as rewards_lib
from mmada_jax.train.rl.run import RLRun
from mmada_jax.train.rl.start import load_policy
from tests.rl_toys import history, one_device, params, rl_config, stopped_in, toy_rewards  # noqa: F401


def count_digits():
    """The share of a completion that is digits: of an untrained model some, in every batch."""

    def score(prompts, completions, images, answers):
        return np.array(
            [sum(map(str.isdigit, text)) / max(8, len(text)) for text in completions], np.float32
        )

    return score


@pytest.mark.slow
def test_the_reward_of_a_toy_problem_rises(config, tmp_path, monkeypatch):
    # An untrained model can learn to say numbers.
    monkeypatch.setitem(rewards_lib.REWARDS, "digits", count_digits)
    task = {"groups": 6, "update_groups": None, "rewards": {"digits": 2.0}}
    config = config | {
        "tasks": {"text": config["tasks"]["text"] | task},
        "iterations": 25,
        "objective": config["objective"] | {"responses": 8, "mu": 2},
        "optim": config["optim"] | {"lr": 3e-3, "warmup": 5},
        "save_every": 100,
    }
    train(config, tmp_path / "run")
    rewards = history(tmp_path / "run", "text/reward")
    assert len(rewards) == 25
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.3, rewards


def test_each_function_compiles_once(config, tmp_path, monkeypatch):
    made = {}
    make = loop.open_task

    def keep(run, name, *rest):
        made[name] = make(run, name, *rest)
        return made[name]

    monkeypatch.setattr(loop, "open_task", keep)
    train(config | {"iterations": 4}, tmp_path / "run")
    assert set(made) == {"draw", "text"}
    for name, opened in made.items():
        counts = [f._cache_size() for f in (opened.generate, opened.score, opened.update)]
        assert counts == [1, 1, 1], (name, counts)
    rows = metrics.read(tmp_path / "run/metrics.jsonl")
    # The first turn of a task compiles: its speed would be that of the compiler.
    for row in rows[:2]:
        assert not [name for name in row if name.endswith(("_per_second", "data_wait"))]
        assert row["productive_seconds"] < 0.1 * row["wall_seconds"]
    row = rows[3]
    assert np.isfinite(row["tokens_per_second"])
    for metric in (
        "reward", "reward_sevens", "reward_format", "failed_sevens", "reward_deviation",
        "groups_that_differ",
        "clip_fraction", "kl", "ratio_error", "response_length", "entropy", "rollout_tokens_per_second",
        "update_tokens_per_second", "seconds_waiting_for_rewards", "grad_norm", "loss",
    ):  # fmt: skip
        assert np.isfinite(row[f"text/{metric}"]), metric
    assert sorted(p.name for p in (tmp_path / "run/samples").iterdir()) == [
        "00000001-draw.md", "00000001-draw.png", "00000002-text.md"
    ]  # fmt: skip
    # What was trained is a model like any other.
    trained = MMaDA.load(tmp_path / "run")
    assert trained.generate(["1+1"], max_new=4)[0].text is not None
    assert trained.draw(["a handwritten one"], rules.ImageRule(steps=2))


@pytest.mark.parametrize("ahead", [0, 1])
def test_old_scores_are_those_of_the_rollouts_policy(config, tmp_path, ahead):
    objective = config["objective"] | {"masking": "unigrpo", "mu": 1}
    tasks = {"text": config["tasks"]["text"] | {"rewards": {"long": 1.0}}}
    config = config | {"ahead": ahead, "objective": objective, "tasks": tasks, "iterations": 3}
    config["optim"] = config["optim"] | {"lr": 1e-2, "warmup": 0}
    train(config, tmp_path / "run")
    moved = history(tmp_path / "run", "text/ratio_error")
    # The first rollout is always the policy's own, later ones with `ahead` those of the one before.
    assert moved[0] < 1e-4
    assert all(error > 1e-3 if ahead else error < 1e-4 for error in moved[1:]), moved


@pytest.mark.parametrize(
    "objective",
    [
        {"masking": "random", "normalise": False},
        {"masking": "coupled", "kl": "reference", "beta": 0.1},
        {"masking": "trace", "kl": "old", "beta": 0.1},
        {"masking": "full", "prompt_mask": 0.3},
        {"masking": "unigrpo", "hidden": (0.5, 1.0), "spread": "even"},
        {"masking": "fading", "ratio": "sequence"},
        {"masking": "uniform", "ratio": "none"},
        {"masking": "top_entropy", "kl": "reference", "beta": 0.1},
        {"masking": "surprisal", "cache": "dual"},
        {"masking": "exact", "cache": "dual"},
    ],
)
def test_every_way_of_masking_trains_and_resumes_to_the_bit(config, tmp_path, objective):
    objective = dict(objective)
    config["tasks"]["text"]["text"] |= {"cache": objective.pop("cache", "none")}
    tasks = {"text": config["tasks"]["text"] | {"rewards": {"long": 1.0}}}
    config = config | {"objective": config["objective"] | objective, "tasks": tasks, "iterations": 2}
    _, before, _ = load_policy(from_dict(RLRun, config), tmp_path, sharding.make_mesh())
    train(config, tmp_path / "run")
    after = params(tmp_path / "run")
    with stopped_in(1):
        assert int(train(config, tmp_path / "broken").step) == 2  # one iteration of mu 2
    train(config, tmp_path / "broken")
    jax.tree.map(np.testing.assert_array_equal, after, params(tmp_path / "broken"))
    change = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), before, after)
    assert 1e-4 < max(jax.tree.leaves(change)) < 1e-2
    assert history(tmp_path / "run", "text/skipped")[-1] == 0


@pytest.mark.slow
def test_sharded_training_is_the_same(config, tmp_path, monkeypatch):
    config = config | {
        "iterations": 2, "objective": config["objective"] | {"kl": "reference", "beta": 0.1},
    }  # fmt: skip
    train(config, tmp_path / "one")
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *a, **k: make(*a, devices=jax.devices()[:8], **k))
    train(config | {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}, tmp_path / "eight")
    for metric in ("draw/reward", "draw/entropy", "draw/loss", "text/reward", "text/kl", "text/loss"):
        one, eight = (history(tmp_path / name, metric) for name in ("one", "eight"))
        np.testing.assert_allclose(one, eight, rtol=1e-3, atol=1e-6, err_msg=metric)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        params(tmp_path / "one"),
        params(tmp_path / "eight"),
    )


def test_the_reference_is_kept_in_bfloat16_where_the_policy_lies(config, tmp_path, monkeypatch):
    values = config | {
        "reference_dtype": "bfloat16", "iterations": 1,
        "objective": config["objective"] | {"kl": "reference", "beta": 0.1, "masking": "unigrpo"},
    }  # fmt: skip
    kept, frozen = [], loop.frozen_reference
    monkeypatch.setattr(
        loop,
        "frozen_reference",
        lambda params, run: kept.append((params, frozen(params, run))) or kept[0][1],
    )
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *a, **k: make(*a, devices=jax.devices()[:4], **k))
    train(values | {"mesh": {"data": 1, "fsdp": 2, "tensor": 2}}, tmp_path / "run")
    ((policy, reference),) = kept
    for a, b in zip(jax.tree.leaves(policy), jax.tree.leaves(reference), strict=True):
        assert b.dtype == jnp.bfloat16
        assert b.sharding == a.sharding
        assert not b.is_deleted()
    # Of the policy itself but for its rounding.
    (kl,) = history(tmp_path / "run", "draw/kl")
    assert 0 < kl < 1e-3


def test_progress_is_a_short_line_that_names_failures(config, tmp_path, monkeypatch, capsys):
    def failing():
        def score(prompts, completions, images, answers):
            if len(completions) > 8:  # the probe is shorter
                raise RuntimeError("broken")
            return np.zeros(len(completions), np.float32)

        return score

    monkeypatch.setitem(rewards_lib.REWARDS, "failing", failing)
    task = config["tasks"]["text"] | {"rewards": {"sevens": 1.0, "failing": 1.0}}
    train(config | {"iterations": 2, "tasks": {"text": task}}, tmp_path / "run")
    # The first iteration compiles, and has no speed.
    _, line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert "text/failed_failing 32" in line
    assert "ETA" in line
    assert "failed_sevens" not in line
    assert len(line) < 250
