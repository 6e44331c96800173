"""Runs that are stopped, killed or damaged go on to the bit, and their workdirs stand by themselves."""

import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import xla_flags
from programs import Program
from states import counting

from mmada_jax.config import from_dict, to_dict
from mmada_jax.serve.api import MMaDA
from mmada_jax.train.rl.loop import train
from mmada_jax.train.rl.run import RLRun
from mmada_jax.train.runs import describe_older
from mmada_jax.weights import folder, lazy
from mmada_jax.weights.checkpoint import Checkpoints, trust
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.inspect import inspect
from mmada_jax.weights.workdir import CONFIG, MODEL, claim_workdir, newest_step, read_config, record_files
from tests.rl_toys import (  # noqa: F401
    change,
    history,
    make_older,
    one_device,
    params,
    rl_config,
    stopped_in,
    toy_rewards,
)

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("ahead", "kl", "dtype"),
    [
        pytest.param(0, "old", "float32", marks=pytest.mark.slow),
        pytest.param(0, "reference", "bfloat16", marks=pytest.mark.slow),
        (1, "reference", "float32"),
    ],
)
@pytest.mark.slow
def test_resume_is_bit_exact(config, tmp_path, ahead, kl, dtype):
    objective = config["objective"] | {"kl": kl, "beta": 0.1}
    if ahead:  # then the checkpoint holds corrections too
        config["tasks"]["text"]["text"]["cache"] = "dual"
    config = config | {
        "iterations": 4, "ahead": ahead, "objective": objective, "reference_dtype": dtype,
        "init": str(shutil.copytree(config["init"], tmp_path / "init")),
    }  # fmt: skip
    train(config, tmp_path / "whole")
    with stopped_in(1):  # then the run goes on
        state = train(config, tmp_path / "broken")
        assert int(state.step) == 2  # one iteration of mu 2
    # The model that it began with has gone away, and a workdir needs nothing of it.
    (tmp_path / "init").rename(tmp_path / "moved")
    train(config, tmp_path / "broken")
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path / "whole"), params(tmp_path / "broken"))
    for metric in ("text/reward", "draw/reward", "text/kl", "draw/entropy"):
        assert history(tmp_path / "whole", metric) == history(tmp_path / "broken", metric)


def test_a_run_stands_by_itself(config, tmp_path, image_tokenizer):
    init = shutil.copytree(config["init"], tmp_path / "init")
    config = config | {"init": str(init), "iterations": 1, "tasks": {"text": config["tasks"]["text"]}}
    train(config, tmp_path / "run")
    init.rename(tmp_path / "moved")
    # The configuration of the run and the description of its model are two files.
    assert read_config(tmp_path / "run") == json.loads(json.dumps(to_dict(from_dict(RLRun, config))))
    assert describe_older(tmp_path / "run") == []
    claim_workdir(tmp_path / "run", {"program": "rl"})
    model, source = MMaDA.load(tmp_path / "run"), open_folder(image_tokenizer)
    jax.tree.map(np.testing.assert_array_equal, model.vision.params, lazy.in_memory(source.params))
    assert inspect(tmp_path / "run")["image_tokenizer"] == str(tmp_path / "run/image_tokenizer")
    begun = open_folder(tmp_path / "moved")
    assert dataclasses.replace(model.config, dtype=begun.config.dtype) == begun.config
    assert model.defaults == MMaDA.load(tmp_path / "moved").defaults


def test_a_run_keeps_the_image_tokenizer_that_it_began_with(config, tmp_path, monkeypatch):
    config = config | {"iterations": 1, "tasks": {"text": config["tasks"]["text"]}}
    train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="image_tokenizer is '' there and 'x' now"):
        train(config | {"image_tokenizer": "x"}, tmp_path / "run")
    verified = counting(monkeypatch, folder, "verify_manifest")
    train(config, tmp_path / "run")
    assert verified == [tmp_path / "run/image_tokenizer/params"]


def test_a_run_of_text_alone_resumes(config, tmp_path):
    init = shutil.copytree(config["init"], tmp_path / "init")
    (init / MODEL).write_text(
        json.dumps(json.loads((init / MODEL).read_text()) | {"image_tokenizer": None})
    )
    record_files(init)
    config = config | {"init": str(init), "tasks": {"text": config["tasks"]["text"]}}
    for iterations in (1, 2):
        state = train(config | {"iterations": iterations}, tmp_path / "run")
        assert int(state.step) == 2 * iterations
    assert open_folder(tmp_path / "run").image_tokenizer is None
    assert not (tmp_path / "run/image_tokenizer").exists()


