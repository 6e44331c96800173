"""Rollouts and RL training: one compilation, learning, exact resume, bad input."""

import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmada_jax.devices import sharding
from mmada_jax.diffusion import denoise, loss
from mmada_jax.nets import transformer
from mmada_jax.serve.api import MMaDA
from mmada_jax.train import metrics, optim
from mmada_jax.train.rl import loop as rl
from mmada_jax.train.rl import prompts as prompts_lib
from mmada_jax.train.rl import rollout as rollout_lib
from mmada_jax.train.rl.diagnose import diagnose
from mmada_jax.train.rl.prompts import Prompt
from mmada_jax.train.rl.rewards import functions as rewards_lib
from mmada_jax.train.rl.rollout import Task
from mmada_jax.weights import lazy
from mmada_jax.weights.arrays import open_params
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.inspect import inspect
from mmada_jax.weights.workdir import claim_workdir, newest_step, read_config

ROOT = pathlib.Path(__file__).parent.parent


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


@pytest.fixture
def config(model_workdir, image_tokenizer, tmp_path):
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


@pytest.fixture(scope="module")
def model(model_workdir):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return MMaDA.load(model_workdir, mesh)


TEXT = Task("lm_chat", None, {}, groups=2, max_prompt=40, max_new=12, text=denoise.TextRule(
    steps=12, block=4, temperature=1.0, remask="largest"))  # fmt: skip
DRAW = Task("t2i", None, {}, groups=2, image=denoise.ImageRule(steps=4, guidance=1.0))
READ = dataclasses.replace(TEXT, layout="mmu", max_prompt=60)
PROMPTS = [Prompt("3+4", "7"), Prompt("what is 12+12?", "24")]


def generate(model, task, prompts, responses=2, seed=0):
    at = rollout_lib.span(task, model.vocab, model.n_image, model.max_text)
    places = jax.tree.map(lambda x: x.sharding, model.params)
    run = rollout_lib.make_generate(model.mesh, model.config, model.vocab, at, places)
    job = rollout_lib.lay_out(model, task, prompts, responses)
    rows, other = (x and (x.tokens, x.valid) for x in (job.rows, job.unconditional))
    with jax.set_mesh(model.mesh):
        return run, run(model.params, *rows, jax.random.key(seed), other), job


# ---- Rollouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [TEXT, READ, DRAW], ids=lambda task: task.layout)
def test_the_record_is_what_the_policy_gives_at_the_state_of_the_reveal(model, task):
    prompts = PROMPTS
    if task is READ:
        prompts = [p._replace(image=np.zeros((*model.image_size, 1), np.float32)) for p in PROMPTS]
    if task is DRAW:
        prompts = [Prompt("a handwritten three", "3"), Prompt("a handwritten nine", "9")]
    _, rollout, job = generate(model, task, prompts)
    rollout = jax.device_get(rollout)
    step, given = rollout.step_RL, job.rows.tokens != model.vocab.mask
    np.testing.assert_array_equal(rollout.tokens_RL[given], job.rows.tokens[given])
    np.testing.assert_array_equal(step < 0, given)
    first, size = job.rule.vocabulary(model.vocab)

    @jax.jit
    def log_probs(seen):
        h = transformer.hidden_states(model.params, model.config, seen, job.rows.valid)
        return jax.nn.log_softmax(transformer.unembed(model.params, model.config, h, first, size), axis=-1)

    for at in np.unique(step[(step >= 0) & (step < denoise.NEVER)]):
        seen = np.where(step >= at, model.vocab.mask, rollout.tokens_RL)
        logp = np.asarray(log_probs(seen))
        for r, place in zip(*np.nonzero(step == at), strict=True):
            want = logp[r, place, rollout.tokens_RL[r, place] - first]
            np.testing.assert_allclose(rollout.logp_RL[r, place], want, atol=2e-5)
            entropy = -np.sum(np.exp(logp[r, place]) * logp[r, place])
            np.testing.assert_allclose(rollout.entropy_RL[r, place], entropy, rtol=1e-4)


