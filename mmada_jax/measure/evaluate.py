"""What is measured on held-out data: on scans reading, drawing, inpainting, arithmetic, reconstruction
and thinking (in text, about an image, before drawing one); on rows of any task the likelihood of what
is hidden, and what the model makes of them.

Every metric of scans is a pair of counts. Whether a drawn digit is the right one is decided by a judge
that has nothing to do with our models: a support vector machine on the training scans.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmada_jax.data import digits
from mmada_jax.devices import sharding
from mmada_jax.diffusion import corrupt, loss
from mmada_jax.diffusion.denoise import ImageRule, TextRule
from mmada_jax.nets import transformer, vq
from mmada_jax.tokens import layout
from mmada_jax.tokens.tokenizer import split_thought
from mmada_jax.tokens.vocab import Vocab

# Of an answer while training.
MAX_NEW = 256
# Chosen on the validation scans. One rule, and so one program, draws and inpaints: where all tokens of an
# image are hidden, both quotas are the same.
DRAW = ImageRule(
    steps=digits.GENERATION["image_steps"], guidance=digits.GENERATION["image_guidance"], quota="hidden"
)


@dataclasses.dataclass(frozen=True)
class Count:
    """`correct` of `total` cases."""

    correct: int
    total: int

    def __str__(self):
        return f"{self.correct}/{self.total} ({100 * self.correct / self.total:.1f} %)"


class Judge:
    """Reads single scans: scikit-learn's SVC, fitted on the training scans."""

    def __init__(self):
        from sklearn.svm import SVC

        train = digits.load("train")
        self._svc = SVC(gamma=0.05, C=10.0).fit(self._features(train.pixels), train.labels)

    def __call__(self, scans: Any) -> np.ndarray:
        """Scans [n, 8, 8] around [-1, 1] -> digits [n]."""
        return self._svc.predict(self._features(np.asarray(scans)))

    def held_out(self, split: str = "test") -> Count:
        """Its own accuracy on scans that it hasn't seen."""
        scans = digits.load(split)
        return _count(self(scans.pixels) == scans.labels)

    @staticmethod
    def _features(scans):
        return (np.clip(scans, -1, 1).reshape(len(scans), -1) + 1) / 2


