"""What a model is worth on scans of handwritten digits: reading, drawing, inpainting, arithmetic,
reconstruction and thinking (in text, about an image, before drawing one), each on held-out cases.

Every metric counts right cases among all. Whether a drawn digit is the right one is decided by a judge that
has nothing to do with our models: a support vector machine, fitted on the training scans. What is measured
while a model trains, on rows of any task, is in `held_out`.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from mmada_jax.data import digits
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.serve.api import MMaDA
from mmada_jax.tokens.tokenizer import split_thought

# The steps and the guidance were chosen on the validation scans. One rule, and so one program, draws and
# inpaints: where all tokens of an image are hidden, both quotas are the same.
DRAW = ImageRule(
    steps=digits.GENERATION["image_steps"], guidance=digits.GENERATION["image_guidance"], quota="hidden"
)


@dataclasses.dataclass(frozen=True)
class Count:
    """`correct` of `total` cases."""

    correct: int
    total: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share (Wilson 1927)."""
        n, p, z = self.total, self.correct / self.total, 1.96
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self):
        return f"{self.correct}/{self.total} ({100 * self.correct / self.total:.1f} %)"


class Judge:
    """Reads single scans: scikit-learn's SVC, fitted on the training scans."""

    def __init__(self):
        from sklearn.svm import SVC

        train = digits.load("train")
        self._svc = SVC(gamma=0.05, C=10.0).fit(self._features(train.pixels), train.labels)

    def __call__(self, scans: Any) -> np.ndarray:
        """Scans [n, 8, 8] around [-1, 1] -> digits [n]."""
        return self._svc.predict(self._features(np.asarray(scans)))

    def held_out(self, split: str = "test") -> Count:
        """Its own accuracy on scans that it hasn't seen."""
        scans = digits.load(split)
        return _count(self(scans.pixels) == scans.labels)

    @staticmethod
    def _features(scans):
        return (np.clip(scans, -1, 1).reshape(len(scans), -1) + 1) / 2


