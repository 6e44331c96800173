"""The report of the quickstart: what was measured and drawn -> one HTML file that holds all its pictures.

What was measured comes as plain numbers and arrays; nothing is trained or counted here. The page itself is
report.html beside this file, a template of Jinja2, which escapes every text that a model has written.
"""

import base64
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmada_jax.data import digits
from mmada_jax.measure import digits as measured
from mmada_jax.nets.vq import to_uint8
from mmada_jax.tokens.tokenizer import split_thought

# Captions of the drawings that are shown step by step.
SHOWN = (digits.caption(3, 5), digits.caption(7), digits.caption(4, 2), digits.caption(0, 9),
         digits.caption(8), digits.caption(6, 1))  # fmt: skip
# Milliseconds that a step of an animated drawing is seen, and the last one.
STEP_MS, LAST_MS = 220, 2000
# Letters and lines of curves: seen on white and on black.
GREY = "#808080"
# Metric -> what it counts, and where it was measured after the stages 1, 2 and 3.
METRICS = {
    "t2i_one": ("a digit is drawn as its caption asks", "pretrain", "cot", "unigrpo"),
    "t2i_two": ("two digits are drawn as asked", "pretrain", None, None),
    "t2i_one_unguided": ("the same without guidance, in fewer steps", None, "unigrpo_before", "unigrpo"),
    "inpaint": ("the hidden one of two digits is redrawn", "pretrain", None, None),
    "r2i_image": ("“draw 3+4”: the drawing is the sum", "cot_before", "cot", None),
    "vqa_one": ("a scanned digit is read", "pretrain", None, None),
    "vqa_two": ("two scanned digits are read", "pretrain", "cot", None),
    "vqa_sum": ("the sum of two scanned digits, thought first", "cot_before", "cot", "unigrpo"),
    "text_arithmetic": ("sums and differences in text", "pretrain", None, None),
    "text_cot": ("sums of four digits, thought first", "cot_before", "cot", "unigrpo"),
    "text_cot_sampled": ("the same, sampled at temperature 1", None, "unigrpo_before", "unigrpo"),
}
RUNS = {
    "image_tokenizer": "image tokenizer", "pretrain": "stage 1", "cot": "stage 2", "unigrpo": "stage 3",
}  # fmt: skip


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of Wilson for a share, in [0, 1]; by default the one of 95 %.

    Source: E. B. Wilson, Probable inference, J. Am. Stat. Assoc. 22 (1927)."""
    share, n = correct / total, total
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def denoising(model: Any) -> tuple[list[np.ndarray], list[str]]:
    """How it draws and reads: pixels [n, I, J, C] of the drawings of SHOWN after each step, hidden tokens
    grey; a text after each step, hidden tokens as low lines."""
    steps = model.watch(model.draw_job(list(SHOWN), measured.DRAW))
    drawn = [model.pixels([drawing.image for drawing in drawings]) for drawings in steps]
    scans = digits.load("test")
    read = model.watch(model.answer_job(digits.canvas(*scans.pixels[:2]), digits.ASK_TWO))
    return drawn, [text.text for text in read]


def page(result: Mapping[str, Any], pictures: Mapping[str, Any], charts: Sequence[Mapping]) -> str:
    """report.html. `result` has the counts of each stage and the seconds, `pictures` what there is to look
    at, `charts` is what `curves` returns."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        minutes=round(sum(result["seconds"].values()) / 60),
        seconds=result["seconds"],
        data_wait=result["data_wait"],
        counts=counts(result["stages"]),
        judge=share(result["judge"]),
        rebuilt=share(result["stages"]["tokenizer"]["reconstructed_digit"]),
        psnr=result["stages"]["tokenizer"]["psnr_db"],
        rewards=rewards(result["stages"]),
        curves=charts,
        text_steps=pictures["text_steps"],
        **tiles(pictures),
        **thoughts(pictures),
    )


# ---- Numbers ---------------------------------------------------------------------------------------