def test_a_response_is_scored_up_to_its_first_end(model):
    _, rollout, job = generate(model, TEXT, PROMPTS * 4, responses=8)  # 64 rows in one call
    rollout = jax.device_get(rollout)
    span = slice(job.start_B[0], job.start_B[0] + job.length)
    assert not rollout.response_RL[:, : span.start].any()
    assert len(rollout.tokens_RL) == 64
    for ids, response in zip(rollout.tokens_RL[:, span], rollout.response_RL[:, span], strict=True):
        ends = np.flatnonzero(ids == model.vocab.eos)
        n = ends[0] + 1 if len(ends) else len(ids)
        np.testing.assert_array_equal(response, np.arange(len(ids)) < n)


def test_prompts_of_all_lengths_share_one_compilation(model):
    run, first, _ = generate(model, TEXT, PROMPTS)
    job = rollout_lib.lay_out(model, TEXT, [Prompt("7", "7"), Prompt("1+1+1+1", "4")], 2)
    with jax.set_mesh(model.mesh):
        run(model.params, job.rows.tokens, job.rows.valid, jax.random.key(1), None)
    assert run._cache_size() == 1
    # And a prompt's rollout doesn't depend on how far it is padded.
    wider = dataclasses.replace(TEXT, max_prompt=55)
    _, second, job = generate(model, wider, PROMPTS)
    np.testing.assert_array_equal(first.tokens_RL[:, 40:], second.tokens_RL[:, 55:])


def test_generation_stops_when_all_rows_have_ended(model):
    eager = jax.tree.map(lambda x: x, model.params)
    # A model that says little but the end, though not always at the end of a block.
    head = eager["head_DV"]
    h = transformer.hidden_states(
        model.params, model.config, np.full((1, 4), model.vocab.mask, np.int32), np.ones((1, 4), bool)
    )
    eager["head_DV"] = head.at[:, model.vocab.eos].set(jnp.mean(h, axis=(0, 1)) * 0.5)
    _, rollout, _ = generate(dataclasses.replace(model, params=eager), TEXT, PROMPTS)
    step = np.asarray(rollout.step_RL)
    ended = (np.asarray(rollout.tokens_RL) == model.vocab.eos)[:, 40:44].any(axis=1)
    assert ended.all()
    assert (step[:, 44:] == denoise.NEVER).all()
    assert (np.asarray(rollout.tokens_RL)[:, 44:] == model.vocab.eos).all()


# ---- Updates -------------------------------------------------------------------------------------


def start(config, name, masking="unigrpo", **objective):
    """All there is for one update: run, model, program, shardings, a scored rollout."""
    values = config["objective"] | {"masking": masking} | objective
    run, mesh, prompts, rewards = rl.check(config | {"objective": values}, "nowhere")
    model = rl.load(run, pathlib.Path("nowhere"), mesh)
    optimizer = optim.make(run.optim, 10)
    with jax.set_mesh(mesh):
        _, shardings = rl.shapes_of(model, optimizer, mesh)
        program = rl.make_program(
            run, name, model, prompts[name], rewards[name], optimizer, mesh, shardings
        )
        _, given = rl.inputs(run, model, program, 0)
        rollout = program.generate(model.params, *given)
    return run, model, program, rollout


def batch_of(run, program, rollout, scored, advantage, fresh):
    R = len(rollout.tokens_RL)
    chosen = rl.Chosen(np.arange(R), np.asarray(advantage, np.float32), np.full(R, 1 / R, np.float32))
    return rl.Batch(scored, rollout.tokens_RL, rollout.valid_RL, chosen, np.full(R, fresh))


