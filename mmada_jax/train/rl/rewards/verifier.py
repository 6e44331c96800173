"""A program that compares answers with libraries that may hang or eat memory: a process of its own.

It reads one JSON line [limit in seconds, function, arguments...] after the other and writes one with
{"value": ...} or {"error": ...} for each. A call that takes longer than its limit ends the process
(SIGALRM), as does the end of its input. Reproducible with PYTHONHASHSEED=0.

No answer is run as code. Where a library evaluates text as Python (sympy's parser, some verifiers of
reasoning-gym), literals and the few names below pass, and all else is refused. What libraries write for
themselves (sympy's polynomials and its lambdify) passes, unless it has a name that the answer brought.
While an answer is scored nothing may write a file, start a program or use the network. A refusal is an
error of the call, also where a library catches it on its way.
"""

import dis
import functools
import hashlib
import json
import os
import random
import re
import resource
import signal
import sys
import types
import unicodedata

MEMORY = 4 << 30
NAMES = {
    "sympy", "Integer", "Float", "Rational", "Symbol", "Function", "Add", "Mul", "Pow", "pi", "oo", "sqrt",
    "cbrt", "root", "exp", "log", "ln", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan",
    "acot", "asec", "acsc", "atan2", "sinh", "cosh", "tanh", "coth", "sech", "csch", "asinh", "acosh",
    "atanh", "acoth", "factorial", "binomial", "gamma", "beta", "zeta", "erf", "erfi", "Abs", "abs", "sign",
    "Max", "Min", "floor", "ceiling", "Mod", "Eq", "Tuple", "Integral", "Derivative", "Sum", "Product",
    "Piecewise", "Si", "Ci", "Ei", "li", "fresnels", "fresnelc",
}  # fmt: skip
# Modules that evaluate text which may be an answer.
READERS = ("sympy.parsing.", "sympy.core.sympify", "reasoning_gym.")
# Beginnings of the names of audit events that scoring doesn't need.
EFFECTS = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "os.chdir", "os.putenv", "subprocess.", "socket.", "shutil.", "pty.", "urllib.", "webbrowser.",
    "ctypes.dlsym", "ctypes.string_at",
)  # fmt: skip
# What code that names things and does nothing else is made of: an answer such as `yes` is an error of
# its own where it is evaluated.
NAMING = {
    "RESUME", "CACHE", "NOP", "LOAD_NAME", "LOAD_CONST", "LOAD_SMALL_INT", "BUILD_LIST", "BUILD_TUPLE",
    "BINARY_OP", "UNARY_NEGATIVE", "RETURN_VALUE", "RETURN_CONST",
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(RuntimeError):
    """An answer would have run as code."""


# While an answer is scored: its letters and digits, else None; and what was refused so far.
_letters: str | None = None
_refused: list[str] = []


def math(wanted: str, answer: str) -> float:
    """1 if math-verify finds `answer`, or the last mathematics in it, equal to `wanted`, else 0."""
    from math_verify import parse, verify

    # Its own limits are signals of a second or more; ours covers the whole call.
    sides = [parse(_boxed(text), parsing_timeout=None) for text in (wanted, answer)]
    return float(verify(*sides, timeout_seconds=None, allow_set_relation_comp=True) and not _differ(*sides))


def tasks() -> list[str]:
    """The tasks of reasoning-gym, those that are left out too."""
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def problem(task: str, seed: int, settings: dict) -> tuple[str, str | None]:
    """Question and answer of a task of reasoning-gym; some have no one answer."""
    _, entry = _entry(json.dumps((task, seed, settings)))
    return entry["question"], entry["answer"]


def score(task: str, seed: int, settings: dict, answer: str) -> float:
    """What the task's own verifier gives to `answer`."""
    key = json.dumps((task, seed, settings))
    dataset, entry = _entry(key)
    _seed(key)
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
    sys.dont_write_bytecode = True
    sys.addaudithook(_watch)
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


def _differ(*sides: list) -> bool:
    """Whether two numbers differ by more than rounding: the library compares digits after the point."""
    import sympy

    if not all(side and isinstance(side[0], sympy.Expr) for side in sides):
        return False
    a, b = (side[0] for side in sides)
    if a.free_symbols or b.free_symbols or a.has(sympy.UnevaluatedExpr) or b.has(sympy.UnevaluatedExpr):
        return False
    try:
        values = (a.doit() - b.doit(), a.doit(), b.doit())
        difference, *sizes = (abs(complex(sympy.N(value, 40))) for value in values)
    except (TypeError, ValueError, OverflowError):
        return False
    tolerance = 1e-5 if a.has(sympy.Float) or b.has(sympy.Float) else 1e-12
    return difference > tolerance * max(sizes)


def _boxed(text: str) -> str:
    # In a sentence the library looks for mathematics itself; what is all mathematics it reads best in
    # a box, without which it would pass over LaTeX.
    sentence = any(len(word) > 1 and word.isalpha() for word in text.split())
    return text if sentence or r"\boxed" in text or "$" in text else rf"\boxed{{{text.rstrip('.')}}}"


@functools.lru_cache(maxsize=256)
def _entry(key: str):
    import reasoning_gym

    task, seed, settings = json.loads(key)
    _seed(key)
    # A dataset for each problem: some make all of theirs at once, and some depend on the order of use.
    dataset = reasoning_gym.create_dataset(task, seed=seed, size=1, **settings)
    return dataset, dataset[0]


def _seed(key: str) -> None:
    # Some tasks draw from Python's and NumPy's own generators, which they don't seed.
    import numpy as np

    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def _guarded(function, *arguments):
    """The number that a function gives for an answer. Raises Refused if anything was refused on the way."""
    global _letters
    texts = [unicodedata.normalize("NFKC", text) for text in arguments if isinstance(text, str)]
    without_commands = [re.sub(r"\\[A-Za-z]+", "", text) for text in texts]
    _letters = "\n".join(re.sub(r"\W+", "", text) for text in texts + without_commands)
    _refused.clear()
    try:
        value = float(function(*arguments))
    except Exception:
        if not _refused:
            raise
    finally:
        _letters = None
    if _refused:
        raise Refused(f"an answer that would run as code is refused: {_refused[0]}")
    return value


def _watch(event: str, arguments: tuple) -> None:
    if _letters is None:
        return
    problem = ""
    if event == "exec":
        problem = _brought(arguments[0], sys._getframe(1).f_globals.get("__name__", ""))
    elif event.startswith(EFFECTS) or (event == "open" and (arguments[2] or 0) & WRITING):
        problem = event
    if problem:
        _refused.append(problem)
        raise Refused(problem)


def _brought(code: types.CodeType, caller: str) -> str:
    """What isn't mathematics in code that is about to run, if an answer may have brought it, else ""."""
    # What is made from text carries no file's name; modules that are imported late do.
    if not code.co_filename.startswith("<") or code.co_filename.startswith("<frozen"):
        return ""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    if caller.startswith(READERS):
        unknown = {name for name in code.co_names if len(name) > 1} - NAMES
        if {instruction.opname for instruction in dis.get_instructions(code)} <= NAMING:
            return ""
        return ", ".join(sorted(unknown)) or ("a function" if inner else "")
    brought = [name for name in code.co_names if len(name) > 1 and name in _letters and name not in NAMES]
    return ", ".join(brought) or next(filter(None, (_brought(part, caller) for part in inner)), "")


if __name__ == "__main__":
    main()
