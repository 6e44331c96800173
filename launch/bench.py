"""Times a part of the project: prints a table, and with --json PATH writes the numbers as well.

The options of each benchmark are here. The benchmark itself is a file in launch/benchmarks/, in which
`measure` gives what --json writes, and `as_text` the table. Those of attention and step need jax, flax and
numpy alone.
"""

import argparse
import ast
import difflib
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from launch import quickstart
from mmada_jax.programs.process import Parser, ending, start_jax

PRESETS = ("digits", "tiny")
SPLITS = ("train", "validation", "test")
DECODINGS = (
    "plain", "stop", "prefix", "cache", "window", "steps", "threshold", "relax", "leap", "wino",
    "factor", "bound", "all", "engine", "draw",
)  # fmt: skip
CACHES = ("none", "prefix", "dual")
MOST_SEED = 2**31 - 1
MASKINGS = (
    "unigrpo", "full", "random", "coupled", "fading",
    "trace", "exact", "uniform", "top_entropy", "surprisal",
)  # fmt: skip


def twin_options(parser: Parser) -> None:
    """Adds the options of `mmada bench twin`."""
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--repeats", type=int, default=31, help="timed calls of each task per side")
    parser.add_argument(
        "--rows", type=int, default=32, help="training batch; generation takes a quarter of it"
    )


def decode_options(parser: Parser) -> None:
    """Adds the options of `mmada bench decode`."""
    parser.add_argument("--model", metavar="FOLDER", help="workdir, checkpoint or Hugging Face folder")
    parser.add_argument(
        "--random", type=sizes, metavar="D,N,V", help="random weights: width, layers, vocabulary"
    )
    parser.add_argument(
        "--train", action="store_true", help="train the model of long sums first (configs/totals.py)"
    )
    parser.add_argument("--prompts", type=pathlib.Path, metavar="FILE", help="prompts, one a line")
    parser.add_argument(
        "--only", nargs="+", choices=DECODINGS, metavar="NAME", help=f"of {', '.join(DECODINGS)}"
    )
    parser.add_argument("--new", nargs="+", type=at_least_one, default=[128, 256, 512, 1024])
    parser.add_argument("--batch", nargs="+", type=at_least_one, default=[1, 16], help="rows (1 16)")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="timed calls (%(default)s)")
    parser.add_argument(
        "--plain-repeats", type=at_least_one, metavar="N", help="of plain decoding (1 if it takes a minute)"
    )
    parser.add_argument(
        "--most", type=float, default=3600, metavar="SECONDS", help="longest call of plain (%(default)s)"
    )
    parser.add_argument("--cases", type=at_least_one, default=500, help="held-out cases (%(default)s)")
    parser.add_argument("--no-cases", action="store_true", help="measure the speed alone")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw the speed-up there")
    of_rule = parser.add_argument_group("fields of TextRule, for the techniques that have them")
    of_rule.add_argument("--block", type=at_least_one, default=32, help="default: %(default)s")
    of_rule.add_argument("--window", type=at_least_one, default=64, help="default: %(default)s")
    of_rule.add_argument("--threshold", type=float, default=0.95, help="default: %(default)s")
    of_rule.add_argument("--relax", type=float, default=0.3, help="default: %(default)s")
    of_rule.add_argument("--leap", type=float, default=0.75, help="default: %(default)s")
    of_rule.add_argument("--draft", type=float, default=0.6, help="threshold of wino (%(default)s)")
    of_rule.add_argument("--verify", type=float, default=0.9, help="default: %(default)s")
    of_rule.add_argument("--factor", type=float, default=1.0, help="default: %(default)s")
    of_rule.add_argument("--bound", type=float, default=0.1, help="default: %(default)s")


def step_options(parser: Parser) -> None:
    """Adds the options of `mmada bench step`."""
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1539)
    parser.add_argument("--remat", default="attention+middle+qkv+mlp")
    parser.add_argument("--repeats", type=repeats, default=10)


def attention_options(parser: Parser) -> None:
    """Adds the options of `mmada bench attention`."""
    parser.add_argument("--repeats", type=repeats, default=20)
    parser.add_argument("--schedule", metavar="TOPOLOGY", help="as v5e:2x2, v5p:2x2x1 or v6e:2x2")


def convert_options(parser: Parser) -> None:
    """Adds the options of `mmada bench convert`."""
    parser.add_argument("--shrink", type=int, default=1, help="divides the widths and the vocabulary")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")


