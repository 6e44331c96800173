"""What clients of the endpoint ask, in the words of OpenAI's API, as jobs of a model.

Everything is checked here, before any compute. Nothing that a request holds is ever taken for a path or
fetched, and what people type is never read as a control token. `serve.endpoint` answers.
"""

import base64
import binascii
import dataclasses
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from PIL import Image

from mmada_jax.config import from_dict
from mmada_jax.data import images, records
from mmada_jax.diffusion.decode import Job
from mmada_jax.diffusion.rules import ImageRule
from mmada_jax.model.inputs import Direction, rule_of
from mmada_jax.model.model import Join
from mmada_jax.ranges import Positive, Range, Ranged, Seed
from mmada_jax.serve.api import MMaDA
from mmada_jax.serve.replies import RefusedError

Several = Annotated[int, Range(1, 16)]
# Fields of OpenAI's that change nothing here.
UNUSED = (
    "metadata", "store", "service_tier", "user", "safety_identifier", "prompt_cache_key", "verbosity",
    "prediction", "web_search_options", "moderation", "background", "style", "input_fidelity",
)  # fmt: skip
# Fields of OpenAI's that would change the answer and can't: only these values, or none, are taken.
NEUTRAL = {
    "top_p": (1, 1.0), "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "logprobs": (False,),
    "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "response_format": ({"type": "text"}, "b64_json"), "output_format": ("png",),
    "output_compression": (100,), "quality": ("auto", "standard"), "parallel_tool_calls": (True, False),
    "reasoning_effort": ("none",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Decoding(Ranged):
    """Fields that all requests have: which model, how often, and how it decodes."""

    model: str = ""
    n: Several | None = None
    seed: Seed | None = None
    steps: Positive | None = None
    guidance: Annotated[float, Range(0, 100)] | None = None
    temperature: Annotated[float, Range(0, 100)] | None = None
    decode: str | None = None
    stream: bool | None = None
    stream_mode: Literal["block_append", "denoise"] = "block_append"

    @property
    def seeds(self) -> list[int]:
        """A seed for each answer: those after `seed`, or any."""
        first = secrets.randbelow(2**31) if self.seed is None else self.seed
        return [(first + i) % 2**31 for i in range(self.n or 1)]

    @property
    def rule(self) -> dict[str, Any]:
        """Fields of a rule. Each temperature and guidance is compiled by itself, so both are rounded."""
        rounded = {
            "temperature": self.temperature and round(self.temperature, 1),
            "guidance": self.guidance and round(4 * self.guidance) / 4,
        }
        return {"decode": self.decode, "steps": self.steps} | rounded


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """What a stream tells beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # has no effect: nothing is padded here


@dataclasses.dataclass(frozen=True)
class Chat(Decoding):
    """A request for chat completions, but for its messages."""

    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    block_length: Positive | None = None
    think: bool = False
    stop: tuple[str, ...] = ()
    modalities: tuple[Literal["text", "image"], ...] = ("text",)
    stream_options: StreamOptions = dataclasses.field(default_factory=lambda: StreamOptions())

    def __post_init__(self):
        super().__post_init__()
        if len(self.stop) > 4 or any(len(stop) > 256 for stop in self.stop):
            raise ValueError("stop has too many texts or a long one; at most 4 of 256 characters are taken")
        if "" in self.stop or not self.modalities:
            raise ValueError("stop has an empty text, or modalities none; leave them out")
        most = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(most) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if "text" not in self.modalities and (self.stop or self.think):
            raise ValueError("stop and think are about texts; modalities asks for none")
        length = self.block_length
        if length is not None and length & (length - 1):  # each length is compiled by itself
            raise ValueError(f"block_length is {length}; it must be a power of two")


@dataclasses.dataclass(frozen=True)
class Images(Decoding):
    """A request for images: generations, or edits where there are pictures."""

    prompt: str = ""
    size: str | None = None
    partial_images: Annotated[int, Range(0, 16)] | None = None
    extend: Direction | None = None


class Conversation(NamedTuple):
    """Messages as the model takes them: turns of text, and the picture that they are about."""

    turns: list[dict[str, str]]
    picture: bytes | None


class Drawn(NamedTuple):
    """A job that draws, and what is made of its codes if they aren't the whole picture."""

    job: Job
    join: Join | None


def read(kind: type, body: Any, leave: Sequence[str] = ()) -> Any:
    """The fields of a request as `kind`, without those to `leave`. Raises RefusedError for what isn't known
    or can't be done."""
    if not isinstance(body, Mapping):
        raise RefusedError("the body must be a JSON object")
    given = {
        key: value
        for key, value in body.items()
        if value is not None and key not in UNUSED and key not in leave
    }
    for key, known in NEUTRAL.items():
        value = given.pop(key, None)
        if value is not None and not any(type(value) is type(one) and value == one for one in known):
            raise RefusedError(
                f"{key} is not supported here; leave it out", code="unsupported_value", param=key
            )
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    try:
        return from_dict(kind, given)
    except RecursionError:
        raise RefusedError("the fields are nested too deeply") from None
    except ValueError as error:
        text = str(error).replace("config key", "field").replace("config lacks", "the request lacks")
        name = re.match(r"unknown field '([\w.]+)'|([\w.]+)", text)
        raise RefusedError(text, param=name and (name[1] or name[2])) from None


def conversation(messages: Any) -> Conversation:
    """The messages of a chat request. Their texts may come in parts; one part may be a picture, as a data
    URL. Raises RefusedError for anything else."""
    if not isinstance(messages, list) or not messages:
        raise RefusedError("messages must be a list of turns, at least one", param="messages")
    turns, pictures = [], []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RefusedError(f"{where} needs a role and a content", param=where)
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise RefusedError(f"{where}.content must be a text or a list of parts", param=where)
        texts = []
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif kind == "image_url":
                url = part.get("image_url")
                pictures.append(picture_of(url.get("url") if isinstance(url, Mapping) else url, where))
            else:
                raise RefusedError(
                    f"{where} has a part of type {kind!r}; known: text, image_url", param=where
                )
        role = {"developer": "system"}.get(message["role"], message["role"])
        if role not in ("system", "user", "assistant"):
            raise RefusedError(f"{where}.role is {role!r}; known: system, user, assistant", param=where)
        turns.append({"role": role, "content": "\n".join(texts)})
    if len(pictures) > 1:
        raise RefusedError(
            f"the messages hold {len(pictures)} pictures; the model sees one in a conversation",
            param="messages",
        )
    return Conversation(turns, pictures[0] if pictures else None)


def picture_of(url: Any, where: str = "image") -> bytes:
    """The bytes of a picture in a data URL. Its header is checked, its pixels aren't decoded yet. Raises
    RefusedError."""
    if not isinstance(url, str) or not url.startswith("data:"):
        raise RefusedError(
            f"{where}: pictures come as data URLs (data:image/png;base64,...); nothing is fetched",
            param=where,
        )
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RefusedError(f"{where}: a data URL of a picture must be base64", param=where)
    try:
        picture = base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise RefusedError(f"{where}: the base64 of a picture is broken: {error}", param=where) from None
    return checked(picture, where)


def checked(picture: bytes, where: str) -> bytes:
    """A picture whose size and format are fine by its header. Raises RefusedError."""
    if len(picture) > images.MAX_BYTES:
        raise RefusedError(f"{where}: a picture has {len(picture)} bytes; at most {images.MAX_BYTES}", 413)
    try:
        images.check_image(picture)
    except ValueError as error:
        raise RefusedError(f"{where}: {error}", param=where) from None
    return picture


# ---- Jobs: they raise ValueError for what the model can't do -----------------------------------------


def check_length(model: MMaDA, texts: Sequence[str]) -> None:
    """Raises RefusedError for texts that can't fit, before they are tokenized."""
    most, length = 32 * model.config.max_len, sum(map(len, texts))
    if length > most:
        raise RefusedError(
            f"the texts have {length} characters; at most {most} are taken", code="context_length_exceeded"
        )


def chat_job(model: MMaDA, asked: Chat, of: Conversation) -> Job:
    """Answers to a conversation, one for each seed."""
    check_length(model, [turn["content"] for turn in of.turns])
    most = asked.max_completion_tokens or asked.max_tokens
    # What follows the end of an answer is never read.
    fields = asked.rule | {"block": asked.block_length, "stop": model.vocab.end_turn}
    turns, n = of.turns, asked.n or 1
    if asked.think:
        turns = records.with_think_prompt(turns, records.THINK_PROMPT)
    if of.picture is None:
        return model.text_job([turns] * n, max_new=most, **fields)
    picture = decoded(of.picture, "messages")
    return model.answer_job([picture] * n, [turns] * n, max_new=most, **fields)


def decoded(picture: bytes, where: str) -> Image.Image:
    """The pixels of a picture. Raises RefusedError if they are damaged."""
    try:
        return images.open_image(picture)
    except ValueError as error:
        raise RefusedError(f"{where}: {error}", param=where) from None


def thought_job(model: MMaDA, asked: Chat, of: Conversation) -> Job:
    """Thoughts about what is to be drawn."""
    check_length(model, [turn["content"] for turn in of.turns])
    drawing_rule(model, asked)  # what is wrong with it is told before the thought
    turns = records.with_think_prompt(of.turns, records.THINK_DRAW_PROMPT) if asked.think else of.turns
    return model.think_job([turns] * (asked.n or 1), block=asked.block_length, decode=asked.decode)


def drawing_rule(model: MMaDA, asked: Decoding) -> ImageRule:
    """How a drawing is decoded."""
    if asked.steps and asked.steps > model.n_image:
        raise RefusedError(
            f"steps is {asked.steps}; a picture has {model.n_image} tokens, and at most as many steps",
            param="steps",
        )
    rule = rule_of(model.defaults.image, None, asked.rule)
    rule.check_length(model.n_image)
    return rule


def draw_job(model: MMaDA, asked: Chat | Images, of: Conversation | None = None) -> Job:
    """Drawings of a prompt, which is the last turn of a conversation."""
    prompt = of.turns[-1]["content"] if of else asked.prompt
    check_length(model, [prompt])
    drawing_rule(model, asked)
    return model.draw_job([prompt] * (asked.n or 1), **asked.rule)


def edit_job(model: MMaDA, asked: Images, picture: bytes, mask: bytes | None) -> Drawn:
    """A picture of which what the mask covers is drawn anew (its transparent or white part), or which is
    extended."""
    n = asked.n or 1
    check_length(model, [asked.prompt])
    drawing_rule(model, asked)
    if bool(asked.extend) == (mask is not None):
        raise RefusedError(
            "an edit needs either a mask, whose transparent or white part is redrawn, or `extend`, the "
            "edge beyond which the picture goes on (left, right, up, down)",
            param="mask",
        )
    whole = decoded(picture, "image")
    if asked.extend:
        return Drawn(*model.extend_job([whole] * n, asked.extend, asked.prompt, **asked.rule))
    covered = decoded(mask, "mask")
    return Drawn(model.inpaint_job([whole] * n, [covered] * n, asked.prompt, **asked.rule), None)


def check_size(model: MMaDA, size: str | None, extend: Direction | None = None) -> None:
    """Raises RefusedError for another size than the one that the model draws."""
    rows, columns = model.image_size
    if size not in (None, "auto", f"{columns}x{rows}") and not extend:
        raise RefusedError(f"size is {size!r}; this model draws {columns}x{rows}", param="size")