@pytest.mark.parametrize(("name", "masking"), [("text", "unigrpo"), ("text", "exact"), ("draw", "full")])
def test_the_first_inner_update_is_the_policy_gradient(config, name, masking):
    run, model, program, rollout = start(config, name, masking, beta=0.1, kl="reference")
    advantage = np.random.default_rng(0).normal(size=len(rollout.tokens_RL)).astype(np.float32)
    with jax.set_mesh(model.mesh):
        scored = program.score(model.params, model.params, rollout, jax.random.key(5), 0)
        values, gradients = {}, {}
        for fresh in (True, False):
            batch = batch_of(run, program, rollout, scored, advantage, fresh)

            @jax.jit
            def of(params, batch):
                return program.objective.loss(params, program.objective.prepare(None, batch))

            (_, values[fresh]), gradients[fresh] = jax.value_and_grad(of, has_aux=True)(model.params, batch)

        @jax.jit
        def policy(params):
            h = transformer.hidden_states(params, model.config, scored.seen_RL, rollout.valid_RL)
            head, targets = rl.vocabulary(params, rollout.tokens_RL, program.at, model.vocab)
            weight = jnp.asarray(advantage)[:, None] * jnp.where(scored.scored_RL, 1.0, 0.0)
            count = jnp.maximum(1, scored.scored_RL.sum(axis=1, keepdims=True)).astype(jnp.float32)
            return loss.weighted_nll(
                h, head, targets, weight / count * scored.weight_R[:, None] / len(advantage)
            )[0]

        want = jax.grad(policy)(model.params)
    assert float(values[True]["ratio_error"]) == 0
    assert float(values[True]["clip_fraction"]) == 0
    assert float(values[False]["ratio_error"]) < 1e-4  # by the scores of another program
    assert float(values[False]["kl"]) < 1e-8
    for fresh in (True, False):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradients[fresh], want
        )


def test_padding_and_what_follows_the_end_have_no_gradient(config):
    config["tasks"]["text"] |= {"groups": 2, "update_groups": 2}
    run, model, program, rollout = start(config, "text")
    with jax.set_mesh(model.mesh):
        scored = program.score(model.params, None, rollout, jax.random.key(5), 0)
        advantage = np.ones(len(rollout.tokens_RL))
        batch = batch_of(run, program, rollout, scored, advantage, True)
        rows, _, _ = program.objective.prepare(None, batch)
        table = model.params["embed_VD"]

        def of(x_RLD):
            # Rows of embeddings of their own: position i of all rows looks up id i of another table.
            R, L, D = x_RLD.shape
            unused_D = jnp.zeros((len(table) - R * L, D))
            params = model.params | {"embed_VD": jnp.concatenate([x_RLD.reshape(R * L, D), unused_D])}
            ids = jnp.arange(R * L, dtype=jnp.int32).reshape(R, L)
            moved = rows[0]._replace(seen_RL=ids), *rows[1:]
            return program.objective.loss(params, (moved, batch.chosen, batch.fresh_S))[0]

        grad = np.asarray(jax.jit(jax.grad(of))(table[scored.seen_RL]))
        assert np.abs(grad[np.asarray(rollout.valid_RL)]).sum() > 0
        assert not grad[~np.asarray(rollout.valid_RL)].any()

        # A token after the end counts for nothing: another one there changes no gradient.
        @jax.jit
        def gradients(targets_RL):
            prepared = ((rows[0], targets_RL, rows[2]), batch.chosen, batch.fresh_S)
            return jax.grad(lambda params: program.objective.loss(params, prepared)[0])(model.params)

        other = jnp.where(rollout.response_RL, rollout.tokens_RL, (rollout.tokens_RL + 1) % 50)
        assert (other != rollout.tokens_RL).any()
        jax.tree.map(np.testing.assert_array_equal, gradients(rollout.tokens_RL), gradients(other))


def params(workdir):
    return lazy.in_memory(open_params(newest_step(workdir) / "params"))


def history(workdir, metric):
    rows = metrics.read(workdir / "metrics.jsonl")
    return [row[metric] for row in rows if metric in row]


def count_digits():
    """The share of a completion that is digits: of an untrained model some, in every batch."""

    def score(prompts, completions, images, answers):
        return np.array(
            [sum(map(str.isdigit, text)) / max(8, len(text)) for text in completions], np.float32
        )

    return score


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
    rl.train(config, tmp_path / "run")
    rewards = history(tmp_path / "run", "text/reward")
    assert len(rewards) == 25
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.3, rewards


def test_each_function_compiles_once(config, tmp_path, monkeypatch):
    made = {}
    make = rl.make_program

    def keep(run, name, *rest):
        made[name] = make(run, name, *rest)
        return made[name]

    monkeypatch.setattr(rl, "make_program", keep)
    rl.train(config | {"iterations": 4}, tmp_path / "run")
    assert set(made) == {"draw", "text"}
    for name, program in made.items():
        counts = [f._cache_size() for f in (program.generate, program.score, program.update)]
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
        "000000-draw.md", "000000-draw.png", "000001-text.md"
    ]  # fmt: skip
    # What was trained is a model like any other.
    trained = MMaDA.load(tmp_path / "run")
    assert trained.generate(["1+1"], max_new=4)[0].text is not None
    assert trained.draw(["a handwritten one"], denoise.ImageRule(steps=2))


