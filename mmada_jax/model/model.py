"""A model without its params: how its rows look for each task, and how the outcome is read.

Training's evaluation, reinforcement learning, compilation ahead of time and serving share a Model. The
params stay outside, with whoever trains or serves them. Decoding is in `diffusion`, file formats are in
`weights.folder`, and a model with its params, whose methods a person calls by name, is in `serve.api`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image

from mmada_jax.data.images import fit_mask, to_pixels
from mmada_jax.devices import sharding
from mmada_jax.diffusion import decode
from mmada_jax.diffusion.decode import Job
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.model import inputs
from mmada_jax.model.inputs import Conversation, Defaults, Direction, Prompt
from mmada_jax.model.results import Drawing, Text
from mmada_jax.model.vision import Vision
from mmada_jax.nets import transformer, vq
from mmada_jax.tokens import layout
from mmada_jax.tokens.layout import RowShape
from mmada_jax.tokens.tokenizer import TextTokenizer
from mmada_jax.tokens.vocab import Vocab
from mmada_jax.weights.folder import ModelFolder
from mmada_jax.weights.quantized import in_8_bits

# One, or a list of them.
Prompts, Captions = Prompt | Sequence[Prompt], str | np.ndarray | Sequence[str | np.ndarray]
Questions = str | Conversation | Sequence[str | Conversation] | None
Counts = int | Sequence[int] | None
# Codes of an image that was drawn -> codes of the longer image that it continues.
Join = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """An architecture with its tokenizers, on a mesh, without params.

    `vq_params` and `vq_config` are the image tokenizer, None for a model of text alone. `max_text` counts
    the tokens of the text slot, `grid` the rows and columns of image tokens, in the rows that the model
    is trained on. `defaults` are the rules and numbers for a task that is given none.

    The `..._job` methods check what is given and lay it out, before any compute. `serve.api` fills the
    hidden spans of a job, and `results` reads them.
    """

    config: transformer.ModelConfig
    vocab: Vocab
    tokenizer: TextTokenizer
    vq_params: Any
    vq_config: vq.VQConfig | None
    max_text: int
    grid: tuple[int, int]
    mesh: jax.sharding.Mesh
    defaults: Defaults = dataclasses.field(default_factory=Defaults)

    @property
    def n_image(self) -> int:
        """Tokens of an image."""
        return math.prod(self.grid)

    @property
    def rows(self) -> RowShape:
        """The shape of the rows that the model is trained on."""
        return RowShape(self.max_text, self.n_image)

    @property
    def vision(self) -> Vision | None:
        """The image codec on the mesh."""
        return Vision(self.vq_params, self.vq_config, self.mesh) if self.vq_config else None

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns of an image in pixels. Raises ValueError without an image tokenizer."""
        down = self._images().downsampling
        return self.grid[0] * down, self.grid[1] * down

    def place(self, params: Any, dtype: str | None = None) -> Any:
        """Puts the model's params, arrays of the host or Lazy ones, onto the mesh; each process reads its
        own part. They become `dtype`; by default they stay as they are stored, but float16 becomes
        float32. Where the configuration says so, the matrices of the layers become 8 bits."""
        if dtype is None and jax.tree.leaves(params)[0].dtype == np.float16:
            dtype = "float32"
        places = decode.param_shardings(self.mesh, self.config)
        if self.config.weights == "int8":
            return sharding.put_params(in_8_bits(params, dtype), places)
        return sharding.put_params(params, places, dtype and np.dtype(dtype))

    # ---- Jobs: layouts and rules, checked before any compute ------------------------------------

    def text_job(
        self, prompts: Prompts, rule: TextRule | None = None, max_new: Counts = None, **fields: Any
    ) -> Job:
        """Answers to questions, continued conversations or continued rows of ids. `max_new` tokens, for
        all or for each, by default what its prompt leaves of the trained length, `defaults.max_new` at
        most."""
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
        """Answers to a question about each image (see `pixels`); otherwise as `text_job`."""
        questions = self.defaults.question if questions is None else questions
        given = {"images": inputs.pictures(images), "questions": inputs.prompts(questions)}
        (images, questions), one = inputs.together(**given)
        asked = [self._prompt_ids(question) for question in questions]
        pixels_BIJC = self.pixels(images)
        lengths = [self.n_image + 3 + len(ids) for ids in asked]
        rule, new, most = self._new_tokens(lengths, rule, max_new, fields)
        prefixes = [
            [self.vocab.mmu, self.vocab.soi, *ids, self.vocab.eoi, *question]
            for ids, question in zip(self._image_ids(self.vision.encode(pixels_BIJC)), asked, strict=True)
        ]
        return self._text_job(prefixes, rule, new, most, one)

    def draw_job(self, prompts: Captions, rule: ImageRule | None = None, **fields: Any) -> Job:
        """An image for each prompt, a text or its token ids."""
        given = inputs.prompts(prompts)
        return self._image_job(self._image_rows(given.items), self._image_rule(rule, fields), given.one)

    def think_job(self, prompts: Prompts, rule: TextRule | None = None, **fields: Any) -> Job:
        """A thought about each prompt, as long as what the prompt leaves of the text slot."""
        given, rule = inputs.prompts(prompts), inputs.rule_of(self.defaults.text, rule, fields)
        ids = [self._prompt_ids(prompt) for prompt in given.items]
        self._check_row()
        rule.check_length(self.max_text)
        rows = [layout.r2i_generation(self.vocab, i, self.n_image, self.max_text) for i in ids]
        batch = layout.stack(rows)
        start_B = np.argmax(batch.target, axis=1)
        return Job(batch, start_B, self.rows.text_end - start_B, self.max_text, rule, one=given.one)

    def inpaint_job(
        self, images: Any, masks: Any, prompts: Captions = "", rule: ImageRule | None = None, **fields: Any
    ) -> Job:
        """Images of which what `masks` cover is drawn anew. A token is, if at least half of its pixels are
        covered."""
        given = {"images": inputs.pictures(images), "masks": inputs.pictures(masks)}
        (images, masks, prompts), one = inputs.together(**given, prompts=inputs.prompts(prompts))
        rule, rows = self._image_rule(rule, fields), self._image_rows(prompts)
        pairs = zip(masks, images, strict=True)
        masks = np.stack([fit_mask(mask, image, self.image_size) for mask, image in pairs])
        codes_Bij, down = self.encode(images), self._images().downsampling
        share_Bij = masks.reshape(-1, self.grid[0], down, self.grid[1], down).mean((2, 4))
        self._show(rows, codes_Bij, share_Bij >= 0.5)
        return self._image_job(rows, rule, one)

    def extend_job(
        self,
        images: Any,
        direction: Direction = "right",
        prompts: Captions = "",
        rule: ImageRule | None = None,
        **fields: Any,
    ) -> tuple[Job, Join]:
        """Images moved by half of their size, so that the half beyond an edge can be drawn. The second
        value is a function from the codes [B, i, j] that were drawn to the codes of the image that is
        half as long again.

        The tokens next to the edge stay as known ones. The new half (the smaller one of an odd number) is
        drawn in the place of the tokens farthest from the edge, which are joined to the result
        afterwards.
        """
        beyond = inputs.beyond(direction, self.grid)
        given = {"images": inputs.pictures(images), "prompts": inputs.prompts(prompts)}
        (images, prompts), one = inputs.together(**given)
        rule, rows = self._image_rule(rule, fields), self._image_rows(prompts)
        old_Bij = self.encode(images)
        self._show(rows, np.roll(old_Bij, beyond.shift, (1, 2)), [beyond.hidden_ij] * len(rows))
        return self._image_job(rows, rule, one), lambda drawn_Bij: beyond.join(old_Bij, drawn_Bij)

    def drawing_job(self, job: Job, thoughts: Sequence[Text], rule: ImageRule) -> Job:
        """Images with the thoughts about the prompts of a `think_job` in view."""
        rows = [
            layout.r2i(
                self.vocab,
                [*row[1:start], *thought.ids, self.vocab.end_turn],
                row[self.rows.image],
                self.max_text,
            )
            for row, start, thought in zip(job.rows.tokens, job.start_B, thoughts, strict=True)
        ]
        return self._image_job(rows, rule, one=False)

    def image_of_job(self, job: Job, rule: ImageRule) -> Job:
        """The images in the rows of a `think_job`, whose thoughts may still be hidden."""
        rows = [layout.Batch(*row) for row in zip(*job.rows, strict=True)]
        return dataclasses.replace(self._image_job(rows, rule, job.one), rows=job.rows)

    # ---- What comes out -------------------------------------------------------------------------

    def results(self, job: Job, spans: Sequence[np.ndarray], hidden: str = "") -> Any:
        """The ids of a job's spans -> a Text or a Drawing of each, or one of them if the job is of one. A
        token that is still hidden is `hidden` in a Text, and grey in a Drawing."""
        if job.rule.modality == "image":
            results = self.drawings(self.codes(spans))
        else:
            results = [Text.of(ids, self.tokenizer, self.vocab, hidden) for ids in spans]
        return results[0] if job.one else results

    def read(self, ids: Sequence[int]) -> Text:
        """Generated ids -> the text up to the first end of turn."""
        return Text.of(ids, self.tokenizer, self.vocab)

    def codes(self, spans: Sequence[np.ndarray]) -> np.ndarray:
        """The ids of images -> their codes [B, i, j], -1 where a token is still hidden."""
        ids_BN = np.stack(spans)
        hidden_BN = ids_BN == self.vocab.mask
        codes_BN = self.vocab.image_codes(np.where(hidden_BN, self.vocab.image_offset, ids_BN))
        return np.where(hidden_BN, -1, codes_BN).reshape(-1, *self.grid)

    def drawings(self, codes_Bij: np.ndarray) -> list[Drawing]:
        """Codes [B, i, j] -> Drawings, grey where a code is -1."""
        down = self._images().downsampling
        pixels_BIJC = vq.to_uint8(self.decode(np.maximum(codes_Bij, 0)))
        hidden_BIJ = (codes_Bij < 0).repeat(down, axis=1).repeat(down, axis=2)
        pixels_BIJC = np.where(hidden_BIJ[..., None], np.uint8(128), pixels_BIJC)
        return [
            Drawing(Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p), codes)
            for p, codes in zip(pixels_BIJC, codes_Bij, strict=True)
        ]

    # ---- Images ---------------------------------------------------------------------------------

    def pixels(self, images: Any) -> np.ndarray:
        """Images -> float32 [B, I, J, C] in [-1, 1], one image -> [I, J, C]; see `data.images.to_pixels`.

        An image is a path, the bytes of a file, an image of Pillow's in any mode, or an array: uint8 or
        floats in [-1, 1], [I, J] or [I, J, C]. One of another size is brought to the model's: the shorter
        side first, then the middle is cut out.
        """
        channels, given = self._images().pixel_channels, inputs.pictures(images)
        pixels_BIJC = np.stack([to_pixels(image, self.image_size, channels) for image in given.items])
        return pixels_BIJC[0] if given.one else pixels_BIJC

    def encode(self, images: Any) -> np.ndarray:
        """Images as `pixels` takes them -> codes [B, i, j]; one image -> [i, j]."""
        pixels = self.pixels(images)
        return self.vision.encode(pixels) if pixels.ndim == 4 else self.vision.encode(pixels[None])[0]

    def decode(self, codes_Bij: np.ndarray) -> np.ndarray:
        """Codes [B, i, j] -> pixels [B, I, J, C] around [-1, 1]; of one image [i, j] -> [I, J, C]."""
        self._images()
        if np.ndim(codes_Bij) == 2:
            return self.vision.decode(np.asarray(codes_Bij)[None])[0]
        return self.vision.decode(codes_Bij)

    def _images(self) -> vq.VQConfig:
        """The architecture of the image tokenizer; raises ValueError if there is none."""
        if self.vq_config is None:
            raise ValueError(
                "this model was loaded without an image tokenizer and has text alone; give "
                "MMaDA.load(..., image_tokenizer=FOLDER), as that of showlab/magvitv2"
            )
        return self.vq_config

    # ---- Parts of jobs --------------------------------------------------------------------------

    def _check_row(self) -> None:
        inputs.check_row(self.max_text, self.grid, self._images().downsampling, self.config.max_len)

    def _image_ids(self, codes_Bij: np.ndarray) -> np.ndarray:
        return self.vocab.image_ids(codes_Bij.reshape(len(codes_Bij), -1))

    def _image_rule(self, rule: ImageRule | None, fields: dict[str, Any]) -> ImageRule:
        rule = inputs.rule_of(self.defaults.image, rule, fields)
        if rule.order == "halton" and rule.columns is None:
            rule = dataclasses.replace(rule, columns=self.grid[1])
        rule.check_length(self.n_image)
        return rule

    def _image_rows(self, prompts: list[Any]) -> list[layout.Batch]:
        """Rows whose images are hidden."""
        ids = [inputs.caption_ids(prompt, self.tokenizer, self.vocab) for prompt in prompts]
        self._check_row()
        return [layout.t2i_generation(self.vocab, i, self.n_image, self.max_text) for i in ids]

    def _show(self, rows: list[layout.Batch], codes_Bij: np.ndarray, hidden_Bij: np.ndarray) -> None:
        """Puts images into rows, but for the tokens that are hidden."""
        for row, ids_N, hidden_ij in zip(rows, self._image_ids(codes_Bij), hidden_Bij, strict=True):
            row.tokens[self.rows.image] = np.where(hidden_ij.ravel(), self.vocab.mask, ids_N)

    def _image_job(self, rows: list[layout.Batch], rule: ImageRule, one: bool) -> Job:
        other = [layout.drop_condition(self.vocab, row, self.max_text) for row in rows]
        start_B, length_B = np.full((2, len(rows)), [[self.rows.image.start], [self.n_image]])
        guide = layout.stack(other) if rule.guidance else None
        return Job(layout.stack(rows), start_B, length_B, self.n_image, rule, guide, one)

    def _new_tokens(
        self, given: list[int], rule: TextRule | None, max_new: Any, fields: dict[str, Any]
    ) -> tuple[TextRule, list[int], int]:
        """The rule, the number of new tokens of each prompt (`given` counts their tokens), and the length
        of the longest span that the rule must fill."""
        rule = inputs.rule_of(self.defaults.text, rule, fields)
        trained = min(self.rows.length, self.config.max_len)
        if max_new is None:
            most = min(trained, self.defaults.max_new)
            new = [
                min(trained - n, most) for n in given
            ]  # the prompt and its answer have the trained length
        else:
            new = inputs.counts(max_new, len(given))
            most = max(new)
        limit = self.config.max_len
        for n, more in zip(given, new, strict=True):
            if more < 1:
                raise ValueError(
                    f"a prompt of {n} tokens leaves no room for an answer in rows of {trained}, the "
                    f"length in training; shorten it, or ask for new tokens (at most {max(0, limit - n)})"
                )
            if n + more > limit:
                raise ValueError(
                    f"a prompt of {n} tokens and {more} new ones don't fit: the model takes {limit}; "
                    "shorten the prompt, or ask for fewer new tokens"
                )
        if rule.cache != "none" and rule.stop is None:
            rule = dataclasses.replace(rule, stop=self.vocab.end_turn)  # what follows is never read
        rule.check_length(most)
        return rule, new, most

    def _text_job(
        self, prefixes: list[list[int]], rule: TextRule, new: list[int], most: int, one: bool
    ) -> Job:
        given = list(map(len, prefixes))
        length = max(map(sum, zip(given, new, strict=True)))
        # Rows of a few lengths share a compilation.
        length = max(length, min(layout.bucket(length), self.config.max_len))
        rows = layout.answers(self.vocab, prefixes, new, length)
        return Job(rows, np.array(given), np.array(new), most, rule, one=one)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        return inputs.prompt_ids(prompt, self.tokenizer, self.vocab)


