"""What is measured while a model trains, on held-out rows of any task: the likelihood of tokens that are
hidden, and what the model makes of the rows.

Metrics of one data set, as of the digits, don't belong here.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmada_jax.devices import sharding
from mmada_jax.diffusion import corrupt, decode, loss
from mmada_jax.diffusion.rules import TextRule
from mmada_jax.nets import transformer, vq
from mmada_jax.serve.api import MMaDA
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import Vocab

# Most tokens of an answer that is generated while a model trains.
MAX_NEW = 256


def masked_nll(
    params: dict[str, Any],
    model: transformer.ModelConfig,
    batch: layout.Batch,
    vocab: Vocab,
    ratios: Sequence[float] = (0.15, 0.5, 0.85),
    key: jax.Array | None = None,
    chunk: int = 2048,
) -> dict[str, dict[float, float]]:
    """Task -> ratio -> nats per hidden token, for the tasks that have rows in the batch.

    A share `ratio` of the targets is hidden as in training, with the same noise for all ratios; nan if
    nothing was hidden. Logits exist for `chunk` positions of a device at a time. Under a mesh the batch
    comes from sharding.put_batch, and the sums are over all devices. Raises ValueError for a ratio
    outside (0, 1].
    """
    if wrong := [ratio for ratio in ratios if not 0 < ratio <= 1]:
        raise ValueError(f"ratio {wrong[0]} hides nothing or too much; it must be in (0, 1]")
    mesh = jax.sharding.get_mesh()
    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh.empty else mesh
    shards = sharding.row_parts(mesh)
    if len(batch.task) % shards:
        raise ValueError(
            f"{len(batch.task)} rows can't be spread over {shards} data shards; give a multiple of that"
        )
    key = jax.random.key(0) if key is None else key
    with jax.set_mesh(mesh):
        sums = _hidden_nll(mesh, model, vocab, chunk, "lora" in params)(
            params, batch, key, np.array(ratios, np.float32)
        )
    sums_RT, hidden_RT, rows_T = jax.device_get(sums)
    with np.errstate(invalid="ignore"):
        nll_RT = sums_RT / hidden_RT
    return {
        task: dict(zip(ratios, nll_RT[:, i].tolist(), strict=True))
        for i, task in enumerate(layout.TASKS)
        if rows_T[i]
    }


@functools.cache
def _hidden_nll(mesh, model, vocab, chunk, adapted):
    """The jitted (params, batch, key, ratios) -> per ratio and task, the summed nll of the hidden tokens
    and their number; the rows of each task."""

    def run(params, batch, key, ratios_R):
        is_task_BT = batch.task[:, None] == jnp.arange(len(layout.TASKS))[None]

        def at_ratio(ratio):
            seen = corrupt.corrupt(key, batch, vocab, corrupt.LossConfig(), ratio)
            hidden_BL = seen.tokens_BL != seen.targets_BL
            h_BLD = transformer.hidden_states(params, model, seen.tokens_BL, batch.valid)
            logp_BL = loss.token_log_probs(
                h_BLD, transformer.head(params), seen.targets_BL, hidden_BL, chunk
            )

            def by_task(x_BL):
                x_B = jnp.sum(x_BL, axis=1, dtype=jnp.float32)
                return jnp.sum(jnp.where(is_task_BT, x_B[:, None], 0), axis=0)

            return by_task(-logp_BL), by_task(hidden_BL)

        return *jax.lax.map(at_ratio, ratios_R), jnp.sum(is_task_BT, axis=0)

    params = decode.param_shardings(mesh, model, adapted)
    everywhere = sharding.replicated(mesh)
    return sharding.jit(
        mesh,
        run,
        in_shardings=(params, sharding.batch_sharding(mesh), everywhere, everywhere),
        out_shardings=everywhere,
    )


def generations(
    model: MMaDA, batch: layout.Batch, n: int, block: int, seed: int = 0
) -> tuple[dict[str, float], Image.Image | None, list[str]]:
    """What a model makes of `n` rows of each task in a batch of held-out rows: the
    share of answers that are exactly the ones of the rows (exact_TASK), all drawings, n in a line, and
    what was said, line by line.

    Answers have at most MAX_NEW tokens, decoded from the left in blocks of `block`.
    """
    values, lines, drawings = {}, [], []
    rule = TextRule(block=block, stop=model.vocab.eos)

    def rows_of(task, usable_B=True):
        return np.flatnonzero((batch.task == layout.TASKS.index(task)) & usable_B)[:n]

    def told(prompt):
        return " ".join(model.tokenizer.decode(prompt).split())

    for task in ("lm_chat", "mmu"):
        rows = rows_of(task)
        if not len(rows):
            continue
        wanted = [model.read(batch.tokens[row][batch.target[row]]).text for row in rows]
        prompts = [batch.tokens[row][: np.argmax(batch.target[row])] for row in rows]
        new = [min(MAX_NEW, len(batch.tokens[0]) - len(prompt)) for prompt in prompts]
        said = [text.text for text in model.complete(model.text_job(prompts, rule, new), seed)]
        values[f"exact_{task}"] = float(np.mean([a == b for a, b in zip(said, wanted, strict=True)]))
        for prompt, a, b in zip(prompts, said, wanted, strict=True):
            lines.append(f"{task}: {told(prompt)} -> {a}" + ("" if a == b else f" (is: {b})"))
    slots = [batch.tokens[row][: model.rows.text_end] for row in rows_of("t2i")]
    captions = [slot[slot != model.vocab.pad][1:-1] for slot in slots]  # without t2i and EOS
    if captions:
        made = model.complete(model.draw_job(captions), seed)
        drawings += [drawing.codes for drawing in made]
        lines += [f"t2i: {model.tokenizer.decode(caption)}" for caption in captions]
    # A text that was cut may have lost its answer.
    answered_B = batch.target[:, : model.rows.text_end].any(axis=1)
    prompts = [batch.tokens[row][1 : np.argmax(batch.target[row])] for row in rows_of("r2i", answered_B)]
    if prompts:
        made = model.think_and_draw(prompts, rule, seed=seed)
        drawings += [drawing.codes for _, drawing in made]
        lines += [f"r2i: {told(p)} -> {text.text}" for p, (text, _) in zip(prompts, made, strict=True)]
    return values, grid(model.decode(np.stack(drawings)), n) if drawings else None, lines


def grid(images: np.ndarray, columns: int) -> Image.Image:
    """Images [n, height, width, 1 or 3] around [-1, 1] -> one picture of them, row by row, each with a
    frame of a grey pixel; the places that are left over are grey."""
    n, height, width, channels = images.shape
    framed = np.full((-(-n // columns) * columns, height + 2, width + 2, channels), -0.5, np.float32)
    framed[:n, 1:-1, 1:-1] = images
    tiles = framed.reshape(-1, columns, *framed.shape[1:]).swapaxes(1, 2)
    pixels = vq.to_uint8(tiles.reshape(-1, columns * (width + 2), channels))
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
