"""Records -> batches: tokenisation, image encoding, layout. A batch is a function of its step."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from mmada_jax import layout
from mmada_jax.data import digits
from mmada_jax.data.tokenizer import TextTokenizer
from mmada_jax.vocab import Vocab


def rows_per_task(mixture: dict[str, int], batch_size: int) -> dict[str, int]:
    """Splits `batch_size` global rows by the mixture's weights, exactly (largest remainders)."""
    unknown = [task for task in mixture if task not in layout.TASKS]
    total = sum(mixture.values())
    if unknown or total <= 0 or min(mixture.values()) < 0:
        raise ValueError(
            f"mixture {mixture} must give non-negative weights, not all zero, to tasks among "
            f"{', '.join(layout.TASKS)}"
        )
    shares = {task: batch_size * weight / total for task, weight in mixture.items()}
    rows = {task: int(share) for task, share in shares.items()}
    by_remainder = sorted(shares, key=lambda task: rows[task] - shares[task])
    for task in by_remainder[: batch_size - sum(rows.values())]:
        rows[task] += 1
    return rows


@dataclasses.dataclass(frozen=True)
class DigitRows:
    """Batches of token rows about scans of digits; called with a step.

    `encode` maps canvases [n, 8, 16, 1] to codes [n, ...].
    """

    tokenizer: TextTokenizer
    vocab: Vocab
    encode: Callable[[np.ndarray], jax.Array]
    rows: dict[str, int]
    max_text: int
    n_image: int
    cond_dropout: float
    seed: int

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.max_text + self.n_image + 3

    def __call__(self, step: int) -> layout.Batch:
        """The whole batch of `step`, numpy."""
        records = digits.records("train", self.seed, step, self.rows)
        dropped = np.random.default_rng([self.seed, step, 1]).random(len(records))
        pixels = [r.pixels for r in records if r.pixels is not None]
        # All rows are encoded, text rows as blanks, so that one shape is compiled.
        blank = np.full((digits.HEIGHT, digits.WIDTH, 1), -1, np.float32)
        canvases = np.stack(pixels + [blank] * (len(records) - len(pixels)))
        codes = self.vocab.image_ids(np.asarray(self.encode(canvases)).reshape(len(records), -1))
        images = iter(codes)
        return layout.stack([
            self._row(record, images, drop < self.cond_dropout)
            for record, drop in zip(records, dropped, strict=True)
        ])  # fmt: skip

    def _row(self, record: digits.Record, images, drop: bool) -> layout.Batch:
        ids = self.tokenizer.encode(record.text)
        if record.task == "t2i":
            layout.check_fits(len(ids) + 2, self.max_text, f"caption {record.text!r} with BOS, EOS")
            return layout.t2i(self.vocab, [] if drop else ids, next(images), self.max_text)
        if record.task == "mmu":
            layout.check_fits(len(ids) + 1, self.max_text, f"text {record.text!r} with EOS")
            return layout.mmu(self.vocab, next(images), ids, self.max_text)
        make = {"lm": layout.lm, "lm_chat": layout.lm_chat}[record.task]
        return make(self.vocab, ids, self.length)


@dataclasses.dataclass(frozen=True)
class DigitCanvases:
    """Batches of canvases [rows, 8, 16, 1] for training the image tokenizer; called with a step."""

    rows: int
    seed: int

    def __call__(self, step: int) -> np.ndarray:
        """The canvases of `step`."""
        return np.stack([r.pixels for r in digits.records("train", self.seed, step, {"mmu": self.rows})])
