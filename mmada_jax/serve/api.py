"""What a user imports: a trained model that generates, answers, draws, inpaints and extends.

model = MMaDA.load("runs/digits")  # a training workdir, a checkpoint, or a Hugging Face folder
model.draw("a handwritten seven", steps=12).image.save("seven.png")

Every task takes one prompt or picture and gives one result, or a list and gives a list; of several inputs
the one that is given by itself goes with each of the others. A rule, TextRule or ImageRule, says how tokens
are decoded; its fields can be given by name instead (steps, guidance, temperature, block, ...).
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image

from mmada_jax.data.images import fit_mask, to_pixels
from mmada_jax.devices import sharding
from mmada_jax.diffusion import decode
from mmada_jax.diffusion.decode import Job
from mmada_jax.diffusion.denoise import ImageRule, TextRule
from mmada_jax.model import inputs
from mmada_jax.model.inputs import Conversation, Defaults, Direction, Prompt, Seed
from mmada_jax.model.results import HIDDEN, Drawing, Text
from mmada_jax.model.vision import Vision
from mmada_jax.nets import transformer, vq
from mmada_jax.tokens import layout
from mmada_jax.tokens.tokenizer import TextTokenizer
from mmada_jax.tokens.vocab import Vocab
from mmada_jax.weights.folder import image_tokenizer_of, open_folder

# One, or a list of them.
Prompts, Captions = Prompt | Sequence[Prompt], str | np.ndarray | Sequence[str | np.ndarray]
Questions = str | Conversation | Sequence[str | Conversation] | None
Counts = int | Sequence[int] | None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MMaDA:
    """A model with its tokenizers. All tasks are batched and take a `seed`.

    `vq_params` and `vq_config` are the image tokenizer, None for a model of text alone. `grid` counts the
    rows and columns of image tokens in the rows that it was trained on. `defaults` are the rules where none
    is given.
    """

    params: Any
    config: transformer.Config
    vocab: Vocab
    tokenizer: TextTokenizer
    vq_params: Any
    vq_config: vq.Config | None
    max_text: int
    grid: tuple[int, int]
    mesh: jax.sharding.Mesh
    defaults: Defaults = dataclasses.field(default_factory=Defaults)

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        mesh: jax.sharding.Mesh | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        *,
        image_tokenizer: str | pathlib.Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        max_text: int | None = None,
        step: int | None = None,
        weights: bool = True,
    ) -> "MMaDA":
        """Loads a training workdir (its newest step, or `step`), a checkpoint, or a Hugging Face folder.

        Params go straight onto `mesh`, by default all devices; each process reads its own part.
        `dtype` is that of params and computation; by default params stay as they are stored. The
        image tokenizer is a folder of any of these kinds, by default `path`/image_tokenizer or the
        one that the run was trained with; without one there is text alone. `image_size` (rows and
        columns in pixels, or one number for both) and `max_text` (tokens of the text slot) are those that
        the model was trained with where `path` says so, else 512 x 512 and 512, as the published ones.
        Without `weights` `params` is None, and nothing is read of those of a workdir.

        Raises FileNotFoundError if there is no model, ValueError if it isn't one or doesn't fit.
        """
        source = open_folder(path, weights=weights, step=step)
        if source.is_image_tokenizer:
            raise ValueError(f"{path} holds an image tokenizer; name the folder of a model")
        tokenizer = source.tokenizer()
        if tokenizer is None:
            raise FileNotFoundError(f"{path} has no tokenizer.json; copy that of the model there")
        config, codes = source.config, source.values.get("codebook_size") or 0
        vocab = tokenizer.vocab(codes, config.vocab)
        images = image_tokenizer_of(source, image_tokenizer)
        grid = inputs.image_grid(source.values, images.config.downsampling if images else 16, image_size)
        is_told = image_size is not None or max_text is not None
        max_text = inputs.text_length(source.values, max_text)
        if dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
        if dtype is None and source.dtype == "float16":
            dtype = "float32"
        if source.kind != "workdir" or dtype:
            config = dataclasses.replace(config, dtype=dtype or source.dtype)
        mesh, defaults = mesh or sharding.make_mesh(), Defaults.of(source.generation)
        vq_config = images and images.config
        model = cls(None, config, vocab, tokenizer, None, vq_config, max_text, grid, mesh, defaults)
        if is_told and images:
            model._check_row()
        places = sharding.tree_shardings(mesh, source.axes, source.params)
        vq_params = images and Vision.place(images.params, images.config, grid, mesh).params
        params = None
        if weights:
            params = sharding.put_params(source.params, places, dtype and np.dtype(dtype))
        return dataclasses.replace(model, params=params, vq_params=vq_params)

    def __repr__(self) -> str:
        n, devices = sum(x.size for x in jax.tree.leaves(self.params)), self.mesh.size if self.mesh else 0
        on = f"{devices} device{'s' * (devices != 1)}"
        size = "images of {} x {} pixels".format(*self.image_size) if self.vq_config else "no images"
        return f"MMaDA({n:,} parameters on {on}, text of {self.max_text} tokens, {size})"

    @property
    def n_image(self) -> int:
        """Tokens of an image."""
        return math.prod(self.grid)

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns of an image in pixels. Raises ValueError without an image tokenizer."""
        down = self._vq_config().downsampling
        return self.grid[0] * down, self.grid[1] * down

    @property
    def vision(self) -> Vision | None:
        """The image tokenizer on the mesh."""
        of_images = self.vq_params, self.vq_config
        return Vision(*of_images, self.grid, self.mesh) if self.vq_config else None

    # ---- Tasks ----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        rule: TextRule | None = None,
        max_new: Counts = None,
        seed: Seed = 0,
        **fields: Any,
    ) -> Any:
        """Answers questions, or continues conversations ({"role", "content"} in turns), or rows of ids, in
        text: a Text, or a list of them.

        `max_new` tokens, for all or for each, by default what its prompt leaves of the trained length, 512
        at most. `fields` are those of the rule: steps, block, temperature, guidance, ...
        """
        return self._texts(self.text_job(prompts, rule, max_new, **fields), seed)

    def answer(
        self,
        images: Any,
        questions: Questions = None,
        rule: TextRule | None = None,
        max_new: Counts = None,
        seed: Seed = 0,
        **fields: Any,
    ) -> Any:
        """Answers a question about each image (see `pixels`), by default to describe it; otherwise as
        `generate`."""
        return self._texts(self.answer_job(images, questions, rule, max_new, **fields), seed)

    def draw(self, prompts: Captions, rule: ImageRule | None = None, seed: Seed = 0, **fields: Any) -> Any:
        """Draws an image for each prompt, a text or its token ids: a Drawing, or a list of them.

        `fields` are those of the rule: steps, guidance, temperature, schedule, ...
        """
        return self._drawings(self.draw_job(prompts, rule, **fields), seed)

    def think_and_draw(
        self,
        prompts: Prompts,
        text_rule: TextRule | None = None,
        image_rule: ImageRule | None = None,
        seed: Seed = 0,
        *,
        block: int | None = None,
        **fields: Any,
    ) -> Any:
        """Thinks about each prompt, then draws an image with the thought in view: a pair of Text and
        Drawing, or a list of pairs. `block` is that of the thought, other `fields` are the image's."""
        image_rule = self._image_rule(image_rule, fields)
        job = self.think_job(prompts, text_rule, block=block)
        thoughts, rows = [], []
        for row, start, ids in zip(job.rows.tokens, job.start_B, self.run(job, seed), strict=True):
            thoughts.append(self.read(ids))
            text = [*row[1:start], *thoughts[-1].ids, self.vocab.end_turn]
            rows.append(layout.r2i(self.vocab, text, row[self.max_text + 2 : -1], self.max_text))
        drawings = self._drawings(self._image_job(rows, image_rule, one=False), seed)
        pairs = list(zip(thoughts, drawings, strict=True))
        return pairs[0] if job.one else pairs

    def inpaint(
        self,
        images: Any,
        masks: Any,
        prompts: Captions = "",
        rule: ImageRule | None = None,
        seed: Seed = 0,
        **fields: Any,
    ) -> Any:
        """Redraws what `masks` cover; keeps all else. Otherwise as `draw`.

        A mask has the proportions of its image: bool [I, J], True = redraw, or a picture whose white is
        redrawn, see `data.images.to_mask`. A token is redrawn if at least half of its pixels are covered.
        """
        return self._drawings(self.inpaint_job(images, masks, prompts, rule, **fields), seed)

    def extend(
        self,
        images: Any,
        direction: Direction = "right",
        prompts: Captions = "",
        rule: ImageRule | None = None,
        seed: Seed = 0,
        **fields: Any,
    ) -> Any:
        """Continues each image beyond its edge by half of its size; gives the longer image. Otherwise as
        `draw`.

        The tokens next to that edge are kept as known ones, the new half (of an odd number the smaller) is
        drawn in place of those farthest from it, and these are joined to the result.
        """
        beyond = inputs.beyond(direction, self.grid)
        given = {"images": inputs.pictures(images), "prompts": inputs.prompts(prompts)}
        (images, prompts), one = inputs.together(**given)
        rule, rows = self._image_rule(rule, fields), self._image_rows(prompts)
        old_Bij = self.encode(images)
        self._show(rows, np.roll(old_Bij, beyond.shift, (1, 2)), [beyond.hidden_ij] * len(rows))
        drawn_Bij = self._run_image(self._image_job(rows, rule, one), seed)
        drawings = self._decoded(beyond.join(old_Bij, drawn_Bij))
        return drawings[0] if one else drawings

    # ---- Jobs: layouts and rules, checked before any compute ------------------------------------

    def text_job(
        self, prompts: Prompts, rule: TextRule | None = None, max_new: Counts = None, **fields: Any
    ) -> Job:
        """The rows of `generate`."""
        given = inputs.prompts(prompts)
        prefixes = [self._prompt_ids(prompt) for prompt in given.items]
        rule, new, most = self._new_tokens(list(map(len, prefixes)), rule, max_new, fields)
        return self._text_job(prefixes, rule, new, most, given.one)

    def answer_job(
        self,
        images: Any,
        questions: Questions = None,
        rule: TextRule | None = None,
        max_new: Counts = None,
        **fields: Any,
    ) -> Job:
        """The rows of `answer`."""
        questions = self.defaults.question if questions is None else questions
        given = {"images": inputs.pictures(images), "questions": inputs.prompts(questions)}
        (images, questions), one = inputs.together(**given)
        asked = [self._prompt_ids(question) for question in questions]
        self._vq_config()
        lengths = [self.n_image + 3 + len(ids) for ids in asked]
        rule, new, most = self._new_tokens(lengths, rule, max_new, fields)
        prefixes = [
            [self.vocab.mmu, self.vocab.soi, *ids, self.vocab.eoi, *question]
            for ids, question in zip(self._image_ids(self.encode(images)), asked, strict=True)
        ]
        return self._text_job(prefixes, rule, new, most, one)

    def draw_job(self, prompts: Captions, rule: ImageRule | None = None, **fields: Any) -> Job:
        """The rows of `draw`."""
        given = inputs.prompts(prompts)
        return self._image_job(self._image_rows(given.items), self._image_rule(rule, fields), given.one)

    def think_job(self, prompts: Prompts, rule: TextRule | None = None, **fields: Any) -> Job:
        """The rows of the thoughts of `think_and_draw`: what each prompt leaves of the text slot."""
        given, rule = inputs.prompts(prompts), inputs.rule_of(self.defaults.text, rule, fields)
        ids = [self._prompt_ids(prompt) for prompt in given.items]
        self._check_row()
        rule.check(self.max_text)
        rows = [layout.r2i_generation(self.vocab, i, self.n_image, self.max_text) for i in ids]
        batch = layout.stack(rows)
        start_B = np.argmax(batch.target, axis=1)
        return Job(batch, start_B, self.max_text + 1 - start_B, self.max_text, rule, one=given.one)

    def inpaint_job(
        self, images: Any, masks: Any, prompts: Captions = "", rule: ImageRule | None = None, **fields: Any
    ) -> Job:
        """The rows of `inpaint`."""
        given = {"images": inputs.pictures(images), "masks": inputs.pictures(masks)}
        (images, masks, prompts), one = inputs.together(**given, prompts=inputs.prompts(prompts))
        rule, rows = self._image_rule(rule, fields), self._image_rows(prompts)
        pairs = zip(masks, images, strict=True)
        masks = np.stack([fit_mask(mask, image, self.image_size) for mask, image in pairs])
        codes_Bij, down = self.encode(images), self._vq_config().downsampling
        share_Bij = masks.reshape(-1, self.grid[0], down, self.grid[1], down).mean((2, 4))
        self._show(rows, codes_Bij, share_Bij >= 0.5)
        return self._image_job(rows, rule, one)

    def run(self, job: Job, seed: Seed = 0) -> list[np.ndarray]:
        """Fills the spans of a job; the ids of each."""
        return decode.run(self.params, self.config, self.vocab, self.mesh, job, seed)

    def steps(self, job: Job, seed: Seed = 0) -> Iterator[list[np.ndarray]]:
        """The same as a Python loop: yields the ids of all spans after every step."""
        return decode.steps(self.params, self.config, self.vocab, self.mesh, job, seed)

    def watch(self, job: Job, seed: Seed = 0) -> Iterator[Any]:
        """The same to look at: yields after every step what the task gives, as in

        for drawing in model.watch(model.draw_job("a handwritten seven")): ...

        What is still hidden is grey in a Drawing, and a low line in a Text.
        """
        for spans in self.steps(job, seed):
            if isinstance(job.rule, ImageRule):
                ids_BN = np.stack(spans)
                hidden_BN = ids_BN == self.vocab.mask
                codes_BN = self.vocab.image_codes(np.where(hidden_BN, self.vocab.image_offset, ids_BN))
                shown = self._decoded(np.where(hidden_BN, -1, codes_BN).reshape(-1, *self.grid))
            else:
                shown = [Text.of(ids, self.tokenizer, self.vocab, HIDDEN) for ids in spans]
            yield shown[0] if job.one else shown

    # ---- Images ---------------------------------------------------------------------------------

    def pixels(self, images: Any) -> np.ndarray:
        """Images -> float32 [B, I, J, C] in [-1, 1], one image -> [I, J, C]; see `data.images.to_pixels`.

        An image is a path, the bytes of a file, an image of Pillow's in any mode, or an array: uint8 or
        floats in [-1, 1], [I, J] or [I, J, C]. One of another size is brought to the model's: the shorter
        side first, then the middle is cut out.
        """
        channels, given = self._vq_config().pixel_channels, inputs.pictures(images)
        pixels_BIJC = np.stack([to_pixels(image, self.image_size, channels) for image in given.items])
        return pixels_BIJC[0] if given.one else pixels_BIJC

    def decode(self, codes_Bij: np.ndarray) -> np.ndarray:
        """Codes [B, i, j] -> pixels [B, I, J, C] around [-1, 1]; of one image [i, j] -> [I, J, C]."""
        self._vq_config()
        if np.ndim(codes_Bij) == 2:
            return self.vision.decode(np.asarray(codes_Bij)[None])[0]
        return self.vision.decode(codes_Bij)

    def encode(self, images: Any) -> np.ndarray:
        """Images as `pixels` takes them -> codes [B, i, j]; one image -> [i, j]."""
        pixels = self.pixels(images)
        return self.vision.encode(pixels) if pixels.ndim == 4 else self.vision.encode(pixels[None])[0]

    def _vq_config(self) -> vq.Config:
        if self.vq_config is None:
            raise ValueError(
                "this model was loaded without an image tokenizer and has text alone; give "
                "MMaDA.load(..., image_tokenizer=FOLDER), as that of showlab/magvitv2"
            )
        return self.vq_config

    def _check_row(self) -> None:
        inputs.check_row(self.max_text, self.grid, self._vq_config().downsampling, self.config.max_len)

    def _image_ids(self, codes_Bij: np.ndarray) -> np.ndarray:
        return self.vocab.image_ids(codes_Bij.reshape(len(codes_Bij), -1))

    def _image_rule(self, rule: ImageRule | None, fields: dict[str, Any]) -> ImageRule:
        rule = inputs.rule_of(self.defaults.image, rule, fields)
        rule.check(self.n_image)
        return rule

    def _image_rows(self, prompts: list[Any]) -> list[layout.Batch]:
        """Rows whose images are hidden."""
        ids = [inputs.caption_ids(prompt, self.tokenizer, self.vocab) for prompt in prompts]
        self._check_row()
        return [layout.t2i_generation(self.vocab, i, self.n_image, self.max_text) for i in ids]

    def _show(self, rows: list[layout.Batch], codes_Bij: np.ndarray, hidden_Bij: np.ndarray) -> None:
        """Puts what isn't hidden of these images into the rows."""
        for row, ids_N, hidden_ij in zip(rows, self._image_ids(codes_Bij), hidden_Bij, strict=True):
            row.tokens[self.max_text + 2 : -1] = np.where(hidden_ij.ravel(), self.vocab.mask, ids_N)

    def _image_job(self, rows: list[layout.Batch], rule: ImageRule, one: bool) -> Job:
        other = [layout.drop_condition(self.vocab, row, self.max_text) for row in rows]
        start_B, length_B = np.full((2, len(rows)), [[self.max_text + 2], [self.n_image]])
        guide = layout.stack(other) if rule.guidance else None
        return Job(layout.stack(rows), start_B, length_B, self.n_image, rule, guide, one)

    def _run_image(self, job: Job, seed: Seed) -> np.ndarray:
        return self.vocab.image_codes(np.stack(self.run(job, seed))).reshape(-1, *self.grid)

    def _drawings(self, job: Job, seed: Seed) -> Any:
        drawings = self._decoded(self._run_image(job, seed))
        return drawings[0] if job.one else drawings

    def _decoded(self, codes_Bij: np.ndarray) -> list[Drawing]:
        down = self._vq_config().downsampling
        pixels_BIJC = vq.to_uint8(self.decode(np.maximum(codes_Bij, 0)))
        hidden_BIJ = (codes_Bij < 0).repeat(down, axis=1).repeat(down, axis=2)
        pixels_BIJC = np.where(hidden_BIJ[..., None], np.uint8(128), pixels_BIJC)
        return [
            Drawing(Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p), codes)
            for p, codes in zip(pixels_BIJC, codes_Bij, strict=True)
        ]

    # ---- Text -----------------------------------------------------------------------------------

    def _new_tokens(
        self, given: list[int], rule: TextRule | None, max_new: Any, fields: dict[str, Any]
    ) -> tuple[TextRule, list[int], int]:
        """The rule, the new tokens of prompts of these lengths, and the most that the rule is for."""
        rule = inputs.rule_of(self.defaults.text, rule, fields)
        row = min(self.max_text + self.n_image + 3, self.config.max_len)
        if max_new is None:
            most = min(row, self.defaults.max_new)
            new = [min(row - n, most) for n in given]  # all that the trained length leaves
        else:
            new = inputs.counts(max_new, len(given))
            most = max(new)
        for n, more in zip(given, new, strict=True):
            if more < 1 or n + more > self.config.max_len:
                raise ValueError(
                    f"a prompt of {n} tokens and {more} new ones don't fit: the model was trained on rows "
                    f"of {row} and takes {self.config.max_len}; shorten the prompt or lower max_new"
                )
        rule.check(most)
        return rule, new, most

    def _text_job(
        self, prefixes: list[list[int]], rule: TextRule, new: list[int], most: int, one: bool
    ) -> Job:
        given = list(map(len, prefixes))
        length = max(map(sum, zip(given, new, strict=True)))
        length = max(length, min(layout.bucket(length), self.config.max_len))
        rows = layout.answers(self.vocab, prefixes, new, length)
        return Job(rows, np.array(given), np.array(new), most, rule, one=one)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        return inputs.prompt_ids(prompt, self.tokenizer, self.vocab)

    def _texts(self, job: Job, seed: Seed) -> Any:
        texts = [self.read(ids) for ids in self.run(job, seed)]
        return texts[0] if job.one else texts

    def read(self, ids: Sequence[int]) -> Text:
        """Generated ids -> the text up to the first end of turn."""
        return Text.of(ids, self.tokenizer, self.vocab)
