"""What a user imports: a trained model that generates, answers, draws, inpaints and extends.

model = MMaDA.load("runs/digits")  # a training workdir, a checkpoint, or a Hugging Face folder
model.draw("a handwritten seven", steps=12).image.save("seven.png")

Every task takes one prompt or picture and gives one result, or takes a list and gives a list. Where a
task has several inputs, an input that is given by itself goes with each of the others. A rule, TextRule
or ImageRule, says how tokens are decoded; its fields can be given by name instead (steps, guidance,
temperature, block, ...), and several of them at once by decode="fast" (see docs/decoding.md).

Only loading and the methods that people call live here; how rows look is in `model.model`, and who
decodes them in `serve.engine`.
"""

import copy
import dataclasses
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from mmada_jax import storage
from mmada_jax.devices import sharding
from mmada_jax.diffusion import decode
from mmada_jax.diffusion.decode import Job
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.model.inputs import Direction, Seed
from mmada_jax.model.model import Captions, Counts, Model, Prompts, Questions, open_model
from mmada_jax.model.results import HIDDEN
from mmada_jax.nets import lora
from mmada_jax.serve.engine import Engine
from mmada_jax.weights.folder import image_tokenizer_of, open_adapters, open_folder

# Most rows that a model decodes at a time; further ones wait.
SLOTS = 32
_MAKING = threading.Lock()  # threads that ask a model for the first time get one engine


