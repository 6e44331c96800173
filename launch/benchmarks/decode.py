"""Times plain decoding of text against each technique that makes it faster, and compares what they say.

    mmada bench decode                                  # runs/totals; without it random weights, 25 million
    mmada bench decode --train                          # trains the model of runs/totals first
    mmada bench decode --model FOLDER --json out.json --plot out.png
    mmada bench decode --only cache all --new 512 --batch 1 --no-cases

Plain decoding reveals the most certain token in each step, block after block, and computes the whole row in
each. The techniques, by fields of TextRule:

    stop       a row ends with the block in which its answer ends
    prefix     stored keys and values of what stands before the block (cache="prefix")
    cache      the same of everything outside of the block (cache="dual")
    window     cache, and a block sees no more than the next places (window)
    steps      a quarter of the steps, shared equally among the blocks (steps)
    threshold  all tokens that are certain enough (threshold)
    relax      the same, the more tokens of a block are known the less certain (threshold, relax)
    leap       the same, less certain beside tokens that are certain enough (threshold, leap)
    wino       a draft of tokens that are half certain, judged and partly hidden again (threshold, verify)
    factor     the more tokens at once, the more certain (factor)
    bound      as many tokens as keep their joint entropy low (bound)
    all        cache, threshold and stop together, as decode="fast" has them

All are decoded as every task is, in the model's engine. Beside them `engine` times many requests at once,
by `cache` and by `all`, against one after the other, and the first token of a request. `draw` times guided
drawing against guidance now and then.

A model with random weights is never certain. It has no techniques of certainty, and its `all` is cache,
window and steps together.

The sides are called in turns, on the same rows. The claims are the RATIOS of the medians, plain /
technique. Compiling is timed apart. A step is a pass over the row or its block; with a cache there is one
more pass over the row. Tokens are counted up to the end of an answer, so that what comes after it makes no
side faster. `equal` is the share of plain decoding's tokens that a technique says too, at the same places.
Where a program judges answers, all sides answer the same held-out cases, and McNemar's exact test compares
each to plain decoding.
"""

import argparse
import dataclasses
import importlib.util
import io
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from launch.bench import DECODINGS
from launch.benchmarks import cases, decode_report, serving, timing
from mmada_jax.devices import sharding
from mmada_jax.diffusion import decode
from mmada_jax.diffusion.decode import Job
from mmada_jax.diffusion.rules import PRESETS, TextRule
from mmada_jax.measure.totals import mcnemar
from mmada_jax.nets import transformer
from mmada_jax.progress import progress
from mmada_jax.serve.api import MMaDA
from mmada_jax.storage import write_whole
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import SPECIAL_TOKENS, Vocab

