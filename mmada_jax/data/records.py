"""One training example as a source has it: its form in an ArrayRecord, and the texts to train on.

Which text of a record is taken, and how much of it, is a function of the record and a generator.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# What makes a model think first. Published checkpoints know the wording of their model card.
THINK_PROMPT = (
    "Work through the problem between <think> and </think> before you answer, and give nothing but the "
    "answer after </think>."
)
THINK_DRAW_PROMPT = (
    "Before you draw, plan the picture between <think> and </think>: say in detail what is to be seen. "
    "The picture follows after </think>."
)

# Longer texts are cut to a window of this many characters.
WINDOW = 8000

# What machines begin captions with, and what says nothing to someone who draws.
OPENINGS = (
    "The image shows ", "The image depicts ", "The image features ", "The image displays ",
    "The image captures ", "The image presents ", "The image contains ", "In the image, ",
    "In this image, ", "In this picture, ", "This image shows ", "This is an image of ",
    "This is a picture of ", "This is a photo of ", "The photo shows ", "The picture shows ",
)  # fmt: skip

# What a reader of captions is asked.
INSTRUCTIONS = (
    "Describe the image.",
    "Describe this picture.",
    "What does the image show?",
    "What can be seen in this picture?",
    "What is in the image?",
    "Write a caption for this image.",
    "Give the picture a caption.",
    "Please say what you see.",
    "Tell me about this image.",
    "Tell me what the picture is of.",
    "Put the content of the image into words.",
    "How would you describe this scene?",
    "What is going on in the picture?",
    "Explain what this image contains.",
    "Caption this.",
    "I can't see the picture. What does it show?",
    "Can you describe what is shown here?",
    "Which words fit this image?",
    "Summarise the image in words.",
    "Look at the image and describe it.",
)

# Where other models put the picture, once or several times in a row. A number in the tag names one of
# several pictures, and is read as part of the sentence.
_IMAGE_TAG = r"(?:<(?:im_start|img)>\s*)?<image\s*/?>(?:\s*</(?:image|img)>|\s*<im_end>)?"
_IMAGE_TAGS = re.compile(rf"{_IMAGE_TAG}(?:\s*{_IMAGE_TAG})*", re.IGNORECASE)

Turns = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Record:
    """An example of any task; what a task doesn't need stays empty.

    `image` is a JPEG, PNG or WebP file, or pixels [I, J, C] (uint8, or floats in [-1, 1]); `codes` are
    its codes [N] where a tokenizer has been there already. `texts` are captions, each of which describes
    the image, or the one text of a text record (a whole conversation, where the source says `rendered`).
    `turns` are a conversation, {"role", "content"} each. `short` is the short caption of a long one (r2i).
    `lacks_image` is set where a conversation names the place of an image and none is here.
    """

    key: str  # unique within its source
    image: bytes | np.ndarray | None = None
    codes: np.ndarray | None = None
    texts: tuple[str, ...] = ()
    turns: tuple[Mapping[str, str], ...] = ()
    short: str = ""
    lacks_image: bool = False


class LeftOut(ValueError):
    """A record that nothing is wrong with, and that isn't used; it is counted under the reason `why`."""

    def __init__(self, why: str, message: str):
        super().__init__(why, message)
        self.why, self.message = why, message

    def __str__(self) -> str:
        return self.message


def pack(record: Record) -> bytes:
    """A record as bytes: the length of a JSON header, the header, then image file and codes.

    Nothing in it can be executed. Raises ValueError for an image that is not an encoded file.
    """
    if isinstance(record.image, np.ndarray):
        raise ValueError(f"record {record.key!r} has an image of pixels; encode it as a PNG first")
    image = record.image or b""
    codes = b"" if record.codes is None else np.asarray(record.codes, "<u4").tobytes()
    header = {"key": record.key, "texts": record.texts, "turns": [dict(t) for t in record.turns]}
    header |= {"short": record.short, "image": len(image), "codes": len(codes)}
    header |= {"lacks_image": True} if record.lacks_image else {}
    text = json.dumps(header, ensure_ascii=False).encode()
    return len(text).to_bytes(4, "little") + text + image + codes


def unpack(data: bytes) -> Record:
    """The inverse of `pack`. Raises ValueError for bytes that it didn't make."""
    try:
        start = 4 + int.from_bytes(data[:4], "little")
        header: dict[str, Any] = json.loads(data[4:start])
        end = start + header["image"]
        if len(data) != end + header["codes"]:
            raise ValueError(f"{len(data)} bytes instead of {end + header['codes']}")
        image, codes = data[start:end], np.frombuffer(data[end:], "<u4")
        return Record(
            key=header["key"],
            image=image or None,
            codes=codes.astype(np.int32) if len(codes) else None,
            texts=tuple(header["texts"]),
            turns=tuple(header["turns"]),
            short=header["short"],
            lacks_image=bool(header.get("lacks_image")),
        )
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"this is no record of ours: {error!r}") from error


