"""A random model on one device, two small tasks for it, and toy rewards: what the tests of RL share."""

import contextlib
import json
import pathlib
import signal

import jax
import numpy as np
import pytest

from mmada_jax.devices import sharding
from mmada_jax.diffusion import rules
from mmada_jax.serve.api import MMaDA
from mmada_jax.train import metrics, optim
from mmada_jax.train.rl import loop, resume, start, tasks
from mmada_jax.train.rl.rewards import functions as rewards_lib
from mmada_jax.train.rl.run import Task
from mmada_jax.weights import lazy
from mmada_jax.weights.arrays import open_params
from mmada_jax.weights.workdir import CONFIG, FILES, MODEL, newest_step, read_config, record_files


def count_sevens():
    """The share of a completion that is the digit 7."""

    def score(prompts, completions, images, answers):
        return np.array([text.count("7") / 8 for text in completions], np.float32)

    return score


def length():
    """The number of letters."""

    def score(prompts, completions, images, answers):
        return np.array([len(text) for text in completions], np.float32)

    return score


def darkness():
    """How dark an image is."""

    def score(prompts, completions, images, answers):
        return -np.asarray(images, np.float32).mean(axis=(1, 2, 3))

    return score


@pytest.fixture(autouse=True)
def toy_rewards(monkeypatch):
    monkeypatch.setitem(rewards_lib.REWARDS, "sevens", count_sevens)
    monkeypatch.setitem(rewards_lib.REWARDS, "dark", darkness)
    monkeypatch.setitem(rewards_lib.REWARDS, "long", length)


@pytest.fixture(name="config")
def rl_config(model_workdir, image_tokenizer, tmp_path):
    """A text and an image task of a random model on one device."""
    rows = [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a in range(3) for b in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"groups": 4, "update_groups": 4, "reward_settings": {}}
    text = {"steps": 8, "block": 4, "temperature": 1.0, "remask": "largest"}
    data = {"path": str(tmp_path / "prompts.jsonl"), "format": "jsonl"}
    return {
        "program": "rl",
        "init": str(model_workdir),
        "iterations": 3,
        "tasks": {
            "draw": common | {
                "layout": "t2i", "data": {"path": "t2i_one", "format": "digits"}, "rewards": {"dark": 1.0},
                "image": {"steps": 3, "guidance": 0.0},
            },
            "text": common | {
                "layout": "lm_chat", "data": data, "rewards": {"sevens": 2.0, "format": 0.5}, "text": text,
                "max_prompt": 30, "max_new": 8,
            },
        },
        "objective": {"masking": "exact", "responses": 4, "mu": 2, "beta": 0.0, "kl": "old"},
        "reference_dtype": "float32",
        "save_every": 2,
        "optim": {"lr": 1e-3, "warmup": 1, "weight_decay": 0.0},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    }  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    make = sharding.make_mesh
    monkeypatch.setattr(
        sharding, "make_mesh", lambda *a, devices=devices, **k: make(*a, devices=devices, **k)
    )


@pytest.fixture(scope="module", name="model")
def random_model(model_workdir):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return MMaDA.load(model_workdir, mesh)


TEXT = Task("lm_chat", None, {}, groups=2, max_prompt=40, max_new=12, text=rules.TextRule(
    steps=12, block=4, temperature=1.0, remask="largest"))  # fmt: skip


def change(config, **task):
    return config | {"tasks": {"text": config["tasks"]["text"] | task}}


def rolled_out(config, name, masking="unigrpo", **objective):
    """A rollout and what an update needs beside it: run, model, params, the open task, rollout."""
    values = config["objective"] | {"masking": masking} | objective
    run, mesh, prompts, rewards = start.open_run(config | {"objective": values}, "nowhere")
    model, params, _ = start.load_policy(run, pathlib.Path("nowhere"), mesh)
    optimizer = optim.make(run.optim, 10)
    with jax.set_mesh(mesh):
        _, shardings = resume.state_shapes(run, model, optimizer, mesh)
        opened = tasks.open_task(run, name, model, prompts[name], rewards[name], optimizer, mesh, shardings)
        _, given = tasks.rollout_inputs(run, model, opened, 0)
        rollout = opened.generate(params, *given)
    return run, model, params, opened, rollout


def params(workdir):
    return lazy.in_memory(open_params(newest_step(workdir) / "params"))


@contextlib.contextmanager
def stopped_in(iteration):
    """SIGTERM arrives during that iteration of the runs within, counted from 1."""
    asked, watch = [], loop.watch_signals

    @contextlib.contextmanager
    def watched(mesh):
        with watch(mesh):
            yield lambda: asked.append(1) or signal.SIGTERM * (len(asked) == iteration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "watch_signals", watched)
        yield


def make_older(workdir):
    """A workdir of RL as it was left before there was a model.json: config.json described the model."""
    about = json.loads((workdir / MODEL).read_text())
    architecture = about["config"] | {"dtype": about["computed"].pop("dtype")}
    described = {"architecture": architecture} | {key: about[key] for key in ("computed", "generation")}
    values = {key: x for key, x in read_config(workdir).items() if key not in ("lora", "base_dtype")}
    (workdir / CONFIG).write_text(json.dumps(values | described))
    for name in (MODEL, FILES):
        (workdir / name).unlink()
    record_files(workdir)


def history(workdir, metric):
    rows = metrics.read(workdir / "metrics.jsonl")
    return [row[metric] for row in rows if metric in row]