def share(count: Mapping[str, int]) -> dict[str, Any]:
    """A count as percent, with its interval."""
    correct, total = count["correct"], count["total"]
    low, high = wilson(correct, total)
    return {
        "correct": correct, "total": total,
        "percent": 100 * correct / total, "low": 100 * low, "high": 100 * high,
    }  # fmt: skip


def counts(stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each metric: what it counts, and its shares after the three stages, None if unknown."""
    rows = []
    for name, (what, *places) in METRICS.items():
        found = [stages.get(place, {}).get(name) for place in places]
        if any(found):
            rows.append({"name": name, "what": what, "shares": [count and share(count) for count in found]})
    return rows


def rewards(stages: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(task, mean reward before, after) of stage 3."""
    before, after = (stages[name]["rewards"] for name in ("unigrpo_before", "unigrpo"))
    return [(task, before[task], reward) for task, reward in after.items()]


# ---- What it said ----------------------------------------------------------------------------------


def answer(question: str, said: str, want: str) -> dict[str, Any]:
    """An answer behind its thought, if it has one, and whether it is right."""
    thought, answered = split_thought(said)
    return {
        "question": question,
        "thought": thought,
        "said": answered,
        "right": answered == want,
        "want": want,
    }


def thoughts(pictures: Mapping[str, Any]) -> dict[str, list]:
    """The texts of the page: sums, and sums in steps before and after stages 2 and 3."""
    before, after = pictures["rl_before"]["sums"], pictures["rl_after"]["sums"]
    changed = [
        {"before": answer(*old), "after": answer(*new)}
        for old, new in zip(before, after, strict=True)
        if old[1] != new[1]
    ]
    return {
        "arithmetic": [answer(*row) for row in pictures["arithmetic"][:12]],
        "unthinking": [answer(*row) for row in pictures["before"]["text_cot"][:3]],
        "chains": [answer(*row) for row in pictures["after"]["text_cot"][:8]],
        "changed": changed[:8],
    }


# ---- Pictures --------------------------------------------------------------------------------------


def tiles(pictures: Mapping[str, Any]) -> dict[str, list]:
    """The pictures of the page, each as `tile` has it, by section."""
    drawn, (hole, scans) = pictures["image_steps"], (pictures["inpaint"], digits.load("test"))
    one, two, after = pictures["drawn_one"], pictures["drawn_two"], pictures["after"]
    given = _given(hole)
    undrawn = [pictures[when]["drawn"] for when in ("rl_before", "rl_after")]
    spread = np.linspace(0, len(two[0]) - 1, min(10, len(two[0]))).astype(int)
    return {
        "animated": [animation([step[i] for step in drawn], text) for i, text in enumerate(SHOWN)],
        "steps": [tile(step[0], f"step {i}") for i, step in enumerate(drawn, 1)],
        "drawn_one": [tile(p, digits.caption(*w)) for p, w in zip(one[0][:10], one[1][:10], strict=True)],
        "drawn_two": [tile(two[0][i], digits.caption(*two[1][i])) for i in spread],
        "inpainted": [
            [tile(a, "given"), tile(b, "redrawn"), tile(c, "the scan")]
            for a, b, c in zip(given[:8], hole["pixels"][:8], hole["canvases"][:8], strict=True)
        ],
        "rebuilt_tiles": [
            [tile(digits.canvas(scan), "scan"), tile(again, "decoded")]
            for scan, again in zip(scans.pixels[:8], pictures["rebuilt"][:8], strict=False)
        ],
        "read": [
            tile(canvas, said, right=said == want, want=want)
            for canvas, said, want in pictures["read_one"][:4] + pictures["read_two"][:8]
        ],
        "added": [
            tile(canvas, f"{a['thought'] or ''} → {a['said']}", right=a["right"], want=want)
            for canvas, said, want in after["vqa_sum"][:8]
            for a in [answer("", said, want)]
        ],
        "thought_drawn": [
            tile(pixels, f"{asked}: {thought}")
            for pixels, (asked, thought) in list(zip(*after["r2i"], strict=True))[:8]
        ],
        "unguided": [
            [tile(p, digits.caption(*w)) for p, w in zip(pixels[:10], wanted[:10], strict=True)]
            for pixels, wanted in undrawn
        ],
    }  # fmt: skip


def tile(pixels: np.ndarray, text: str, right: bool | None = None, want: str = "") -> dict:
    """A canvas [I, J, 1] as a PNG of the same size, which the page enlarges, over a text; for an answer
    whether it is right, and the one that is."""
    return {
        "src": inline(Image.fromarray(to_uint8(pixels)[..., 0])),
        "text": text,
        "right": right,
        "want": want,
    }


def animation(frames: Sequence[np.ndarray], text: str) -> dict:
    """Canvases as an animated PNG that begins anew after a while."""
    images = [Image.fromarray(to_uint8(pixels)[..., 0]) for pixels in frames]
    times = [STEP_MS] * (len(images) - 1) + [LAST_MS]
    file = io.BytesIO()
    images[0].save(file, "PNG", save_all=True, append_images=images[1:], duration=times, loop=0)
    return {"src": _data(file.getvalue()), "text": text, "right": None, "want": ""}


def results(pictures: Mapping[str, Any]) -> Image.Image:
    """The report in one picture: digits drawn, two digits drawn, what inpainting was given, what it redrew,
    and a drawing step by step; ten of each."""
    hole, steps, two = pictures["inpaint"], pictures["image_steps"], pictures["drawn_two"][0]
    rows = [
        pictures["drawn_one"][0][:10],
        [two[i] for i in np.linspace(3, len(two) - 1, 10).astype(int)],
        _given(hole)[:10],
        hole["pixels"][:10],
        [steps[i * (len(steps) - 1) // 9][0] for i in range(10)],
    ]
    bars = [np.concatenate([np.pad(p[..., 0], 1, constant_values=-0.5) for p in r], axis=1) for r in rows]
    image = Image.fromarray(to_uint8(np.concatenate(bars)))
    return image.resize((5 * image.width, 5 * image.height), Image.Resampling.NEAREST)


def _given(hole: Mapping[str, Any]) -> list[np.ndarray]:
    """Canvases whose hidden half is grey."""
    return [np.where(m[..., None], 0, c) for m, c in zip(hole["masks"], hole["canvases"], strict=True)]


def curves(histories: Mapping[str, Sequence[Mapping]]) -> list[dict]:
    """A picture for each run: its losses, or its rewards, over the steps. Lines and letters can be seen on
    white and on black."""
    import matplotlib
    from matplotlib.figure import Figure

    colors = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    pictures = []
    for run, title in RUNS.items():
        rows, what = histories[run], "reward" if run == "unigrpo" else "loss"
        names = list(dict.fromkeys(name for row in rows for name in row if _is_shown(name)))
        with matplotlib.rc_context(dict.fromkeys(colors, GREY) | {"font.size": 9}):
            figure = Figure(figsize=(4.6, 2.8))
            axis = figure.add_subplot()
            for name in names:
                points = [(row["step"], row[name]) for row in rows if name in row]
                label = name.removeprefix("loss_").removesuffix("/reward")
                axis.plot(*zip(*points, strict=True), label=label)
            axis.set(title=f"{title}: {what}", xlabel="step")
            axis.set_yscale("linear" if what == "reward" else "log")
            axis.grid(alpha=0.2)
            if names:
                axis.legend(fontsize=7, frameon=False, labelcolor=GREY)
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=110, bbox_inches="tight", transparent=True)
        pictures.append({"src": _data(file.getvalue()), "text": f"{what} of {title} over its steps"})
    return pictures


def _is_shown(name: str) -> bool:
    return name == "reconstruction" or name.startswith("loss_") or name.endswith("/reward")


def inline(image: Image.Image) -> str:
    """An image as a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return _data(file.getvalue())


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
