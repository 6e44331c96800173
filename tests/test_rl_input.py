"""Configurations, prompts and pictures that RL can't use, and how tasks take turns."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from mmada_jax.config import from_dict
from mmada_jax.devices import sharding
from mmada_jax.train.rl import loop, start, tasks
from mmada_jax.train.rl.loop import train
from mmada_jax.train.rl.rewards import functions as rewards_lib
from mmada_jax.train.rl.run import RLRun
from tests.rl_toys import change, one_device, rl_config, rolled_out, toy_rewards  # noqa: F401


def broken(*scores):
    def make():
        return lambda prompts, completions, images, answers: np.array(scores, np.float32)

    return make


@pytest.mark.parametrize(
    ("of_task", "of_run", "message"),
    [
        ({"rewards": {"sevns": 1.0}}, {}, "tasks.text: unknown reward 'sevns'; did you mean 'sevens'"),
        ({"rewards": {}}, {}, "no reward is named"),
        ({"rewards": {"nan": 1.0}}, {}, "reward 'nan' failed on a probe: it returned nan"),
        ({"rewards": {"short": 1.0}}, {}, r"reward 'short' failed on a probe: .* shape \(1,\)"),
        ({"max_prompt": 3}, {}, "max_prompt is 3; shorten it or raise max_prompt"),
        ({"max_new": 9}, {}, "steps 8 are not divisible by the 3 blocks of 4 tokens in a length of 9"),
        ({"max_new": 400, "text": {"steps": 400, "block": 4, "temperature": 1.0}}, {}, "lower max_prompt"),
        ({"text": {"steps": 8, "block": 4, "temperature": 0.0}}, {}, "greedy rule"),
        ({"update_groups": 5}, {}, "update_groups 5"),
        ({"layout": "mmu"}, {}, "has no image"),
        ({}, {"objective": {"responses": 1}}, "responses is 1; it must be at least 2"),
        ({}, {"objective": {"masking": "luck"}}, "objective.masking is 'luck'"),
        ({}, {"init": ""}, "config.init is empty"),
        ({}, {"init": "nowhere"}, "nowhere"),
        ({}, {"ahead": 2}, "ahead is 2"),
        ({}, {"iterationz": 3}, "did you mean 'iterations'"),
        ({}, {"model": {"d_model": 3}}, "the architecture is that of init"),
        ({}, {"accumulate": 3}, "16 rows, which can't be split into 3 parts"),
    ],
)
def test_bad_input_is_refused_before_any_compute(config, tmp_path, monkeypatch, of_task, of_run, message):
    monkeypatch.setitem(rewards_lib.REWARDS, "nan", broken(*[np.nan] * 8))
    monkeypatch.setitem(rewards_lib.REWARDS, "short", broken(1.0))
    monkeypatch.setattr(loop, "open_task", None)
    with pytest.raises((ValueError, OSError), match=message):
        train(change(config, **of_task) | of_run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "1+1"}', "line 1: 'answer' is None"),
        ('{"prompt": "1+1", "answer": "2"}\n{"prompt": " ", "answer": "2"}', "line 2: 'prompt' is ' '"),
        ('{"prompt": "1+1", "answer": 2}', "line 1: 'answer' is 2"),
        ("{", "line 1 is no JSON"),
        ("", "holds no prompts"),
        ('{"prompt": "1", "answer": "2", "image": 5}', "line 1: 'image' is 5"),
        ('{"prompt": "1", "answer": "2", "image": "bad.jsonl"}', "line 1: .*cannot identify image file"),
        (b'{"prompt": "\xe9", "answer": "2"}', "is no UTF-8"),
        ('{"prompt": "1", "answer": "2", "image": "no.png"}', "no.png, which isn't there"),
    ],
)
def test_bad_prompts_name_their_line(config, tmp_path, lines, message):
    (tmp_path / "bad.jsonl").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    data = {"path": str(tmp_path / "bad.jsonl"), "format": "jsonl"}
    with pytest.raises((ValueError, OSError), match=message):
        train(change(config, data=data), tmp_path / "run")


def test_another_prompt_stands_in_where_a_picture_is_damaged(config, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(255, size=(16, 16), dtype=np.uint8)
    rows = [{"prompt": "what?", "answer": str(i), "image": f"{i}.png"} for i in range(3)]
    for row in rows:
        Image.fromarray(pixels).save(tmp_path / row["image"])
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])  # its header is as it was
    (tmp_path / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "seen.jsonl"), "format": "jsonl"}
    config = change(config, data=data, layout="mmu")
    run, model, _, opened, _ = rolled_out(config, "text", "exact")
    asked = [prompt for i in range(6) for prompt in tasks.rollout_inputs(run, model, opened, i)[0][::4]]
    assert {prompt.answer for prompt in asked} == {"0", "2"}
    assert opened.unreadable == {tmp_path / "1.png"}
    assert capsys.readouterr().err.count("1.png can't be decoded") == 1
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match="none of the images of 3 prompts"):
        tasks.rollout_inputs(run, model, opened, 6)


def test_the_folder_of_a_reward_is_relative_to_the_workdir(config, tmp_path):
    settings = {"clip": {"folder": "../clip"}}
    draw = config["tasks"]["draw"] | {"rewards": {"clip": 0.1}, "reward_settings": settings}
    with pytest.raises((ValueError, OSError), match=str(tmp_path / "clip")):
        train(config | {"tasks": {"draw": draw}}, tmp_path / "run")


def test_tasks_take_their_turns(config):
    tasks = config["tasks"]
    config = config | {"tasks": {"draw": tasks["draw"], "text": tasks["text"] | {"turns": 3}}}
    run = from_dict(RLRun, config)
    assert [run.turn(i) for i in range(9)] == [
        ("draw", 0), ("text", 0), ("text", 1), ("text", 2), ("draw", 1), ("text", 3), ("text", 4),
        ("text", 5), ("draw", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("arg", ["digits", "8b", "digits,full", "digits,fast", "digits,smoke", "8b,smoke"])
def test_the_configurations_are_valid(arg):
    from configs import unigrpo

    run = from_dict(RLRun, unigrpo.get_config(arg))
    assert run.objective.masking == ("unigrpo" if "8b" in arg else "exact")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    start.check_rollout_rows(run, mesh)
