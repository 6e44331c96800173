"""Rollouts: prompts become rows, a policy completes the rows, and a record says how.

The record holds what the updates need: at which step each token was revealed, its log-probability and the
entropy there. Rewards and gradients aren't computed here.

P prompts, G responses to each, R = P G rows, L positions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax import storage
from mmada_jax.data import images
from mmada_jax.devices import sharding
from mmada_jax.diffusion import denoise, rules
from mmada_jax.diffusion.decode import Job
from mmada_jax.model.model import Model
from mmada_jax.nets import transformer
from mmada_jax.tokens import layout
from mmada_jax.tokens.layout import RowShape
from mmada_jax.tokens.tokenizer import chat
from mmada_jax.tokens.vocab import Vocab
from mmada_jax.train.rl.prompts import Prompt, load_image
from mmada_jax.train.rl.run import Task
from mmada_jax.train.rl.unigrpo import Rollout


@dataclasses.dataclass(frozen=True)
class ResponseSpan:
    """The positions of a task's responses: the first one and their number, the length of the row that
    they lie in, and the rule that fills them."""

    start: int
    length: int
    row: int
    rule: rules.Rule


def response_span(task: Task, vocab: Vocab, rows: RowShape) -> ResponseSpan:
    """The shape of a task's rows. Raises ValueError if the task's rule can't fill a response."""
    if task.layout == "t2i":
        task.image.check_length(rows.n_image)
        if task.image.caches:
            raise ValueError(
                f"image.recompute is {task.image.recompute}; rollouts need 1.0, so that the "
                "log-probabilities that they record are those of the policy"
            )
        return ResponseSpan(rows.image.start, rows.n_image, rows.length, task.image)
    task.text.check_length(task.max_new)
    if task.text.verify:
        raise ValueError(
            f"text.verify is {task.text.verify}; rollouts need None, since a token that is hidden again "
            "has no step of its own"
        )
    # In front of a question about an image stand the token of the task, soi, the image and eoi.
    start = task.max_prompt + (rows.n_image + 3 if task.layout == "mmu" else 0)
    rule = dataclasses.replace(task.text, stop=vocab.eos)
    return ResponseSpan(start, task.max_new, start + task.max_new, rule)


def prompt_ids(model: Model, task: Task, prompt: Prompt) -> list[int]:
    """The text of a prompt as tokens. Raises ValueError if it is too long."""
    text = prompt.text if task.layout == "t2i" else chat(prompt.text)
    ids, limit = model.tokenizer.encode(text), task.max_prompt
    more, name = (2, "max_text") if task.layout == "t2i" else (0, "max_prompt")
    limit = model.max_text if task.layout == "t2i" else limit
    if len(ids) + more > limit:
        raise ValueError(
            f"the prompt {prompt.text[:40]!r} has {len(ids) + more} tokens, {name} is {limit}; shorten it "
            f"or raise {name}"
        )
    return ids


def lay_out(model: Model, task: Task, prompts: Sequence[Prompt], responses: int) -> Job:
    """The rows of P prompts, each prompt `responses` times in a row, with the response still masked."""
    at = response_span(task, model.vocab, model.rows)
    ids = [prompt_ids(model, task, prompt) for prompt in prompts]
    unconditional = None
    if task.layout == "t2i":
        rows = [layout.t2i_generation(model.vocab, i, model.n_image, model.max_text) for i in ids]
        batch = layout.stack(rows)
        if task.image.guidance:
            unconditional = layout.stack(
                [layout.drop_condition(model.vocab, row, model.max_text) for row in rows]
            )
    else:
        if task.layout == "mmu":
            codes_Bij = model.encode([read_image(prompt.image, model.image_size) for prompt in prompts])
            images_BN = model.vocab.image_ids(codes_Bij.reshape(len(ids), -1))
            v = model.vocab
            ids = [[v.mmu, v.soi, *image, v.eoi, *i] for image, i in zip(images_BN, ids, strict=True)]
        batch = layout.continuation(model.vocab, ids, at.length, at.start)

    def repeat(rows):
        return rows and layout.Batch(*(np.repeat(x, responses, axis=0) for x in rows))

    start_R, length_R = np.full((2, len(prompts) * responses), [[at.start], [at.length]])
    return Job(repeat(batch), start_R, length_R, at.length, at.rule, repeat(unconditional))


def make_generate(
    mesh: jax.sharding.Mesh,
    config: transformer.ModelConfig,
    vocab: Vocab,
    at: ResponseSpan,
    params: Any,
    responses: int = 1,
) -> Callable[..., Rollout]:
    """The jitted (params, tokens [R, L], valid [R, L], key, unconditional rows or None) -> Rollout.

    `params` here are shardings. One compilation serves all prompts of a task. Every `responses` rows that
    follow each other have the same prompt; with a cache they share their first pass, on one device.
    """
    share = responses if sharding.row_parts(mesh) == 1 else 1

    def generate(params, tokens_RL, valid_RL, key, unconditional):
        tokens_RL, record = denoise.denoise(
            transformer.Network(params, config),
            tokens_RL,
            valid_RL,
            start=at.start,
            length=at.length,
            rule=at.rule,
            vocab=vocab,
            key=key,
            unconditional=unconditional,
            record=True,
            share=share,
        )
        generated_RL = record.step_BL >= 0
        ends_RL = (generated_RL & (tokens_RL == vocab.eos)).astype(jnp.int32)
        # A response goes up to its first end of text, and the end itself belongs to it: of the ends up to
        # and with a token there is none, or the token is the first one.
        response_RL = generated_RL & (jnp.cumsum(ends_RL, axis=1) == ends_RL)
        return Rollout(tokens_RL, valid_RL, response_RL, *record)

    rows = sharding.batch_sharding(mesh)
    return sharding.jit(
        mesh,
        generate,
        in_shardings=(params, rows, rows, sharding.replicated(mesh), rows),
        out_shardings=rows,
    )


def read_responses(
    model: Model, task: Task, at: ResponseSpan, tokens_RL: np.ndarray
) -> tuple[list[str], np.ndarray | None]:
    """The generated responses: R texts, or pixels [R, I, J, C] in [-1, 1] (the texts are then empty)."""
    ids_RN = tokens_RL[:, at.start : at.start + at.length]
    if task.layout != "t2i":
        return [model.read(ids).text for ids in ids_RN], None
    codes_Rij = model.vocab.image_codes(ids_RN).reshape(-1, *model.grid)
    return [""] * len(ids_RN), np.clip(model.decode(codes_Rij), -1, 1)


def read_image(image: Any, size: tuple[int, int]) -> Any:
    """The pixels of a prompt's image. Pixels stay as they are. The image of a file is resized to `size`
    without cropping, as stage 2 resizes images that are asked about. Raises ValueError or OSError for a
    file that can't be read."""
    if not isinstance(image, storage.Path):
        return image
    return images.to_image(images.resize(images.open_image(load_image(image)), size, "squash"))