def reconstruction(
    model: MMaDA, judge: Judge, n: int, split: str = "test"
) -> tuple[Count, float, np.ndarray]:
    """Digits that the judge still reads after encoding and decoding, `n` canvases at a time; PSNR in dB
    (peak 2: pixels lie in [-1, 1]) of the canvases; the reconstructed canvases."""
    scans = digits.load(split)
    pixels = np.stack([digits.canvas(scan) for scan in scans.pixels])
    # The last part is filled up, so that all parts share a program.
    parts = np.resize(pixels, (-(-len(pixels) // n), n, *pixels.shape[1:]))
    rebuilt = np.concatenate([model.decode(model.encode(part)) for part in parts])[: len(pixels)]
    rebuilt = np.clip(rebuilt, -1, 1)
    psnr = 10 * np.log10(4 / np.mean((rebuilt - pixels) ** 2))
    read = judge([digits.cut(canvas, 1)[0] for canvas in rebuilt])
    return _count(read == scans.labels), float(psnr), rebuilt


def read_digits(
    model: MMaDA, n_digits: int, n: int, split: str = "test", seed: int = 0
) -> tuple[Count, list]:
    """vqa_one, vqa_two: the digits on canvases of held-out scans, asked for in words."""
    canvases, labels = _canvases(n_digits, n, split, seed)
    ask = digits.ASK_ONE if n_digits == 1 else digits.ASK_TWO
    answers = [text.text for text in model.answer(canvases, [ask] * n, _from_the_left(model), seed=seed)]
    wanted = [digits.reading(*row) for row in labels]
    return _count(np.array(answers) == np.array(wanted)), list(zip(canvases, answers, wanted, strict=True))


def draw_digits(
    model: MMaDA, judge: Judge, n_digits: int, n: int, seed: int = 0, rule: ImageRule = DRAW
) -> tuple[Count, np.ndarray, Any]:
    """t2i_one, t2i_two: whether the judge reads what the caption asked for, all digits of it."""
    wanted = _balanced(n_digits, n)
    drawn = model.draw([digits.caption(*row) for row in wanted], rule, seed=seed)
    pixels = model.decode(np.stack([d.codes for d in drawn]))
    read = judge([scan for canvas in pixels for scan in digits.cut(canvas, n_digits)])
    return _count((read.reshape(wanted.shape) == wanted).all(axis=1)), pixels, wanted


def draw_pages(
    model: MMaDA, judge: Judge, n: int, seed: int = 0, rule: ImageRule = DRAW
) -> tuple[Count, Count, np.ndarray]:
    """Pages of four lines: the scans on them that the judge reads as the caption has them, the pages of
    which all scans are so, and the pages."""
    wanted = np.random.default_rng([seed, 3]).integers(10, size=(n, digits.LINES))
    drawn = model.draw([digits.page_caption(*row) for row in wanted], rule, seed=seed)
    pixels = np.concatenate([model.decode(of.codes[None]) for of in drawn])
    read = judge(np.concatenate([digits.cut_page(page).reshape(-1, 8, 8) for page in pixels]))
    right = read.reshape(n, digits.LINES, digits.LINES) == wanted[:, :, None]
    return _count(right.ravel()), _count(right.all(axis=(1, 2))), pixels


def inpaint_half(
    model: MMaDA, judge: Judge, n: int, split: str = "test", seed: int = 0
) -> tuple[Count, dict]:
    """inpaint: one of two digits is hidden; given the caption and the other, is it the right one?"""
    canvases, labels = _canvases(2, n, split, seed + 1)
    side = np.arange(n) % 2
    masks = np.zeros((n, digits.HEIGHT, digits.WIDTH), bool)
    for mask, s in zip(masks, side, strict=True):
        mask[:, digits.SIDE * s : digits.SIDE * (s + 1)] = True
    drawn = model.inpaint(canvases, masks, [digits.caption(*row) for row in labels], DRAW, seed=seed)
    pixels = model.decode(np.stack([d.codes for d in drawn]))
    read = judge([digits.cut(canvas, 2)[s] for canvas, s in zip(pixels, side, strict=True)])
    pictures = {"canvases": canvases, "masks": masks, "pixels": pixels, "labels": labels}
    return _count(read == labels[np.arange(n), side]), pictures


def arithmetic(model: MMaDA, n: int, seed: int = 0) -> tuple[Count, list]:
    """text_arithmetic: sums and differences that were held out."""
    questions = digits.sums("test")[:n]
    answers = model.generate([question for question, _ in questions], _from_the_left(model), seed=seed)
    rows = [(q, text.text, want) for (q, want), text in zip(questions, answers, strict=True)]
    return _count(np.array([answer == want for _, answer, want in rows])), rows


def text_cot(
    model: MMaDA,
    n: int,
    split: str = "test",
    seed: int = 0,
    rule: TextRule | None = None,
    max_new: int | None = None,
) -> tuple[Count, list]:
    """text_cot: sums of four digits that were held out, with the intermediate results as a thought, by the
    rule, greedy by default. More cases than there are sums ask them again, which says something more only
    with a temperature."""
    held_out = digits.chains(split)
    chains = [held_out[i % len(held_out)] for i in range(n)]
    questions = [digits.addition(*chain) for chain in chains]
    rule = dataclasses.replace(rule, stop=model.vocab.eos) if rule else _from_the_left(model)
    texts = [text.text for text in model.generate(questions, rule, max_new, seed=seed)]
    wanted = [str(sum(chain)) for chain in chains]
    return _answered(texts, wanted), list(zip(questions, texts, wanted, strict=True))


def vqa_sum(model: MMaDA, n: int, split: str = "test", seed: int = 0) -> tuple[Count, list]:
    """vqa_sum: the sum of the two digits on canvases of held-out scans, after a thought."""
    canvases, labels = _canvases(2, n, split, seed + 2)
    questions = [digits.ASK_SUM] * n
    rule = _from_the_left(model)
    texts = [text.text for text in model.answer(canvases, questions, rule, seed=seed)]
    wanted = [str(total) for total in labels.sum(axis=1)]
    return _answered(texts, wanted), list(zip(canvases, texts, wanted, strict=True))


def draw_sums(
    model: MMaDA, judge: Judge, n: int, split: str = "test", seed: int = 0
) -> tuple[dict, np.ndarray, list]:
    """r2i_thought, r2i_image: sums of held-out pairs, thought, then drawn; is the thought right, and does
    the judge read the sum in the image? Then the images, and (prompt, thought) of each."""
    held_out = digits.pairs(split)
    pairs = [held_out[i % len(held_out)] for i in range(n)]
    prompts = [digits.request(*pair) for pair in pairs]
    made = model.think_and_draw(prompts, _from_the_left(model), DRAW, seed=seed)
    thoughts = [split_thought(text.text)[0] for text, _ in made]
    wanted = [digits.thought(*pair) for pair in pairs]
    pixels = model.decode(np.stack([drawing.codes for _, drawing in made]))
    read = judge([digits.cut(canvas, 1)[0] for canvas in pixels])
    counts = {
        "r2i_thought": _count(np.array(thoughts) == np.array(wanted)),
        "r2i_image": _count(read == np.sum(pairs, axis=1)),
    }
    return counts, pixels, list(zip(prompts, thoughts, strict=True))


def _from_the_left(model: MMaDA) -> TextRule:
    """Token by token, until every answer has ended. All answers and thoughts are found by this rule, so
    that equally many rows of them share a program."""
    return TextRule(block=1, stop=model.vocab.eos)


def _answered(texts: list[str], wanted: list[str]) -> Count:
    answers = [split_thought(text)[1] for text in texts]
    return _count(np.array(answers) == np.array(wanted))


def _count(right: np.ndarray) -> Count:
    return Count(int(np.sum(right)), len(right))


def _canvases(n_digits: int, n: int, split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Every scan of the split once in each place before any is used twice."""
    scans = digits.load(split)
    rng = np.random.default_rng([seed, n_digits])
    rounds = -(-n // len(scans.labels))
    which = np.stack([
        np.concatenate([rng.permutation(len(scans.labels)) for _ in range(rounds)])[:n]
        for _ in range(n_digits)
    ], axis=1)  # fmt: skip
    return np.stack([digits.canvas(*scans.pixels[row]) for row in which]), scans.labels[which]


def _balanced(n_digits: int, n: int) -> np.ndarray:
    """[n, n_digits]: all numbers of that many digits, equally often."""
    numbers = np.arange(n) % 10**n_digits
    return np.stack([numbers // 10**k % 10 for k in reversed(range(n_digits))], axis=1)
