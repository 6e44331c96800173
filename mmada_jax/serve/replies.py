"""What the endpoint says: texts as they become known, usage, errors, pictures as PNG."""

import base64
from typing import Any

import numpy as np

from mmada_jax.data.images import png_of
from mmada_jax.diffusion.decode import Job
from mmada_jax.model.model import Model
from mmada_jax.model.results import Drawing
from mmada_jax.serve.tickets import FullError, Ticket
from mmada_jax.tokens.tokenizer import END_THINK, THINK, conversation_end, cut


class RefusedError(Exception):
    """A request that isn't answered: the status of HTTP, and the fields of OpenAI's errors."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class TextReply:
    """An answer in text while it comes into being: a thought, if it begins with <think>, and the rest.

    Only what can't change any more is told: tokens before the first hidden one, and of these no half of a
    character, of a tag, or of a text in `stops`, at which the answer ends. `finish` is "stop" if it has
    come to an end, "length" if there were no more tokens for it, None before.
    """

    def __init__(self, model: Model, stops: tuple[str, ...] = ()):
        self._model, self._stops = model, tuple(stop for stop in stops if stop)
        self.thought, self.answer, self.tokens = "", "", 0
        self.finish: str | None = None

    def take(self, ids: np.ndarray, final: bool) -> dict[str, str]:
        """The ids of the span as they are now; `final` if nothing more will become of it. What is new is
        given as the fields of a delta."""
        hidden = np.flatnonzero(ids == self._model.vocab.mask)
        stable = ids[: hidden[0]] if len(hidden) else ids
        kept = conversation_end(stable, self._model.vocab)
        ended = len(kept) < len(stable)
        thought, answer = self._split(self._model.read(kept).text, ended or final)
        said = cut(answer, self._stops)
        stopped = len(said) < len(answer)
        answer, ended = said, ended or stopped
        if ended or final:
            self.finish = "stop" if ended else "length"
        else:
            answer = _without_part(answer, self._stops)
        delta = {}
        for name, old, new in (
            ("reasoning_content", self.thought, thought),
            ("content", self.answer, answer),
        ):
            if len(new) > len(old):
                delta[name] = new[len(old) :]
        # Of what follows a stop nothing is told, and nothing counts.
        told = self._model.tokenizer.encode(thought + answer) if stopped else kept
        self.thought, self.answer, self.tokens = thought, answer, len(told)
        return delta

    def _split(self, text: str, done: bool) -> tuple[str, str]:
        if not done:
            text = text.rstrip("\ufffd").rstrip()  # the rest of a character is still hidden
            if THINK.startswith(text):
                return "", ""
        if not text.startswith(THINK):
            return "", text
        thought, end, answer = text.removeprefix(THINK).partition(END_THINK)
        if not end and not done:
            thought = _without_part(thought, (END_THINK,))
        return thought.strip(), answer.strip()

    def message(self) -> dict[str, Any]:
        """The whole answer, as a message."""
        thought = {"reasoning_content": self.thought} if self.thought else {}
        return {"role": "assistant", "content": self.answer} | thought


def _without_part(text: str, stops: tuple[str, ...]) -> str:
    """A text without an end that may be the beginning of one of these."""
    lengths = (
        n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])
    )
    return text[: len(text) - max(lengths, default=0)]


def usage(jobs: list[Job], tickets: list[Ticket], completion: int, n_image: int = 0) -> dict[str, Any]:
    """The tokens of a request, under the names of both of OpenAI's APIs; `nfe` are the forward passes of
    all its rows. The prompt counts once, however many answers it has; `n_image` of it are a picture's."""
    prompt = int(jobs[0].rows.valid[0].sum() - jobs[0].length_B[0])
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "input_tokens": prompt, "output_tokens": completion, "nfe": sum(ticket.steps for ticket in tickets),
        "input_tokens_details": {"text_tokens": prompt - n_image, "image_tokens": n_image},
    }  # fmt: skip


def error(problem: Exception, wait: int = 1) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and body for what went wrong; `wait` are the seconds after which a full queue may be
    tried again."""
    code, param, headers = getattr(problem, "code", None), getattr(problem, "param", None), {}
    if isinstance(problem, RefusedError):
        status, kind = problem.status, "invalid_request_error"
    elif isinstance(problem, FullError):
        status, kind, code = 429, "rate_limit_error", "queue_full"
        headers = {"Retry-After": str(wait)}
    elif isinstance(problem, TimeoutError):
        status, kind, code = 504, "timeout", "timeout"
    elif isinstance(problem, ValueError):
        status, kind = 400, "invalid_request_error"
    else:
        status, kind = 500, "server_error"
    # The connection ends with these; a client must not send its next request there.
    if status in (408, 500):
        headers = {"Connection": "close"}
    text = (
        str(problem) if status < 500 or status == 504 else f"the request failed ({type(problem).__name__})"
    )
    return status, headers, {"error": {"message": text, "type": kind, "param": param, "code": code}}


def png(drawing: Drawing) -> str:
    """A drawing as PNG, in base64."""
    return base64.b64encode(png_of(drawing.image)).decode()