@pytest.mark.parametrize(
    ("ahead", "kl", "dtype"),
    [(0, "old", "float32"), (0, "reference", "bfloat16"), (1, "reference", "float32")],
)
def test_resume_is_bit_exact(config, tmp_path, ahead, kl, dtype):
    objective = config["objective"] | {"kl": kl, "beta": 0.1}
    config = config | {
        "iterations": 4, "ahead": ahead, "objective": objective, "reference_dtype": dtype,
        "init": str(shutil.copytree(config["init"], tmp_path / "init")),
    }  # fmt: skip
    rl.train(config, tmp_path / "whole")
    steps, watch = [], rl.watch_signals
    # SIGTERM arrives during the second iteration; then the run goes on.
    with pytest.MonkeyPatch.context() as patch:

        @contextlib.contextmanager
        def after_two(mesh):
            with watch(mesh):
                yield lambda: steps.append(1) or signal.SIGTERM * (len(steps) == 1)

        patch.setattr(rl, "watch_signals", after_two)
        state = rl.train(config, tmp_path / "broken")
        assert int(state.step) == 2  # one iteration of mu 2
    # The model that it began with has gone away, and a workdir needs nothing of it.
    (tmp_path / "init").rename(tmp_path / "moved")
    rl.train(config, tmp_path / "broken")
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path / "whole"), params(tmp_path / "broken"))
    for metric in ("text/reward", "draw/reward", "text/kl", "draw/entropy"):
        assert history(tmp_path / "whole", metric) == history(tmp_path / "broken", metric)


def test_a_run_stands_by_itself(config, tmp_path, image_tokenizer):
    init = shutil.copytree(config["init"], tmp_path / "init")
    config = config | {"init": str(init), "iterations": 1, "tasks": {"text": config["tasks"]["text"]}}
    rl.train(config, tmp_path / "run")
    old = shutil.copytree(tmp_path / "run", tmp_path / "old")
    init.rename(tmp_path / "moved")
    model, source = MMaDA.load(tmp_path / "run"), open_folder(image_tokenizer)
    jax.tree.map(np.testing.assert_array_equal, model.vision.params, lazy.in_memory(source.params))
    assert inspect(tmp_path / "run")["image_tokenizer"] == str(tmp_path / "run/image_tokenizer")
    with pytest.raises(ValueError, match="image_tokenizer is '' there and 'x' now"):
        rl.train(config | {"image_tokenizer": "x"}, tmp_path / "run")

    # A workdir of an older version needs the image tokenizer of `init`, and nothing else.
    shutil.rmtree(old / "image_tokenizer")
    values = read_config(old)
    del values["computed"]
    claim_workdir(old, values)
    with pytest.raises(FileNotFoundError, match=f"image tokenizer of the model in {old} .* name"):
        MMaDA.load(old)
    MMaDA.load(old, image_tokenizer=image_tokenizer)
    (tmp_path / "moved").rename(init)
    (init / "checkpoints").rename(tmp_path / "params_of_init")
    MMaDA.load(old)


def test_a_broken_policy_is_not_resumed_for_ever(config, tmp_path):
    config = config | {
        "tasks": {"text": config["tasks"]["text"] | {"rewards": {"long": 1.0}}},
        "save_every": 1,
    }
    config["optim"] = config["optim"] | {"lr": 1e36, "max_skipped": 2}
    with pytest.raises(FloatingPointError, match="in a row were skipped"):
        rl.train(config | {"iterations": 9}, tmp_path / "run")
    config["optim"] |= {"lr": 1e-3}
    assert int(rl.train(config | {"iterations": 2}, tmp_path / "run").step) == 4