@dataclasses.dataclass(frozen=True, eq=False, repr=False, init=False)
class MMaDA(Model):
    """A Model with its params, which come first when one is made. All tasks are batched and take a
    `seed`. However many rows a call has, at most SLOTS of them are decoded at a time.

    `adapters` stand beside the params, by name; `adapter` is the name of the one that takes part, see
    `adapted`."""

    params: Any = None
    adapters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapter: str = ""

    def __init__(
        self,
        params: Any,
        *fields: Any,
        adapters: Mapping[str, Any] | None = None,
        adapter: str = "",
        **named: Any,
    ):
        super().__init__(*fields, **named)
        for name, value in {"params": params, "adapters": adapters or {}, "adapter": adapter}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def load(
        cls,
        path: storage.Name,
        mesh: jax.sharding.Mesh | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        *,
        image_tokenizer: storage.Name | None = None,
        image_size: int | tuple[int, int] | None = None,
        max_text: int | None = None,
        step: int | None = None,
        weights: Literal["plain", "int8"] = "plain",
        adapters: Mapping[str, storage.Name] | None = None,
    ) -> "MMaDA":
        """Loads a training workdir (its newest step, or `step`), a checkpoint, or a Hugging Face folder.

        Params go straight onto `mesh`, by default all devices; each process reads its own part. Params
        and computation have `dtype`; by default params stay as they are stored. `image_tokenizer` is a
        folder of any of these kinds, by default `path`/image_tokenizer or the one that the run was
        trained with; without one there is text alone. `image_size` (rows and columns in pixels, or one
        number for both) and `max_text` (tokens of the text slot) must be the ones that the model was
        trained with. By default they are read from `path`; where it doesn't say, they are 512 x 512 and
        512, as in the published models. With `weights` "int8" the matrices of the layers are held in 8
        bits, half of bfloat16, and answers are nearly the same (docs/adapters.md). `adapters` are workdirs
        of adapters or PEFT's folders, by the names that `adapted` takes; all of them share the params.

        Raises FileNotFoundError if there is no model, ValueError if it isn't one or doesn't fit.
        """
        source = open_folder(path, step=step)
        images = image_tokenizer_of(source, image_tokenizer)
        told = {"image_size": image_size, "max_text": max_text, "weights": weights}
        model = open_model(source, mesh, dtype, images=images, **told)
        opened = open_adapters(source, adapters or {})  # raises, before the params are read
        beside = {name: lora.beside({}, of.arrays, of.lora)["lora"] for name, of in opened.items()}
        everywhere = jax.tree.map(lambda _: sharding.replicated(model.mesh), beside)
        placed = sharding.put_params(beside, everywhere)
        return cls(model.place(source.params, dtype), **vars(model), adapters=placed)

    def adapted(self, name: str) -> "MMaDA":
        """The same model with the adapter of that name, "" for none; they share params and engine. Raises
        ValueError for an unknown name."""
        if name and name not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise ValueError(f"there is no adapter {name!r}; known: {known}")
        self.engine  # noqa: B018  it is made once, and shared from then on
        other = copy.copy(self)
        object.__setattr__(other, "adapter", name)
        return other

    def __repr__(self) -> str:
        n, devices = sum(x.size for x in jax.tree.leaves(self.params)), self.mesh.size
        on = f"{devices} device{'s' * (devices != 1)}"
        size = "images of {} x {} pixels".format(*self.image_size) if self.vq_config else "no images"
        return f"MMaDA({n:,} parameters on {on}, text of {self.max_text} tokens, {size})"

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

        `max_new` counts the new tokens, one number for all prompts or one for each. By default it is what a
        prompt leaves of the length of the rows in training, 512 at most. `fields` are fields of the rule:
        steps, block, temperature, guidance, ...
        """
        return self.complete(self.text_job(prompts, rule, max_new, **fields), seed)

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
        job = self.answer_job(images, questions, rule, max_new, **fields)
        return self.complete(job, seed)

    def draw(self, prompts: Captions, rule: ImageRule | None = None, seed: Seed = 0, **fields: Any) -> Any:
        """Draws an image for each prompt, a text or its token ids: a Drawing, or a list of them.

        `fields` are fields of the rule: steps, guidance, temperature, schedule, ...
        """
        return self.complete(self.draw_job(prompts, rule, **fields), seed)

    def think_and_draw(
        self,
        prompts: Prompts,
        text_rule: TextRule | None = None,
        image_rule: ImageRule | None = None,
        seed: Seed = 0,
        *,
        block: int | None = None,
        decode: str | None = None,
        together: bool = False,
        **fields: Any,
    ) -> Any:
        """Thinks about each prompt, then draws an image with the thought in view: a pair of Text and
        Drawing, or a list of pairs. `block` is a field of the rule for the thought, `fields` are fields
        of the rule for the image, `decode` is a preset for both. With `together` it thinks while it draws:
        both are revealed in the same steps."""
        job = self.think_job(prompts, text_rule, block=block, decode=decode)
        image_rule = self._image_rule(image_rule, fields | {"decode": decode})
        if together:
            spans = self.run_together([job, self.image_of_job(job, image_rule)], seed)
            thoughts, drawings = [self.read(ids) for ids in spans[0]], self.drawings(self.codes(spans[1]))
        else:
            thoughts = [self.read(ids) for ids in self.run(job, seed)]
            drawings = self.complete(self.drawing_job(job, thoughts, image_rule), seed)
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
        job = self.inpaint_job(images, masks, prompts, rule, **fields)
        return self.complete(job, seed)

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

        The tokens next to the edge stay as known ones. The new half (the smaller one of an odd number) is
        drawn in the place of the tokens farthest from the edge, which are joined to the result
        afterwards.
        """
        job, join = self.extend_job(images, direction, prompts, rule, **fields)
        drawn_Bij = self.codes(self.run(job, seed))
        drawings = self.drawings(join(drawn_Bij))
        return drawings[0] if job.one else drawings

    def watch(self, job: Job, seed: Seed = 0) -> Iterator[Any]:
        """Runs a job and yields after every step what the task gives, as in

        for drawing in model.watch(model.draw_job("a handwritten seven")): ...

        What is still hidden is grey in a Drawing, and a low line in a Text.
        """
        for spans in self.engine.steps(job, seed, self.adapter):
            yield self.results(job, spans, HIDDEN)

    # ---- Jobs -----------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """What decodes the rows of all tasks, at most SLOTS at a time (see `serve.engine`)."""
        with _MAKING:
            if "_engine" not in vars(self):
                made = Engine(self, slots=sharding.whole_rows(self.mesh, SLOTS), queue=sys.maxsize)
                object.__setattr__(self, "_engine", made)
        return vars(self)["_engine"]

    @property
    def all_params(self) -> Any:
        """The params, and beside them the adapter that takes part."""
        return self.params | ({"lora": self.adapters[self.adapter]} if self.adapter else {})

    def run(self, job: Job, seed: Seed = 0) -> list[np.ndarray]:
        """Fills the spans of a job; the ids of each."""
        return self.engine.run(job, seed, adapter=self.adapter)

    def run_together(self, jobs: Sequence[Job], seed: Seed = 0) -> list[list[np.ndarray]]:
        """Fills the spans of several jobs with the same rows in the same steps; the ids of each job's.

        All rows are decoded at once, not by the engine."""
        return decode.run_spans(self.all_params, self.config, self.vocab, self.mesh, jobs, seed)

    def complete(self, job: Job, seed: Seed = 0) -> Any:
        """Fills the spans of a job; what they say or show, see `results`."""
        return self.results(job, self.run(job, seed))
