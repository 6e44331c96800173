"""Real scans of handwritten digits, and the sentences about them that the quickstart trains on.

The scans are scikit-learn's `load_digits`: 1797 scans of 8x8 pixels (UCI, Alpaydin and Kaynak 1998). Each
scan belongs to one split, so no model sees a held-out scan in training. A canvas has 8x16 pixels, with
one digit in the middle or two digits side by side. A page has 32x32 pixels, four lines of four scans.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from mmada_jax.data.records import Record
from mmada_jax.tokens.tokenizer import END_THINK, THINK, chat

HEIGHT, WIDTH, SIDE = 8, 16, 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ASK_ONE = "which digit is this?"
ASK_TWO = "which digits are these?"
ASK_NUMBERS = "in numbers?"
ASK_SUM = "add them"
# Defaults of generation for models of the digits, as fields of a generation_config.json.
GENERATION = {"image_steps": 12, "image_guidance": 1.0, "question": ASK_ONE}
SPLITS = ("train", "validation", "test")
KINDS = ("captions", "statements", "sums", "reading", "text_cot", "vqa_sum", "draw_sum", "pages")
LINES = 4  # of a page, and scans in a line

Kind = Literal[KINDS]


@dataclasses.dataclass(frozen=True)
class Scans:
    """The scans of one split: `pixels` float32 [n, 8, 8] in [-1, 1], and `labels` int [n]."""

    pixels: np.ndarray
    labels: np.ndarray


@functools.cache
def load(split: str) -> Scans:
    """The scans of the split `train` (70 %), `validation` (10 %) or `test` (20 %). Splits never change."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'mmada_jax[digits]'") from error
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    n_test, n_validation = round(0.2 * len(order)), round(0.1 * len(order))
    chosen = {
        "test": order[:n_test],
        "validation": order[n_test : n_test + n_validation],
        "train": order[n_test + n_validation :],
    }[split]
    pixels = (data.images[chosen] / 8 - 1).astype(np.float32)
    return Scans(pixels, data.target[chosen])


def canvas(*scans: np.ndarray) -> np.ndarray:
    """A canvas [8, 16, 1] with one scan in the middle or two scans side by side."""
    out = np.full((HEIGHT, WIDTH, 1), -1, np.float32)
    left = (WIDTH - SIDE * len(scans)) // 2
    for i, scan in enumerate(scans):
        out[:, left + SIDE * i : left + SIDE * (i + 1), 0] = scan
    return out


def cut(canvas_IJ1: np.ndarray, n: int) -> list[np.ndarray]:
    """The n scans [8, 8] of a canvas [8, 16, 1], from left to right."""
    left = (WIDTH - SIDE * n) // 2
    return [canvas_IJ1[:, left + SIDE * i : left + SIDE * (i + 1), 0] for i in range(n)]


def page(scans: np.ndarray) -> np.ndarray:
    """A page [32, 32, 1] of scans [4, 4, 8, 8], line by line."""
    return scans.swapaxes(1, 2).reshape(LINES * SIDE, LINES * SIDE, 1)


def cut_page(page_IJ1: np.ndarray) -> np.ndarray:
    """The scans [4, 4, 8, 8] of a page [32, 32, 1]."""
    return page_IJ1.reshape(LINES, SIDE, LINES, SIDE).swapaxes(1, 2)


def page_caption(*digits: int) -> str:
    """What a page shows, as `lines of three, one, four and one`."""
    *others, last = (WORDS[d] for d in digits)
    return f"lines of {', '.join(others)} and {last}"


def caption(*digits: int, numbers: bool = False) -> str:
    """A caption, as `a handwritten seven` or `a three and a five`. With `numbers` it is `a handwritten 7`
    or `a 3 and a 5`."""
    names = [str(d) if numbers else WORDS[d] for d in digits]
    if len(digits) == 1:
        return f"a handwritten {names[0]}"
    return " and ".join(f"{_article(d)} {name}" for d, name in zip(digits, names, strict=True))


