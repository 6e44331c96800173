"""The command `mmada`: finds the program that the first word names, and runs it.

Only the standard library is imported here, and in the head of each program, so that --help comes at once.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from mmada_jax.programs.process import ending

# Name -> (module, what it does).
PROGRAMS = {
    "quickstart": ("launch.quickstart", "train a small model of handwritten digits, and report"),
    "train": ("mmada_jax.programs.train", "train what a config describes; run again to resume"),
    "rl": ("mmada_jax.programs.rl", "reinforcement learning by a config; run again to resume"),
    "sweep": ("mmada_jax.programs.sweep", "train every trial of a sweep, and table them"),
    "sample": ("mmada_jax.programs.sample", "write texts, draw, inpaint, extend and read pictures"),
    "serve": ("mmada_jax.programs.serve", "answer clients of OpenAI's API with a model"),
    "page": ("mmada_jax.programs.page", "chat with a model and watch it draw, in a browser"),
    "evaluate": ("mmada_jax.programs.evaluate", "score a model by tasks of lm-evaluation-harness"),
    "prepare": ("mmada_jax.programs.prepare", "make shards of your data, with images as codes if wanted"),
    "convert": ("mmada_jax.programs.convert", "carry checkpoints between PyTorch and JAX"),
    "bench": ("launch.bench", "time training, decoding, attention, conversion or data"),
    "aot": ("mmada_jax.programs.aot", "compile a step for a TPU that isn't there, and say if it fits"),
}
HELP = (
    "usage: mmada PROGRAM [options]\n\nprograms:\n"
    + "".join(f"  {name:11} {what}\n" for name, (_, what) in PROGRAMS.items())
    + "\nmmada PROGRAM --help tells the options of each."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program that the first word of `argv` (by default of the command line) names.

    Ends with status 2 if it names none, otherwise as the program does."""
    name, *words = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help"):
        print(HELP)
        return
    if not name:
        print(HELP, file=sys.stderr)
        sys.exit(2)
    if name not in PROGRAMS:
        near = difflib.get_close_matches(name, PROGRAMS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        print(f"error: unknown program {name!r}{hint} Known: {', '.join(PROGRAMS)}", file=sys.stderr)
        sys.exit(2)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a config file may import others, as `from configs import pretrain`
    with ending():
        load(PROGRAMS[name][0]).main(words)


def load(module: str):
    """Imports a program. Those of launch/ aren't part of the installed package."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in ("launch", module):
            raise
        raise ImportError(
            f"{module} isn't here; it belongs to the repository, not to the package: call it in the "
            "repository's folder"
        ) from error


if __name__ == "__main__":
    main()