RANDOM = (512, 8, 4096)
PROMPT = 128  # tokens of a prompt, where nobody gives one
BY_CERTAINTY = ("stop", "threshold", "relax", "leap", "wino", "factor", "bound")
BESIDE = ("engine", "draw")
LONG = 60.0  # seconds of a call of plain decoding from which on it is called once


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of a run. Raises ValueError for options that don't go together or don't fit the model."""
    subject = open_subject(args)
    names = chosen(args, subject)
    if args.plot and set(names) <= set(BESIDE):
        raise ValueError(f"--plot draws techniques, and --only {' '.join(names)} names none")
    by_new = {new: rules(args, subject, new, names) for new in args.new}
    jobs = {
        (batch, new): {name: subject.job(batch, new, rule) for name, rule in by_new[new].items()}
        for batch in args.batch
        for new in args.new
        if by_new[new]
    }
    load_before = os.getloadavg()[0]
    most, new = max(args.batch), 512 if 512 in args.new else max(args.new)
    rows, judged, stopped = [], {}, False
    engine = drawn = first = None
    try:
        for (batch, of_new), of in jobs.items():
            rows += time_sides(subject, of, batch, of_new, args)
        if "engine" in names and most > 1 and subject.model.mesh.size == 1:
            by_name = rules(args, subject, new, ["cache", "all"])
            engine = {
                name: serving.through_engine(
                    subject.model, subject.job(most, new, by_name[name]), min(args.repeats, 3), name
                )
                for name in ("cache", "all")
            }
            one = {name: subject.job(1, new, rule) for name, rule in by_name.items()}
            first = serving.first_token(subject.model, one["all"], one["plain"], args.repeats)
        if "draw" in names:
            with progress("guided drawing", 1, "comparison") as bar:
                drawn = serving.drawing(subject.model, args.repeats)
                bar.update(1)
        if subject.task and by_new[new] and not args.no_cases:
            judge(subject, by_new[new], new, args.cases, judged)
    except KeyboardInterrupt:
        stopped = True  # what is measured is reported
    report = {
        "machine": timing.machine(),
        "stopped": stopped,
        "load": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "model": subject.what,
        "rules": {
            new: {name: changes(rule) for name, rule in by_name.items()} for new, by_name in by_new.items()
        },
        "rows": rows,
        "cache_512": ratio(rows, "cache", 512),
        "all_512": ratio(rows, "all", 512),
        "all_1024": ratio(rows, "all", 1024),
        "engine": engine,
        "engine_16": engine["cache"]["ratio"] if engine and engine["cache"]["rows"] == 16 else None,
        "first_token": first,
        "drawing": drawn,
        "draw": drawn and drawn["ratio"],
        "cases": judged or None,
        "accuracy": {
            name: count(judged, of) if judged and of in judged["techniques"] else None
            for name, of in (("plain", "plain"), ("fast", "all"))
        },
    }
    if args.plot:
        buffer = io.BytesIO()
        decode_report.figure(report).savefig(buffer, dpi=90, bbox_inches="tight", format="png")
        write_whole(args.plot, buffer.getvalue())
    return report


def as_text(report: Mapping[str, Any]) -> str:
    """The tables, and what it takes to read them."""
    return decode_report.as_text(report)


# ------------------------------------------------------------------------------- what is decoded


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and what it is asked. `task` judges its answers, `prompts` are those of a file. With neither
    of them the prompts are random ids."""

    model: MMaDA
    what: dict[str, Any]
    is_random: bool
    task: cases.Task | None = None
    prompts: Sequence[str] | None = None

    def job(self, batch: int, new: int, rule: TextRule) -> Job:
        """Rows of the first prompts. Raises ValueError if they are too long for the model."""
        if self.prompts:
            prompts = [self.prompts[i % len(self.prompts)] for i in range(batch)]
        elif self.task:
            prompts = self.task.questions(batch, new)
        else:
            vocab, rng = self.model.vocab, np.random.default_rng(0)
            special = {getattr(vocab, name) for name in SPECIAL_TOKENS}
            words = [i for i in range(vocab.image_offset) if i not in special]
            prompts = rng.choice(words, (batch, PROMPT))
        return self.job_of(prompts, new, rule)

    def job_of(self, prompts: Any, new: int, rule: TextRule) -> Job:
        """Rows of these prompts, decoded by this very rule: by default a rule with a cache stops at the end
        of a text, which is a technique of its own here."""
        return dataclasses.replace(self.model.text_job(prompts, rule, new), rule=rule)


def open_subject(args: argparse.Namespace) -> Subject:
    """The model that the options name. Raises ValueError or FileNotFoundError if there is none."""
    named = [f"--{name}" for name in ("model", "random", "train") if getattr(args, name)]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} name different models; give one of them")
    if args.prompts and not args.model:
        raise ValueError("--prompts are for a model that reads text; give --model too")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; install it: pip install matplotlib")
    for path in filter(None, (args.json, args.plot)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} to write {path.name} into")
    folder = args.model or (None if args.random else cases.trained(args.train))
    if not folder:
        model = random_model(args.random or RANDOM, PROMPT + max(args.new))
        return Subject(model, describe(model, "random weights", f"{PROMPT} random ids"), True)
    prompts, task = None, cases.task_of(pathlib.Path(folder))
    model = MMaDA.load(folder)
    asked = f"{PROMPT} random ids"
    if args.prompts:
        prompts = [line for line in args.prompts.read_text().splitlines() if line.strip()]
        asked = f"the lines of {args.prompts}"
        if not prompts:
            raise ValueError(f"{args.prompts} has no line; write a prompt on each")
    elif task:
        asked = f"held-out cases of {task[0]}"
    return Subject(model, describe(model, str(folder), asked), False, task and task[1], prompts)


def describe(model: MMaDA, name: str, prompts: str) -> dict[str, Any]:
    """What the report says of a model."""
    return {
        "name": name,
        "params": transformer.param_count(model.config),
        "dtype": model.config.dtype,
        "prompts": prompts,
    }


