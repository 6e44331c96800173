"""Rewards on the host: `score(prompts, completions, images, answers) -> float32 [N]`, listed in REWARDS.

A reward fails if it raises, takes too long, or returns scores that aren't numbers. Then the rows that it
failed for score 0 and are counted under its name. No reward runs text of a model as code. Libraries that
may hang are called in processes of their own (`workers`).
"""

import contextlib
import difflib
import math
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmada_jax.train.rl.rewards import answers as answers_lib
from mmada_jax.train.rl.rewards import pictures
from mmada_jax.train.rl.rewards.extract import answer_of
from mmada_jax.train.rl.rewards.own import OwnReward
from mmada_jax.train.rl.rewards.workers import Unscored, Workers

Reward = Callable[[Sequence[str], Sequence[str], Sequence | None, Sequence | None], np.ndarray]

_STOP = 30.0  # seconds that all late rewards together may take to stop
_PROBE = 8  # rows that `Combined.check` tries


class Combined:
    """The sum of several rewards by weights, `{"correct": 2.0, "format": 0.5}`; names as in REWARDS.

    `settings` are the arguments of a reward's maker by the reward's name. All rewards of a batch run at
    once, and `limit` is the time in seconds that they may take together. `failures` counts rows without a
    score, `errors` keeps the text of the first error, both by the reward's name. Raises ValueError for an
    unknown name or a weight that is no finite number. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        limit: float = 120.0,
    ):
        settings = settings or {}
        if not weights:
            raise ValueError(f"no reward is named; known: {', '.join(sorted(REWARDS))}")
        known = sorted(REWARDS)
        for name in [*weights, *settings]:
            if name not in known and not name.startswith(("reasoning_gym:", "own:")):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ";"
                raise ValueError(f"unknown reward {name!r}{hint} Known: {', '.join(known)}")
        for name, weight in weights.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} is {weight!r}; it must be a finite number")
        unused = set(settings) - set(weights)
        if unused:
            raise ValueError(
                f"settings are given for rewards without a weight: {', '.join(sorted(unused))}"
            )
        self.weights, self._limit = dict(weights), limit
        self.rewards: dict[str, Reward] = {}
        for name in weights:
            kind, _, task = name.partition(":")
            try:
                self.rewards[name] = REWARDS[kind](*([task] if task else []), **settings.get(name, {}))
            except TypeError as error:
                raise ValueError(f"the settings of reward {name!r} don't fit: {error}") from error
        self.failures, self.errors = dict.fromkeys(weights, 0), dict[str, str]()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Ends the processes of the rewards."""
        for reward in self.rewards.values():
            if hasattr(reward, "close"):
                reward.close()

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        images: Sequence | None = None,
        answers: Sequence | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The weighted sum float32 [N], and the scores [N] of each reward before weighting."""
        n = len(completions)
        parts = {}
        for name, outcome in self._run(prompts, completions, images, answers).items():
            scores, errors = _settle(outcome, n)
            self.failures[name] += len(errors)
            if errors and name not in self.errors:
                self.errors[name] = next(iter(errors.values()))
                print(
                    f"warning: reward {name!r} failed for {len(errors)} of {n} rows, which score 0: "
                    f"{self.errors[name]} (further ones are only counted)",
                    file=sys.stderr,
                    flush=True,
                )
            parts[name] = scores
        total = sum(np.float32(self.weights[name]) * scores for name, scores in parts.items())
        return total, parts

    def check(
        self, prompts: Sequence[str], answers: Sequence | None = None, images: Sequence | None = None
    ) -> None:
        """Tries the rewards on the first rows of the data before training begins; completions are made up.

        Raises ValueError, naming the row, for an empty prompt or for an answer that is missing where a
        reward needs one; and, naming the reward, if it fails for any of these rows.
        """
        _check_lengths(prompts, prompts, images, answers)
        for row, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"row {row} has an empty prompt; drop it from the data")
        for name in self.rewards:
            need = NEEDS.get(name.partition(":")[0])
            if need == "answers":
                _wanted(answers, len(prompts), name)
            if need == "images" and images is None:
                raise ValueError(
                    f"reward {name!r} scores images, and these rows make none; drop the reward"
                )
        for name, reward in self.rewards.items():
            if hasattr(reward, "start"):
                try:
                    reward.start()
                except (ImportError, RuntimeError, TimeoutError) as error:
                    raise ValueError(f"reward {name!r} failed on a probe: {error}") from error
        n = min(_PROBE, len(prompts))
        completions = [f"<think>{row}</think>{row}" for row in range(n)]
        first = [rows if rows is None else rows[:n] for rows in (prompts, completions, images, answers)]
        for name, outcome in self._run(*first).items():
            _, errors = _settle(outcome, n)
            if errors:
                raise ValueError(f"reward {name!r} failed on a probe: {next(iter(errors.values()))}")
        self._warn_of_easy_marks(*first)

    def _warn_of_easy_marks(self, prompts, completions, images, answers) -> None:
        """Warns of rewards that give full marks to completions without an answer, or with the answer of
        another row."""
        judges = [name for name in self.rewards if NEEDS.get(name.partition(":")[0]) == "answers"]
        own = [str(a.get("answer") if isinstance(a, Mapping) else a).strip() for a in answers or ()]
        for made_up in (["I don't know."] * len(own), own[1:] + own[:1]):
            rows = [i for i in range(len(own)) if made_up[i] not in (own[i], "None")]
            if not rows or not judges:
                continue
            wrong = [f"<think></think>{text}" for text in made_up]
            for name, outcome in self._run(prompts, wrong, images, answers, judges).items():
                full = [i for i in rows if _settle(outcome, len(own))[0][i] >= 1]
                if 2 * len(full) > len(rows):
                    print(
                        f"warning: reward {name!r} gives full marks to {len(full)} of {len(rows)} wrong "
                        f"answers, such as {made_up[full[0]]!r:.80} for {own[full[0]]!r:.80}; what it "
                        "teaches isn't to be right",
                        file=sys.stderr,
                        flush=True,
                    )

    def _run(self, prompts, completions, images, answers, names=None) -> dict[str, Any]:
        """The value or the exception of each reward in `names`, by default of all; all run at once."""
        _check_lengths(prompts, completions, images, answers)
        waiting = {}
        for name in self.rewards if names is None else names:
            reward = self.rewards[name]
            box: queue.SimpleQueue = queue.SimpleQueue()

            def work(reward=reward, box=box):
                try:
                    box.put(reward(prompts, completions, images, answers))
                except Exception as error:
                    box.put(error)

            # A daemon, so that the program can end even if this reward never does.
            threading.Thread(target=work, daemon=True).start()
            waiting[name] = box
        outcomes = _collect(waiting, self._limit)
        late = {name: box for name, box in waiting.items() if name not in outcomes}
        for name in late:
            outcomes[name] = TimeoutError(f"no scores within {self._limit:g} s")
        # A late reward that can stop returns the scores that it has, and is free for the next batch.
        stopping = {name: box for name, box in late.items() if hasattr(self.rewards[name], "stop")}
        for name in stopping:
            self.rewards[name].stop()
        outcomes |= _collect(stopping, _STOP)
        return {name: outcomes[name] for name in waiting}


# ---- Text ----------------------------------------------------------------------------------------


def exact() -> Reward:
    """1 where the answer is the expected string, else 0."""

    def score(prompts, completions, images, answers):
        wanted = _wanted(answers, len(completions), "exact")
        found = [answer_of(completion) for completion in completions]
        return np.array([a == b for a, b in zip(found, wanted, strict=True)], np.float32)

    return score


def well_formed() -> Reward:
    """1 where a completion is <think>...</think>, each tag once, and a non-empty answer; else 0."""

    def score(prompts, completions, images, answers):
        return np.array([_well_formed(completion) for completion in completions], np.float32)

    return score


def brief(most: int = 1000, over: int = 1000) -> Reward:
    """0 for completions of up to `most` characters, then falling to -1 at `over` more (the soft punishment
    of DAPO, arXiv 2503.14476)."""
    if most < 0 or over < 1:
        raise ValueError(f"reward 'length' has most={most}, over={over}; they must be at least 0 and 1")

    def score(prompts, completions, images, answers):
        length = np.array([len(completion) for completion in completions], np.float32)
        return -np.clip((length - most) / over, 0, 1)

    return score


def unrepeated(n: int = 4) -> Reward:
    """Minus the share of the runs of `n` words in a completion that have been there before: 0 where nothing
    is said twice, near -1 where one thing is said for ever."""
    if n < 1:
        raise ValueError(f"reward 'repetition' has n={n}; it must be at least 1")

    def share(completion):
        words = completion.split()
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0

    def score(prompts, completions, images, answers):
        return -np.array([share(completion) for completion in completions], np.float32)

    return score


class Correct:
    """1 where the answer means the same as the expected one, else 0: numbers with units, words, the letters
    of choices (`answers`), and mathematics in LaTeX (math-verify). `limit` is the time in seconds of one
    comparison, `workers` the number of processes that compare."""

    def __init__(self, limit: float = 5.0, workers: int = 2):
        self._verify = Workers("math_verify", limit, workers)
        self.close, self.stop = self._verify.close, self._verify.stop

    def start(self) -> None:
        """Starts a process, so that a missing library is an ImportError now; many answers need none."""
        self._verify.ask("load", "math_verify")

    def __call__(self, prompts, completions, images, answers):
        """Raises Unscored where a comparison fails."""
        wanted = _wanted(answers, len(completions), "correct")
        verdicts = [answers_lib.verdict(*pair) for pair in zip(wanted, completions, strict=True)]
        rows = [("math", *verdict) if isinstance(verdict, tuple) else verdict for verdict in verdicts]
        return self._verify.scores(rows)


class ReasoningGym:
    """A task of the reasoning-gym package: prompts and reward together.

    `problem(index)` is a function of (task, seed, index) and of `settings`, the task's own options. The
    entry of a problem is the answer of its row. Raises ValueError for an unknown task, naming the nearest.
    """

    def __init__(
        self,
        task: str = "",
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        limit: float = 5.0,
        workers: int = 2,
    ):
        self._verify = Workers("reasoning_gym", limit, workers)
        self.close, self.stop = self._verify.close, self._verify.stop
        self.task, self._seed, self._settings = task, seed, dict(settings or {})
        known = sorted(set(self._verify.ask("tasks")) - set(LEFT_OUT))
        if task not in known:
            self.close()
            if task in LEFT_OUT:
                raise ValueError(f"reasoning-gym's task {task!r} is left out: {LEFT_OUT[task]}")
            near = difflib.get_close_matches(task, known, n=1, cutoff=0.5)
            hint = f"; did you mean 'reasoning_gym:{near[0]}'?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"reasoning-gym has no task {task!r}{hint}")

    def problem(self, index: int) -> tuple[str, str | None, dict[str, Any]]:
        """(question, answer or None where many answers are right, entry). The entry is plain JSON."""
        # With seed + index the problems of seed 1 would be those of seed 0, moved by one.
        seed = int(np.random.SeedSequence([self._seed, index]).generate_state(1)[0])
        question, answer = self._verify.ask("problem", self.task, seed, self._settings)
        entry = {"task": self.task, "seed": seed, "settings": self._settings, "answer": answer}
        return question, answer, entry

    def __call__(self, prompts, completions, images, answers):
        """The task's own scores in [0, 1]; `answers` are entries. Raises Unscored where it fails."""
        rows: list[Any] = []
        for row, (entry, completion) in enumerate(zip(answers or (), completions, strict=True)):
            if not isinstance(entry, Mapping) or entry.get("task") != self.task:
                raise ValueError(f"the answer of row {row} is no entry of reasoning_gym:{self.task}")
            rows.append(("score", self.task, entry["seed"], entry["settings"], answer_of(completion)))
        return self._verify.scores(rows)