def test_an_older_run_goes_on_to_the_bit_and_gets_a_model_json(config, tmp_path):
    init = shutil.copytree(config["init"], tmp_path / "init")
    config = config | {
        "init": str(init), "tasks": {"text": config["tasks"]["text"]}, "model": {"remat": "full"},
    }  # fmt: skip
    train(config | {"iterations": 2}, tmp_path / "whole")
    train(config | {"iterations": 1}, tmp_path / "older")
    make_older(tmp_path / "older")
    init.rename(tmp_path / "moved")
    before = open_folder(tmp_path / "older")
    train(config | {"iterations": 2}, tmp_path / "older")
    whole, older = (open_folder(tmp_path / name) for name in ("whole", "older"))
    for name in ("config", "values", "generation", "step"):
        assert getattr(older, name) == getattr(whole, name), name
        assert name == "step" or getattr(before, name) == getattr(whole, name), name
    one, other = (inspect(tmp_path / name)["state_sha256"] for name in ("whole", "older"))
    assert one == other
    for name in (MODEL, CONFIG):
        assert (tmp_path / "older" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("computed", [True, False])
def test_an_older_run_needs_the_image_tokenizer_of_init_and_is_trusted(config, tmp_path, computed):
    init = shutil.copytree(config["init"], tmp_path / "init")
    config = config | {"init": str(init), "iterations": 1, "tasks": {"text": config["tasks"]["text"]}}
    train(config, tmp_path / "run")
    old = shutil.copytree(tmp_path / "run", tmp_path / "old")
    make_older(old)
    shutil.rmtree(old / "image_tokenizer")
    if not computed:  # the first form of these workdirs
        values = read_config(old)
        del values["computed"]
        claim_workdir(old, values)
    init.rename(tmp_path / "moved")
    for use in (MMaDA.load, describe_older):
        with pytest.raises(FileNotFoundError, match=f"image tokenizer of the model in {old} .* name"):
            use(old)
    MMaDA.load(old, image_tokenizer=tmp_path / "moved/image_tokenizer")
    (tmp_path / "moved").rename(init)
    (init / "checkpoints").rename(tmp_path / "params_of_init")
    MMaDA.load(old)
    assert describe_older(old) == [old / MODEL]
    init.rename(tmp_path / "moved")
    one, other = (open_folder(tmp_path / name) for name in ("run", "old"))
    assert (one.config, one.values, one.generation) == (other.config, other.values, other.generation)
    assert other.image_tokenizer == old / "image_tokenizer"
    assert int(train(config | {"iterations": 2}, old).step) == 4


def test_a_run_that_has_lost_its_model_json_is_one_line(config, tmp_path):
    config = config | {"iterations": 1, "tasks": {"text": config["tasks"]["text"]}}
    train(config, tmp_path)
    (tmp_path / MODEL).unlink()
    trust(tmp_path)
    assert describe_older(tmp_path) == []
    with pytest.raises(
        ValueError, match=r"has no model\.json, which says what model it holds; put it back"
    ):
        train(config | {"iterations": 2}, tmp_path)


def test_a_broken_policy_is_not_resumed_for_ever(config, tmp_path):
    config = config | {
        "tasks": {"text": config["tasks"]["text"] | {"rewards": {"long": 1.0}}},
        "save_every": 1,
    }
    config["optim"] = config["optim"] | {"lr": 1e36, "max_skipped": 2}
    with pytest.raises(FloatingPointError, match="in a row were skipped"):
        train(config | {"iterations": 9}, tmp_path / "run")
    config["optim"] |= {"lr": 1e-3}
    assert int(train(config | {"iterations": 2}, tmp_path / "run").step) == 4


@pytest.mark.slow
def test_a_disk_that_is_full_costs_the_saves_alone(config, tmp_path, monkeypatch, capsys):
    config = config | {"iterations": 3, "save_every": 1, "tasks": {"text": config["tasks"]["text"]}}
    train(config, tmp_path / "whole")
    save, full = Checkpoints.save, [2, 4]  # steps, two of an iteration

    def save_little(self, state):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with contextlib.ExitStack() as stack:
            if int(state.step) in full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
                stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            save(self, state)
            self.latest()

    monkeypatch.setattr(Checkpoints, "save", save_little)
    train(config, tmp_path / "broken")
    assert capsys.readouterr().err.count("could not be saved") == 2
    assert newest_step(tmp_path / "broken").name == "6"
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path / "whole"), params(tmp_path / "broken"))
    full.append(6)
    with pytest.raises(OSError, match="the checkpoint of step 6 could not be saved"):
        train(config, tmp_path / "last")
    full.clear()
    assert int(train(config, tmp_path / "last").step) == 6


