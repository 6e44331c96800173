"""Rollouts: what a policy generates, and the record of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmada_jax.diffusion import denoise, rules
from mmada_jax.nets import transformer
from mmada_jax.train.rl import prompts as prompts_lib
from mmada_jax.train.rl import rollout as rollout_lib
from mmada_jax.train.rl.prompts import Prompt
from mmada_jax.train.rl.run import Task
from tests.rl_toys import TEXT, one_device, random_model  # noqa: F401

ANEW = dataclasses.replace(TEXT, text=dataclasses.replace(TEXT.text, cache="dual", refresh=1))
CACHED = dataclasses.replace(TEXT, text=dataclasses.replace(TEXT.text, cache="dual"))
DRAW = Task("t2i", None, {}, groups=2, image=rules.ImageRule(steps=4, guidance=1.0))
HALTON = dataclasses.replace(DRAW, image=rules.ImageRule(steps=4, guidance=0, order="halton", columns=4))
EMERGE = dataclasses.replace(DRAW, image=rules.ImageRule(steps=4, guidance=0, order="emerge"))


READ = dataclasses.replace(TEXT, layout="mmu", max_prompt=60)


PROMPTS = [Prompt("3+4", "7"), Prompt("what is 12+12?", "24")]


def generate(model, task, prompts, responses=2, seed=0):
    at = rollout_lib.response_span(task, model.vocab, model.rows)
    places = jax.tree.map(lambda x: x.sharding, model.params)
    run = rollout_lib.make_generate(model.mesh, model.config, model.vocab, at, places)
    job = rollout_lib.lay_out(model, task, prompts, responses)
    rows, other = (x and (x.tokens, x.valid) for x in (job.rows, job.unconditional))
    with jax.set_mesh(model.mesh):
        return run, run(model.params, *rows, jax.random.key(seed), other), job


@pytest.mark.parametrize(
    "task",
    [TEXT, READ, DRAW, HALTON, EMERGE, ANEW],
    ids=["lm_chat", "mmu", "t2i", "t2i by halton", "t2i by emerge", "a cache that is stored anew"],
)
def test_the_record_is_what_the_policy_gives_at_the_state_of_the_reveal(model, task):
    prompts = PROMPTS
    if task is READ:
        prompts = [p._replace(image=np.zeros((*model.image_size, 1), np.float32)) for p in PROMPTS]
    if task.layout == "t2i":
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


def test_with_a_cache_the_record_is_what_tokens_were_drawn_from(model):
    _, rollout, job = generate(model, CACHED, PROMPTS, responses=4)
    # The same rows, each with a first pass of its own, and all probabilities by the logits of the steps.
    of_span = {"start": job.start_B, "length": job.length, "rule": job.rule, "vocab": model.vocab}
    network = transformer.Network(model.params, model.config)
    with jax.set_mesh(model.mesh):
        tokens_RL, record = jax.jit(
            lambda rows: denoise.denoise(network, *rows, **of_span, key=jax.random.key(0), record=True)
        )((job.rows.tokens, job.rows.valid))
    np.testing.assert_array_equal(rollout.tokens_RL, tokens_RL)
    np.testing.assert_array_equal(rollout.step_RL, record.step_BL)
    np.testing.assert_allclose(rollout.logp_RL, record.logp_BL, atol=1e-5)


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


def test_images_that_are_asked_about_may_have_any_size(model, tmp_path):
    Image.fromarray(np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)).save(tmp_path / "wide.png")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "what?", "answer": "it", "image": "wide.png"}')
    asked = prompts_lib.open_prompts(prompts_lib.PromptsConfig("rows.jsonl"), tmp_path)
    task = dataclasses.replace(TEXT, layout="mmu")
    job = rollout_lib.lay_out(model, task, list(asked), 2)
    assert job.rows.tokens.shape == (2, 40 + model.n_image + 3 + 12)
