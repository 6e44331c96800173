"""Samples from a model: writes PNGs and prints text. Options stand before or after the task.

mmada sample text "7 + 12" --model runs/digits
mmada sample draw "a handwritten seven" "a three and a five" --model runs/digits --steps 12
mmada sample think "draw 3+4" --model runs/digits --block 1
mmada sample answer canvas.png --model runs/digits --question "which digit is this?"
mmada sample inpaint canvas.png --model runs/digits --box 0 8 8 16 --prompt "a three and a five"
mmada sample extend canvas.png --model runs/digits --direction right --prompt "a five"
"""

import argparse
import re
from typing import TYPE_CHECKING

from mmada_jax import storage
from mmada_jax.programs.process import Parser, quiet

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from mmada_jax.serve.api import MMaDA

TASKS = {
    "text": "answers questions in text",
    "answer": "answers a question about each picture",
    "draw": "draws a picture for each prompt",
    "think": "thinks about each prompt, then draws a picture for it",
    "inpaint": "redraws a part of each picture",
    "extend": "continues each picture beyond an edge",
}
OF_TEXT, OF_PICTURES = ("text", "answer"), ("draw", "think", "inpaint", "extend")


def parser() -> Parser:
    """The command line. Options of a task are None where they aren't given."""
    top = Parser(
        __doc__,
        prog="mmada sample",
        epilog="tasks:\n" + "\n".join(f"  {name:8} {what}" for name, what in TASKS.items()),
    )
    top.add_argument("task", choices=TASKS, metavar="TASK", help="see below")
    top.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="prompts; of answer, inpaint, extend: files"
    )
    top.add_argument("--out", default="samples", help="folder for the PNGs (default: %(default)s)")
    top.add_argument("--seed", type=int, default=0, help="same seed, same result (default: 0)")

    group = top.add_argument_group("the model")
    group.add_argument(
        "--model", "--workdir", required=True, metavar="FOLDER",
        help="training workdir, checkpoint, or Hugging Face folder",
    )  # fmt: skip
    group.add_argument("--image-tokenizer", metavar="FOLDER", help="if the model's folder has none")
    group.add_argument("--step", type=int, metavar="N", help="an older checkpoint of a workdir")
    group.add_argument("--int8", action="store_true", help="hold the matrices of the layers in 8 bits")
    group.add_argument(
        "--image-size", type=image_size, metavar="ROWSxCOLUMNS",
        help="in pixels, or one number for both (default: as the folder says, else 512)",
    )  # fmt: skip
    group.add_argument(
        "--max-text", type=int, metavar="N",
        help="tokens of the text slot (default: as the folder says, else 512)",
    )  # fmt: skip

    def add(name, tasks, **settings):
        settings["help"] += f" [{', '.join(tasks)}]"
        group.add_argument(name, **settings)
        task_of[name[2:].replace("-", "_")] = tasks

    task_of = {}
    group = top.add_argument_group("decoding (defaults: as the model's folder says)")
    add(
        "--decode",
        (*OF_TEXT, *OF_PICTURES),
        help="a preset: exact (as trained), fast; text: cached too (see docs/decoding.md)",
    )
    add("--steps", (*OF_TEXT, *OF_PICTURES), type=int, help="denoising steps; text: one per token")
    add("--guidance", (*OF_TEXT, *OF_PICTURES), type=float, help="0: none")
    add("--temperature", (*OF_TEXT, *OF_PICTURES), type=float, help="of text, or of the order of pictures")
    add("--max-new", OF_TEXT, type=int, help="new tokens, as many as in training")
    add("--block", (*OF_TEXT, "think"), type=int, help="tokens per block of a text")
    add("--schedule", OF_PICTURES, help="cosine, linear, powK, sigmoid")
    group = top.add_argument_group("tasks")
    add("--question", ("answer",), help="about the pictures")
    add(
        "--prompt",
        ("inpaint", "extend"),
        help="what the whole picture shows; extend: its new part and the part beside it",
    )
    add("--mask", ("inpaint",), metavar="FILE", help="a picture of the same proportions; white is redrawn")
    add(
        "--box",
        ("inpaint",),
        type=int,
        nargs=4,
        metavar=("TOP", "LEFT", "BOTTOM", "RIGHT"),
        help="in pixels of the picture; of an enlarged drawing, in those of the model",
    )
    directions = ("left", "right", "up", "down")
    add("--direction", ("extend",), choices=directions, help="where to (default: right)")
    add("--scale", OF_PICTURES, type=int, help="enlarges PNGs (default: small ones, to 256 pixels)")
    top.set_defaults(task_of=task_of)
    return top


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Ends with status 2 for an option of another task."""
    top = parser()
    args = top.parse_args(argv)
    for name, tasks in args.task_of.items():
        if getattr(args, name) is not None and args.task not in tasks:
            top.error(f"--{name.replace('_', '-')} is an option of {', '.join(tasks)}, not of {args.task}")
    return args


def image_size(text: str) -> tuple[int, int]:
    """`8x16`, or `512` for both."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2:
        raise ValueError(text)
    return sides[0], sides[-1]


