"""Drawings for benchmarks that judge pictures: prompts of a file, pictures in the form that a judge reads.

geneval   evaluation_metadata.jsonl -> 00000/metadata.jsonl, 00000/samples/0000.png ...; four for a prompt
dpg       a folder of prompts, one a .txt -> NAME.png, four in a grid
wise      a .json with "prompt_id" and "Prompt" -> ID.png

A picture depends on its prompt's number and the seed alone; what is there already isn't drawn again. The
judges are programs of their own; `judge_of` says how to call them.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from mmada_jax import storage
from mmada_jax.data.images import png_of
from mmada_jax.files import read_json, read_text
from mmada_jax.progress import progress
from mmada_jax.serve.api import MMaDA
from mmada_jax.storage import write_whole

PER_PROMPT = {"geneval": 4, "dpg": 4, "wise": 1}
_JUDGES = {
    "geneval": "python evaluation/evaluate_images.py {out} --outfile results.jsonl --model-path DETECTOR "
    "(github.com/djghosh13/geneval)",
    "dpg": "bash dpg_bench/dist_eval.sh {out} {side} (github.com/TencentQQGYLab/ELLA)",
    "wise": "python gpt_eval.py --json_path {prompts} --image_dir {out} (github.com/PKU-YuanGroup/WISE)",
}


_FORMS = {
    "geneval": 'lines like {"tag": "single_object", "include": [...], "prompt": "a photo of a bench"}',
    "dpg": "a folder of .txt files",
    "wise": 'a list like [{"prompt_id": 1, "Prompt": "..."}]',
}


class Prompt(NamedTuple):
    """A prompt, the name of its pictures, and the line of GenEval's file that it is from."""

    name: str
    text: str
    line: str = ""


def read_prompts(kind: str, path: storage.Path) -> list[Prompt]:
    """The prompts of a benchmark. Raises FileNotFoundError, or ValueError for a file of another form."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; name the prompts of {kind} (docs/evaluation.md)")
    try:
        if kind == "geneval":
            lines = [line for line in read_text(path).splitlines() if line.strip()]
            prompts = [Prompt(f"{i:05}", json.loads(x)["prompt"], x) for i, x in enumerate(lines)]
        elif kind == "dpg":
            prompts = [Prompt(file.stem, read_text(file).strip()) for file in sorted(path.glob("*.txt"))]
        else:
            prompts = [Prompt(str(row["prompt_id"]), row["Prompt"]) for row in read_json(path, list)]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} has not the form of {kind}'s prompts, {_FORMS[kind]} ({error!r})"
        ) from error
    if not prompts:
        raise ValueError(f"{path} holds no prompts of {kind}")
    names = [prompt.name for prompt in prompts]
    if wrong := [n for n in names if n != pathlib.PurePath(n).name] or [
        n for n in names if names.count(n) > 1
    ]:
        raise ValueError(f"{path}: {wrong[0]!r} can't be the name of one picture")
    return prompts


def draw(
    model: MMaDA,
    kind: str,
    prompts: Sequence[Prompt],
    out: storage.Path,
    seed: int = 0,
    rows: int = 16,
    **fields: Any,
) -> dict[str, Any]:
    """Draws what isn't in `out` yet, about `rows` pictures at a time; `fields` are those of ImageRule.
    Counts of prompts and pictures."""
    n = PER_PROMPT[kind]
    left = [i for i, prompt in enumerate(prompts) if not _last(kind, out, prompt).is_file()]
    at_once = max(1, rows // n)
    with progress("drawing", len(left), "prompts") as bar:
        for part in (left[i : i + at_once] for i in range(0, len(left), at_once)):
            texts = [prompts[i].text for i in part for _ in range(n)]
            seeds = [(seed + i * n + k) % 2**31 for i in part for k in range(n)]
            drawn = [drawing.image.convert("RGB") for drawing in model.draw(texts, seed=seeds, **fields)]
            for at, i in enumerate(part):
                _write(kind, out, prompts[i], drawn[at * n : (at + 1) * n])
                bar.update(1)
    return {"prompts": len(prompts), "pictures": len(prompts) * n, "drawn_now": len(left) * n}


def judge_of(kind: str, prompts: storage.Path, out: storage.Path, side: int) -> str:
    """How a benchmark's own judge is called for pictures of that side in `out`."""
    return _JUDGES[kind].format(prompts=prompts, out=out, side=side)


def _last(kind: str, out: storage.Path, prompt: Prompt) -> storage.Path:
    """The file of a prompt that is written last."""
    return out / prompt.name / "metadata.jsonl" if kind == "geneval" else out / f"{prompt.name}.png"


def _write(kind: str, out: storage.Path, prompt: Prompt, pictures: list[Image.Image]) -> None:
    if kind != "geneval":
        write_whole(_last(kind, out, prompt), png_of(_grid(pictures)))
        return
    for number, picture in enumerate(pictures):
        write_whole(out / prompt.name / "samples" / f"{number:04}.png", png_of(picture))
    write_whole(_last(kind, out, prompt), prompt.line + "\n")


def _grid(pictures: list[Image.Image]) -> Image.Image:
    """One picture as it is; four, two by two."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % 2 * width, number // 2 * height))
    return grid


def pictures_of(kind: str, out: storage.Path, prompt: Prompt) -> list[Image.Image]:
    """The pictures of a prompt, out of its files."""
    if kind == "geneval":
        files = sorted((out / prompt.name / "samples").glob("*.png"))
        return [Image.open(file).convert("RGB") for file in files]
    with Image.open(_last(kind, out, prompt)) as image:
        whole = image.convert("RGB")
    if PER_PROMPT[kind] == 1:
        return [whole]
    width, height = whole.width // 2, whole.height // 2
    corners = [(x, y) for y in (0, height) for x in (0, width)]
    return [whole.crop((x, y, x + width, y + height)) for x, y in corners]
