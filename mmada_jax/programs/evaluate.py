"""Evaluates a model by tasks of lm-evaluation-harness; run again to go on (docs/evaluation.md).

mmada evaluate --model mmada-8b --tasks gsm8k --chat --out evals/mmada
mmada evaluate --model runs/digits --tasks sums --include-path tasks --out evals/digits

Writes results.json, results.md and answers.jsonl. Needs the extra `eval`; tasks by name fetch their data
from Hugging Face, tasks of your own may name local files.
"""

import pathlib

from mmada_jax.programs.process import Parser, quiet


def parser() -> Parser:
    """The command line."""
    top = Parser(__doc__, prog="mmada evaluate")
    top.add_argument("--model", required=True, metavar="FOLDER", help="training workdir, checkpoint, or "
                     "Hugging Face folder")  # fmt: skip
    top.add_argument("--tasks", required=True, metavar="NAME[,NAME]", help="tasks of the harness")
    top.add_argument("--include-path", metavar="FOLDER", help="tasks of your own (YAML)")
    top.add_argument("--out", required=True, metavar="FOLDER", help="for the results")
    top.add_argument("--chat", action="store_true", help="ask in the chat template")
    top.add_argument("--fewshot", type=int, metavar="N", help="examples before each (default: the task's)")
    top.add_argument("--limit", type=int, metavar="N", help="the first N cases of each task alone")
    group = top.add_argument_group("decoding and scoring")
    group.add_argument(
        "--preset", default="gsm8k", help="lengths for tasks that name none: gsm8k, math, base"
    )
    group.add_argument("--max-new", type=int, help="new tokens (default: the task's, else the preset's)")
    group.add_argument("--block", type=int, help="tokens of a block (default: the preset's)")
    group.add_argument("--steps", type=int, help="denoising steps (default: one per token)")
    group.add_argument("--decode", default="exact", help="exact, cached or fast (docs/decoding.md)")
    group.add_argument("--draws", type=int, default=128, help="of a likelihood (default: %(default)s)")
    group.add_argument("--greedy", action="store_true", help="also look whether greedy decoding agrees")
    group.add_argument("--batch", type=int, default=16, help="rows at a time (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return top


def main(argv: list[str]) -> None:
    """Evaluates, writes and prints the table."""
    args = parser().parse_args(argv)
    for name in ("draws", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    quiet()
    try:
        from mmada_jax.measure.evaluation import TABLE, evaluate
    except ImportError as error:
        raise ImportError('this needs the extra eval: pip install "mmada_jax[eval]"') from error
    settings = {
        "preset": args.preset, "max_new": args.max_new, "block": args.block, "steps": args.steps,
        "decode": args.decode, "draws": args.draws, "greedy": args.greedy, "batch_size": args.batch,
        "seed": args.seed,
    }  # fmt: skip
    out = pathlib.Path(args.out)
    evaluate(
        args.model, args.tasks.split(","), out, settings, include=args.include_path, limit=args.limit,
        fewshot=args.fewshot, chat=args.chat,
    )  # fmt: skip
    print((out / TABLE).read_text())