def open_model(
    source: ModelFolder,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    *,
    images: ModelFolder | None = None,
    image_size: int | tuple[int, int] | None = None,
    max_text: int | None = None,
    weights: Literal["plain", "int8"] = "plain",
) -> Model:
    """The model in a folder that is open, on `mesh` (by default all devices), without its params.

    `images` is its image tokenizer, open too, None for a model of text alone. The other arguments are
    those of `serve.api.MMaDA.load`. Raises FileNotFoundError where the text tokenizer is missing,
    ValueError where the folder holds no model or something doesn't fit.
    """
    if source.is_image_tokenizer:
        raise ValueError(f"{source.path} holds an image tokenizer; name the folder of a model")
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise FileNotFoundError(f"{source.path} has no tokenizer.json; copy that of the model there")
    config, codes = source.config, source.values.get("codebook_size") or 0
    vocab = tokenizer.vocab(codes, config.vocab)
    down = images.config.downsampling if images else 16
    grid = inputs.image_grid(source.values, down, image_size)
    is_told = (image_size, max_text) != (None, None)
    max_text = inputs.text_length(source.values, max_text)
    if images and is_told:
        inputs.check_row(max_text, grid, down, config.max_len)
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
    if dtype or source.kind != "workdir":
        stored = "float32" if source.dtype == "float16" else source.dtype
        config = dataclasses.replace(config, dtype=dtype or stored)
    if weights not in ("plain", "int8"):
        raise ValueError(f"weights is {weights!r}; it must be plain or int8")
    config = dataclasses.replace(config, weights=weights)
    mesh, defaults = mesh or sharding.make_mesh(), Defaults.of(source.generation)
    decode.param_shardings(mesh, config)  # raises for a mesh that doesn't fit, before anything is read
    vq_params = images and Vision.place(images.params, images.config, mesh).params
    vq_config = images and images.config
    return Model(config, vocab, tokenizer, vq_params, vq_config, max_text, grid, mesh, defaults)
