"""The whole method on real scans of handwritten digits, on a CPU: train, measure, report.

    mmada quickstart
    mmada quickstart --full --workdir runs/full

Trains the image tokenizer and the three stages, measures what was held out, and writes the report. Running
it again resumes, or says what is already done. launch/quickstart.sh makes the environment first.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mmada_jax.programs.process import Parser, ending, keep_programs, start_jax

# Forms of the quickstart beside the default one.
FORMS = {"fast": "fewer steps and cases", "full": "more steps and cases: what docs/results.md quotes"}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the form that the words after the program's name ask for."""
    parser = Parser(__doc__, prog="mmada quickstart")
    parser.add_argument("--workdir", default="runs/quickstart", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of every stage (%(default)s)")
    group = parser.add_mutually_exclusive_group()
    for name, what in FORMS.items():
        group.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=what)
    parser.set_defaults(form="default")
    args = parser.parse_args(argv)

    start()
    from launch import quickstart_stages

    quickstart_stages.complete(pathlib.Path(args.workdir), args.form, args.seed)


def start() -> None:
    """Starts jax for models of the digits. At their size programs that LLVM optimises less are as fast, and
    compile in three quarters of the time."""
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {os.environ.get('XLA_FLAGS', '')}"
    keep_programs()
    start_jax()


if __name__ == "__main__":
    with ending():
        main()