# Tasks of reasoning-gym 0.1.25 that no model can learn from, and the reason.
LEFT_OUT = {
    "codeio": "it runs programs that answers hold",
    "composite": "it is a mixture of other tasks; name these, each with its weight",
    "game_of_life_halting": "its verifier gives full marks to any text",
    "puzzle24": "its verifier gives full marks for any four numbers that make 24, whatever was asked",
}


def _well_formed(text: str) -> bool:
    found = re.fullmatch(r"\s*<think>(.*)</think>(.*)", text, re.DOTALL)
    return bool(found and "think>" not in found[1] + found[2] and found[2].strip())


def _wanted(answers: Sequence | None, n: int, name: str) -> list[str]:
    """The expected answers as text. An entry of reasoning-gym gives its own answer. Raises ValueError for a
    row without an answer."""
    wanted = []
    for row in range(n):
        answer = answers[row] if answers is not None else None
        if isinstance(answer, Mapping) and not name.startswith("reasoning_gym"):
            answer = answer.get("answer")
        if answer is None or not str(answer).strip():
            raise ValueError(f"row {row} has no answer, and reward {name!r} compares with it; give it one")
        wanted.append(str(answer).strip())
    return wanted


# Name -> maker of a reward. The reward of a task of reasoning-gym is written `reasoning_gym:chain_sum`. The
# weights in the MMaDA paper (arXiv 2505.15809) are correct 2.0, format 0.5, clip 0.1.
REWARDS: dict[str, Callable[..., Reward]] = {
    "correct": Correct,
    "exact": exact,
    "format": well_formed,
    "length": brief,
    "repetition": unrepeated,
    "clip": pictures.ClipScore,
    "image_reward": pictures.ImageReward,
    "digit": pictures.digit_probability,
    "reasoning_gym": ReasoningGym,
    "own": OwnReward,
}
NEEDS = {
    "correct": "answers", "exact": "answers", "reasoning_gym": "answers",
    "clip": "images", "image_reward": "images", "digit": "images",
}  # fmt: skip


