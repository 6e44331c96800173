"""What a model is worth on long sums with their running totals (`data.totals`), by any rule of decoding:
right chains among held-out ones, case by case, and how long it took.
"""

import dataclasses
import math
import time

import numpy as np

from mmada_jax.data import totals
from mmada_jax.diffusion.rules import TextRule
from mmada_jax.serve.api import MMaDA

# Plain decoding: the most certain token in each step, block after block.
PLAIN = TextRule(block=32)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Answers to chains of `rounds` rounds. `chain_B` and `total_B` say which chains are right as a whole
    and at their end, `lines_B` counts the lines before the first wrong one. `seconds` is the time of all
    answers, with compiling."""

    rounds: int
    chain_B: np.ndarray
    total_B: np.ndarray
    lines_B: np.ndarray
    answers: list[str]
    seconds: float

    def __str__(self):
        n, right = len(self.chain_B), int(self.chain_B.sum())
        return (
            f"{n} chains of {self.rounds} rounds: {right} right ({100 * right / n:.1f} %), the last total "
            f"of {int(self.total_B.sum())}; {self.lines_B.mean():.1f} lines before the first wrong one; "
            f"{self.seconds:.1f} s"
        )


def chains(
    model: MMaDA,
    n: int,
    rounds: int = 4,
    rule: TextRule = PLAIN,
    max_new: int | None = None,
    split: str = "test",
    seed: int = 0,
) -> Outcome:
    """Asks for the totals of the first `n` chains of a split. Two rules are asked about the same chains.
    `max_new` is by default what the answers need, in whole blocks of 32 tokens."""
    records = totals.open_records(str(rounds), split)
    questions = [records.chain(i).question for i in range(n)]
    new = max_new or -(-len(_answer_ids(model, records.chain(0))) // 32) * 32
    began = time.perf_counter()
    answers = [text.text for text in model.generate(questions, rule, new, seed=seed)]
    seconds = time.perf_counter() - began
    verdicts = [totals.check(*pair) for pair in zip(questions, answers, strict=True)]
    return Outcome(
        rounds,
        *(np.array([getattr(v, name) for v in verdicts]) for name in ("chain", "total", "lines")),
        answers,
        seconds,
    )


def mcnemar(a_B: np.ndarray, b_B: np.ndarray) -> tuple[int, int, float]:
    """Two rules on the same cases: how many only the first has right, how many only the second, and the
    two-sided p of the exact test that both are as likely."""
    only_a, only_b = int(np.sum(a_B & ~b_B)), int(np.sum(b_B & ~a_B))
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    return only_a, only_b, min(1.0, 2 * tail)


def _answer_ids(model: MMaDA, chain: totals.Chain) -> list[int]:
    return [*model.tokenizer.encode(chain.answer), model.vocab.end_turn]