def main(argv: list[str]) -> None:
    """Loads the model, runs one task, writes and prints its results."""
    args = parse(argv)
    quiet()
    from mmada_jax.serve.api import MMaDA

    model = MMaDA.load(
        args.model,
        image_tokenizer=args.image_tokenizer,
        image_size=args.image_size,
        max_text=args.max_text,
        step=args.step,
        weights="int8" if args.int8 else "plain",
    )
    names, texts, drawings = args.inputs, [], []
    rule = {name: getattr(args, name) for name in ("decode", "steps", "guidance", "temperature")} | {
        "seed": args.seed
    }
    of_text = rule | {"block": args.block, "max_new": args.max_new}
    of_pictures = rule | {"schedule": args.schedule}
    if args.task == "text":
        texts = model.generate(names, **of_text)
    elif args.task == "answer":
        texts = model.answer([read_image(model, path) for path in names], args.question, **of_text)
    elif args.task == "draw":
        drawings = model.draw(names, **of_pictures)
    elif args.task == "think":
        texts, drawings = zip(*model.think_and_draw(names, block=args.block, **of_pictures), strict=True)
    else:
        images, prompt = [read_image(model, path) for path in names], args.prompt or ""
        if args.task == "inpaint":
            masks = [read_mask(args, image.size) for image in images]
            drawings = model.inpaint(images, masks, prompt, **of_pictures)
        else:
            drawings = model.extend(images, args.direction or "right", prompt, **of_pictures)
    for name, text in zip(names, texts, strict=False):
        print(f"{name}: {text}")
    from mmada_jax.data.images import png_of

    out = storage.path(args.out)
    if drawings:
        out.mkdir(parents=True, exist_ok=True)
    for i, (name, drawing) in enumerate(zip(names, drawings, strict=False)):
        name = storage.path(name).stem if args.task in ("inpaint", "extend") else name
        slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:40]
        path = out / f"{args.task}_{i:02}_{slug}.png"
        storage.write_whole(path, png_of(drawing.enlarged(args.scale)))
        print(path)


def read_image(model: "MMaDA", path: str) -> "Image.Image":
    """Opens a picture. One that is an enlargement of the model's size, as this program writes them,
    is brought back to it; the model takes care of any other size."""
    from mmada_jax.data.images import open_image, shrunk

    return shrunk(open_image(path), model.image_size)


def read_mask(args: argparse.Namespace, size: tuple[int, int]) -> "np.ndarray":
    """The mask of inpainting in pixels, from --mask or --box."""
    import numpy as np

    from mmada_jax.data.images import to_mask

    if args.mask:
        return to_mask(args.mask)
    if not args.box:
        raise ValueError("say what to redraw: --mask FILE or --box TOP LEFT BOTTOM RIGHT")
    top, left, bottom, right = args.box
    if not (0 <= top < bottom <= size[1] and 0 <= left < right <= size[0]):
        raise ValueError(
            f"box {args.box} is empty or outside the image of {size[1]}x{size[0]} (rows x columns)"
        )
    mask = np.zeros((size[1], size[0]), bool)
    mask[top:bottom, left:right] = True
    return mask
