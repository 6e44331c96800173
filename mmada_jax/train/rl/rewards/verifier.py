"""A program that compares answers with libraries that may hang or take all memory: a process of its own.

It reads JSON lines [limit in seconds, function, arguments...] and answers each with a line {"value": ...}
or {"error": ...}. A call that takes longer than its limit ends the process (SIGALRM), and so does the end
of the input. With PYTHONHASHSEED=0 its values are reproducible. It imports nothing of this project.

No answer is run as code. Some libraries evaluate text as Python: sympy's parser and some verifiers of
reasoning-gym. There literals and the NAMES below pass, and all other code is refused. Code that libraries
write for themselves (sympy's polynomials and its lambdify) passes, unless it contains a name from the
answer. While an answer is scored, nothing may write a file, start a program or use the network. A refusal
is an error of the call, even if a library catches the exception.
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

MEMORY = 4 << 30  # bytes of address space that the process may have
NAMES = {
    "sympy", "Integer", "Float", "Rational", "Symbol", "Function", "Add", "Mul", "Pow", "pi", "oo", "sqrt",
    "cbrt", "root", "exp", "log", "ln", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan",
    "acot", "asec", "acsc", "atan2", "sinh", "cosh", "tanh", "coth", "sech", "csch", "asinh", "acosh",
    "atanh", "acoth", "factorial", "binomial", "gamma", "beta", "zeta", "erf", "erfi", "Abs", "abs", "sign",
    "Max", "Min", "floor", "ceiling", "Mod", "Eq", "Tuple", "Integral", "Derivative", "Sum", "Product",
    "Piecewise", "Si", "Ci", "Ei", "li", "fresnels", "fresnelc",
}  # fmt: skip
# Beginnings of the names of modules that evaluate text which may come from an answer.
READERS = ("sympy.parsing.", "sympy.core.sympify", "reasoning_gym.")
# Beginnings of the names of audit events that scoring doesn't need.
EFFECTS = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "os.chdir", "os.putenv", "subprocess.", "socket.", "shutil.", "pty.", "urllib.", "webbrowser.",
    "ctypes.dlsym", "ctypes.string_at",
)  # fmt: skip
# Instructions of code that only names things. Such code passes the guard: an answer such as `yes` fails
# with a NameError where it is evaluated, and does nothing.
NAMING = {
    "RESUME", "CACHE", "NOP", "LOAD_NAME", "LOAD_CONST", "LOAD_SMALL_INT", "BUILD_LIST", "BUILD_TUPLE",
    "BINARY_OP", "UNARY_NEGATIVE", "RETURN_VALUE", "RETURN_CONST",
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(RuntimeError):
    """An answer would have run as code."""


# The letters and digits of the answer that is being scored, None while there is none; and descriptions of
# the code and the events that were refused for it.
_letters: str | None = None
_refused: list[str] = []


def math(wanted: str, answer: str) -> float:
    """1 if math-verify finds `answer`, or the last mathematics in it, equal to `wanted`, else 0."""
    from math_verify import parse, verify

    # The library's own limits are off: they are whole seconds, and the limit of the call covers all of it.
    sides = [parse(_boxed(text), parsing_timeout=None) for text in (wanted, answer)]
    return float(verify(*sides, timeout_seconds=None, allow_set_relation_comp=True) and not _differ(*sides))


def tasks() -> list[str]:
    """The names of all tasks of reasoning-gym, also of the tasks that the reward leaves out."""
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def problem(task: str, seed: int, settings: dict) -> tuple[str, str | None]:
    """The question and the answer of a problem of reasoning-gym; None where many answers are right."""
    _, entry = _entry(json.dumps((task, seed, settings)))
    return entry["question"], entry["answer"]


def score(task: str, seed: int, settings: dict, answer: str) -> float:
    """The score of `answer` by the task's own verifier."""
    key = json.dumps((task, seed, settings))
    dataset, entry = _entry(key)
    _seed(key)
    return _guarded(dataset.score_answer, answer, entry)


def load(library: str) -> None:
    """Imports what the calls will need, so that no call spends its limit on it."""
    if library == "math_verify":
        # sympy imports some of its parts at their first use.
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
    os.dup2(2, 1)  # libraries print, and replies have a file of their own
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
    """Whether two numbers differ by more than rounding. The library compares a few digits after the point,
    so it finds 1e-7 and 1e-8 equal."""
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
    # The library finds mathematics in a sentence by itself. A text that is all mathematics needs a box:
    # without one the library passes over LaTeX.
    sentence = any(len(word) > 1 and word.isalpha() for word in text.split())
    return text if sentence or r"\boxed" in text or "$" in text else rf"\boxed{{{text.rstrip('.')}}}"


@functools.lru_cache(maxsize=256)
def _entry(key: str):
    import reasoning_gym

    task, seed, settings = json.loads(key)
    _seed(key)
    # A dataset for each problem: some datasets make all problems at once, and some make a problem that
    # depends on the problems made before.
    dataset = reasoning_gym.create_dataset(task, seed=seed, size=1, **settings)
    return dataset, dataset[0]


def _seed(key: str) -> None:
    # Some tasks draw from the global generators of Python and NumPy without seeding them.
    import numpy as np

    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def _guarded(function, *arguments):
    """The value of a function of an answer, a float. Raises Refused if anything was refused meanwhile."""
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
    """The names in code that is about to run that aren't mathematics and may come from the answer."""
    # Code that was made from text has no file name. Modules that are imported late have one.
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
