"""A model for lmms-eval: questions about pictures, and drawings.

    pip install lmms-eval==0.7.3
    python -m lmms_eval --model mmada_jax --model_args path=runs/digits --tasks mme --batch_size 16
    python -m lmms_eval --model mmada_jax --model_args path=runs/digits,mode=draw,out=drawn --tasks geneval

lmms-eval finds it by an entry point of this package. (Its own model "mmada" runs the code in PyTorch.)
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms

from mmada_jax import storage
from mmada_jax.data import records
from mmada_jax.devices import sharding
from mmada_jax.measure.answers import Answers
from mmada_jax.progress import progress
from mmada_jax.serve.api import MMaDA
from mmada_jax.serve.engine import Engine
from mmada_jax.tokens.tokenizer import cut

MODES = ("answer", "draw")


def manifest() -> Any:
    """What the entry point gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("mmada_jax", simple_class_path=f"{__name__}.PicturedModel")


class PicturedModel(lmms):
    """A model of ours as lmms-eval asks for one.

    path         the folder of the model, or the model itself
    mode         "answer": says something about the first picture of each case; "draw": draws what is asked
    max_new      new tokens; a task's own max_new_tokens goes first unless this is given
    block, steps, decode, guidance, think   how that is decoded, as in `mmada evaluate`
    batch_size   rows at a time
    out          a folder for drawings, and for answers, so that an evaluation goes on
    """

    is_simple = True

    def __init__(
        self,
        path: str | MMaDA,
        mode: str = "answer",
        max_new: int | None = None,
        block: int | None = None,
        steps: int | None = None,
        decode: str = "exact",
        guidance: float | None = None,
        think: bool = False,
        batch_size: int | str = 16,
        seed: int = 0,
        out: str | None = None,
        **given_by_the_harness: Any,
    ):
        super().__init__()
        del given_by_the_harness  # device, max_batch_size
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
        if mode == "draw" and not out:
            raise ValueError("drawings need a folder: out=FOLDER")
        self.model = MMaDA.load(path) if isinstance(path, storage.Name) else path
        self.mode, self._max_new, self._think, self._seed = mode, max_new, think, int(seed)
        self._fields = {"steps": steps, "decode": decode, "guidance": guidance}
        self._block, self._out = block, storage.path(out) if out else None
        self._rows = sharding.whole_rows(self.model.mesh, int(batch_size))
        self._settings = [str(path), mode, max_new, block, self._fields, think, self._seed]
        if self._out:
            self._out.mkdir(parents=True, exist_ok=True)
        self._answers = Answers(self._out / "answers.jsonl" if self._out else None)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What is said about each case, cut off before the first of its `until`; of a drawing a JSON with
        the path of its PNG, as lmms-eval's tasks of this kind read it."""
        asked = [request.args for request in requests]
        keys = [self._answers.key(self._settings, *args[:2], *map(str, args[3:])) for args in asked]
        left = [i for i, key in enumerate(keys) if self._answers.get(key) is None]
        engine = Engine(self.model, slots=self._rows)
        more = 0  # cases with several pictures
        with progress("answering", len(left), "it") as bar:
            for part in (left[i : i + self._rows] for i in range(0, len(left), self._rows)):
                tickets = []
                for i in part:
                    job, pictures = self._job(asked[i])
                    more += pictures > 1
                    tickets += engine.submit(job, self._seed, adapter=self.model.adapter)
                for i, ticket in zip(part, tickets, strict=True):
                    self._answers.put(keys[i], self._told(asked[i], ticket.result()))
                    bar.update(1)
        if more:
            print(f"{more} cases have several pictures; the model saw the first", file=sys.stderr)
        return [self._answers.get(key) for key in keys]

    def _job(self, args):
        context, settings, visuals_of, doc_id, task, split = args
        if self.mode == "draw":
            return self.model.draw_job(context, **self._fields), 0
        turns = [{"role": "user", "content": context}]
        if self._think:
            turns = records.with_think_prompt(turns, records.THINK_PROMPT)
        fields = self._fields | {"block": self._block, "stop": self.model.vocab.end_turn}
        new = self._max_new or settings.get("max_new_tokens") or None
        visuals = [] if visuals_of is None else list(visuals_of(self.task_dict[task][split][doc_id]))
        if not visuals:
            return self.model.text_job([turns], max_new=new, **fields), 0
        return self.model.answer_job([visuals[0]], [turns], max_new=new, **fields), len(visuals)

    def _told(self, args, ids: np.ndarray) -> str:
        _, settings, _, doc_id, task, _ = args
        if self.mode == "answer":
            return cut(self.model.read(ids).text, settings.get("until") or [])
        path = self._out / f"{task}_{doc_id}.png"
        [drawing] = self.model.drawings(self.model.codes([ids]))
        drawing.image.convert("RGB").save(path)
        return json.dumps({"text": "", "images": [str(path)]})

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Isn't there: tasks with pictures that are widely used generate."""
        raise NotImplementedError(
            "likelihoods of texts about pictures aren't computed; choose a task that generates"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Isn't there."""
        raise NotImplementedError("tasks of several rounds aren't supported")