def random_model(sizes: tuple[int, int, int], length: int) -> MMaDA:
    """A model of text with random weights: width, layers and vocabulary, for rows of `length` tokens."""
    width, layers, ids = sizes
    if ids <= 2 * len(SPECIAL_TOKENS) or width % 16:
        raise ValueError(
            f"--random {width},{layers},{ids}: the width must be a multiple of 16, the vocabulary larger "
            f"than {2 * len(SPECIAL_TOKENS)}"
        )
    heads = width // 64 if width % 64 == 0 else width // 16
    config = transformer.ModelConfig(
        d_model=width, n_layers=layers, n_heads=heads, n_kv_heads=heads, d_mlp=2 * width, vocab=ids,
        max_len=max(320, layout.bucket(length)), dtype="float32", unroll=min(layers, 8),
    )  # fmt: skip
    special = dict(zip(SPECIAL_TOKENS, range(len(SPECIAL_TOKENS)), strict=True))
    vocab, mesh = Vocab(ids - ids // 4, ids // 4, rows=ids, **special), sharding.make_mesh()
    places = decode.param_shardings(mesh, config)
    params = jax.jit(lambda key: transformer.init_params(key, config), out_shardings=places)(
        jax.random.key(0)
    )
    return MMaDA(params, config, vocab, None, None, None, config.max_len, (1, 1), mesh)


def chosen(args: argparse.Namespace, subject: Subject) -> list[str]:
    """The names that `--only` has, by default all that say something of the model. Raises ValueError for a
    technique that says nothing of it."""
    certain = [name for name in args.only or () if name in BY_CERTAINTY]
    if subject.is_random and certain:
        raise ValueError(
            f"{certain[0]} needs a model that is certain of some tokens, and random weights are not; "
            "give --model FOLDER"
        )
    left_out = BY_CERTAINTY if subject.is_random else ()
    return args.only or [name for name in DECODINGS if name not in left_out]


def rules(
    args: argparse.Namespace, subject: Subject, new: int, names: Sequence[str]
) -> dict[str, TextRule]:
    """The rules of these techniques for so many new tokens, first that of plain decoding. Without a
    technique there is none."""
    vocab, blocks = subject.model.vocab, -(-new // args.block)
    quota = {"steps": blocks * max(1, min(args.block, new) // 4)}
    surely = {"threshold": args.threshold, "relax": args.relax}
    window = {"cache": "dual", "window": args.window}
    stop = {"stop": vocab.end_turn}
    fields = {
        "plain": {},
        "stop": stop,
        "prefix": {"cache": "prefix"},
        "cache": {"cache": "dual"},
        "window": window,
        "steps": quota,
        "threshold": {"threshold": args.threshold},
        "relax": surely,
        "leap": {"threshold": args.threshold, "leap": args.leap},
        "wino": {"threshold": args.draft, "verify": args.verify},
        "factor": {"factor": args.factor},
        "bound": {"bound": args.bound},
        "all": window | quota
        if subject.is_random
        else PRESETS["text"]["fast"] | {"threshold": args.threshold} | stop,
    }
    # The mask reveals nothing, and the answers of random weights would end anywhere.
    never = (vocab.mask, vocab.eos, vocab.end_turn) if subject.is_random else (vocab.mask,)
    techniques = [name for name in fields if name in names]
    return {
        name: TextRule(block=args.block, never=never, **fields[name])
        for name in dict.fromkeys(["plain", *techniques] if techniques else ())
    }


def changes(rule: TextRule) -> dict[str, Any]:
    """The fields of a rule that aren't the default."""
    default = dataclasses.asdict(TextRule())
    return {key: x for key, x in dataclasses.asdict(rule).items() if x != default[key]}


# ---------------------------------------------------------------------------------------- timing


class Side:
    """A technique on its rows, in the model's engine. `spans` are the ids that the last call decoded.
    Compiling is done here; its seconds are those of the first step."""

    def __init__(self, model: MMaDA, job: Job):
        self.model, self.job, self.spans = model, job, None
        begin = time.perf_counter()
        next(model.engine.steps(job))
        self.compile_seconds = time.perf_counter() - begin

    def __call__(self) -> None:
        """Decodes the rows."""
        self.spans = self.model.run(self.job)

    def steps(self) -> int:
        """The steps of all rows together: as many as the row that takes most. A decoding counts them,
        unless the rule says how many they are."""
        rule, new = self.job.rule, self.job.length
        if not rule.by_quota or rule.stop is not None:
            tickets = self.model.engine.submit(self.job)
            return max(ticket.steps for ticket in tickets if ticket.result() is not None)
        size = rule.size(new)
        blocks = [min(size, new - first) for first in range(0, new, size)]
        most = size if rule.steps is None else rule.steps // len(blocks)
        return sum(min(n, most) for n in blocks)

    def expected_seconds(self) -> float:
        """The seconds of a call, from those of its second and third step."""
        times = []
        for _, _ in zip(range(3), self.model.engine.steps(self.job), strict=False):
            times.append(time.perf_counter())
        return self.steps() * (times[-1] - times[0]) / max(1, len(times) - 1)


def time_sides(
    subject: Subject, jobs: Mapping[str, Job], batch: int, new: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of the table for one batch and one number of new tokens. Plain decoding isn't timed if a
    call is expected to take longer than `--most`."""
    what, sides, expected = f"batch {batch}, {new} new", {}, {}
    with progress(f"{what}: compiling", len(jobs), "programs") as bar:
        for name, job in jobs.items():
            sides[name] = Side(subject.model, job)
            bar.update(1)
    expected["plain"] = sides["plain"].expected_seconds()
    turns = dict.fromkeys(sides, args.repeats)
    turns["plain"] = args.plain_repeats or (1 if expected["plain"] > LONG else args.repeats)
    is_timed = expected["plain"] <= args.most
    if not is_timed:
        turns["plain"] = 0
    with progress(f"{what}: first calls", len(sides), "calls") as bar:
        for name, side in sides.items():
            if name != "plain":
                begin = time.perf_counter()
                side()
                expected[name] = time.perf_counter() - begin
            bar.update(1)
    steps = {name: side.steps() for name, side in sides.items()}
    timed = {name: side for name, side in sides.items() if turns[name]}
    total = sum(turns[name] * expected[name] for name in timed)
    with progress(f"{what}: decoding", round(total, 3), "s") as bar:
        told = lambda name: bar.update(min(expected[name], bar.total - bar.n))  # noqa: E731
        times = timing.take_turns(timed, turns, 0, called=told)
    rows = []
    for name, side in sides.items():
        row = {"batch": batch, "new": new, "technique": name, "steps": steps[name]}
        row |= {"turns": turns[name], "compile_seconds": side.compile_seconds, "ratio": None, "equal": None}
        row |= {"seconds": times.get(name), "tokens_per_second": None}
        if not turns[name]:
            row["expected_seconds"] = expected[name]
        else:
            tokens = sum(len(answer(span, subject.model.vocab)) for span in side.spans)
            row["tokens_per_second"] = tokens / times[name]["median"]
            if is_timed:
                row["ratio"] = times["plain"]["median"] / times[name]["median"]
                row["equal"] = equal(sides["plain"].spans, side.spans, subject.model.vocab)
        rows.append(row)
    return rows


def answer(ids: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Generated ids up to the first end of turn or of text, which is counted too."""
    ends = np.flatnonzero((ids == vocab.eos) | (ids == vocab.end_turn))
    return ids[: ends[0] + 1] if ends.size else ids


def equal(plain: Sequence[np.ndarray], other: Sequence[np.ndarray], vocab: Vocab) -> float:
    """The share of the tokens of plain decoding, up to the end of each answer, that the other says too."""
    pairs = [(answer(ids, vocab), other_ids) for ids, other_ids in zip(plain, other, strict=True)]
    same = sum(int(np.sum(ids == other_ids[: len(ids)])) for ids, other_ids in pairs)
    return same / sum(len(ids) for ids, _ in pairs)


def ratio(rows: Sequence[Mapping[str, Any]], technique: str, new: int) -> float | None:
    """Plain / technique for one row of so many new tokens, None if it wasn't measured."""
    found = [
        row["ratio"] for row in rows if (row["batch"], row["new"], row["technique"]) == (1, new, technique)
    ]
    return found[0] if found else None


# -------------------------------------------------------------------------------------- accuracy


def judge(
    subject: Subject, by_name: Mapping[str, TextRule], new: int, n: int, judged: dict[str, Any]
) -> None:
    """Fills `judged`, technique by technique: how many of n held-out cases each has right, and how it
    differs from plain decoding."""
    model, task = subject.model, subject.task
    questions = task.questions(n, new)
    spans, right = {}, {}
    with progress("held-out cases", len(by_name) * n, "cases") as bar:
        for name, rule in by_name.items():
            job = subject.job_of(questions, new, rule)
            spans[name] = []
            for ticket in model.engine.submit(job):
                spans[name].append(ticket.result())
                bar.update(1)
            texts = [text.text for text in model.results(job, spans[name])]
            right[name] = [task.is_right(*pair) for pair in zip(questions, texts, strict=True)]
            only_plain, only_it, p = mcnemar(np.array(right["plain"]), np.array(right[name]))
            judged |= {"total": n, "new": new}
            judged.setdefault("techniques", {})[name] = {
                "correct": sum(right[name]),
                "only_plain": only_plain,
                "only_it": only_it,
                "p": p,
                "equal": equal(spans["plain"], spans[name], model.vocab),
            }


def count(judged: Mapping[str, Any], technique: str) -> dict[str, int]:
    """Right cases of a technique, and all cases."""
    return {"correct": judged["techniques"][technique]["correct"], "total": judged["total"]}