# ---- Texts ---------------------------------------------------------------------------------------


def without_image_tag(text: str) -> str:
    """What someone said about a picture, without the tags <image> that tell where it stood.

    The words around a tag are parted as they were: by the line breaks that were beside it, by one
    space, or by nothing before a punctuation mark. A text without the tag stays as it is.
    """
    parts = _IMAGE_TAGS.split(text)
    pieces = []
    for i, part in enumerate(parts):
        start = part.rstrip() if i < len(parts) - 1 else part
        pieces.append(start.lstrip() if i else start)
        after = parts[i + 1] if i < len(parts) - 1 else ""
        if start and after.strip():
            following = after.lstrip()
            spaces = part[len(start) :], after[: len(after) - len(following)]
            pieces.append(_gap(start[-1], *spaces, following[0]))
    return "".join(pieces)


def drawing_caption(record: Record, rng: np.random.Generator) -> str:
    """What a picture is drawn from: one of the captions, every other time its first sentence alone
    (what stands before the first full stop), without the openings of machines.

    Raises ValueError if the record has no caption.
    """
    text = _caption(record, rng)
    if rng.random() < 0.5:
        text = text.partition(".")[0].strip() or text
    for opening in OPENINGS:
        if text.lower().startswith(opening.lower()):
            return text[len(opening) :].strip() or text
    return text


def reading_turns(record: Record, rng: np.random.Generator) -> list[dict[str, str]]:
    """What is said about a picture: the first of the record's turns up to one of its answers, or an
    instruction and one of the captions.

    Raises ValueError if the record has neither answers nor captions.
    """
    if not record.turns:
        instruction = INSTRUCTIONS[rng.integers(len(INSTRUCTIONS))]
        return _exchange(instruction, _caption(record, rng))
    answers = [i for i, turn in enumerate(record.turns) if turn["role"] == "assistant"]
    if not answers:
        raise ValueError(f"record {record.key!r} has a conversation without an answer of the assistant")
    return [dict(turn) for turn in record.turns[: answers[rng.integers(len(answers))] + 1]]


def whole_text(record: Record) -> str:
    """The text of a text record. Raises ValueError if it has none."""
    if not record.texts or not record.texts[0].strip():
        raise ValueError(f"record {record.key!r} has no text")
    return record.texts[0]


def plain_text(record: Record, rng: np.random.Generator) -> str:
    """The text of a text record without its newlines; of a long one WINDOW characters, from anywhere.

    Raises ValueError if the record has no text.
    """
    text = whole_text(record).replace("\n", "")
    start = rng.integers(len(text) - WINDOW + 1) if len(text) > WINDOW else 0
    return text[start : start + WINDOW]


def thinking_turns(record: Record) -> list[dict[str, str]]:
    """What a picture is drawn from with thinking: the short caption, and the long one as the thought.

    Raises ValueError if the record lacks one of them.
    """
    if not (record.short.strip() and record.texts and record.texts[0].strip()):
        raise ValueError(f"record {record.key!r} lacks a short or a long caption; thinking takes both")
    return _exchange(record.short, f"<think>{record.texts[0]}</think>")


def with_think_prompt(turns: Turns, think_prompt: str) -> list[dict[str, str]]:
    """The turns, the first of the user led by `think_prompt` and a newline."""
    turns = [dict(turn) for turn in turns]
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = f"{think_prompt}\n{turn['content']}"
            break
    return turns


def _gap(last: str, before: str, after: str, following: str) -> str:
    """What stays between a word's last character and the following one, of the spaces beside a tag."""
    if "\n" in before + after:
        breaks = max(before, after, key=lambda spaces: spaces.count("\n"))
        _, newline, indent = after.rpartition("\n")
        return breaks.rpartition("\n")[0] + "\n" + (indent if newline else "")
    if before or after:
        opens, closes = last in "([{", following in ".,;:!?)]}"
        return "" if (closes and not after) or (opens and not before) else " "
    # A tag without spaces on either side has parted two words, except in a script that has no spaces.
    return " " if (last + following).isascii() and (last + following).isalnum() else ""


def _caption(record: Record, rng: np.random.Generator) -> str:
    texts = [text for text in record.texts if text.strip()]
    if not texts:
        raise ValueError(f"record {record.key!r} has no caption")
    text = texts[rng.integers(len(texts))]

    # Names that were taken out of captions, one tag each.
    def someone(tags):
        if tags[0].lower().count("<person>") > 1:
            return "people"
        return ("a person", "someone", "somebody")[rng.integers(3)]

    return re.sub(r"<person>(?:\s*<person>)*", someone, text, flags=re.IGNORECASE).strip()


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