def reading(*digits: int) -> str:
    """The answer to ASK_ONE or ASK_TWO: `seven`, `three and five`."""
    return " and ".join(WORDS[d] for d in digits)


@functools.cache
def sums(split: str) -> list[tuple[str, str]]:
    """Questions of arithmetic, such as `3+5`, with their answers, such as `3+5=8`.

    Thoughts consist of sums of two digits. All of these sums are in `train`, six times each. A third of the
    other questions is held out for `test`.
    """
    facts = [(a, b) for a in range(10) for b in range(10)]
    others = [(f"{a}+{b}", a + b) for a in range(21) for b in range(21) if (a, b) not in facts]
    others += [(f"{a}-{b}", a - b) for a in range(21) for b in range(a + 1)]
    order = np.random.default_rng(1).permutation(len(others))
    chosen = [
        others[i] for i in (order[: len(others) // 3] if split == "test" else order[len(others) // 3 :])
    ]
    if split != "test":
        chosen += 6 * [(f"{a}+{b}", a + b) for a, b in facts]
    return [(question, f"{question}={result}") for question, result in chosen]


@functools.cache
def chains(split: str) -> list[tuple[int, int, int, int]]:
    """Chains of four digits, which are added in three steps. The sum of the first three digits is a digit.

    `train` has 600 chains, `validation` 200 and `test` 400. The 1000 chains of `prompts` are for
    reinforcement learning, and no training example explains them."""
    cases = [
        (a, b, c, d) for a in range(10) for b in range(10 - a) for c in range(10 - a - b) for d in range(10)
    ]
    return _part(cases, split, {"test": 400, "validation": 200, "prompts": 1000, "train": 600})


@functools.cache
def pairs(split: str) -> list[tuple[int, int]]:
    """Ordered pairs of digits whose sum is a digit: 35 in `train`, 5 in `validation` and 15 in `test`."""
    cases = [(a, b) for a in range(10) for b in range(10 - a)]
    return _part(cases, split, {"test": 15, "validation": 5, "train": 35})


def thought(*numbers: int) -> str:
    """The thought that adds numbers: `3+5=8`, or `3+1=4 4+4=8 8+8=16`."""
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    return " ".join(steps)


def addition(*numbers: int) -> str:
    """The question for the sum of numbers: `3+1+4+8`."""
    return "+".join(map(str, numbers))


def request(a: int, b: int) -> str:
    """The prompt that asks for a drawing of a sum: `draw 3+4`."""
    return f"draw {addition(a, b)}"


def corpus() -> Iterator[str]:
    """All texts about digits, which train the text tokenizer. Thoughts have no tags here."""
    for a in range(10):
        yield from (caption(a), caption(a, numbers=True), chat(ASK_ONE, reading(a)))
        for b in range(10):
            yield from (caption(a, b), chat(ASK_TWO, reading(a, b)), _statement(a, b))
            yield from (caption(a, b, numbers=True), chat(ASK_NUMBERS, addition(a, b)))
            yield from (chat(ASK_SUM, str(a + b)), chat(request(a, b), thought(a, b)))
    for question, answer in sums("train"):
        yield chat(question, answer)


@dataclasses.dataclass(frozen=True)
class DigitRecords:
    """Records of one kind about the digits of a split. Any record can be read by its index.

        captions     t2i       one or two scans and what they show, in words or as numbers
        statements   lm        `three plus five is 8`
        sums         lm_chat   `3+5`, answered `3+5=8`
        reading      mmu       one or two scans, and which digits they are, in words or as numbers
        text_cot     lm_chat   `3+1+4+8`, answered after a thought
        vqa_sum      mmu       two scans, their sum after a thought
        draw_sum     r2i       `draw 3+4`, a thought, and a scan of the sum
        pages        t2i       four lines of four scans of a digit, and which digits these are

    Kinds with scans have 65536 records. Scans are chosen at random for each record.
    """

    kind: Kind
    split: str

    def __len__(self) -> int:
        table = {"statements": 100, "sums": len(sums(self.split)), "text_cot": len(chains(self.split))}
        return table.get(self.kind, 2**16)

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.kind} of {self.split} has {len(self)} records, none is number {i}")
        rng = np.random.default_rng([KINDS.index(self.kind), SPLITS.index(self.split), i])
        return getattr(self, f"_{self.kind}")(rng, i, f"{self.kind}-{self.split}-{i}")

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the scans and of texts about them, which differs if these differ."""
        seen = hashlib.sha256(load(self.split).pixels.tobytes())
        for i in range(min(len(self), 64)):
            record = self[i]
            seen.update(repr((record.key, record.texts, record.turns)).encode())
        return seen.hexdigest()

    def _captions(self, rng, i, key):
        image, labels = self._canvas(rng, 1 + rng.integers(2))
        words = caption(*labels)
        return Record(key, image, texts=(words, words, caption(*labels, numbers=True)))

    def _statements(self, rng, i, key):
        return Record(key, texts=(_statement(*divmod(i, 10)),))

    def _sums(self, rng, i, key):
        return Record(key, turns=_turns(*sums(self.split)[i]))

    def _reading(self, rng, i, key):
        image, labels = self._canvas(rng, 1 + rng.integers(2))
        if rng.integers(3) == 0:
            return Record(key, image, turns=_turns(ASK_NUMBERS, addition(*labels)))
        ask = ASK_ONE if len(labels) == 1 else ASK_TWO
        return Record(key, image, turns=_turns(ask, reading(*labels)))

    def _text_cot(self, rng, i, key):
        numbers = chains(self.split)[i]
        return Record(key, turns=_turns(addition(*numbers), _think(*numbers)))

    def _vqa_sum(self, rng, i, key):
        image, labels = self._canvas(rng, 2)
        return Record(key, image, turns=_turns(ASK_SUM, _think(*labels)))

    def _draw_sum(self, rng, i, key):
        pair = pairs(self.split)[rng.integers(len(pairs(self.split)))]
        scans = load(self.split)
        which = rng.choice(np.flatnonzero(scans.labels == sum(pair)))
        turns = _turns(request(*pair), f"{THINK}{thought(*pair)}{END_THINK}")
        return Record(key, canvas(scans.pixels[which]), turns=turns)

    def _pages(self, rng, i, key):
        scans, labels = load(self.split), rng.integers(10, size=LINES)
        which = np.stack([rng.choice(np.flatnonzero(scans.labels == d), LINES) for d in labels])
        return Record(key, page(scans.pixels[which]), texts=(page_caption(*labels),))

    def _canvas(self, rng, n):
        scans = load(self.split)
        which = rng.integers(len(scans.labels), size=n)
        return canvas(*scans.pixels[which]), [int(d) for d in scans.labels[which]]


def open_records(kind: Kind, split: str) -> DigitRecords:
    """Opens records of a kind. Raises ValueError for an unknown kind or split."""
    for name, value, known in (("kind", kind, KINDS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    return DigitRecords(kind, split)


def _think(*numbers: int) -> str:
    return f"{THINK}{thought(*numbers)}{END_THINK}{sum(numbers)}"


def _turns(question: str, answer: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


def _part(cases: list, split: str, sizes: dict[str, int]) -> list:
    """The cases of a split, chosen at random. Raises ValueError for an unknown split."""
    if split not in sizes:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(sizes)}")
    ends = dict(zip(sizes, itertools.accumulate(sizes.values()), strict=True))
    order = np.random.default_rng(2).permutation(len(cases))
    return [cases[i] for i in order[ends[split] - sizes[split] : ends[split]]]


def _statement(a: int, b: int) -> str:
    return f"{WORDS[a]} plus {WORDS[b]} is {a + b}"


def _article(digit: int) -> str:
    return "an" if digit == 8 else "a"
