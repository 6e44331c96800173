"""Long sums with all running totals written out: a text task whose answers have hundreds of tokens, and
which a program checks.

    question  a2:x+3=y          answer  <think>a1:0+3=3
              b2:x+1=y                  b1:3+1=4
              ...                       ...
              l2:x+2=y                  l1:3+2=5
                                        a2:5+3=8
                                        ...
                                        l2:8+2=0</think>0

A sum has twelve terms of 1 to 3, which are added in one to nine rounds. A line of the question says the
name of a term, a letter, the number of rounds, and the term. A line of the answer says the name, the round,
the total so far, the term and the new total. Totals are last digits, so each is a single token. A line has
9 tokens, a question 107, and the answer to r rounds 108 r + 3 with the end of its turn.

It is made to be learned in minutes. Every token follows from a few others, nearly all of them at a constant
distance: the term from the question or the round before, the new total from the line itself. And terms are
small, since a total then says much about the next one. Where it says nothing, as after terms of 0 to 9, no
gradient leads to addition: a small model copies all else and guesses.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
import zlib

import numpy as np

from mmada_jax.data.records import Record
from mmada_jax.tokens.tokenizer import END_THINK, THINK, split_thought

NAMES = "abcdefghijkl"
TERMS = (1, 2, 3)
CLOCK = 10  # totals are taken modulo it
ROUNDS = 9  # at most
SPLITS = ("train", "validation", "test")
RECORDS = 2**18  # of each split

_BUCKETS = ("test", "validation", *["train"] * 8)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Numbers to add, one of TERMS for each of NAMES, in so many rounds."""

    terms: tuple[int, ...]
    rounds: int

    @property
    def question(self) -> str:
        """What asks for the totals."""
        return "\n".join(
            f"{name}{self.rounds}:x+{term}=y" for name, term in zip(NAMES, self.terms, strict=False)
        )

    @property
    def answer(self) -> str:
        """The right answer: all totals as a thought, then the last one."""
        lines, total = [], 0
        for number, (name, term) in itertools.product(
            range(1, self.rounds + 1), zip(NAMES, self.terms, strict=False)
        ):
            lines.append(f"{name}{number}:{total}+{term}={(total + term) % CLOCK}")
            total = (total + term) % CLOCK
        return THINK + "\n".join(lines) + END_THINK + str(total)

    @property
    def split(self) -> str:
        """The one split that the terms belong to, in any number of rounds. Of all terms a tenth are of
        `test`, a tenth of `validation`."""
        return _BUCKETS[zlib.crc32(bytes(self.terms)) % len(_BUCKETS)]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is right in an answer: `chain`, all of it; `total`, the total after the thought; `lines`, the
    number of lines before the first that is wrong."""

    chain: bool
    total: bool
    lines: int


def parse(question: str) -> Chain:
    """The chain of a question. Raises ValueError for a text that isn't one."""
    rounds = re.match("[a-z]([1-9]):", question)
    chain = Chain(tuple(map(int, re.findall("[+]([1-3])=", question))), int(rounds[1]) if rounds else 0)
    if len(chain.terms) != len(NAMES) or chain.question != question:
        raise ValueError(
            f"{question!r:.80} asks for no totals; it needs {len(NAMES)} lines, from 'a4:x+3=y' with the "
            f"number of rounds and a term of 1 to 3 on to {NAMES[-1]!r}"
        )
    return chain


def check(question: str, text: str) -> Verdict:
    """Judges the answer to a question. Raises ValueError for a text that isn't a question."""
    right = parse(question).answer
    (wanted, total), (thought, said) = split_thought(right), split_thought(text)
    pairs = zip(wanted.split("\n"), thought.split("\n"), strict=False)
    agree = [a == b for a, b in pairs]
    return Verdict(text == right, said == total, [*agree, False].index(False))


@dataclasses.dataclass(frozen=True)
class Records:
    """Chains of `least` to `most` rounds in a split, with their answers, by random access."""

    least: int
    most: int
    split: str

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"totals of {self.split} has {len(self)} records, none is number {i}")
        chain = self.chain(i)
        turns = (
            {"role": "user", "content": chain.question},
            {"role": "assistant", "content": chain.answer},
        )
        return Record(f"totals-{self.split}-{i}", turns=turns)

    def chain(self, i: int) -> Chain:
        """The chain of record `i`: of a random sequence the first that belongs to the split."""
        rng = np.random.default_rng([self.least, self.most, SPLITS.index(self.split), i])
        rounds = int(rng.integers(self.least, self.most + 1))
        while True:
            chain = Chain(tuple(rng.choice(TERMS, size=len(NAMES)).tolist()), rounds)
            if chain.split == self.split:
                return chain

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with the questions and their answers."""
        seen = hashlib.sha256(repr(self).encode())
        for i in range(64):
            seen.update(repr(self[i].turns).encode())
        return seen.hexdigest()


def open_records(rounds: str, split: str) -> Records:
    """Opens the chains of a split that have so many rounds: `4`, or `2-4`. Raises ValueError for other
    numbers and for an unknown split."""
    found = re.fullmatch(r"(\d)(?:-(\d))?", rounds, re.ASCII)
    least, most = (int(n) for n in (found[1], found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most <= ROUNDS:
        raise ValueError(
            f"{rounds!r} must be a number of rounds from 1 to {ROUNDS}, or two of them as '2-4'"
        )
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return Records(least, most, split)
