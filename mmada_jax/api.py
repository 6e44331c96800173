"""What a user imports: a trained model that generates, answers, draws, inpaints and extends.

model = MMaDA.load("runs/digits")
model.draw(["a handwritten seven"])[0].image.save("seven.png")
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image

from mmada_jax import denoise, layout, run, sharding, transformer, vq
from mmada_jax.checkpoint import Checkpoints, read_config
from mmada_jax.data.tokenizer import TextTokenizer, chat, conversation_end
from mmada_jax.denoise import ImageRule, TextRule
from mmada_jax.vocab import Vocab

Direction = Literal["left", "right", "up", "down"]


@dataclasses.dataclass(frozen=True)
class Text:
    """A generated text and its token ids, up to the first end token."""

    text: str
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A generated image and its codes [i, j]."""

    image: Image.Image
    codes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Job:
    """Rows ready for the denoising loop: what goes in, and the span that is to be filled."""

    rows: layout.Batch
    start: int
    length: int
    rule: denoise.Rule
    unconditional: layout.Batch | None = None


@dataclasses.dataclass(frozen=True)
class MMaDA:
    """A model with its tokenizers. All methods are batched and take a `seed`."""

    params: Any
    config: transformer.Config
    vocab: Vocab
    tokenizer: TextTokenizer
    vq_params: Any
    vq_config: vq.Config
    max_text: int
    grid: tuple[int, int]  # rows and columns of image tokens

    @classmethod
    def load(cls, workdir: str | pathlib.Path) -> "MMaDA":
        """Loads the newest checkpoint of a training workdir.

        Raises FileNotFoundError if there is none, ValueError if it isn't that of a model.
        """
        workdir = pathlib.Path(workdir)
        config = run.parse(read_config(workdir))
        if not isinstance(config, run.ModelRun):
            raise ValueError(f"{workdir} holds an image tokenizer; name the workdir of a model")
        plan = run.plan(config, workdir)
        shapes = transformer.param_shapes(plan.model)
        axes = transformer.param_axes(plan.model)
        with Checkpoints(workdir) as checkpoints:
            places = sharding.tree_shardings(sharding.make_mesh(), axes, shapes)
            params = checkpoints.restore_params(shapes, places)
        vq_params, _ = run.load_vq(run.image_tokenizer_of(config, workdir))
        return cls(
            params, plan.model, plan.vocab, plan.tokenizer, vq_params, plan.vq, config.max_text, plan.grid
        )

    @property
    def n_image(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    # ---- Tasks ----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str],
        rule: TextRule | None = None,
        max_new: int | None = None,
        seed: int = 0,
    ) -> list[Text]:
        """Answers questions in text. `max_new` tokens, by default what fits the trained length."""
        return self._texts(self.text_job(prompts, rule, max_new), seed)

    def answer(
        self,
        images: Sequence[Any],
        questions: Sequence[str],
        rule: TextRule | None = None,
        max_new: int | None = None,
        seed: int = 0,
    ) -> list[Text]:
        """Answers a question about each image (PIL, or arrays in [-1, 1])."""
        return self._texts(self.answer_job(images, questions, rule, max_new), seed)

    def draw(self, prompts: Sequence[str], rule: ImageRule | None = None, seed: int = 0) -> list[Drawing]:
        """Draws an image for each prompt."""
        return self._drawings(self.draw_job(prompts, rule), seed)

    def inpaint(
        self,
        images: Sequence[Any],
        masks: np.ndarray,
        prompts: Sequence[str],
        rule: ImageRule | None = None,
        seed: int = 0,
    ) -> list[Drawing]:
        """Redraws what `masks` (bool [B, I, J] in pixels, True = redraw) cover; keeps all else.

        A token is redrawn if at least half of its pixels are covered.
        """
        return self._drawings(self.inpaint_job(images, masks, prompts, rule), seed)

    def extend(
        self,
        images: Sequence[Any],
        direction: Direction,
        prompts: Sequence[str],
        rule: ImageRule | None = None,
        seed: int = 0,
    ) -> list[Drawing]:
        """Continues each image beyond its edge by half of its size; returns the longer image.

        The half next to that edge is kept as known tokens, the new half is drawn, and the two
        are joined with the remaining old half.
        """
        old_Bij = self.encode(images)
        axis, forward = _direction(direction)
        half = self.grid[axis] // 2
        keep = np.roll(old_Bij, -half if forward else half, axis=1 + axis)
        hidden = np.zeros(self.grid, bool)
        new = [slice(None)] * 2
        new[axis] = slice(self.grid[axis] - half, None) if forward else slice(0, half)
        hidden[tuple(new)] = True
        rows = self._image_rows(keep, np.broadcast_to(hidden, keep.shape), prompts)
        drawn_Bij = self._run_image(self._image_job(rows, rule), seed)
        rest = np.take(old_Bij, range(half) if forward else range(half, self.grid[axis]), 1 + axis)
        parts = (rest, drawn_Bij) if forward else (drawn_Bij, rest)
        return self._decoded(np.concatenate(parts, axis=1 + axis))

    # ---- Jobs: layouts and rules, checked before any compute ------------------------------------

    def text_job(
        self, prompts: Sequence[str], rule: TextRule | None = None, max_new: int | None = None
    ) -> Job:
        """The rows of `generate`."""
        prefixes = [self.tokenizer.encode(chat(prompt)) for prompt in prompts]
        return self._text_job(prefixes, self.max_text + self.n_image + 3, rule, max_new)

    def answer_job(
        self,
        images: Sequence[Any],
        questions: Sequence[str],
        rule: TextRule | None = None,
        max_new: int | None = None,
    ) -> Job:
        """The rows of `answer`."""
        _same_length(images=images, questions=questions)
        prefixes = [
            [self.vocab.mmu, self.vocab.soi, *ids, self.vocab.eoi, *self.tokenizer.encode(chat(question))]
            for ids, question in zip(self._image_ids(self.encode(images)), questions, strict=True)
        ]
        return self._text_job(prefixes, self.max_text + self.n_image + 3, rule, max_new)

    def draw_job(self, prompts: Sequence[str], rule: ImageRule | None = None) -> Job:
        """The rows of `draw`."""
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        rows = [layout.t2i_generation(self.vocab, i, self.n_image, self.max_text) for i in ids]
        return self._image_job(rows, rule)

    def inpaint_job(
        self,
        images: Sequence[Any],
        masks: np.ndarray,
        prompts: Sequence[str],
        rule: ImageRule | None = None,
    ) -> Job:
        """The rows of `inpaint`."""
        codes_Bij = self.encode(images)
        down = self.vq_config.downsampling
        masks = np.asarray(masks, np.float32)
        want = (len(codes_Bij), self.grid[0] * down, self.grid[1] * down)
        if masks.shape != want:
            raise ValueError(f"masks have shape {masks.shape}; they must have {want}: images and pixels")
        share_Bij = masks.reshape(want[0], self.grid[0], down, self.grid[1], down).mean((2, 4))
        return self._image_job(self._image_rows(codes_Bij, share_Bij >= 0.5, prompts), rule)

    def run(self, job: Job, seed: int = 0) -> np.ndarray:
        """Fills the span of a job; ids [B, length]."""
        other = job.unconditional
        tokens = _denoise(
            self.params,
            job.rows.tokens,
            job.rows.valid,
            jax.random.key(seed),
            None if other is None else (other.tokens, other.valid),
            config=self.config,
            vocab=self.vocab,
            start=job.start,
            length=job.length,
            rule=job.rule,
        )
        return np.asarray(tokens)[:, job.start : job.start + job.length]

    def steps(self, job: Job, seed: int = 0):
        """The same as a Python loop: yields ids [B, length] after every step."""
        other = job.unconditional
        for tokens in denoise.denoise_steps(
            functools.partial(transformer.hidden_states, self.params, self.config),
            functools.partial(transformer.unembed, self.params, self.config),
            job.rows.tokens,
            job.rows.valid,
            start=job.start,
            length=job.length,
            rule=job.rule,
            vocab=self.vocab,
            key=jax.random.key(seed),
            unconditional=None if other is None else (other.tokens, other.valid),
        ):
            yield np.asarray(tokens)[:, job.start : job.start + job.length]

    # ---- Images ---------------------------------------------------------------------------------

    def pixels(self, images: Sequence[Any]) -> np.ndarray:
        """Images (PIL, or float arrays [I, J, C] in [-1, 1]) -> [B, I, J, C]; wrong sizes raise."""
        down, channels = self.vq_config.downsampling, self.vq_config.pixel_channels
        want = (self.grid[0] * down, self.grid[1] * down, channels)
        _some(images)
        out = []
        for image in images:
            if isinstance(image, Image.Image):
                image = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32)
                image = image.reshape(*image.shape[:2], channels) / 127.5 - 1
            image = np.asarray(image, np.float32)
            if image.shape != want:
                raise ValueError(
                    f"an image has {' x '.join(map(str, image.shape))} (rows, columns, channels); this "
                    f"model takes {' x '.join(map(str, want))}: crop or resize it"
                )
            out.append(image)
        return np.stack(out)

    def decode(self, codes_Bij: np.ndarray) -> np.ndarray:
        """Codes [B, i, j] -> pixels [B, I, J, C] around [-1, 1]."""
        return np.asarray(_vq_decode(self.vq_params, np.asarray(codes_Bij), self.vq_config))

    def encode(self, images: Sequence[Any]) -> np.ndarray:
        """Images as `pixels` takes them -> codes [B, i, j]."""
        return np.asarray(_vq_encode(self.vq_params, self.pixels(images), self.vq_config))

    def _image_ids(self, codes_Bij: np.ndarray) -> np.ndarray:
        return self.vocab.image_ids(codes_Bij.reshape(len(codes_Bij), -1))

    def _image_rows(self, codes_Bij, hidden_Bij, prompts) -> list[layout.Batch]:
        _same_length(images=codes_Bij, prompts=prompts)
        hidden_BN = hidden_Bij.reshape(len(prompts), -1)
        ids_BN = np.where(hidden_BN, self.vocab.mask, self._image_ids(codes_Bij))
        rows = []
        for prompt, ids in zip(prompts, ids_BN, strict=True):
            text = self.tokenizer.encode(prompt)
            layout.check_fits(len(text) + 2, self.max_text, "prompt with BOS and EOS")
            rows.append(layout.t2i(self.vocab, text, ids, self.max_text))
        return rows

    def _image_job(self, rows: list[layout.Batch], rule: ImageRule | None) -> Job:
        _some(rows)
        rule = rule or ImageRule()
        rule.check(self.n_image)
        other = [layout.drop_condition(self.vocab, row, self.max_text) for row in rows]
        return Job(
            layout.stack(rows),
            self.max_text + 2,
            self.n_image,
            rule,
            layout.stack(other) if rule.guidance else None,
        )

    def _run_image(self, job: Job, seed: int) -> np.ndarray:
        return self.vocab.image_codes(self.run(job, seed)).reshape(-1, *self.grid)

    def _drawings(self, job: Job, seed: int) -> list[Drawing]:
        return self._decoded(self._run_image(job, seed))

    def _decoded(self, codes_Bij: np.ndarray) -> list[Drawing]:
        pixels = vq.to_uint8(self.decode(codes_Bij))
        return [
            Drawing(Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p), codes)
            for p, codes in zip(pixels, codes_Bij, strict=True)
        ]

    # ---- Text -----------------------------------------------------------------------------------

    def _text_job(
        self, prefixes: list[list[int]], row: int, rule: TextRule | None, max_new: int | None
    ) -> Job:
        _some(prefixes)
        longest = max(map(len, prefixes))
        new = row - longest if max_new is None else max_new
        if new < 1 or longest + new > self.config.max_len:
            raise ValueError(
                f"a prompt of {longest} tokens and {new} new ones don't fit: the model was trained on "
                f"rows of {row} and takes {self.config.max_len}; shorten the prompt or lower max_new"
            )
        rule = rule or TextRule(steps=new, block=new)
        rule.check(new)
        return Job(layout.continuation(self.vocab, prefixes, new), longest, new, rule)

    def _texts(self, job: Job, seed: int) -> list[Text]:
        return [self.read(ids) for ids in self.run(job, seed)]

    def read(self, ids: Sequence[int]) -> Text:
        """Generated ids -> the text up to the first end of turn."""
        ids = conversation_end(ids, self.vocab)
        return Text(self.tokenizer.decode(ids).strip(), np.asarray(ids, np.int32))


