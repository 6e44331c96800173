"""A model for lm-evaluation-harness (the extra `eval`): generation on the engine, likelihoods by the bound.

    mmada evaluate --model runs/digits --tasks gsm8k           # this project's command
    python -m mmada_jax.measure.harness --model mmada --model_args path=runs/digits --tasks gsm8k

The second is the harness's own command line, which knows the model "mmada" by this module.
"""

import collections
import functools
import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import lm_eval.api.registry
import numpy as np
from lm_eval.api.model import TemplateLM

from mmada_jax import storage
from mmada_jax.data import records
from mmada_jax.devices import sharding
from mmada_jax.measure import likelihood
from mmada_jax.measure.answers import Answers
from mmada_jax.progress import progress
from mmada_jax.serve.api import MMaDA
from mmada_jax.serve.engine import Engine
from mmada_jax.tokens.tokenizer import TEMPLATE, Template, chat, cut

# New tokens and tokens of a block, as the models of this kind are evaluated with (LLaDA's settings).
PRESETS = {"gsm8k": (256, 8), "math": (512, 64), "base": (1024, 1024)}


@lm_eval.api.registry.register_model("mmada")
class HarnessModel(TemplateLM):
    """A model of ours as the harness asks for one.

    path         the folder of the model, or the model itself
    preset       one of PRESETS: `max_new` and `block` for tasks that say nothing themselves
    max_new, block, steps, decode   how text is generated; a max_new goes before a task's max_gen_toks
    draws        of the likelihood's bound; single tokens are exact
    think        asks for a thought in a conversation, as stage 2 trains it; what is said holds the thought
    greedy       whether `is_greedy` of a likelihood is looked up, by decoding; False says it never is
    batch_size   rows at a time
    answers      a file of answers, so that an evaluation that was interrupted goes on
    """

    def __init__(
        self,
        path: str | MMaDA,
        *,
        preset: str = "gsm8k",
        max_new: int | None = None,
        block: int | None = None,
        steps: int | None = None,
        decode: str = "exact",
        draws: int = likelihood.DRAWS,
        greedy: bool = False,
        batch_size: int | str = 16,
        seed: int = 0,
        think: bool = False,
        answers: str | None = None,
        model_hash: str = "",
        **given_by_the_harness: Any,
    ):
        super().__init__()
        del given_by_the_harness  # device, max_batch_size
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}; known: {', '.join(PRESETS)}")
        self.model = MMaDA.load(path) if isinstance(path, storage.Name) else path
        self._max_new, self._most = max_new, PRESETS[preset][0]
        self._block = block or PRESETS[preset][1]
        self._steps, self._decode, self._draws, self._greedy = steps, decode, draws, greedy
        self._seed = seed
        rows = 16 if batch_size == "auto" else int(batch_size)
        self._rows = sharding.whole_rows(self.model.mesh, rows)
        self._settings = [model_hash, self._steps, decode, draws, greedy, seed, self._block]
        self._think = think
        self._answers = Answers(storage.path(answers) if answers else None)
        self._rendered: dict[str, Template] = {}

    # ---- Texts and ids ---------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.model.vocab.eos

    @property
    def prefix_token_id(self) -> int:
        """The id that begins a text, which stands for an empty context."""
        return self.model.vocab.bos

    @property
    def tokenizer_name(self) -> str:
        """What tells the harness's caches one tokenizer from another."""
        return hashlib.sha256(self.model.tokenizer.to_json().encode()).hexdigest()[:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text. In one that `apply_chat_template` has made, control tokens are control tokens;
        in any other, and in what follows it, they are text."""
        del add_special_tokens
        made = string if string in self._rendered else None
        if made is None:
            begun = [text for text in self._rendered if string.startswith(text)]
            made = max(begun, key=len, default=None)
        if made is None:
            return self.model.tokenizer.encode(string)
        rest = self.model.tokenizer.encode(string.removeprefix(made))
        return self.model.tokenizer.encode(self._rendered[made]) + rest

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """A conversation ends where its answer begins; of plain text the harness has its own way."""
        if context in self._rendered:
            return self.tok_encode(context), self.model.tokenizer.encode(continuation)
        return super()._encode_pair(context, continuation)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which the harness keeps with its results."""
        return TEMPLATE if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model reads it."""
        if not add_generation_prompt:
            raise ValueError("answers can't be begun for this model; leave gen_prefix out of the task")
        if self._think:
            chat_history = records.with_think_prompt(chat_history, records.THINK_PROMPT)
        made = chat(chat_history)
        self._rendered[str(made)] = made
        return str(made)

    # ---- What the harness asks -------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers to contexts, each cut off before the first of its `until`. All wait in the engine at
        once, and each is kept as soon as it is there."""
        del disable_tqdm
        asked = [(request.args[0], self._settled(request.args[1])) for request in requests]
        # Equal requests are asked once; those that sample get answers of their own.
        times, turns = collections.Counter(), []
        for one in asked:
            turns.append(times[str(one)] if one[1]["temperature"] else 0)
            times[str(one)] += 1
        keys = [self._key("generate", *one, turn) for one, turn in zip(asked, turns, strict=True)]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        left = [i for i, key in enumerate(keys) if self._answers.get(key) is None and first[key] == i]
        with progress("generating", len(left), "it") as bar:

            def keep(i, ticket):
                if ticket.state == "done":
                    text = cut(self.model.read(ticket.ids).text, asked[i][1]["until"])
                    self._answers.put(keys[i], text)
                    bar.update(1)

            engine = Engine(self.model, slots=self._rows, queue=max(1, len(left)))
            tickets = []
            for i in left:
                job = self._job(*asked[i])
                named = {"at_end": functools.partial(keep, i), "adapter": self.model.adapter}
                tickets += engine.submit(job, self._seed + turns[i], **named)
            for ticket in tickets:
                ticket.result()
        return [self._answers.get(key) for key in keys]

    def _job(self, context, settings):
        new = settings["max_new"]
        # As in the harness's other models: what doesn't fit is cut off at the left.
        ids = self.tok_encode(context) or [self.prefix_token_id]
        ids = ids[-max(1, self.model.config.max_len - new) :]
        return self.model.text_job(
            np.array(ids), max_new=new, block=min(self._block, new), steps=self._steps,
            decode=self._decode, temperature=settings["temperature"],
            stop=self.model.vocab.end_turn,
        )  # fmt: skip

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        most = self.model.config.max_len - 1
        if long := sum(len(more) > most for _, _, more in requests):
            print(
                f"{long} texts to score have more than {most} tokens; their ends are scored",
                file=sys.stderr,
            )
        asked = [(context, more[-most:]) for _, context, more in requests]
        pairs = [likelihood.Pair(self._cut(context, more), more) for context, more in asked]
        keys = [self._key("likelihood", pair) for pair in pairs]
        left = [i for i, key in enumerate(keys) if self._answers.get(key) is None]
        todo = [pairs[i] for i in left]
        greedy = self._greedily(todo) if self._greedy else [False] * len(todo)
        with progress("scoring", len(left), "it") as bar:

            def keep(number, value):
                self._answers.put(keys[left[number]], [float(value), bool(greedy[number])])
                bar.update(1)

            likelihood.log_likelihoods(self.model, todo, self._draws, self._seed, self._rows, keep)
        return [tuple(self._answers.get(key)) for key in keys]

    def _greedily(self, pairs):
        """Whether greedy decoding, token by token, gives the continuation."""
        engine = Engine(self.model, slots=self._rows, queue=max(1, len(pairs)))
        tickets = []
        for context, more in pairs:
            job = self.model.text_job(np.array(context), max_new=len(more), block=len(more))
            tickets += engine.submit(job, self._seed, adapter=self.model.adapter)
        spans = [ticket.result() for ticket in tickets]
        return [list(x) == list(pair.continuation) for x, pair in zip(spans, pairs, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The bound of whole texts, in windows of the length that the model takes."""
        del disable_tqdm
        most, values = self.model.config.max_len - 1, []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            parts = [ids[i : i + most] for i in range(0, len(ids), most)]
            asked = [(None, [self.prefix_token_id], part) for part in parts]
            values.append(sum(value for value, _ in self._loglikelihood_tokens(asked)))
        return values

    def _cut(self, context, more):
        """A context whose beginning is left out where all of it doesn't fit."""
        return context[-max(1, self.model.config.max_len - len(more)) :]

    def _settled(self, given: dict[str, Any]) -> dict[str, Any]:
        """How a request is generated, by its own settings and those of this object."""
        until = given.get("until") or []
        sampled = given.get("do_sample") and given.get("temperature")
        return {
            "until": [until] if isinstance(until, str) else list(until),
            "max_new": self._max_new or int(given.get("max_gen_toks") or self._most),
            "temperature": float(sampled) if sampled else 0.0,
        }

    def _key(self, kind, *asked):
        return self._answers.key(kind, self._settings, asked)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
