"""Carries checkpoints between PyTorch and JAX, and says what is in one.

mmada convert from-torch --src MMaDA-8B-Base --dst checkpoints/base --image-tokenizer magvitv2
mmada convert from-torch --src LLaDA-8B-Instruct --dst checkpoints/start --add-image-vocab 8192
mmada convert to-torch --src runs/quickstart/pretrain --dst exported
mmada convert to-peft --src runs/adapters --dst adapter --base exported
mmada convert from-torch --src exported --adapter adapter --dst checkpoints/merged
mmada convert inspect --src exported [--json]
mmada convert trust --src runs/quickstart/pretrain

A target must be new or empty. It is written under another name and renamed when it is complete. What
lacks the hashes that it is verified by, or whose config.json was edited, is refused until it is trusted:
hashes are then written of what is there. A workdir of an older version gets its model.json.
"""

import json
import os

from mmada_jax import storage
from mmada_jax.programs.process import Parser, quiet, share_memory

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> Parser:
    """The command line."""
    top = Parser(__doc__, prog="mmada convert")
    ways = top.add_subparsers(dest="way", required=True, metavar="COMMAND")

    def both(name, help):
        way = ways.add_parser(name, help=help)
        way.add_argument("--src", required=True, help="folder to read")
        way.add_argument("--dst", required=True, help="folder to write: new or empty")
        way.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: as they are)")
        way.add_argument(
            "--image-tokenizer", metavar="DIR", help="folder of the image tokenizer that goes with it"
        )
        return way

    way = both("from-torch", "Hugging Face folder -> checkpoint")
    way.add_argument(
        "--add-image-vocab", type=int, default=0, metavar="N",
        help="grow LLaDA into MMaDA by N image codes (8192 for MAGVIT-v2)",
    )  # fmt: skip
    way.add_argument("--adapter", metavar="DIR", help="folder of PEFT's that is merged into the weights")
    both("to-torch", "checkpoint or training workdir -> Hugging Face folder")
    way = ways.add_parser("to-peft", help="the adapters of a training workdir -> folder of PEFT's")
    way.add_argument("--src", required=True, help="workdir that was trained with config.lora")
    way.add_argument("--dst", required=True, help="folder to write: new or empty")
    way.add_argument("--base", default="", help="what PEFT shall load them beside: a folder or a name")
    way = ways.add_parser("inspect", help="what a folder holds, with a hash of its parameters")
    way.add_argument("--src", required=True, help="Hugging Face folder, checkpoint or training workdir")
    way.add_argument("--json", action="store_true", help="one JSON object on stdout")
    way = ways.add_parser("trust", help="write the hashes that files are verified by, of what is there now")
    way.add_argument("--src", required=True, help="checkpoint or training workdir")
    return top


def main(argv: list[str]) -> None:
    """Converts or inspects."""
    args = parser().parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing here is for an accelerator
    quiet()
    share_memory()
    from mmada_jax.train.runs import describe_older
    from mmada_jax.weights.checkpoint import trust
    from mmada_jax.weights.convert import from_torch, to_peft, to_torch
    from mmada_jax.weights.inspect import inspect

    if args.way == "trust":
        print(*trust(args.src), *describe_older(storage.path(args.src)), sep="\n")
        return
    if args.way == "inspect":
        report = inspect(args.src)
        if args.json:
            print(json.dumps(report, indent=1))
            return
        for name, value in report.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
            print(f"{name:16}{value:,}" if isinstance(value, int) else f"{name:16}{value}")
        return
    if args.way == "to-peft":
        to_peft(args.src, args.dst, args.base)
        print(storage.path(args.dst).absolute())
        return
    shared = {"dtype": args.dtype, "image_tokenizer": args.image_tokenizer}
    if args.way == "from-torch":
        more = {"add_image_vocab": args.add_image_vocab, "adapter": args.adapter}
        from_torch(args.src, args.dst, **more, **shared)
    else:
        to_torch(args.src, args.dst, **shared)
    print(storage.path(args.dst).absolute())
