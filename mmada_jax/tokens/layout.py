"""Rows of tokens. Each task has one function, which makes a row of the token ids of a record, in numpy.

    t2i       pad*  t2i BOS text EOS soi image* eoi          the text slot is left-padded
    lm        BOS text EOS EOS*
    lm_chat   BOS prompt header | answer EOS EOS*            everything after the last header is hidden
    mmu       mmu soi image* eoi BOS prompt header | answer EOS EOS*
    r2i       r2i BOS prompt header | thought EOS EOS* soi | image* | eoi

S (`max_text`) is the length of the text slot in tokens. N is the number of image tokens. t2i, mmu and r2i
rows have the length S + N + 3. lm and lm_chat rows have the length that their functions are given.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mmada_jax.tokens.vocab import Vocab

TASKS = ("t2i", "lm", "lm_chat", "mmu", "r2i")


class Batch(NamedTuple):
    """Rows of one or more tasks, all of one length L. A single row is a Batch without the B axis.

    `target` marks the tokens that may be hidden and must be predicted. `shown` marks tokens that are scored
    but never hidden (soi and eoi of t2i, as in the reference's labels). `valid` is False at padding that no
    token attends to. `task` holds indices of TASKS.
    """

    tokens: np.ndarray  # int32 [B, L], clean
    valid: np.ndarray  # bool [B, L]
    target: np.ndarray  # bool [B, L]
    shown: np.ndarray  # bool [B, L]
    task: np.ndarray  # int32 [B]


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The lengths that all rows of a model share. The text slot has `max_text` tokens (S), and the image
    has `n_image` tokens (N)."""

    max_text: int
    n_image: int

    @property
    def length(self) -> int:
        """Length in tokens of a t2i, mmu or r2i row: the slot, the image, soi, eoi and the task's token."""
        return self.max_text + self.n_image + 3

    @property
    def text_end(self) -> int:
        """The place after the text slot of a t2i or r2i row, where soi stands."""
        return self.max_text + 1

    @property
    def image(self) -> slice:
        """The places of the image in a t2i or r2i row."""
        return slice(self.max_text + 2, self.max_text + 2 + self.n_image)


def _row(task: str, tokens: Sequence[int], valid=None, target=(), shown=()) -> Batch:
    tokens = np.asarray(tokens, np.int32)
    marks = np.zeros((2, len(tokens)), bool)
    for start, stop in target:
        marks[0, start:stop] = True
    marks[1, list(shown)] = True
    valid = np.ones(len(tokens), bool) if valid is None else valid
    return Batch(tokens, valid, marks[0], marks[1], np.int32(TASKS.index(task)))


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows of equal length -> one batch."""
    lengths = sorted({len(row.tokens) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"rows of lengths {lengths} don't stack: t2i, mmu and r2i rows have max_text + image "
            "tokens + 3 tokens, and lm rows must be given that length"
        )
    return Batch(*map(np.stack, zip(*rows, strict=True)))


def t2i(vocab: Vocab, text: Sequence[int], image: Sequence[int], max_text: int) -> Batch:
    """A row that draws an image from a text. The image is the target. Guidance takes the row of an empty
    text as its unconditional row."""
    text, image = _with_bos(vocab, text), _image(vocab, image)
    slot = [vocab.t2i, *text, vocab.eos]
    if len(slot) > max_text + 1:
        slot = [*slot[:max_text], vocab.eos]
    pads = max_text + 1 - len(slot)
    tokens = [vocab.pad] * pads + slot + [vocab.soi, *image, vocab.eoi]
    first = max_text + 2
    last = first + len(image)
    valid = np.arange(len(tokens)) >= pads
    return _row("t2i", tokens, valid, target=[(first, last)], shown=(first - 1, last))


def t2i_generation(vocab: Vocab, text: Sequence[int], n_image: int, max_text: int) -> Batch:
    """The t2i row whose N image tokens are all hidden. Raises ValueError if the text doesn't fit."""
    check_fits(len(_with_bos(vocab, text)) + 1, max_text, "prompt with BOS and EOS")
    return t2i(vocab, text, [vocab.mask] * n_image, max_text)


def lm(vocab: Vocab, text: Sequence[int], length: int) -> Batch:
    """A row of plain text with `length` tokens. All tokens are target, also the EOS that pad the text."""
    tokens = _pad_text(vocab, [*_with_bos(vocab, text), vocab.eos][:length], length)
    return _row("lm", tokens, target=[(0, length)])


def lm_chat(vocab: Vocab, text: Sequence[int], length: int) -> Batch:
    """A row of a conversation with `length` tokens. All tokens after the last header are target."""
    tokens = _pad_text(vocab, [*_with_bos(vocab, text), vocab.eos][:length], length)
    return _row("lm_chat", tokens, target=[(_answer_start(vocab, tokens, default=0), length)])


def mmu(vocab: Vocab, image: Sequence[int], text: Sequence[int], max_text: int) -> Batch:
    """A row of an image and a conversation. All tokens after the last header are target. Without a header
    the whole text is target."""
    image = _image(vocab, image)
    prefix = [vocab.mmu, vocab.soi, *image, vocab.eoi]
    slot = _text_slot(vocab, text, max_text)
    start = len(prefix) + _answer_start(vocab, slot, default=0)
    return _row("mmu", [*prefix, *slot], target=[(start, len(prefix) + max_text)])


def r2i(vocab: Vocab, text: Sequence[int], image: Sequence[int], max_text: int) -> Batch:
    """A row of a prompt, a thought and an image. The thought and the image are target. Without a header
    only the image is target."""
    image = _image(vocab, image)
    slot = _text_slot(vocab, text, max_text)
    start = 1 + _answer_start(vocab, slot, default=max_text)
    first = max_text + 2
    tokens = [vocab.r2i, *slot, vocab.soi, *image, vocab.eoi]
    return _row("r2i", tokens, target=[(start, max_text + 1), (first, first + len(image))])


def image_start(task: str, max_text: int) -> int:
    """The place of the first image token in a row; 0 for tasks without an image."""
    return {"t2i": max_text + 2, "mmu": 2, "r2i": max_text + 2}.get(task, 0)


def r2i_generation(vocab: Vocab, prompt: Sequence[int], n_image: int, max_text: int) -> Batch:
    """The r2i row of a prompt. The rest of the text slot and the image are hidden, and are the target.
    Raises ValueError if the prompt leaves no room for a thought."""
    prompt = _with_bos(vocab, prompt)
    check_fits(len(prompt) + 1, max_text, "prompt with the first token of a thought")
    row = r2i(vocab, prompt, [vocab.mask] * n_image, max_text)
    row.tokens[1 + len(prompt) : 1 + max_text] = vocab.mask
    row.target[: 1 + max_text] = np.arange(1 + max_text) > len(prompt)
    return row


def drop_condition(vocab: Vocab, row: Batch, max_text: int) -> Batch:
    """The t2i row of a row's image without its text. Guidance takes it as the unconditional row."""
    return t2i(vocab, [], row.tokens[max_text + 2 : -1], max_text)


def continuation(
    vocab: Vocab, prompts: Sequence[Sequence[int]], n_new: int, length: int | None = None
) -> Batch:
    """Rows of prompts, padded on the left to one length. `n_new` hidden tokens follow each prompt.

    `length` is the common length of the prompts in tokens. By default it is the length of the longest
    prompt. If `length` is given, batches of different prompts have one shape.

    The rows serve text generation, chat and image understanding. The padding isn't valid, so the result
    of a prompt doesn't depend on its neighbours. (RoPE is relative, so the shift changes nothing.)
    """
    longest = max(map(len, prompts))
    length = longest if length is None else length
    check_fits(longest, length, "prompt")
    rows = []
    for prompt in prompts:
        pads = length - len(prompt)
        tokens = [vocab.eos] * pads + list(prompt) + [vocab.mask] * n_new
        valid = np.arange(length + n_new) >= pads
        rows.append(_row("lm_chat", tokens, valid, target=[(length, length + n_new)]))
    return stack(rows)


def answers(vocab: Vocab, prompts: Sequence[Sequence[int]], n_new: Sequence[int], length: int) -> Batch:
    """Rows of prompts. Each prompt begins at place 0, and its own number `n_new` of hidden tokens follows.

    Padding fills the rest of the `length` tokens of a row. The padding isn't valid, so the result of a
    prompt depends neither on the padding nor on the other prompts."""
    rows = []
    for prompt, new in zip(prompts, n_new, strict=True):
        end = len(prompt) + new
        check_fits(end, length, "prompt with what is to follow it")
        tokens = [*prompt, *[vocab.mask] * new, *[vocab.eos] * (length - end)]
        rows.append(_row("lm_chat", tokens, np.arange(length) < end, target=[(len(prompt), end)]))
    return stack(rows)


def bucket(length: int) -> int:
    """The smallest length in tokens, among a few allowed lengths, that is at least `length`.

    From 64 tokens on the result is at most a quarter longer than `length`. Rows of one length share a
    compilation."""
    step = max(16, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


def check_fits(length: int, limit: int, what: str) -> None:
    """Raises ValueError if `length` tokens exceed `limit`."""
    if length > limit:
        raise ValueError(
            f"the {what} has {length} tokens, the limit is {limit}; shorten it or raise max_text"
        )


def _with_bos(vocab: Vocab, text: Sequence[int]) -> list[int]:
    text = list(text)
    return text if text and text[0] == vocab.bos else [vocab.bos, *text]


def _pad_text(vocab: Vocab, tokens: list[int], length: int) -> list[int]:
    return tokens + [vocab.eos] * (length - len(tokens))


def _text_slot(vocab: Vocab, text: Sequence[int], max_text: int) -> list[int]:
    slot = [*_with_bos(vocab, text), vocab.eos]
    if len(slot) > max_text:
        slot = [*slot[: max_text - 1], vocab.eos]
    return _pad_text(vocab, slot, max_text)


def _answer_start(vocab: Vocab, tokens: Sequence[int], default: int) -> int:
    headers = np.flatnonzero(np.asarray(tokens) == vocab.end_header)
    return int(headers[-1]) + 1 if len(headers) else default


def _image(vocab: Vocab, image: Sequence[int]) -> list[int]:
    ids = np.asarray(image, np.int64)
    bad = ids[(ids != vocab.mask) & ((ids < vocab.image_offset) | (ids >= vocab.rows))]
    if bad.size:
        raise ValueError(
            f"image token {bad[0]} is outside [{vocab.image_offset}, {vocab.rows}); codes become ids "
            "by vocab.image_ids(codes)"
        )
    return ids.tolist()