# ---- Failing safely ------------------------------------------------------------------------------


def _settle(outcome: Any, n: int) -> tuple[np.ndarray, dict[int, str]]:
    """The value or the exception of a reward -> scores [N], 0 where it failed, and row -> error."""
    if isinstance(outcome, Unscored):
        errors = dict(outcome.errors)
        outcome = outcome.scores
    elif isinstance(outcome, Exception):
        return np.zeros(n, np.float32), dict.fromkeys(range(n), f"{type(outcome).__name__}: {outcome}")
    else:
        errors = {}
    try:
        scores = np.array(outcome, np.float32)
    except (TypeError, ValueError) as error:
        return np.zeros(n, np.float32), dict.fromkeys(range(n), f"it returned no numbers: {error}")
    if scores.shape != (n,):
        text = f"it returned an array of shape {scores.shape} for {n} rows"
        return np.zeros(n, np.float32), dict.fromkeys(range(n), text)
    bad = np.flatnonzero(~np.isfinite(scores))
    for row in bad:
        errors.setdefault(int(row), f"it returned {scores[row]} for row {row}")
    scores[bad] = 0
    return scores, errors


def _collect(waiting: Mapping[str, queue.SimpleQueue], limit: float) -> dict[str, Any]:
    """The items that arrive in the queues within `limit` seconds, by the queue's name."""
    end, arrived = time.monotonic() + limit, {}
    for name, box in waiting.items():
        with contextlib.suppress(queue.Empty):
            arrived[name] = box.get(timeout=max(0.0, end - time.monotonic()))
    return arrived


def _check_lengths(prompts, completions, images, answers) -> None:
    for name, rows in (("prompts", prompts), ("images", images), ("answers", answers)):
        if rows is not None and len(rows) != len(completions):
            raise ValueError(f"there are {len(completions)} completions and {len(rows)} {name}")
