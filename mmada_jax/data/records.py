"""Records: one training example each, its bytes in an ArrayRecord, and the texts that it trains on.

A function of the record and a random generator chooses the text, and the part of the text.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Prompts that make a model think first. Published checkpoints know the words of their model card.
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

# Openings of captions that machines write. They tell nothing about the picture.
OPENINGS = (
    "The image shows ", "The image depicts ", "The image features ", "The image displays ",
    "The image captures ", "The image presents ", "The image contains ", "In the image, ",
    "In this image, ", "In this picture, ", "This image shows ", "This is an image of ",
    "This is a picture of ", "This is a photo of ", "The photo shows ", "The picture shows ",
)  # fmt: skip

# Instructions that ask for a caption.
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

# Tags by which other models mark the place of the picture, one tag or several in a row. A tag with a number
# names one of several pictures. It doesn't match, since it is read as part of the sentence.
_IMAGE_TAG = r"(?:<(?:im_start|img)>\s*)?<image\s*/?>(?:\s*</(?:image|img)>|\s*<im_end>)?"
_IMAGE_TAGS = re.compile(rf"{_IMAGE_TAG}(?:\s*{_IMAGE_TAG})*", re.IGNORECASE)

Turns = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Record:
    """An example of any task. Fields that its task doesn't need are empty.

    `image` is a JPEG, PNG or WebP file, or pixels [I, J, C] (uint8, or floats in [-1, 1]). `codes` are
    the codes [N] of the image if an image tokenizer has made them already. `texts` are captions, each of
    which describes the image, or the one text of a text record. This text is a whole conversation if the
    source is `rendered`. `turns` are the turns of a conversation, {"role", "content"} each. `short` is a
    short caption beside the long one (r2i). `lacks_image` says that the conversation names the place of
    an image, and that the record has no image.
    """

    key: str  # unique within its source
    image: bytes | np.ndarray | None = None
    codes: np.ndarray | None = None
    texts: tuple[str, ...] = ()
    turns: tuple[Mapping[str, str], ...] = ()
    short: str = ""
    lacks_image: bool = False


class LeftOut(ValueError):
    """The error for a sound record that isn't used. Such records are counted by the reason `why`."""

    def __init__(self, why: str, message: str):
        super().__init__(why, message)
        self.why, self.message = why, message

    def __str__(self) -> str:
        return self.message


def pack(record: Record) -> bytes:
    """A record as bytes: the length of a JSON header, the header, the image file, the codes.

    Reading the bytes executes nothing. Raises ValueError if the image isn't an encoded file.
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
    """The record that `pack` made the bytes of. Raises ValueError for other bytes."""
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
    """A text about a picture without the tags <image>, which mark the place of the picture.

    The words before and after a tag stay separate. Between them are the line breaks that stood beside the
    tag, or one space, or nothing before a punctuation mark. A text without a tag isn't changed.
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
    """A caption to draw from, without the openings that machines write.

    The generator chooses one of the captions. In half of the cases only the first sentence is taken, which
    ends before the first full stop. Raises ValueError if the record has no caption.
    """
    text = _caption(record, rng)
    if rng.random() < 0.5:
        text = text.partition(".")[0].strip() or text
    for opening in OPENINGS:
        if text.lower().startswith(opening.lower()):
            return text[len(opening) :].strip() or text
    return text


def reading_turns(record: Record, rng: np.random.Generator) -> list[dict[str, str]]:
    """A conversation about a picture.

    For a record with turns it has the turns up to one of the answers. For a record without turns it has an
    instruction and one of the captions. Raises ValueError if the record has neither answers nor captions.
    """
    if not record.turns:
        instruction = INSTRUCTIONS[rng.integers(len(INSTRUCTIONS))]
        return _exchange(instruction, _caption(record, rng))
    answers = [i for i, turn in enumerate(record.turns) if turn["role"] == "assistant"]
    if not answers:
        raise ValueError(f"record {record.key!r} has a conversation without an answer of the assistant")
    return [dict(turn) for turn in record.turns[: answers[rng.integers(len(answers))] + 1]]


def whole_text(record: Record) -> str:
    """The text of a text record. Raises ValueError if the record has no text."""
    if not record.texts or not record.texts[0].strip():
        raise ValueError(f"record {record.key!r} has no text")
    return record.texts[0]


def plain_text(record: Record, rng: np.random.Generator) -> str:
    """The text of a text record without its newlines. A text of more than WINDOW characters is cut to
    WINDOW characters at a random place.

    Raises ValueError if the record has no text.
    """
    text = whole_text(record).replace("\n", "")
    start = rng.integers(len(text) - WINDOW + 1) if len(text) > WINDOW else 0
    return text[start : start + WINDOW]


def thinking_turns(record: Record) -> list[dict[str, str]]:
    """A conversation that draws with a thought: the short caption, then the long caption as the thought.

    Raises ValueError if the record lacks one of the captions.
    """
    if not (record.short.strip() and record.texts and record.texts[0].strip()):
        raise ValueError(f"record {record.key!r} lacks a short or a long caption; thinking takes both")
    return _exchange(record.short, f"<think>{record.texts[0]}</think>")


def with_think_prompt(turns: Turns, think_prompt: str) -> list[dict[str, str]]:
    """The turns. The first turn of the user begins with `think_prompt` and a newline."""
    turns = [dict(turn) for turn in turns]
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = f"{think_prompt}\n{turn['content']}"
            break
    return turns


def _gap(last: str, before: str, after: str, following: str) -> str:
    """The white space that replaces a tag between the characters `last` and `following`. `before` and
    `after` are the white space beside the tag."""
    if "\n" in before + after:
        breaks = max(before, after, key=lambda spaces: spaces.count("\n"))
        _, newline, indent = after.rpartition("\n")
        return breaks.rpartition("\n")[0] + "\n" + (indent if newline else "")
    if before or after:
        opens, closes = last in "([{", following in ".,;:!?)]}"
        return "" if (closes and not after) or (opens and not before) else " "
    # A tag without spaces on both sides separates two words, unless the script has no spaces.
    return " " if (last + following).isascii() and (last + following).isalnum() else ""


def _caption(record: Record, rng: np.random.Generator) -> str:
    texts = [text for text in record.texts if text.strip()]
    if not texts:
        raise ValueError(f"record {record.key!r} has no caption")
    text = texts[rng.integers(len(texts))]

    # Each tag <person> replaces a name that was removed from the caption.
    def someone(tags):
        if tags[0].lower().count("<person>") > 1:
            return "people"
        return ("a person", "someone", "somebody")[rng.integers(3)]

    return re.sub(r"<person>(?:\s*<person>)*", someone, text, flags=re.IGNORECASE).strip()


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
