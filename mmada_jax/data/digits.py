"""Real scans of handwritten digits, and the sentences about them that the quickstart trains on.

scikit-learn's `load_digits`: 1797 scans of 8x8 pixels (UCI, Alpaydin and Kaynak 1998). They are split
by scan, so that a held-out scan is seen by no model in training. A canvas is 8x16 pixels with one
digit in the middle or two side by side.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from mmada_jax.data.tokenizer import chat

HEIGHT, WIDTH, SIDE = 8, 16, 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ASK_ONE = "which digit is this?"
ASK_TWO = "which digits are these?"
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Scans:
    """Scans of one split: `pixels` float32 [n, 8, 8] in [-1, 1], `labels` int [n]."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Record:
    """One training example, before tokenisation; `pixels` is a canvas [8, 16, 1] or None."""

    task: str
    text: str
    pixels: np.ndarray | None = None


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


def caption(*digits: int) -> str:
    """`a handwritten seven`, or `a three and a five`."""
    if len(digits) == 1:
        return f"a handwritten {WORDS[digits[0]]}"
    return " and ".join(f"{_article(d)} {WORDS[d]}" for d in digits)


def reading(*digits: int) -> str:
    """The answer to ASK_ONE or ASK_TWO: `seven`, `three and five`."""
    return " and ".join(WORDS[d] for d in digits)


def sums(split: str) -> list[tuple[str, str]]:
    """Questions of arithmetic and their answers; a third of them is held out for `test`."""
    pairs = [(f"{a} + {b}", str(a + b)) for a in range(21) for b in range(21)]
    pairs += [(f"{a} - {b}", str(a - b)) for a in range(21) for b in range(a + 1)]
    order = np.random.default_rng(1).permutation(len(pairs))
    n_test = len(pairs) // 3
    return [pairs[i] for i in (order[:n_test] if split == "test" else order[n_test:])]


def corpus() -> Iterator[str]:
    """All texts that occur, for training the text tokenizer."""
    for a in range(10):
        yield from (caption(a), chat(ASK_ONE, reading(a)))
        for b in range(10):
            yield from (caption(a, b), chat(ASK_TWO, reading(a, b)), _statement(a, b))
    for question, answer in sums("train"):
        yield chat(question, answer)


def records(split: str, seed: int, step: int, rows: dict[str, int]) -> list[Record]:
    """The records of one step, `rows` of each task: a function of (seed, step) alone."""
    rng = np.random.default_rng([seed, step])
    scans = load(split)
    out = []
    for task, count in rows.items():
        for _ in range(count):
            if task in ("t2i", "mmu"):
                out.append(_image_record(rng, task, scans))
            elif task == "lm_chat":
                question, answer = sums(split)[rng.integers(len(sums(split)))]
                out.append(Record(task, chat(question, answer)))
            elif task == "lm":
                out.append(Record(task, _statement(*rng.integers(10, size=2))))
            else:
                raise ValueError(f"the digits have no records for task {task!r}")
    return out


def _image_record(rng: np.random.Generator, task: str, scans: Scans) -> Record:
    which = rng.integers(len(scans.labels), size=1 + rng.integers(2))
    digits = [int(d) for d in scans.labels[which]]
    pixels = canvas(*scans.pixels[which])
    if task == "t2i":
        return Record(task, caption(*digits), pixels)
    ask = ASK_ONE if len(digits) == 1 else ASK_TWO
    return Record(task, chat(ask, reading(*digits)), pixels)


def _statement(a: int, b: int) -> str:
    return f"{WORDS[a]} plus {WORDS[b]} is {a + b}"


def _article(digit: int) -> str:
    return "an" if digit == 8 else "a"


sums = functools.cache(sums)
