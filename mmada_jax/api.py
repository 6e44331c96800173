"""What a user imports: a trained model that generates, answers, draws, inpaints and extends.

model = MMaDA.load("runs/digits")  # a training workdir, a checkpoint, or a Hugging Face folder
model.draw(["a handwritten seven"])[0].image.save("seven.png")
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image

from mmada_jax import decode, layout, sharding, transformer, vq
from mmada_jax.convert.folder import Source, image_tokenizer_of, open_folder
from mmada_jax.data.images import fit_mask, to_pixels
from mmada_jax.data.tokenizer import TextTokenizer, chat, conversation_end
from mmada_jax.decode import Job
from mmada_jax.denoise import ImageRule, TextRule
from mmada_jax.vision import Vision
from mmada_jax.vocab import Vocab

Direction = Literal["left", "right", "up", "down"]
Conversation = Sequence[Mapping[str, str]]
# A question of the user, a conversation, or token ids as they are.
Prompt = str | Conversation | np.ndarray
# One for all rows, or one for each, whose result then doesn't depend on the others.
Seed = int | Sequence[int]
# New tokens of a text, where nothing else is said: no more than the reference.
MOST_NEW = 512


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
class MMaDA:
    """A model with its tokenizers. All methods are batched and take a `seed`.

    `vision` is None for a model without an image tokenizer, which has text alone. `grid` counts the rows
    and columns of image tokens in the rows that it was trained on.
    """

    params: Any
    config: transformer.Config
    vocab: Vocab
    tokenizer: TextTokenizer
    max_text: int
    grid: tuple[int, int]
    mesh: jax.sharding.Mesh
    vision: Vision | None = None

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        mesh: jax.sharding.Mesh | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        *,
        image_tokenizer: str | pathlib.Path | None = None,
        image_size: tuple[int, int] | None = None,
        max_text: int | None = None,
        weights: bool = True,
    ) -> "MMaDA":
        """Loads a training workdir (its newest step), a checkpoint, or a Hugging Face folder.

        Params go straight onto `mesh`, by default all devices; each process reads its own part.
        `dtype` is that of params and computation; by default params stay as they are stored. The
        image tokenizer is a folder of any of these kinds, by default `path`/image_tokenizer or the
        one that the run was trained with; without one there is text alone. `image_size` (rows,
        columns in pixels) and `max_text` (tokens of the text slot) are those that the model was
        trained with where `path` says so, else 512 x 512 and 512, as the published ones. Without `weights`
        `params` is None, and nothing is read of those of a workdir.

        Raises FileNotFoundError if there is no model, ValueError if it isn't one or doesn't fit.
        """
        source = open_folder(path, weights=weights)
        if source.is_image_tokenizer:
            raise ValueError(f"{path} holds an image tokenizer; name the folder of a model")
        tokenizer = source.tokenizer()
        if tokenizer is None:
            raise FileNotFoundError(f"{path} has no tokenizer.json; copy that of the model there")
        config, codes = source.config, source.values.get("codebook_size") or 0
        vocab = tokenizer.vocab(codes, config.vocab)
        images = image_tokenizer_of(source, image_tokenizer)
        grid = _grid(source, images.config.downsampling if images else 16, image_size)
        max_text = source.values.get("max_text", 512) if max_text is None else max_text
        if type(max_text) is not int or max_text < 1:
            raise ValueError(f"{path}: max_text is {max_text!r}, it must be a number of tokens")
        if dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
        if dtype is None and source.dtype == "float16":
            dtype = "float32"
        if source.kind != "workdir" or dtype:
            config = dataclasses.replace(config, dtype=dtype or source.dtype)
        mesh = mesh or sharding.make_mesh()
        places = sharding.tree_shardings(mesh, source.axes, source.params)
        params = None
        if weights:
            params = sharding.put_params(source.params, places, dtype and np.dtype(dtype))
        vision = images and Vision.place(images.params, images.config, grid, mesh)
        return cls(params, config, vocab, tokenizer, max_text, grid, mesh, vision)

    @property
    def n_image(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns of an image in pixels. Raises ValueError without an image tokenizer."""
        down = self.vq_config.downsampling
        return self.grid[0] * down, self.grid[1] * down

    @property
    def vq_config(self) -> vq.Config:
        """The architecture of the image tokenizer. Raises ValueError without one."""
        return self._vision().config

    # ---- Tasks ----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        rule: TextRule | None = None,
        max_new: int | Sequence[int] | None = None,
        seed: Seed = 0,
    ) -> list[Text]:
        """Answers questions, or continues conversations ({"role", "content"} in turns), or rows of ids, in
        text.

        `max_new` tokens, for all or for each, by default what its prompt leaves of the trained length, 512
        at most.
        """
        return self._texts(self.text_job(prompts, rule, max_new), seed)

    def answer(
        self,
        images: Sequence[Any],
        questions: Sequence[str | Conversation],
        rule: TextRule | None = None,
        max_new: int | Sequence[int] | None = None,
        seed: Seed = 0,
    ) -> list[Text]:
        """Answers a question about each image (paths, PIL, or arrays: see `pixels`)."""
        return self._texts(self.answer_job(images, questions, rule, max_new), seed)

    def draw(
        self, prompts: Sequence[str | np.ndarray], rule: ImageRule | None = None, seed: Seed = 0
    ) -> list[Drawing]:
        """Draws an image for each prompt, a text or its token ids."""
        return self._drawings(self.draw_job(prompts, rule), seed)

    def think_and_draw(
        self,
        prompts: Sequence[Prompt],
        text_rule: TextRule | None = None,
        image_rule: ImageRule | None = None,
        seed: Seed = 0,
    ) -> list[tuple[Text, Drawing]]:
        """Thinks about each prompt, then draws an image with the thought in view."""
        job = self.think_job(prompts, text_rule)
        (image_rule or ImageRule()).check(self.n_image)
        thoughts, rows = [], []
        for row, start, ids in zip(job.rows.tokens, job.start_B, self.run(job, seed), strict=True):
            thoughts.append(self.read(ids))
            text = [*row[1:start], *thoughts[-1].ids, self.vocab.end_turn]
            rows.append(layout.r2i(self.vocab, text, row[self.max_text + 2 : -1], self.max_text))
        return list(zip(thoughts, self._drawings(self._image_job(rows, image_rule), seed), strict=True))

    def inpaint(
        self,
        images: Sequence[Any],
        masks: Sequence[Any],
        prompts: Sequence[str],
        rule: ImageRule | None = None,
        seed: Seed = 0,
    ) -> list[Drawing]:
        """Redraws what `masks` cover; keeps all else.

        A mask has the proportions of its image: bool [I, J], True = redraw, or a picture whose white is
        redrawn, see `data.images.to_mask`. A token is redrawn if at least half of its pixels are covered.
        """
        return self._drawings(self.inpaint_job(images, masks, prompts, rule), seed)

    def extend(
        self,
        images: Sequence[Any],
        direction: Direction,
        prompts: Sequence[str],
        rule: ImageRule | None = None,
        seed: Seed = 0,
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
        self,
        prompts: Sequence[Prompt],
        rule: TextRule | None = None,
        max_new: int | Sequence[int] | None = None,
    ) -> Job:
        """The rows of `generate`."""
        prefixes = [self._prompt(prompt) for prompt in prompts]
        return self._text_job(prefixes, rule, max_new)

    def answer_job(
        self,
        images: Sequence[Any],
        questions: Sequence[str | Conversation],
        rule: TextRule | None = None,
        max_new: int | Sequence[int] | None = None,
    ) -> Job:
        """The rows of `answer`."""
        _same_length(images=images, questions=questions)
        prefixes = [
            [self.vocab.mmu, self.vocab.soi, *ids, self.vocab.eoi, *self.tokenizer.encode(chat(question))]
            for ids, question in zip(self._image_ids(self.encode(images)), questions, strict=True)
        ]
        return self._text_job(prefixes, rule, max_new)

    def draw_job(self, prompts: Sequence[str | np.ndarray], rule: ImageRule | None = None) -> Job:
        """The rows of `draw`."""
        ids = [p.tolist() if isinstance(p, np.ndarray) else self.tokenizer.encode(p) for p in prompts]
        rows = [layout.t2i_generation(self.vocab, i, self.n_image, self.max_text) for i in ids]
        return self._image_job(rows, rule)

    def think_job(self, prompts: Sequence[Prompt], rule: TextRule | None = None) -> Job:
        """The rows of the thoughts of `think_and_draw`: what each prompt leaves of the text slot."""
        _some(prompts)
        self._vision()
        ids = [self._prompt(prompt) for prompt in prompts]
        rows = [layout.r2i_generation(self.vocab, i, self.n_image, self.max_text) for i in ids]
        batch, rule = layout.stack(rows), rule or TextRule()
        rule.check(self.max_text)
        start_B = np.argmax(batch.target, axis=1)
        return Job(batch, start_B, self.max_text + 1 - start_B, self.max_text, rule)

    def inpaint_job(
        self,
        images: Sequence[Any],
        masks: Sequence[Any],
        prompts: Sequence[str],
        rule: ImageRule | None = None,
    ) -> Job:
        """The rows of `inpaint`."""
        down = self.vq_config.downsampling
        _some(images)
        _same_length(images=images, masks=masks)
        pairs = zip(masks, images, strict=True)
        masks = np.stack([fit_mask(mask, image, self.image_size) for mask, image in pairs])
        codes_Bij = self.encode(images)
        share_Bij = masks.reshape(-1, self.grid[0], down, self.grid[1], down).mean((2, 4))
        return self._image_job(self._image_rows(codes_Bij, share_Bij >= 0.5, prompts), rule)

    def run(self, job: Job, seed: Seed = 0) -> list[np.ndarray]:
        """Fills the spans of a job; the ids of each."""
        return decode.run(self.params, self.config, self.vocab, self.mesh, job, seed)

    def steps(self, job: Job, seed: Seed = 0) -> Iterator[list[np.ndarray]]:
        """The same as a Python loop: yields the ids of all spans after every step."""
        return decode.steps(self.params, self.config, self.vocab, self.mesh, job, seed)

    # ---- Images ---------------------------------------------------------------------------------

    def pixels(self, images: Sequence[Any]) -> np.ndarray:
        """Images -> float32 [B, I, J, C] in [-1, 1], see `data.images.to_pixels`.

        An image is a path, the bytes of a file, an image of Pillow's in any mode, or an array: uint8 or
        floats in [-1, 1], [I, J] or [I, J, C]. One of another size is brought to the model's: the shorter
        side first, then the middle is cut out.
        """
        channels = self.vq_config.pixel_channels
        _some(images)
        return np.stack([to_pixels(image, self.image_size, channels) for image in images])

    def decode(self, codes_Bij: np.ndarray) -> np.ndarray:
        """Codes [B, i, j] -> pixels [B, I, J, C] around [-1, 1]."""
        return self._vision().decode(codes_Bij)

    def encode(self, images: Sequence[Any]) -> np.ndarray:
        """Images as `pixels` takes them -> codes [B, i, j]."""
        return self._vision().encode(self.pixels(images))

    def _vision(self) -> Vision:
        if self.vision is None:
            raise ValueError(
                "this model was loaded without an image tokenizer and has text alone; give "
                "MMaDA.load(..., image_tokenizer=FOLDER), as that of showlab/magvitv2"
            )
        return self.vision

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
        self._vision()
        rule = rule or ImageRule()
        rule.check(self.n_image)
        other = [layout.drop_condition(self.vocab, row, self.max_text) for row in rows]
        start_B, length_B = np.full((2, len(rows)), [[self.max_text + 2], [self.n_image]])
        guide = layout.stack(other) if rule.guidance else None
        return Job(layout.stack(rows), start_B, length_B, self.n_image, rule, guide)

    def _run_image(self, job: Job, seed: Seed) -> np.ndarray:
        return self.vocab.image_codes(np.stack(self.run(job, seed))).reshape(-1, *self.grid)

    def _drawings(self, job: Job, seed: Seed) -> list[Drawing]:
        return self._decoded(self._run_image(job, seed))

    def _decoded(self, codes_Bij: np.ndarray) -> list[Drawing]:
        pixels = vq.to_uint8(self.decode(codes_Bij))
        return [
            Drawing(Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p), codes)
            for p, codes in zip(pixels, codes_Bij, strict=True)
        ]

    # ---- Text -----------------------------------------------------------------------------------

    def _text_job(
        self, prefixes: list[list[int]], rule: TextRule | None, max_new: int | Sequence[int] | None
    ) -> Job:
        _some(prefixes)
        row, given = self.max_text + self.n_image + 3, [len(prefix) for prefix in prefixes]
        most = min(row, MOST_NEW) if max_new is None else max(np.atleast_1d(max_new))
        if max_new is None:
            new = [min(row - n, MOST_NEW) for n in given]  # all that the trained length leaves
        else:
            new = np.broadcast_to(max_new, (len(given),)).tolist()
        for n, more in zip(given, new, strict=True):
            if more < 1 or n + more > self.config.max_len:
                raise ValueError(
                    f"a prompt of {n} tokens and {more} new ones don't fit: the model was trained on rows "
                    f"of {row} and takes {self.config.max_len}; shorten the prompt or lower max_new"
                )
        rule = rule or TextRule()
        rule.check(int(most))
        length = max(map(sum, zip(given, new, strict=True)))
        length = max(length, min(layout.bucket(length), self.config.max_len))
        rows = layout.answers(self.vocab, prefixes, new, length)
        return Job(rows, np.array(given), np.array(new), int(most), rule)

    def _prompt(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, np.ndarray):
            return self.tokenizer.encode(chat(prompt))
        if self.vocab.mask in prompt:
            raise ValueError("a prompt of ids holds the mask, which stands for what is to be generated")
        return prompt.tolist()

    def _texts(self, job: Job, seed: Seed) -> list[Text]:
        return [self.read(ids) for ids in self.run(job, seed)]

    def read(self, ids: Sequence[int]) -> Text:
        """Generated ids -> the text up to the first end of turn."""
        ids = conversation_end(ids, self.vocab)
        return Text(self.tokenizer.decode(ids).strip(), np.asarray(ids, np.int32))


def _grid(source: Source, down: int, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of image tokens, each of `down` pixels."""
    if image_size is None:
        grid = source.values.get("image_grid", [512 // down, 512 // down])
        if not (isinstance(grid, list) and len(grid) == 2 and all(type(n) is int and n > 0 for n in grid)):
            raise ValueError(
                f"{source.path}: image_grid is {grid!r}, it must be rows and columns of tokens"
            )
        return tuple(grid)
    if any(side < 1 or side % down for side in image_size):
        raise ValueError(f"image_size {image_size} isn't made of multiples of {down} pixels")
    return tuple(side // down for side in image_size)


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
