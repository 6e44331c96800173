"""Rows of a model and how they are run: company, lengths, seeds, compilations."""

import dataclasses

import jax
import numpy as np
import pytest

from mmada_jax.data import digits
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.serve.api import MMaDA
from mmada_jax.tokens import layout
from mmada_jax.tokens.tokenizer import chat

FAST = ImageRule(steps=3, guidance=1.0)


@pytest.fixture(scope="module")
def model(model_workdir):
    return MMaDA.load(model_workdir)


@pytest.fixture(scope="module")
def canvases():
    return np.stack([digits.canvas(*digits.load("test").pixels[i : i + 2]) for i in range(2)])


def test_thinking_hides_the_rest_of_the_slot_and_the_image(model):
    job = model.think_job(["draw 3+4", "draw"])
    hidden = job.rows.tokens == model.vocab.mask
    for i, prompt in enumerate(("draw 3+4", "draw")):
        start = 1 + len(model.tokenizer.encode(chat(prompt)))
        want = np.zeros_like(hidden[i])
        want[start : model.max_text + 1] = True
        want[model.max_text + 2 : -1] = True
        np.testing.assert_array_equal(hidden[i], want)
        assert (job.start_B[i], job.start_B[i] + job.length_B[i]) == (start, model.max_text + 1)


QUESTIONS = ["7 + 2", "draw 3+4", "1", "what is nine plus eleven plus six?"]


def tokens_of(texts):
    return [text.ids.tolist() for text in texts]


@pytest.mark.parametrize(
    "rule", [TextRule(block=4), TextRule(block=5, temperature=1.0)], ids=["greedy", "hot"]
)
@pytest.mark.parametrize("task", ["generate", "answer", "think"])
def test_a_prompt_gives_the_same_whatever_stands_beside_it(model, canvases, rule, task):
    def ask(which):
        seeds, prompts = [10 + i for i in which], [QUESTIONS[i] for i in which]
        if task == "generate":
            return tokens_of(model.generate(prompts, rule, seed=seeds))
        if task == "answer":
            return tokens_of(model.answer([canvases[i % 2] for i in which], prompts, rule, seed=seeds))
        return [span.tolist() for span in model.run(model.think_job(prompts, rule), seeds)]

    which = (0, 1, 2, 3) if task == "generate" else (0, 1, 2)
    together = ask(which)
    assert [ask([i])[0] for i in which] == together
    assert ask(which[::-1])[::-1] == together


def test_one_seed_makes_rows_of_their_own(model):
    same = model.draw(["a handwritten seven"] * 2, FAST, seed=3)
    assert (same[0].codes != same[1].codes).any()
    np.testing.assert_array_equal(same[0].codes, model.draw(["a handwritten seven"], FAST, seed=3)[0].codes)
    with pytest.raises(ValueError, match="2 seeds for 1 rows; give one seed, or one for each row"):
        model.draw(["a handwritten seven"], FAST, seed=[1, 2])


def test_the_length_of_a_row_changes_nothing(model):
    # Explicit lengths put the same prompt into rows of other lengths: its first tokens see the same.
    prompts = [model.tokenizer.encode(chat(q)) for q in QUESTIONS[:2]]
    job = model.text_job([np.array(p) for p in prompts], TextRule(block=4), max_new=8)
    wider = layout.answers(model.vocab, prompts, [8, 8], 2 * len(job.rows.tokens[0]))
    spans = [model.run(dataclasses.replace(job, rows=rows)) for rows in (job.rows, wider)]
    for a, b in zip(*spans, strict=True):
        np.testing.assert_array_equal(a, b)


def test_prompts_of_other_lengths_and_seeds_compile_nothing(model):
    rule, compiled = TextRule(block=7), []

    def ask(prompts, seed):
        model.generate(prompts, rule, seed=seed)
        list(model.watch(model.text_job(prompts[:1], rule), seed))

    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    ask(QUESTIONS, 0)
    assert compiled
    compiled.clear()
    for i, prompt in enumerate(["8 - 2", "draw 4+4", "what is two plus three plus one?", "7"]):
        ask([prompt, *QUESTIONS[:i]], i)
    assert not compiled


def test_steps_show_the_decoding_that_run_makes(model):
    job = model.draw_job(["a handwritten seven"], FAST)
    steps = list(model.engine.steps(job, seed=5))
    assert len(steps) == FAST.steps
    np.testing.assert_array_equal(steps[-1], model.run(job, seed=5))