def test_the_next_rollout_survives_a_damaged_checkpoint_of_another_task(config, tmp_path):
    config = config | {"iterations": 2, "ahead": 1, "save_every": 1}
    train(config, tmp_path / "whole")
    train(config, tmp_path / "broken")
    newest = newest_step(tmp_path / "broken")
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = largest.read_bytes()
    largest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    train(config, tmp_path / "broken")
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path / "whole"), params(tmp_path / "broken"))


@pytest.mark.parametrize("changed", ["seed", "prompts"])
def test_the_next_rollout_is_judged_by_its_own_prompts(config, tmp_path, changed):
    config = config | {"iterations": 1, "ahead": 1, "tasks": {"text": config["tasks"]["text"]}}
    train(config, tmp_path)
    other = {"path": "vqa_sum", "format": "digits"}
    new, name = {
        "seed": (config | {"seed": 5}, "seed is 0 there and 5 now"),
        "prompts": (change(config, data=other), "tasks.text.data"),
    }[changed]
    with pytest.raises(ValueError, match=name):
        train(new | {"iterations": 2}, tmp_path)


def test_a_trained_run_is_where_another_stage_can_start(config, tmp_path):
    from mmada_jax.train.runs import open_start

    tasks = {"text": config["tasks"]["text"]}
    train(config | {"iterations": 1, "samples_every": 0, "tasks": tasks}, tmp_path / "run")
    begin = open_start(tmp_path / "run")
    model = MMaDA.load(tmp_path / "run")
    assert dataclasses.replace(begin.config, dtype=model.config.dtype) == model.config
    assert begin.tokenizer().to_json() == model.tokenizer.to_json()


def test_a_workdir_holds_one_run(config, tmp_path):
    workdir = tmp_path / "run"
    config = config | {"iterations": 1, "samples_every": 0, "tasks": {"text": config["tasks"]["text"]}}
    train(config, workdir)
    with pytest.raises(ValueError, match=r"objective\.mu is 2 there and 3 now"):
        train(config | {"objective": config["objective"] | {"mu": 3}}, workdir)
    with pytest.raises(ValueError, match="ahead is 0 there and 1 now"):
        train(config | {"ahead": 1}, workdir)
    with pytest.raises(ValueError, match=r"objective\.kl is 'old' there and 'reference' now"):
        train(config | {"objective": config["objective"] | {"kl": "reference"}}, workdir)
    train(config | {"seed": 5}, workdir)  # from here on


@pytest.mark.slow
def test_launch_goes_on_after_a_kill_and_ctrl_c(model_workdir, tmp_path):
    def launch(workdir, number=None, step=0):
        """Runs until a step is shown, where the process gets a signal; what it printed."""
        command = [
            ROOT / "launch/rl.py", "--config", ROOT / "configs/unigrpo.py:digits,smoke",
            "--workdir", workdir, f"--config.init={model_workdir}", "--config.iterations=8",
            "--config.save_every=1",
        ]  # fmt: skip
        with Program(command, {"XLA_FLAGS": xla_flags(1)}, new_session=True) as process:
            out = []
            for line in process.stdout:
                out.append(line)
                if number and line.startswith(f"step {step}/"):
                    os.killpg(process.pid, number)  # as a terminal does, to all processes of a program
            assert process.wait() == (-number if number == signal.SIGKILL else 0), "".join(out)
        return out

    launch(tmp_path / "whole")
    launch(tmp_path / "run", signal.SIGKILL, 2)
    assert "stopped by SIGINT after iteration" in launch(tmp_path / "run", signal.SIGINT, 4)[-1]
    stopped = int(newest_step(tmp_path / "run").name) // 2
    assert 4 <= stopped < 8
    assert f"resuming at iteration {stopped}\n" in "".join(launch(tmp_path / "run"))
    one, other = (inspect(tmp_path / name)["state_sha256"] for name in ("whole", "run"))
    assert one == other