@functools.partial(jax.jit, static_argnames=("config", "vocab", "start", "length", "rule"))
def _denoise(params, tokens_BL, valid_BL, key, unconditional, *, config, vocab, start, length, rule):
    return denoise.denoise(
        functools.partial(transformer.hidden_states, params, config),
        functools.partial(transformer.unembed, params, config),
        tokens_BL,
        valid_BL,
        start=start,
        length=length,
        rule=rule,
        vocab=vocab,
        key=key,
        unconditional=unconditional,
    )


@functools.partial(jax.jit, static_argnums=2)
def _vq_encode(params, pixels_BIJC, config):
    return vq.encode(params, config, pixels_BIJC)


@functools.partial(jax.jit, static_argnums=2)
def _vq_decode(params, codes_Bij, config):
    return vq.decode(params, config, codes_Bij)


def _direction(direction: str) -> tuple[int, bool]:
    known = {"right": (1, True), "left": (1, False), "down": (0, True), "up": (0, False)}
    if direction not in known:
        raise ValueError(f"unknown direction {direction!r}; known: {', '.join(known)}")
    return known[direction]


def _some(rows: Sequence[Any]) -> None:
    if not len(rows):
        raise ValueError("there is nothing to do: give at least one prompt or image")


def _same_length(**named: Sequence[Any]) -> None:
    lengths = {name: len(items) for name, items in named.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"numbers differ: {lengths}; give one of each per row")