def test_a_disk_that_is_full_costs_the_saves_alone(config, tmp_path, monkeypatch, capsys):
    config = config | {"iterations": 3, "save_every": 1, "tasks": {"text": config["tasks"]["text"]}}
    rl.train(config, tmp_path / "whole")
    save, full = rl.Checkpoints.save, [2, 4]  # steps, two of an iteration

    def save_little(self, state):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with contextlib.ExitStack() as stack:
            if int(state.step) in full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
                stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            save(self, state)
            self.latest()

    monkeypatch.setattr(rl.Checkpoints, "save", save_little)
    rl.train(config, tmp_path / "broken")
    assert capsys.readouterr().err.count("could not be saved") == 2
    assert newest_step(tmp_path / "broken").name == "6"
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path / "whole"), params(tmp_path / "broken"))
    full.append(6)
    with pytest.raises(OSError, match="the checkpoint of step 6 could not be saved"):
        rl.train(config, tmp_path / "last")
    full.clear()
    assert int(rl.train(config, tmp_path / "last").step) == 6


def test_the_next_rollout_survives_a_damaged_checkpoint_of_another_task(config, tmp_path):
    config = config | {"iterations": 2, "ahead": 1, "save_every": 1}
    rl.train(config, tmp_path / "whole")
    rl.train(config, tmp_path / "broken")
    newest = newest_step(tmp_path / "broken")
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"!")
    rl.train(config, tmp_path / "broken")
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path / "whole"), params(tmp_path / "broken"))


@pytest.mark.parametrize("ahead", [0, 1])
def test_old_scores_are_those_of_the_rollouts_policy(config, tmp_path, ahead):
    objective = config["objective"] | {"masking": "unigrpo", "mu": 1}
    tasks = {"text": config["tasks"]["text"] | {"rewards": {"long": 1.0}}}
    config = config | {"ahead": ahead, "objective": objective, "tasks": tasks, "iterations": 3}
    config["optim"] = config["optim"] | {"lr": 1e-2, "warmup": 0}
    rl.train(config, tmp_path / "run")
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
    ],
)
def test_every_way_of_masking_trains(config, tmp_path, objective):
    tasks = {"text": config["tasks"]["text"] | {"rewards": {"long": 1.0}}}
    config = config | {"objective": config["objective"] | objective, "tasks": tasks, "iterations": 1}
    before = rl.load(rl.config_lib.from_dict(rl.RLRun, config), tmp_path, sharding.make_mesh()).params
    rl.train(config, tmp_path / "run")
    after = params(tmp_path / "run")
    change = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), before, after)
    assert 1e-4 < max(jax.tree.leaves(change)) < 1e-2
    assert history(tmp_path / "run", "text/skipped")[-1] == 0


@pytest.mark.parametrize("changed", ["seed", "prompts"])
def test_the_next_rollout_is_judged_by_its_own_prompts(config, tmp_path, changed):
    config = config | {"iterations": 1, "ahead": 1, "tasks": {"text": config["tasks"]["text"]}}
    rl.train(config, tmp_path)
    other = {"path": "vqa_sum", "format": "digits"}
    new, name = {
        "seed": (config | {"seed": 5}, "seed is 0 there and 5 now"),
        "prompts": (change(config, data=other), "tasks.text.data"),
    }[changed]
    with pytest.raises(ValueError, match=name):
        rl.train(new | {"iterations": 2}, tmp_path)


def test_sharded_training_is_the_same(config, tmp_path, monkeypatch):
    config = config | {
        "iterations": 2, "objective": config["objective"] | {"kl": "reference", "beta": 0.1},
    }  # fmt: skip
    rl.train(config, tmp_path / "one")
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *a, **k: make(*a, devices=jax.devices()[:8], **k))
    rl.train(config | {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}, tmp_path / "eight")
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
    kept, frozen = [], rl.frozen
    monkeypatch.setattr(
        rl, "frozen", lambda params, run: kept.append((params, frozen(params, run))) or kept[0][1]
    )
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *a, **k: make(*a, devices=jax.devices()[:4], **k))
    rl.train(values | {"mesh": {"data": 1, "fsdp": 2, "tensor": 2}}, tmp_path / "run")
    ((policy, reference),) = kept
    for a, b in zip(jax.tree.leaves(policy), jax.tree.leaves(reference), strict=True):
        assert b.dtype == jnp.bfloat16
        assert b.sharding == a.sharding
        assert not b.is_deleted()
    # Of the policy itself but for its rounding.
    (kl,) = history(tmp_path / "run", "draw/kl")
    assert 0 < kl < 1e-3


