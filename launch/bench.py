"""Times a part of the project: prints a table, and with --json PATH writes the numbers as well.

Each name is a file in launch/benchmarks/, in which `add_options` adds to the command line, `measure` gives
what --json writes, and `as_text` the table. Those of attention and step need jax, flax and numpy alone.
"""

import difflib
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mmada_jax.programs.process import Parser, ending, keep_memory, keep_memory_on_cpus

# Name -> what is timed.
NAMES = {
    "twin": "a training step and decoding, against the same model in plain PyTorch",
    "step": "a training step at the 8B's width, with each attention",
    "attention": "attention at the model's shapes, each implementation",
    "convert": "conversion of a checkpoint, against cp, and its memory",
    "data": "the input of training: images per second",
    "rl": "UniGRPO on digits: several seeds and maskings, before and after",
    "seeds": "the quickstart with several seeds: mean, least share and deviation of each metric",
}
# Those with a report and a workdir of their own.
WHOLE = {"rl": "launch.benchmark_rl", "seeds": "launch.benchmark_quickstart"}
HELP = (
    "usage: mmada bench NAME [options]\n\n"
    + "".join(f"  {name:11} {what}\n" for name, what in NAMES.items())
    + "\nmmada bench NAME --help tells the options of each."
)


def main(argv: Sequence[str] | None = None) -> object:
    """Measures what the first word names, prints the table, and returns what --json writes."""
    name, *words = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help"):
        print(HELP)
        return None
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        print(f"error: unknown benchmark {name!r}{hint} Known: {', '.join(NAMES)}", file=sys.stderr)
        sys.exit(2)
    if name in WHOLE:
        return importlib.import_module(WHOLE[name]).main(words)
    keep_memory()  # as training does
    benchmark = importlib.import_module(f"launch.benchmarks.{name}")
    parser = Parser(benchmark.__doc__, prog=f"mmada bench {name}")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers there, too")
    benchmark.add_options(parser)
    args = parser.parse_args(words)
    keep_memory_on_cpus()
    report = benchmark.measure(args)
    print(benchmark.as_text(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    with ending():
        main()