def data_options(parser: Parser) -> None:
    """Adds the options of `mmada bench data`."""
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument("--workers", type=int, default=0, help="processes with that many threads each")
    parser.add_argument("--images", type=int, default=1000, help="how many there are (default: 1000)")
    parser.add_argument("--side", type=int, default=256, help="shorter side of the files (default: 256)")
    parser.add_argument("--image_size", type=int, default=256, help="pixels of a row (default: 256)")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement (default: 5)")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")


def prepare_options(parser: Parser) -> None:
    """Adds the options of `mmada bench prepare`."""
    parser.add_argument("--pictures", type=at_least_one, default=800, help="default: %(default)s")
    parser.add_argument("--shards", type=repeats, default=8, help="default: %(default)s")
    parser.add_argument("--side", type=at_least_one, default=256, help="shorter side of the files (256)")
    parser.add_argument("--image_size", type=at_least_one, default=64, help="pixels encoded (%(default)s)")
    parser.add_argument("--workers", type=at_least_one, default=1, help="of Ray (default: %(default)s)")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="default: %(default)s")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")


def variant(text: str) -> str:
    """A masking, with changes or without."""
    masking, *changes = text.split(":")
    if masking not in MASKINGS:
        raise argparse.ArgumentTypeError(f"invalid choice: {masking!r} (choose from {', '.join(MASKINGS)})")
    for one in changes:
        if change(one)[0] == "masking":
            raise argparse.ArgumentTypeError(f"{text!r} names two maskings; name the second one alone")
    return text


def change(text: str) -> tuple[str, str]:
    """A field and the value that it is given. What has an option of its own is no such field."""
    field, equals, value = text.partition("=")
    if not (field and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} must be FIELD=VALUE, as spread=even or optim.b2=0.9")
    if field in (own := {"seed": "--seeds", "init": "--init", "objective.masking": "--maskings"}):
        raise argparse.ArgumentTypeError(f"{text!r} has an option of its own; use {own[field]}")
    return field, value


def seed(text: str) -> int:
    """A seed of a run."""
    if not text.isdecimal() or int(text) > MOST_SEED:
        raise argparse.ArgumentTypeError(f"{text} is no seed; it must be an integer from 0 to {MOST_SEED}")
    return int(text)


def rl_options(parser: Parser) -> None:
    """Adds the options of `mmada bench rl`."""
    parser.add_argument("--init", default="runs/quickstart/cot", help="model to begin with (%(default)s)")
    parser.add_argument("--workdir", default="runs/benchmark_rl", help="default: %(default)s")
    parser.add_argument(
        "--preset", choices=("digits", "digits,full", "totals"), default="digits,full",
        help="of configs/unigrpo.py (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=seed, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--maskings",
        nargs="+",
        type=variant,
        default=["exact", "unigrpo", "fading", "uniform", "top_entropy", "surprisal", "trace"],
        metavar="MASKING[:FIELD=VALUE...]",
        help=f"of {', '.join(MASKINGS)}, with other values of the objective's fields, or with ahead=1, as "
        "unigrpo:spread=even (default: %(default)s)",
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    parser.add_argument(
        "--n", type=at_least_one, default=1200, help="cases of each sampled metric (%(default)s)"
    )
    parser.add_argument(
        "--few", type=at_least_one, default=400, help="cases of the other metrics (%(default)s)"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", type=change, default=[], metavar="FIELD=VALUE",
        help="other values of the preset, as iterations=48 optim.warmup=30",
    )  # fmt: skip


def rollouts_options(parser: Parser) -> None:
    """Adds the options of `mmada bench rollouts`."""
    parser.add_argument("--init", default="runs/quickstart/cot", help="model to begin with (%(default)s)")
    parser.add_argument("--masking", choices=MASKINGS, default="exact", help="default: %(default)s")
    parser.add_argument("--prompts", type=at_least_one, default=12, help="of 8 responses (%(default)s)")
    parser.add_argument("--new", type=at_least_one, default=24, help="tokens (%(default)s)")
    parser.add_argument("--block", type=at_least_one, default=4, help="tokens (%(default)s)")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES, help="in turns")
    parser.add_argument("--repeats", type=repeats, default=10, help="default: %(default)s")


def own_options(parser: Parser) -> None:
    """Adds the options of `mmada bench own`."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="as configs/own.py trains it")
    parser.add_argument("--test", required=True, metavar="PATH", help="pictures to be named or asked about")
    parser.add_argument("--train", metavar="PATH", help="pictures that the judge of drawings knows")
    parser.add_argument("--n", type=at_least_one, default=10000, help="of them at most (%(default)s)")
    parser.add_argument("--each", type=at_least_one, default=50, help="drawings of a name (%(default)s)")
    parser.add_argument("--sheet", type=pathlib.Path, metavar="FILE.png", help="write drawings there")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def load_options(parser: Parser) -> None:
    """Adds the options of `mmada bench load`."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="as for mmada serve")
    parser.add_argument("--clients", type=at_least_one, default=32, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=at_least_one, default=120, help="(default: %(default)s)")
    parser.add_argument("--warm", type=at_least_one, default=75, help="seconds before (%(default)s)")


