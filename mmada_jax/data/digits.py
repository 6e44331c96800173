"""Real scans of handwritten digits, and the sentences about them that the quickstart trains on.

scikit-learn's `load_digits`: 1797 scans of 8x8 pixels (UCI, Alpaydin and Kaynak 1998). They are split
by scan, so that a held-out scan is seen by no model in training. A canvas is 8x16 pixels with one
digit in the middle or two side by side.
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
# How a model of them generates where nothing else is said, as fields of a generation_config.json.
GENERATION = {"image_steps": 12, "image_guidance": 1.0, "question": ASK_ONE}
SPLITS = ("train", "validation", "test")
KINDS = ("captions", "statements", "sums", "reading", "text_cot", "vqa_sum", "draw_sum")

Kind = Literal[KINDS]


@dataclasses.dataclass(frozen=True)
class Scans:
    """Scans of one split: `pixels` float32 [n, 8, 8] in [-1, 1], `labels` int [n]."""

    pixels: np.ndarray
    labels: np.ndarray


@functools.cache
def load(split: str) -> Scans:
    """The scans of `train` (70 %), `validation` (10 %) or `test` (20 %), always the same ones."""
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
    """One scan in the middle or two side by side -> [8, 16, 1]."""
    out = np.full((HEIGHT, WIDTH, 1), -1, np.float32)
    left = (WIDTH - SIDE * len(scans)) // 2
    for i, scan in enumerate(scans):
        out[:, left + SIDE * i : left + SIDE * (i + 1), 0] = scan
    return out


def cut(canvas_IJ1: np.ndarray, n: int) -> list[np.ndarray]:
    """A canvas [8, 16, 1] -> its n scans [8, 8], left to right."""
    left = (WIDTH - SIDE * n) // 2
    return [canvas_IJ1[:, left + SIDE * i : left + SIDE * (i + 1), 0] for i in range(n)]


def caption(*digits: int, numbers: bool = False) -> str:
    """`a handwritten seven`, or `a three and a five`; with `numbers`, `a handwritten 7`, `a 3 and a 5`."""
    names = [str(d) if numbers else WORDS[d] for d in digits]
    if len(digits) == 1:
        return f"a handwritten {names[0]}"
    return " and ".join(f"{_article(d)} {name}" for d, name in zip(digits, names, strict=True))


def reading(*digits: int) -> str:
    """The answer to ASK_ONE or ASK_TWO: `seven`, `three and five`."""
    return " and ".join(WORDS[d] for d in digits)


@functools.cache
def sums(split: str) -> list[tuple[str, str]]:
    """Questions of arithmetic, `3+5`, and their answers, `3+5=8`.

    Sums of two digits are what thoughts are made of: those are all in `train`, six times each. Of the
    others a third is held out for `test`.
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
    """Digits to add in three steps, the first three of which make a digit: 600 chains to `train` on, 200
    for `validation`, 400 for `test`, and 1000 `prompts` that no training explains, for reinforcement
    learning."""
    cases = [
        (a, b, c, d) for a in range(10) for b in range(10 - a) for c in range(10 - a - b) for d in range(10)
    ]
    return _part(cases, split, {"test": 400, "validation": 200, "prompts": 1000, "train": 600})


@functools.cache
def pairs(split: str) -> list[tuple[int, int]]:
    """Digits whose sum is a digit: 35 ordered pairs, 5 for `validation` and 15 for `test`."""
    cases = [(a, b) for a in range(10) for b in range(10 - a)]
    return _part(cases, split, {"test": 15, "validation": 5, "train": 35})


def thought(*numbers: int) -> str:
    """How numbers are added: `3+5=8`, or `3+1=4 4+4=8 8+8=16`."""
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    return " ".join(steps)


def addition(*numbers: int) -> str:
    """A question in text: `3+1+4+8`."""
    return "+".join(map(str, numbers))


def request(a: int, b: int) -> str:
    """What asks for a drawn sum: `draw 3+4`."""
    return f"draw {addition(a, b)}"


def corpus() -> Iterator[str]:
    """All texts that occur, for training the text tokenizer; thoughts without their tags."""
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
    """One kind of records about the digits of a split, by random access.

        captions     t2i       one or two scans and what they show, in words or as numbers
        statements   lm        `three plus five is 8`
        sums         lm_chat   `3+5`, answered `3+5=8`
        reading      mmu       one or two scans, and which digits they are, in words or as numbers
        text_cot     lm_chat   `3+1+4+8`, answered after a thought
        vqa_sum      mmu       two scans, their sum after a thought
        draw_sum     r2i       `draw 3+4`, a thought, and a scan of the sum

    Scans are put together at random, 65536 records of them.
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
        """Changes with the scans and with what is said about them."""
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
    """The cases of a split, chosen at random. Raises ValueError for an unknown one."""
    if split not in sizes:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(sizes)}")
    ends = dict(zip(sizes, itertools.accumulate(sizes.values()), strict=True))
    order = np.random.default_rng(2).permutation(len(cases))
    return [cases[i] for i in order[ends[split] - sizes[split] : ends[split]]]


def _statement(a: int, b: int) -> str:
    return f"{WORDS[a]} plus {WORDS[b]} is {a + b}"


def _article(digit: int) -> str:
    return "an" if digit == 8 else "a"