def reconstruction(model, judge: Judge, n: int, split: str = "test") -> tuple[Count, float, np.ndarray]:
    """Digits that the judge still reads after encoding and decoding, `n` canvases at a time; PSNR in dB
    (peak 2: pixels lie in [-1, 1]) of the canvases; the reconstructed canvases."""
    scans = digits.load(split)
    pixels = np.stack([digits.canvas(scan) for scan in scans.pixels])
    # The last part is filled up, so that all parts share a program.
    parts = np.resize(pixels, (-(-len(pixels) // n), n, *pixels.shape[1:]))
    rebuilt = np.concatenate([model.decode(model.encode(part)) for part in parts])[: len(pixels)]
    rebuilt = np.clip(rebuilt, -1, 1)
    psnr = 10 * np.log10(4 / np.mean((rebuilt - pixels) ** 2))
    read = judge([digits.cut(canvas, 1)[0] for canvas in rebuilt])
    return _count(read == scans.labels), float(psnr), rebuilt


def read_digits(model, n_digits: int, n: int, split: str = "test", seed: int = 0) -> tuple[Count, list]:
    """vqa_one, vqa_two: the digits on canvases of held-out scans, asked for in words."""
    canvases, labels = _canvases(n_digits, n, split, seed)
    ask = digits.ASK_ONE if n_digits == 1 else digits.ASK_TWO
    answers = [text.text for text in model.answer(canvases, [ask] * n, _from_the_left(model), seed=seed)]
    wanted = [digits.reading(*row) for row in labels]
    return _count(np.array(answers) == np.array(wanted)), list(zip(canvases, answers, wanted, strict=True))


def draw_digits(
    model, judge: Judge, n_digits: int, n: int, seed: int = 0, rule: ImageRule = DRAW
) -> tuple[Count, np.ndarray, Any]:
    """t2i_one, t2i_two: whether the judge reads what the caption asked for, all digits of it."""
    wanted = _balanced(n_digits, n)
    drawn = model.draw([digits.caption(*row) for row in wanted], rule, seed=seed)
    pixels = model.decode(np.stack([d.codes for d in drawn]))
    read = judge([scan for canvas in pixels for scan in digits.cut(canvas, n_digits)])
    return _count((read.reshape(wanted.shape) == wanted).all(axis=1)), pixels, wanted


def inpaint_half(model, judge: Judge, n: int, split: str = "test", seed: int = 0) -> tuple[Count, dict]:
    """inpaint: one of two digits is hidden; given the caption and the other, is it the right one?"""
    canvases, labels = _canvases(2, n, split, seed + 1)
    side = np.arange(n) % 2
    masks = np.zeros((n, digits.HEIGHT, digits.WIDTH), bool)
    for mask, s in zip(masks, side, strict=True):
        mask[:, digits.SIDE * s : digits.SIDE * (s + 1)] = True
    drawn = model.inpaint(canvases, masks, [digits.caption(*row) for row in labels], DRAW, seed=seed)
    pixels = model.decode(np.stack([d.codes for d in drawn]))
    read = judge([digits.cut(canvas, 2)[s] for canvas, s in zip(pixels, side, strict=True)])
    pictures = {"canvases": canvases, "masks": masks, "pixels": pixels, "labels": labels}
    return _count(read == labels[np.arange(n), side]), pictures


def arithmetic(model, n: int, seed: int = 0) -> tuple[Count, list]:
    """text_arithmetic: sums and differences that were held out."""
    questions = digits.sums("test")[:n]
    answers = model.generate([question for question, _ in questions], _from_the_left(model), seed=seed)
    rows = [(q, text.text, want) for (q, want), text in zip(questions, answers, strict=True)]
    return _count(np.array([answer == want for _, answer, want in rows])), rows


def text_cot(
    model, n: int, split: str = "test", seed: int = 0, temperature: float = 0.0
) -> tuple[Count, list]:
    """text_cot: sums of four digits that were held out, with the intermediate results as a thought. More
    cases than there are sums ask them again, which says something more only with a temperature."""
    held_out = digits.chains(split)
    chains = [held_out[i % len(held_out)] for i in range(n)]
    questions = [digits.addition(*chain) for chain in chains]
    rule = dataclasses.replace(_from_the_left(model), temperature=temperature)
    texts = [text.text for text in model.generate(questions, rule, seed=seed)]
    wanted = [str(sum(chain)) for chain in chains]
    return _answered(texts, wanted), list(zip(questions, texts, wanted, strict=True))


def vqa_sum(model, n: int, split: str = "test", seed: int = 0) -> tuple[Count, list]:
    """vqa_sum: the sum of the two digits on canvases of held-out scans, after a thought."""
    canvases, labels = _canvases(2, n, split, seed + 2)
    questions = [digits.ASK_SUM] * n
    rule = _from_the_left(model)
    texts = [text.text for text in model.answer(canvases, questions, rule, seed=seed)]
    wanted = [str(total) for total in labels.sum(axis=1)]
    return _answered(texts, wanted), list(zip(canvases, texts, wanted, strict=True))


def draw_sums(
    model, judge: Judge, n: int, split: str = "test", seed: int = 0
) -> tuple[dict, np.ndarray, list]:
    """r2i_thought, r2i_image: sums of held-out pairs, thought, then drawn; is the thought right, and does
    the judge read the sum in the image? Then the images, and (prompt, thought) of each."""
    held_out = digits.pairs(split)
    pairs = [held_out[i % len(held_out)] for i in range(n)]
    prompts = [digits.request(*pair) for pair in pairs]
    made = model.think_and_draw(prompts, _from_the_left(model), DRAW, seed=seed)
    thoughts = [split_thought(text.text)[0] for text, _ in made]
    wanted = [digits.thought(*pair) for pair in pairs]
    pixels = model.decode(np.stack([drawing.codes for _, drawing in made]))
    read = judge([digits.cut(canvas, 1)[0] for canvas in pixels])
    counts = {
        "r2i_thought": _count(np.array(thoughts) == np.array(wanted)),
        "r2i_image": _count(read == np.sum(pairs, axis=1)),
    }
    return counts, pixels, list(zip(prompts, thoughts, strict=True))


def _from_the_left(model) -> TextRule:
    """Token by token, until every answer has ended. All answers and thoughts are found by this rule, so
    that equally many rows of them share a program."""
    return TextRule(block=1, stop=model.vocab.eos)


def _answered(texts: list[str], wanted: list[str]) -> Count:
    answers = [split_thought(text)[1] for text in texts]
    return _count(np.array(answers) == np.array(wanted))


def _count(right: np.ndarray) -> Count:
    return Count(int(np.sum(right)), len(right))


def _canvases(n_digits: int, n: int, split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Every scan of the split once in each place before any is used twice."""
    scans = digits.load(split)
    rng = np.random.default_rng([seed, n_digits])
    rounds = -(-n // len(scans.labels))
    which = np.stack([
        np.concatenate([rng.permutation(len(scans.labels)) for _ in range(rounds)])[:n]
        for _ in range(n_digits)
    ], axis=1)  # fmt: skip
    return np.stack([digits.canvas(*scans.pixels[row]) for row in which]), scans.labels[which]


def _balanced(n_digits: int, n: int) -> np.ndarray:
    """[n, n_digits]: all numbers of that many digits, equally often."""
    numbers = np.arange(n) % 10**n_digits
    return np.stack([numbers // 10**k % 10 for k in reversed(range(n_digits))], axis=1)


# ---- Rows of any task ------------------------------------------------------------------------------


def masked_nll(
    params: dict[str, Any],
    model: transformer.Config,
    batch: layout.Batch,
    vocab: Vocab,
    ratios: Sequence[float] = (0.15, 0.5, 0.85),
    key: jax.Array | None = None,
    chunk: int = 2048,
) -> dict[str, dict[float, float]]:
    """Task -> ratio -> nats per hidden token, of the tasks that have rows in the batch.

    That share of the targets is hidden as in training, with the same noise for all ratios; nan if it
    hid none. `chunk` positions of a device have logits at a time. Under a mesh the batch is what
    sharding.put_batch gives and the sums are global. Raises ValueError for a ratio outside (0, 1].
    """
    if wrong := [ratio for ratio in ratios if not 0 < ratio <= 1]:
        raise ValueError(f"ratio {wrong[0]} hides nothing or too much; it must be in (0, 1]")
    mesh = jax.sharding.get_mesh()
    mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh.empty else mesh
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if len(batch.task) % shards:
        raise ValueError(
            f"{len(batch.task)} rows can't be spread over {shards} data shards; give a multiple of that"
        )
    key = jax.random.key(0) if key is None else key
    with jax.set_mesh(mesh):
        sums = _hidden_nll(mesh, model, vocab, chunk)(params, batch, key, np.array(ratios, np.float32))
    sums_RT, hidden_RT, rows_T = jax.device_get(sums)
    with np.errstate(invalid="ignore"):
        nll_RT = sums_RT / hidden_RT
    return {
        task: dict(zip(ratios, nll_RT[:, i].tolist(), strict=True))
        for i, task in enumerate(layout.TASKS)
        if rows_T[i]
    }


@functools.cache
def _hidden_nll(mesh, model, vocab, chunk):
    """The jitted (params, batch, key, ratios) -> per ratio and task, the summed nll of the hidden tokens
    and their number; the rows of each task."""

    def run(params, batch, key, ratios_R):
        is_task_BT = batch.task[:, None] == jnp.arange(len(layout.TASKS))[None]

        def at_ratio(ratio):
            seen = corrupt.corrupt(key, batch, vocab, corrupt.Config(), ratio)
            hidden_BL = seen.tokens_BL != seen.targets_BL
            h_BLD = transformer.hidden_states(params, model, seen.tokens_BL, batch.valid)
            logp_BL = loss.token_log_probs(h_BLD, params["head_DV"], seen.targets_BL, hidden_BL, chunk)

            def by_task(x_BL):
                x_B = jnp.sum(x_BL, axis=1, dtype=jnp.float32)
                return jnp.sum(jnp.where(is_task_BT, x_B[:, None], 0), axis=0)

            return by_task(-logp_BL), by_task(hidden_BL)

        return *jax.lax.map(at_ratio, ratios_R), jnp.sum(is_task_BT, axis=0)

    params = sharding.tree_shardings(mesh, transformer.param_axes(model), transformer.param_shapes(model))
    everywhere = sharding.replicated(mesh)
    return jax.jit(
        run,
        in_shardings=(params, sharding.batch_sharding(mesh), everywhere, everywhere),
        out_shardings=everywhere,
        compiler_options=sharding.compiler_options(mesh),
    )


def generations(
    model, batch: layout.Batch, n: int, block: int, seed: int = 0
) -> tuple[dict[str, float], Image.Image | None, list[str]]:
    """What a model makes of `n` rows of each task in a batch of held-out rows: the share of answers that
    are exactly those of the rows (exact_TASK), all drawings, n in a line, and what was said, line by line.

    Answers have at most MAX_NEW tokens, decoded from the left in blocks of `block`.
    """
    values, lines, drawings = {}, [], []
    rule = TextRule(block=block, stop=model.vocab.eos)
    for task in ("lm_chat", "mmu"):
        of_task = np.flatnonzero(batch.task == layout.TASKS.index(task))[:n]
        if not len(of_task):
            continue
        answers = [batch.tokens[row][batch.target[row]] for row in of_task]
        prompts = [batch.tokens[row][: np.argmax(batch.target[row])] for row in of_task]
        new = [min(MAX_NEW, len(batch.tokens[0]) - len(prompt)) for prompt in prompts]
        job = model.text_job(prompts, rule, new)
        said = [model.read(ids).text for ids in model.run(job, seed)]
        wanted = [model.read(answer).text for answer in answers]
        values[f"exact_{task}"] = float(np.mean([a == b for a, b in zip(said, wanted, strict=True)]))
        for prompt, a, b in zip(prompts, said, wanted, strict=True):
            asked = " ".join(model.tokenizer.decode(prompt).split())
            lines.append(f"{task}: {asked} -> {a}" + ("" if a == b else f" (is: {b})"))
    slots = [
        tokens[: model.max_text + 1] for tokens in batch.tokens[batch.task == layout.TASKS.index("t2i")]
    ]
    captions = [slot[slot != model.vocab.pad][1:-1] for slot in slots[:n]]  # without t2i and EOS
    if captions:
        drawings += [drawing.codes for drawing in model.draw(captions, seed=seed)]
        lines += [f"t2i: {model.tokenizer.decode(caption)}" for caption in captions]
    # A text that was cut may have lost its answer.
    answered = batch.target[:, : model.max_text + 1].any(axis=1)
    of_task = np.flatnonzero((batch.task == layout.TASKS.index("r2i")) & answered)[:n]
    prompts = [batch.tokens[row][1 : np.argmax(batch.target[row])] for row in of_task]
    if prompts:
        made = model.think_and_draw(prompts, rule, seed=seed)
        drawings += [drawing.codes for _, drawing in made]
        for prompt, (thought, _) in zip(prompts, made, strict=True):
            asked = " ".join(model.tokenizer.decode(prompt).split())
            lines.append(f"r2i: {asked} -> {thought.text}")
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