def test_a_trained_run_is_where_another_stage_can_start(config, tmp_path):
    from mmada_jax.train.runs import open_start

    tasks = {"text": config["tasks"]["text"]}
    rl.train(config | {"iterations": 1, "samples_every": 0, "tasks": tasks}, tmp_path / "run")
    begin = open_start(tmp_path / "run")
    model = MMaDA.load(tmp_path / "run")
    assert dataclasses.replace(begin.config, dtype=model.config.dtype) == model.config
    assert begin.tokenizer().to_json() == model.tokenizer.to_json()


def test_progress_is_a_short_line_that_names_failures(config, tmp_path, monkeypatch, capsys):
    def failing():
        def score(prompts, completions, images, answers):
            if len(completions) > 8:  # the probe is shorter
                raise RuntimeError("broken")
            return np.zeros(len(completions), np.float32)

        return score

    monkeypatch.setitem(rewards_lib.REWARDS, "failing", failing)
    task = config["tasks"]["text"] | {"rewards": {"sevens": 1.0, "failing": 1.0}}
    rl.train(config | {"iterations": 2, "tasks": {"text": task}}, tmp_path / "run")
    # The first iteration compiles, and has no speed.
    _, line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert "text/failed_failing 32" in line
    assert "ETA" in line
    assert "failed_sevens" not in line
    assert len(line) < 250


# ---- Gradients, measured -------------------------------------------------------------------------


def test_the_measured_gradient_of_exact_masks_is_nearer_to_all_reveals_than_that_of_ratios(
    config, tmp_path
):
    text = config["tasks"]["text"] | {"groups": 8, "update_groups": None, "rewards": {"long": 1.0}}
    config = config | {
        "tasks": {"text": text},
        "objective": config["objective"] | {"mu": 8, "responses": 8},
    }
    found = diagnose(config, tmp_path, ["unigrpo", "exact"], 2)["text"]
    assert list(found) == ["every", "unigrpo", "exact"]
    np.testing.assert_allclose(found["every"]["with_every"], 1, rtol=1e-5)
    assert 1 > found["exact"]["with_every"] > found["unigrpo"]["with_every"]
    assert all(values["norm"] > 0 for values in found.values())
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(ValueError, match="maskings luck"):
        diagnose(config, tmp_path, ["luck"], 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 4)
        with pytest.raises(ValueError, match="4 processes; gradients"):
            diagnose(config, tmp_path, ["exact"], 2)


# ---- Bad input -----------------------------------------------------------------------------------


def broken(*scores):
    def make():
        return lambda prompts, completions, images, answers: np.array(scores, np.float32)

    return make


def change(config, **task):
    return config | {"tasks": {"text": config["tasks"]["text"] | task}}


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
    monkeypatch.setattr(rl, "make_program", None)
    with pytest.raises((ValueError, OSError), match=message):
        rl.train(change(config, **of_task) | of_run, tmp_path / "run")
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
        rl.train(change(config, data=data), tmp_path / "run")


def test_a_line_of_prompts_ends_where_json_says_so(tmp_path):
    rows = [{"prompt": "a\u2028b\x0c", "answer": "\u0085c"}, {"prompt": "d", "answer": "e"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    found = prompts_lib.open_prompts(prompts_lib.Config("rows.jsonl"), tmp_path)
    assert [(p.text, p.answer) for p in found] == [(r["prompt"], r["answer"]) for r in rows]


def test_images_that_are_asked_about_may_have_any_size(model, tmp_path):
    Image.fromarray(np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)).save(tmp_path / "wide.png")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "what?", "answer": "it", "image": "wide.png"}')
    asked = prompts_lib.open_prompts(prompts_lib.Config("rows.jsonl"), tmp_path)
    task = dataclasses.replace(TEXT, layout="mmu")
    job = rollout_lib.lay_out(model, task, list(asked), 2)
    assert job.rows.tokens.shape == (2, 40 + model.n_image + 3 + 12)


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
    run, model, program, _ = start(config, "text", "exact")
    asked = [prompt for i in range(6) for prompt in rl.inputs(run, model, program, i)[0][::4]]
    assert {prompt.answer for prompt in asked} == {"0", "2"}
    assert program.unreadable == {tmp_path / "1.png"}
    assert capsys.readouterr().err.count("1.png can't be decoded") == 1
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match="none of the images of 3 prompts"):
        rl.inputs(run, model, program, 6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "t2i_one", "format": "digits", "split": "prompts"}, "unknown split 'prompts'"),
        ({"path": "text_cot", "format": "digits", "split": "luck"}, "unknown split 'luck'"),
        ({"path": "chain_sum", "format": "reasoning_gym", "count": 0}, "count is 0"),
    ],
)
def test_prompts_that_are_not_there(values, message):
    with pytest.raises(ValueError, match=message):
        prompts_lib.open_prompts(prompts_lib.Config(**values))


