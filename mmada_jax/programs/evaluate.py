"""Evaluates a model; run again to go on (docs/evaluation.md).

mmada evaluate --model mmada-8b --tasks gsm8k --chat --out evals/mmada
mmada evaluate --model runs/digits --tasks sums --include-path tasks --out evals/digits

mmada evaluate --model mmada-8b --draw geneval --prompts evaluation_metadata.jsonl --out evals/geneval

With --tasks, those of lm-evaluation-harness: writes results.json, results.md and answers.jsonl. Needs the
extra `eval`; tasks by name fetch their data from Hugging Face, tasks of your own may name local files. With
--draw, pictures in the form that a benchmark's own judge reads.
"""

import argparse
import json
import pathlib

from mmada_jax import storage
from mmada_jax.measure.answers import alone
from mmada_jax.programs.process import Parser, quiet
from mmada_jax.progress import progress


def parser() -> Parser:
    """The command line."""
    top = Parser(__doc__, prog="mmada evaluate")
    top.add_argument("--model", required=True, metavar="FOLDER", help="training workdir, checkpoint, or "
                     "Hugging Face folder")  # fmt: skip
    what = top.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", metavar="NAME[,NAME]", help="tasks of the harness")
    what.add_argument("--draw", choices=("geneval", "dpg", "wise"), help="pictures of a benchmark")
    top.add_argument("--include-path", metavar="FOLDER", help="tasks of your own (YAML)")
    top.add_argument("--out", required=True, metavar="FOLDER", help="for the results")
    top.add_argument("--chat", action="store_true", help="ask in the chat template")
    top.add_argument("--think", action="store_true", help="ask for a thought first (with --chat)")
    top.add_argument("--fewshot", type=int, metavar="N", help="examples before each (default: the task's)")
    top.add_argument("--limit", type=int, metavar="N", help="the first N cases of each task alone")
    group = top.add_argument_group("pictures (--draw)")
    group.add_argument("--prompts", type=pathlib.Path, metavar="PATH", help="the benchmark's prompts")
    group.add_argument("--clip", metavar="FOLDER", help="a CLIP, whose score is computed as well")
    group.add_argument("--image-reward", metavar="FOLDER", help="the same by ImageReward")
    group.add_argument("--guidance", type=float, help="(default: as the model's folder says)")
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
    for name in ("draws", "batch", "limit", "max_new", "block", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.think and not args.chat:
        raise ValueError("--think is a part of the chat template; give --chat too")
    quiet()
    if args.draw:
        with alone(storage.path(args.out)):
            draw(args)
        return
    try:
        from mmada_jax.measure.evaluation import TABLE, evaluate
    except ImportError as error:
        raise ImportError('this needs the extra eval: pip install "mmada_jax[eval]"') from error
    settings = {
        "preset": args.preset, "max_new": args.max_new, "block": args.block, "steps": args.steps,
        "decode": args.decode, "draws": args.draws, "greedy": args.greedy, "batch_size": args.batch,
        "seed": args.seed, "think": args.think,
    }  # fmt: skip
    out = storage.path(args.out)
    with alone(out):
        evaluate(
            args.model, args.tasks.split(","), out, settings, include=args.include_path,
            limit=args.limit, fewshot=args.fewshot, chat=args.chat,
        )  # fmt: skip
    print((out / TABLE).read_text())


def draw(args: argparse.Namespace) -> None:
    """Draws for a benchmark, and prints how its judge is called."""
    from mmada_jax.files import read_json
    from mmada_jax.measure import drawings
    from mmada_jax.serve.api import MMaDA
    from mmada_jax.storage import write_whole
    from mmada_jax.weights import lazy
    from mmada_jax.weights.folder import open_folder

    if args.prompts is None:
        raise ValueError(f"--draw {args.draw} needs --prompts PATH, the prompts of the benchmark")
    prompts, out = drawings.read_prompts(args.draw, args.prompts)[: args.limit], storage.path(args.out)
    fields = {"steps": args.steps, "guidance": args.guidance, "decode": args.decode}
    settings = {"seed": args.seed, **{name: x for name, x in fields.items() if x is not None}}
    about = {"model": lazy.sha256(open_folder(args.model).tensors()), "benchmark": args.draw, **settings}
    known = out / "results.json"
    old = read_json(known, dict).get("of", {}) if known.is_file() else about
    if old != about:
        differs = [name for name in {**old, **about} if old.get(name) != about.get(name)]
        raise ValueError(f"{out} holds pictures of another {' and '.join(differs)}; name another --out")
    write_whole(known, json.dumps({"of": about}) + "\n")
    model = MMaDA.load(args.model)
    report = drawings.draw(model, args.draw, prompts, out, rows=args.batch, **settings)
    report["judge"] = drawings.judge_of(args.draw, args.prompts, out, max(model.image_size))
    for name, folder in (("clip_score", args.clip), ("image_reward", args.image_reward)):
        if folder:
            report[name] = _mean_score(name, folder, args, prompts, out)
    write_whole(known, json.dumps({"of": about, **report}, indent=2) + "\n")
    print("\n".join(f"{name}: {value}" for name, value in report.items()))


def _mean_score(name, folder, args, prompts, out):
    """The mean of a score of each picture and its prompt."""
    from mmada_jax.measure.drawings import PER_PROMPT, pictures_of
    from mmada_jax.train.rl.rewards.pictures import ClipScore, ImageReward

    make = {"clip_score": ClipScore, "image_reward": ImageReward}[name]
    score, scores = make(folder, batch=PER_PROMPT[args.draw]), []
    with progress(name, len(prompts), "prompts") as bar:
        for prompt in prompts:
            pictures = pictures_of(args.draw, out, prompt)
            scores += list(score([prompt.text] * len(pictures), [""] * len(pictures), pictures, None))
            bar.update(1)
    return float(sum(scores) / len(scores))
