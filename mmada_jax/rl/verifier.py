"""A program that compares answers with libraries that may hang or eat memory: a process of its own.

It reads one JSON line [limit in seconds, function, arguments...] after the other and writes one with
{"value": ...} or {"error": ...} for each. A call that takes longer than its limit ends the process
(SIGALRM), as does the end of its input. Reproducible with PYTHONHASHSEED=0.

No answer is run as code. Where a library evaluates one as Python (sympy's parser, some verifiers of
reasoning-gym), literals and the few names below pass, and all else is refused.
"""

import functools
import json
import os
import resource
import signal
import sys
import types

MEMORY = 4 << 30
NAMES = {
    "sympy", "Integer", "Float", "Rational", "Symbol", "Function", "Add", "Mul", "Pow", "pi", "oo", "sqrt",
    "exp", "log", "ln", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh",
    "tanh", "factorial", "binomial", "Abs",
}  # fmt: skip

_scoring = False


def math(wanted: str, answer: str) -> float:
    """1 if math-verify finds `answer`, or the last mathematics in it, equal to `wanted`, else 0."""
    from math_verify import parse, verify

    # Its own limits are signals of a second or more; ours covers the whole call.
    sides = [parse(_boxed(text), parsing_timeout=None) for text in (wanted, answer)]
    return float(verify(*sides, timeout_seconds=None))


def tasks() -> list[str]:
    """The tasks of reasoning-gym, but for a mixture of others and one that runs programs."""
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite", "codeio"})


def problem(*key) -> tuple[str, str | None]:
    """Question and answer of a task of reasoning-gym by (task, seed, settings); some have no one answer."""
    _, entry = _entry(json.dumps(key))
    return entry["question"], entry["answer"]


def score(task: str, seed: int, settings: dict, answer: str) -> float:
    """What the task's own verifier gives to `answer`."""
    dataset, entry = _entry(json.dumps((task, seed, settings)))
    return _guarded(dataset.score_answer, answer, entry)


def load(library: str) -> None:
    """Imports what the calls will need, so that no call pays for it."""
    if library == "math_verify":
        # Some parts are imported at their first use.
        for wanted, answer in (("1/2", r"\frac{1}{2}"), ("(x+1)^2", "x^2+2x+1"), ("(1,2)", r"\{1, 2\}")):
            math(wanted, answer)
    else:
        import reasoning_gym  # noqa: F401


FUNCTIONS = {
    "load": load, "tasks": tasks, "problem": problem, "score": score,
    "math": lambda *pair: _guarded(math, *pair),
}  # fmt: skip


def main() -> None:
    """Answers requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.addaudithook(_refuse_code)
    for line in sys.stdin:
        limit, name, *arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            reply = {"value": FUNCTIONS[name](*arguments)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _boxed(text: str) -> str:
    # In a sentence the library looks for mathematics itself; what is all mathematics it reads best in
    # a box, without which it would pass over LaTeX.
    sentence = any(len(word) > 1 and word.isalpha() for word in text.split())
    return text if sentence or r"\boxed" in text or "$" in text else rf"\boxed{{{text.rstrip('.')}}}"


@functools.lru_cache(maxsize=256)
def _entry(key: str):
    import reasoning_gym

    task, seed, settings = json.loads(key)
    # A dataset for each problem: some make all of theirs at once, and some depend on the order of use.
    dataset = reasoning_gym.create_dataset(task, seed=seed, size=1, **settings)
    return dataset, dataset[0]


def _guarded(function, *arguments):
    global _scoring
    _scoring = True
    try:
        return float(function(*arguments))
    finally:
        _scoring = False


def _refuse_code(event: str, arguments: tuple) -> None:
    # What is evaluated from text carries no file's name; modules that are imported late do.
    if not _scoring or event != "exec":
        return
    code = arguments[0]
    if not code.co_filename.startswith("<") or code.co_filename.startswith("<frozen"):
        return
    unknown = {name for name in code.co_names if len(name) > 1} - NAMES
    if unknown or any(isinstance(constant, types.CodeType) for constant in code.co_consts):
        raise RuntimeError("an answer that would run as code is refused")


if __name__ == "__main__":
    main()