def test_the_folder_of_a_reward_is_relative_to_the_workdir(config, tmp_path):
    settings = {"clip": {"folder": "../clip"}}
    draw = config["tasks"]["draw"] | {"rewards": {"clip": 0.1}, "reward_settings": settings}
    with pytest.raises((ValueError, OSError), match=str(tmp_path / "clip")):
        rl.train(config | {"tasks": {"draw": draw}}, tmp_path / "run")


def test_a_workdir_holds_one_run(config, tmp_path):
    workdir = tmp_path / "run"
    config = config | {"iterations": 1, "samples_every": 0, "tasks": {"text": config["tasks"]["text"]}}
    rl.train(config, workdir)
    with pytest.raises(ValueError, match=r"objective\.mu is 2 there and 3 now"):
        rl.train(config | {"objective": config["objective"] | {"mu": 3}}, workdir)
    with pytest.raises(ValueError, match="ahead is 0 there and 1 now"):
        rl.train(config | {"ahead": 1}, workdir)
    with pytest.raises(ValueError, match=r"objective\.kl is 'old' there and 'reference' now"):
        rl.train(config | {"objective": config["objective"] | {"kl": "reference"}}, workdir)
    rl.train(config | {"seed": 5}, workdir)  # from here on


def test_tasks_take_their_turns(config):
    tasks = config["tasks"]
    config = config | {"tasks": {"draw": tasks["draw"], "text": tasks["text"] | {"turns": 3}}}
    run = rl.config_lib.from_dict(rl.RLRun, config)
    assert [run.turn(i) for i in range(9)] == [
        ("draw", 0), ("text", 0), ("text", 1), ("text", 2), ("draw", 1), ("text", 3), ("text", 4),
        ("text", 5), ("draw", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("arg", ["digits", "8b", "digits,full", "digits,fast", "digits,smoke", "8b,smoke"])
def test_the_configurations_are_valid(arg):
    from configs import unigrpo

    run = rl.config_lib.from_dict(rl.RLRun, unigrpo.get_config(arg))
    assert run.objective.masking == ("unigrpo" if "8b" in arg else "exact")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    rl.check_rows(run, mesh)


def test_launch_goes_on_after_a_kill_and_ctrl_c(model_workdir, tmp_path):
    def launch(workdir, number=None, step=0):
        """Runs until a step is shown, where the process gets a signal; what it printed."""
        command = [
            sys.executable, ROOT / "launch/rl.py", "--config", ROOT / "configs/unigrpo.py:digits,smoke",
            "--workdir", workdir, f"--config.init={model_workdir}", "--config.iterations=12",
            "--config.save_every=1",
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            out = []
            for line in process.stdout:
                out.append(line)
                if number and line.startswith(f"step {step}/"):
                    os.killpg(process.pid, number)  # as a terminal does, to all processes of a program
            assert process.wait() == (-number if number == signal.SIGKILL else 0), "".join(out)
        return out

    launch(tmp_path / "whole")
    launch(tmp_path / "run", signal.SIGKILL, 3)
    assert "stopped by SIGINT after iteration" in launch(tmp_path / "run", signal.SIGINT, 6)[-1]
    stopped = int(newest_step(tmp_path / "run").name) // 2
    assert 6 <= stopped < 12
    assert f"resuming at iteration {stopped}\n" in "".join(launch(tmp_path / "run"))
    one, other = (inspect(tmp_path / name)["state_sha256"] for name in ("whole", "run"))
    assert one == other
