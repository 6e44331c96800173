"""Samples from a model: writes PNGs and prints text.

python launch/sample.py --model runs/digits text "7 + 12"
python launch/sample.py --model runs/digits draw "a handwritten seven" "a three and a five"
python launch/sample.py --model runs/digits think "draw 3+4" --block 1
python launch/sample.py --model runs/digits answer canvas.png --question "which digit is this?"
python launch/sample.py --model runs/digits inpaint canvas.png --box 0 8 8 16 \
        --prompt "a three and a five"
python launch/sample.py --model runs/digits extend canvas.png --direction right --prompt "a five"
"""

import argparse
import os
import pathlib
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from PIL import Image

from launch import fail
from mmada_jax.api import MMaDA
from mmada_jax.data.images import open_image, to_mask
from mmada_jax.denoise import ImageRule, TextRule


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument(
        "--model", "--workdir", required=True, metavar="FOLDER",
        help="training workdir, checkpoint, or Hugging Face folder",
    )  # fmt: skip
    top.add_argument("--image-tokenizer", metavar="FOLDER", help="if the model's folder has none")
    top.add_argument("--out", default="samples", help="folder for the PNGs (default: %(default)s)")
    top.add_argument("--seed", type=int, default=0, help="same seed, same result (default: 0)")
    tasks = top.add_subparsers(dest="task", required=True, metavar="TASK")

    def text_rule(task):
        task.add_argument("--max-new", type=int, help="new tokens (default: as many as in training)")
        task.add_argument("--steps", type=int, help="denoising steps (default: one per new token)")
        task.add_argument("--block", type=int, default=128, help="tokens per block (default: 128)")
        task.add_argument("--temperature", type=float, default=0.0)
        task.add_argument("--guidance", type=float, default=0.0)

    def image_rule(task):
        task.add_argument("--steps", type=int, default=12, help="denoising steps (default: 12)")
        task.add_argument("--guidance", type=float, default=1.0, help="0: none (default: 1)")
        task.add_argument("--temperature", type=float, default=1.0, help="of the order (default: 1)")
        task.add_argument("--schedule", default="cosine", help="cosine, linear, powK, sigmoid")
        task.add_argument("--scale", type=int, help="enlarge the PNG (default: small ones, to 256 pixels)")

    text = tasks.add_parser("text", help="answer questions in text")
    text.add_argument("prompts", nargs="+")
    text_rule(text)
    answer = tasks.add_parser("answer", help="answer a question about images")
    answer.add_argument("images", nargs="+")
    answer.add_argument("--question", default="which digit is this?")
    text_rule(answer)
    draw = tasks.add_parser("draw", help="draw images for prompts")
    draw.add_argument("prompts", nargs="+")
    image_rule(draw)
    think = tasks.add_parser("think", help="think about prompts, then draw images for them")
    think.add_argument("prompts", nargs="+")
    think.add_argument(
        "--block", type=int, default=128, help="tokens per block of the thought (default: 128)"
    )
    image_rule(think)
    inpaint = tasks.add_parser("inpaint", help="redraw a part of images")
    inpaint.add_argument("images", nargs="+")
    inpaint.add_argument("--prompt", default="", help="what the whole image shows")
    inpaint.add_argument("--mask", help="a picture of the same size; white is redrawn")
    inpaint.add_argument(
        "--box", type=int, nargs=4, metavar=("TOP", "LEFT", "BOTTOM", "RIGHT"), help="in pixels"
    )
    image_rule(inpaint)
    extend = tasks.add_parser("extend", help="continue images beyond an edge")
    extend.add_argument("images", nargs="+")
    extend.add_argument(
        "--prompt", default="", help="what the new part of the image and its neighbour show"
    )
    extend.add_argument("--direction", choices=("left", "right", "up", "down"), default="right")
    image_rule(extend)
    return top


def main() -> None:
    """Loads the model, runs one task, writes and prints its results."""
    args = parser().parse_args()
    model = MMaDA.load(args.model, image_tokenizer=args.image_tokenizer)
    if args.task in ("text", "answer"):
        say(model, args)
        return
    rule = ImageRule(args.steps, args.schedule, args.temperature, args.guidance)
    if args.task == "draw":
        names = args.prompts
        drawings = model.draw(args.prompts, rule, seed=args.seed)
    elif args.task == "think":
        names = args.prompts
        thinking = TextRule(block=args.block)
        thoughts, drawings = zip(*model.think_and_draw(names, thinking, rule, args.seed), strict=True)
        for name, thought in zip(names, thoughts, strict=True):
            print(f"{name}: {thought.text}")
    else:
        names = [pathlib.Path(path).stem for path in args.images]
        images = [read_image(model, path) for path in args.images]
        prompts = [args.prompt] * len(images)
        if args.task == "inpaint":
            masks = [read_mask(args, image.size) for image in images]
            drawings = model.inpaint(images, masks, prompts, rule, seed=args.seed)
        else:
            drawings = model.extend(images, args.direction, prompts, rule, seed=args.seed)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for i, (name, drawing) in enumerate(zip(names, drawings, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:40]
        path = out / f"{args.task}_{i:02}_{slug}.png"
        scale = args.scale or max(1, 256 // max(drawing.image.size))
        size = [scale * side for side in drawing.image.size]
        drawing.image.resize(size, Image.Resampling.NEAREST).save(path)
        print(path)


def say(model: MMaDA, args: argparse.Namespace) -> None:
    """The tasks whose result is text."""
    if args.task == "text":
        names, inputs = args.prompts, (args.prompts,)
    else:
        names = args.images
        inputs = ([read_image(model, path) for path in args.images], [args.question] * len(names))
    rule = TextRule(args.steps, args.block, args.temperature, guidance=args.guidance)
    method = model.generate if args.task == "text" else model.answer
    for name, text in zip(names, method(*inputs, rule, args.max_new, seed=args.seed), strict=True):
        print(f"{name}: {text.text}")


def read_image(model: MMaDA, path: str) -> Image.Image:
    """Opens a picture. One that is an enlargement of the model's size, as this program writes them,
    is brought back to it; the model takes care of any other size."""
    height, width = model.image_size
    image = open_image(path)
    scale = image.width // width
    if scale > 1 and image.size == (scale * width, scale * height):
        image = image.resize((width, height), Image.Resampling.BOX)
    return image


def read_mask(args: argparse.Namespace, size: tuple[int, int]) -> np.ndarray:
    """The mask of inpainting in pixels, from --mask or --box."""
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


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        fail(error)
