"""Texts of records: the text of a row, and a sample of texts that trains a text tokenizer."""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from mmada_jax.data import digits, records, sources
from mmada_jax.data.records import Record
from mmada_jax.tokens.tokenizer import END_THINK, THINK, Template, chat, parse_chat

# The largest number of records of a source, and of characters of a record, that train a text tokenizer. A
# source has at most 16 million characters in the sample.
SAMPLED_RECORDS, SAMPLED_CHARACTERS = 4096, 4096


def text_of(
    task: str,
    config: sources.SourceConfig,
    record: Record,
    rng: np.random.Generator,
    think_prompt: str,
    think_draw_prompt: str,
) -> str | Template:
    """The text of a record in a row of a task.

    Raises ValueError if the record has no text, and LeftOut for a conversation about an image if the rows
    of the task have no image.
    """
    if task == "lm":
        return records.plain_text(record, rng)
    if task == "t2i":
        return records.drawing_caption(record, rng)
    has_image = record.image is not None or record.codes is not None
    if task == "lm_chat" and (has_image or record.lacks_image):
        message = f"record {record.key!r} is about an image, which rows of lm_chat don't have"
        raise records.LeftOut("about an image", message)
    if task == "lm_chat" and not record.turns:
        text = records.whole_text(record)
        if not config.rendered:
            raise ValueError(
                f"record {record.key!r} has a text and no turns; if it is a conversation with its control "
                "tokens, rendered already, say so by the source's rendered=True"
            )
        return parse_chat(text)
    if task == "r2i":
        turns = record.turns or records.thinking_turns(record)
    else:
        turns = records.reading_turns(record, rng) if task == "mmu" else record.turns
    if config.think:
        prompt = think_draw_prompt if task == "r2i" else think_prompt
        turns = records.with_think_prompt(turns, prompt)
    # The user's words after the last answer are dropped, since no answer follows them.
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("a conversation has no answer of the assistant")
    return chat(turns[: answers[-1]], turns[answers[-1]]["content"])


def sample_texts(
    data: Mapping[str, Mapping[str, sources.SourceConfig]],
    opened: Mapping[str, Mapping[str, sources.Source]],
    think_prompt: str,
    think_draw_prompt: str,
) -> Iterator[str]:
    """A sample of texts that trains a text tokenizer. The sample is the same in every call. It comes from
    records at equal distances in each source, and has neither control tokens nor the tags of thoughts. For
    digits the sample has all texts."""
    formats = {data[task][name].format for task, of_task in opened.items() for name in of_task}
    if "digits" in formats:
        yield from digits.corpus()
    for task, of_task in opened.items():
        for name, source in of_task.items():
            config, rng = data[task][name], np.random.default_rng(0)
            if config.format == "digits":
                continue
            for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED_RECORDS).astype(int)):
                try:
                    record = source[int(index)]
                    text = text_of(task, config, record, rng, think_prompt, think_draw_prompt)
                except Exception:  # training skips such records too, and counts them
                    continue
                left = SAMPLED_CHARACTERS
                for part in text.parts if isinstance(text, Template) else [text]:
                    if isinstance(part, str) and left > 0:
                        # The cut may leave half of a surrogate pair, which is dropped.
                        part = part[:left].encode(errors="ignore").decode()
                        left -= len(part)
                        yield from re.split(f"{THINK}|{END_THINK}", part)