def digits_options(parser: Parser) -> None:
    """Adds the options of `mmada bench digits`."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="any model folder")
    parser.add_argument("--cases", type=at_least_one, default=359, help="of each task (%(default)s)")


def codec_options(parser: Parser) -> None:
    """Adds the options of `mmada bench codec`."""
    parser.add_argument("--preset", choices=("digits", "small", "medium", "magvitv2"), default="small")
    parser.add_argument("--rows", type=at_least_one, default=8, help="pictures of a step (%(default)s)")
    parser.add_argument("--side", type=at_least_one, default=64, help="pixels (%(default)s)")
    parser.add_argument("--repeats", type=repeats, default=11, help="default: %(default)s")


def seeds_options(parser: Parser) -> None:
    """Adds the options of `mmada bench seeds`."""
    forms = ("default", *quickstart.FORMS)
    parser.add_argument("--workdir", default="runs/seeds", help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--form", choices=forms, default="default", help="default: %(default)s")


def repeats(text: str) -> int:
    """Reads the number of timed calls: at least 2, since quartiles are formed of them."""
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is too few; at least 2")
    return int(text)


def sizes(text: str) -> tuple[int, ...]:
    """Reads `512,8,4096`: three numbers, at least 1."""
    numbers = tuple(int(number) for number in text.split(","))
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be three numbers, as 512,8,4096")
    return numbers


def at_least_one(text: str) -> int:
    """Reads a number of cases: at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few; at least 1")
    return int(text)


class Benchmark(NamedTuple):
    """`what` is timed, the options are added by `add_options`, and jax is started by `start`."""

    what: str
    add_options: Callable[[Parser], None]
    start: Callable[[], None] = start_jax


BENCHMARKS = {
    "twin": Benchmark(
        "a training step and decoding, against the same model in plain PyTorch", twin_options
    ),
    "decode": Benchmark("plain decoding of text against caches and parallel reveal", decode_options),
    "step": Benchmark("a training step at the 8B's width, with each attention", step_options),
    "attention": Benchmark("attention at the model's shapes, each implementation", attention_options),
    "convert": Benchmark("conversion of a checkpoint, against cp, and its memory", convert_options),
    "data": Benchmark("the input of training: images per second", data_options),
    "prepare": Benchmark(
        "mmada prepare by a worker of Ray, against its plain loop", prepare_options, lambda: None
    ),
    "rl": Benchmark("UniGRPO on digits: several seeds and maskings, before and after", rl_options),
    "rollouts": Benchmark("an iteration of UniGRPO, with caches in its rollouts", rollouts_options),
    "codec": Benchmark("a training step of the image tokenizer, against PyTorch", codec_options),
    "load": Benchmark("many clients of an endpoint at once", load_options),
    "digits": Benchmark("a model on handwritten digits: eight tasks, with intervals", digits_options),
    "own": Benchmark("a model of your own pictures: naming, drawing, questions about them", own_options),
    "seeds": Benchmark(
        "the quickstart with several seeds: mean, least share and deviation of each metric",
        seeds_options,
        quickstart.start,
    ),
}
HELP = (
    "usage: mmada bench NAME [options]\n\n"
    + "".join(f"  {name:11} {benchmark.what}\n" for name, benchmark in BENCHMARKS.items())
    + "\nmmada bench NAME --help tells the options of each."
)


def main(argv: Sequence[str] | None = None) -> object:
    """Measures what the first word names, prints the table, and returns what --json writes."""
    name, *words = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help"):
        print(HELP)
        return None
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        print(f"error: unknown benchmark {name!r}{hint} Known: {', '.join(BENCHMARKS)}", file=sys.stderr)
        sys.exit(2)
    parser = Parser(description(name), prog=f"mmada bench {name}")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write the numbers there, too")
    BENCHMARKS[name].add_options(parser)
    args = parser.parse_args(words)
    BENCHMARKS[name].start()
    benchmark = importlib.import_module(f"launch.benchmarks.{name}")
    report = benchmark.measure(args)
    print(benchmark.as_text(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


def description(name: str) -> str:
    """The docstring of a benchmark, which is read without importing what the benchmark computes with."""
    source = (pathlib.Path(__file__).parent / "benchmarks" / f"{name}.py").read_text()
    return ast.get_docstring(ast.parse(source)) or ""


if __name__ == "__main__":
    with ending():
        main()
