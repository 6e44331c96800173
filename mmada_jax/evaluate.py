"""What is measured on held-out scans: reading, drawing, inpainting, arithmetic, reconstruction.

Every metric is a pair of counts. Whether a drawn digit is the right one is decided by a judge that
has nothing to do with our models: a support vector machine on the training scans.
"""

import dataclasses
from typing import Any

import numpy as np

from mmada_jax.data import digits
from mmada_jax.denoise import ImageRule, TextRule

# Chosen on the validation scans.
DRAW = ImageRule(steps=12, guidance=1.0)
INPAINT = ImageRule(steps=12, guidance=1.0, quota="hidden")


@dataclasses.dataclass(frozen=True)
class Count:
    """`correct` of `total` cases."""

    correct: int
    total: int

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


def reconstruction(model, judge: Judge, split: str = "test") -> tuple[Count, float, np.ndarray]:
    """Digits that the judge still reads after encoding and decoding; PSNR in dB (peak 2: pixels lie
    in [-1, 1]) of the canvases; the reconstructed canvases."""
    scans = digits.load(split)
    pixels = np.stack([digits.canvas(scan) for scan in scans.pixels])
    rebuilt = np.clip(model.decode(model.encode(pixels)), -1, 1)
    psnr = 10 * np.log10(4 / np.mean((rebuilt - pixels) ** 2))
    read = judge([digits.cut(canvas, 1)[0] for canvas in rebuilt])
    return _count(read == scans.labels), float(psnr), rebuilt


def read_digits(model, n_digits: int, n: int, split: str = "test", seed: int = 0) -> tuple[Count, list]:
    """vqa_one, vqa_two: the digits on canvases of held-out scans, asked for in words."""
    canvases, labels = _canvases(n_digits, n, split, seed)
    ask = digits.ASK_ONE if n_digits == 1 else digits.ASK_TWO
    answers = [text.text for text in model.answer(canvases, [ask] * n, seed=seed)]
    wanted = [digits.reading(*row) for row in labels]
    return _count(np.array(answers) == np.array(wanted)), list(zip(canvases, answers, wanted, strict=True))


def draw_digits(model, judge: Judge, n_digits: int, n: int, seed: int = 0) -> tuple[Count, np.ndarray, Any]:
    """t2i_one, t2i_two: whether the judge reads what the caption asked for, all digits of it."""
    wanted = _balanced(n_digits, n)
    drawn = model.draw([digits.caption(*row) for row in wanted], DRAW, seed=seed)
    pixels = model.decode(np.stack([d.codes for d in drawn]))
    read = judge([scan for canvas in pixels for scan in digits.cut(canvas, n_digits)])
    return _count((read.reshape(wanted.shape) == wanted).all(axis=1)), pixels, wanted


def inpaint_half(model, judge: Judge, n: int, split: str = "test", seed: int = 0) -> tuple[Count, dict]:
    """inpaint: one of two digits is hidden; given the caption and the other, is it the right one?"""
    canvases, labels = _canvases(2, n, split, seed + 1)
    side = np.arange(n) % 2
    masks = np.zeros((n, digits.HEIGHT, digits.WIDTH), bool)
    for mask, s in zip(masks, side, strict=True):
        mask[:, digits.SIDE * s : digits.SIDE * (s + 1)] = True
    drawn = model.inpaint(canvases, masks, [digits.caption(*row) for row in labels], INPAINT, seed=seed)
    pixels = model.decode(np.stack([d.codes for d in drawn]))
    read = judge([digits.cut(canvas, 2)[s] for canvas, s in zip(pixels, side, strict=True)])
    pictures = {"canvases": canvases, "masks": masks, "pixels": pixels, "labels": labels}
    return _count(read == labels[np.arange(n), side]), pictures


def arithmetic(model, n: int, seed: int = 0) -> tuple[Count, list]:
    """text_arithmetic: sums and differences that were held out."""
    questions = digits.sums("test")[:n]
    # Short blocks from the left, and an end when every answer has ended.
    rule = TextRule(steps=40, block=4, stop=model.vocab.eos)
    answers = model.generate([question for question, _ in questions], rule, max_new=40, seed=seed)
    rows = [(q, text.text, want) for (q, want), text in zip(questions, answers, strict=True)]
    return _count(np.array([answer == want for _, answer, want in rows])), rows


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
