"""A page to talk with a model and to see it draw, by Gradio (the extra `page`).

Each task is denoised live, on the engine that all visitors of the page share.
"""

import dataclasses
import html
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from mmada_jax.data.images import shrunk
from mmada_jax.model.inputs import rule_of
from mmada_jax.serve import canvas
from mmada_jax.serve.api import MMaDA

CSS = """
.said { font-size: 1.1em; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; }
.said .hidden { color: #999; letter-spacing: 1px; }
.said mark { background: #ffd599; color: inherit; border-radius: 3px; }
.said .tag { font-size: 0.8em; color: #777; margin: 0 0.5em; }
.turn { margin: 0.6em 0; padding: 0.5em 0.8em; border-left: 3px solid #ff8c00; }
.turn.user { border-color: #999; }
.drawing { image-rendering: pixelated; max-width: 100%; display: block; margin: 0.5em 0; }
.ready { color: #777; }
"""
# Prompts that the quickstart's model knows, and others.
DIGITS = {
    "chat": ["7+2", "8+5"],
    "draw": ["a handwritten seven", "a three and a five"],
    "think": ["draw 3+4", "draw 9-2"],
}
OTHERS = {
    "chat": ["What is 12 times 7?", "Write a short poem about autumn."],
    "draw": ["a red apple on a wooden table", "a lighthouse in a storm"],
    "think": ["the animal that gives us wool, on a meadow"],
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """How a visitor wants a task to be decoded; a 0 stands for the model's default."""

    steps: float
    guidance: float
    decode: str
    seed: float | None

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of a rule."""
        guidance = None if self.guidance < 0 else self.guidance
        return {"steps": int(self.steps) or None, "guidance": guidance, "decode": self.decode}


class Page:
    """The page of a model. `blocks` is what Gradio launches."""

    def __init__(self, model: MMaDA, name: str):
        self.model, self.name = model, name
        is_digits = model.vq_config is not None and model.vq_config.pixel_channels == 1
        self.prompts = DIGITS if is_digits else OTHERS
        self.ready = threading.Event()
        self.blocks = gr.Blocks(title=f"MMaDA: {name}", analytics_enabled=False)
        with self.blocks:
            self._build()
        self.blocks.queue(default_concurrency_limit=16)

    def warm_up(self) -> None:
        """Compiles what visitors will ask for first."""
        try:
            self.model.generate(self.prompts["chat"][0])
            if self.model.vq_config:
                self.model.draw(self.prompts["draw"][0])
        finally:
            self.ready.set()

    # ---- Layout ---------------------------------------------------------------------------------

    def _build(self):
        model = self.model
        gr.Markdown(f"# {self.name}\n{model!r}")
        status, timer = gr.HTML(self._status()), gr.Timer(1.0)
        timer.tick(self._tick, None, [status, timer], show_progress="hidden")
        last = gr.State(None)  # the last drawing of this visitor
        with gr.Accordion("Decoding", open=False), gr.Row():
            steps = gr.Slider(0, 256, 0, step=1, label="steps (0: as the model does)", elem_id="steps")
            guidance = gr.Slider(-1, 15, -1, step=0.5, label="guidance (-1: as the model does)")
            decode = gr.Radio(["exact", "fast"], value="exact", label="decode", elem_id="decode")
            seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="seed", elem_id="seed")
        controls = [steps, guidance, decode, seed]
        with gr.Tab("Chat"):
            self._chat(controls, last)
        if model.vq_config:
            with gr.Tab("Draw"):
                prompt = self._prompt("draw")
                self._when(prompt, "Draw", "draw", self._draw, [prompt, *controls], last)
            with gr.Tab("Inpaint"):
                picture = gr.ImageEditor(
                    label="paint over what is to be drawn anew", type="pil", layers=False, transforms=(),
                    brush=gr.Brush(colors=["#ff8c00"], default_size=24), elem_id="inpaint_in", height=420,
                )  # fmt: skip
                self._take(last, picture, "inpaint_take")
                prompt = self._prompt("draw", "inpaint")
                given = [picture, prompt, *controls]
                self._when(prompt, "Redraw", "inpaint", self._inpaint, given, last)
            with gr.Tab("Extend"):
                picture = gr.Image(label="picture", type="pil", elem_id="extend_in", height=300)
                self._take(last, picture, "extend_take")
                way = gr.Radio(["left", "right", "up", "down"], value="right", label="beyond which edge")
                prompt = self._prompt("draw", "extend")
                self._when(prompt, "Extend", "extend", self._extend, [picture, way, prompt, *controls])
            with gr.Tab("Think, then draw"):
                prompt = self._prompt("think")
                self._when(prompt, "Think", "think", self._think, [prompt, *controls], last)

    def _prompt(self, task, name=None):
        name = name or task
        prompt = gr.Textbox(self.prompts[task][0], label="prompt", elem_id=f"{name}_prompt", max_lines=4)
        gr.Examples([[text] for text in self.prompts[task]], [prompt], label="examples")
        return prompt

    def _chat(self, controls, last):
        turns, shown = gr.State([]), gr.HTML(elem_id="chat_out")
        with gr.Row():
            picture = gr.Image(label="a picture to talk about", type="pil", elem_id="chat_in", height=200)
            with gr.Column():
                prompt = self._prompt("chat")
                if self.model.vq_config:
                    self._take(last, picture, "chat_take")
        given = [prompt, picture, turns, *controls]
        self._when(prompt, "Send", "chat", self._talk, given, turns, shown=shown)
        clear = gr.Button("Begin anew", size="sm", elem_id="chat_clear")
        clear.click(lambda: ("", [], None), None, [shown, turns, picture])

    def _take(self, last, picture, name):
        button = gr.Button("Take the last drawing", size="sm", elem_id=name)
        button.click(lambda drawing: drawing, last, picture)

    def _when(self, prompt, label, name, function, inputs, kept=None, shown=None):
        """A button, and Enter in the prompt, begin the task, which shows itself below and is `kept` in a
        state; another button ends it."""
        with gr.Row():
            go = gr.Button(label, variant="primary", elem_id=f"{name}_go")
            stop = gr.Button("Stop", elem_id=f"{name}_stop")
        outputs = [shown or gr.HTML(elem_id=f"{name}_out"), *([kept] if kept else [])]
        hidden = {"show_progress": "hidden"}
        begun = [on(function, inputs, outputs, **hidden) for on in (go.click, prompt.submit)]
        stop.click(None, cancels=begun)

    def _status(self):
        if self.ready.is_set():
            return ""
        return '<p class="ready">The model is being compiled; what you ask for waits until it is.</p>'

    def _tick(self):
        is_ready = self.ready.is_set()
        return gr.HTML(self._status(), visible=not is_ready), gr.Timer(active=not is_ready)

    # ---- Tasks: each gives snapshots ------------------------------------------------------------

    def _talk(self, prompt, picture, turns, *controls) -> Iterator[Any]:
        asked = Asked(*controls)
        if asked.fields["guidance"] is None and asked.decode == "fast":
            asked = dataclasses.replace(asked, guidance=0.0)
        turns = [*turns, {"role": "user", "content": prompt}]
        said = "".join(self._turn(turn) for turn in turns)

        def job():
            if not prompt.strip():
                raise ValueError("the prompt is empty; say something")
            fields = asked.fields | {"stop": self.model.vocab.end_turn}
            if picture is None:
                return self.model.text_job(turns, **fields)
            return self.model.answer_job(self._fitted(picture), turns, **fields)

        ids = None
        for ids, before in self._steps(job, asked):
            yield f'{said}<div class="turn">{canvas.text(self.model, ids, before)}</div>', turns
        answer = self.model.read(ids).text
        said += f'<div class="turn">{canvas.text(self.model, ids)}</div>'
        yield said, [*turns, {"role": "assistant", "content": answer}]

    def _turn(self, turn):
        kind = "turn user" if turn["role"] == "user" else "turn"
        return f'<div class="{kind}"><div class="said">{html.escape(turn["content"])}</div></div>'

    def _draw(self, prompt, *controls) -> Iterator[Any]:
        asked = Asked(*controls)

        def job():
            if not prompt.strip():
                raise ValueError("the prompt is empty; say what is to be drawn")
            return self.model.draw_job(prompt, **asked.fields)

        yield from self._drawn(job, asked)

    def _inpaint(self, edited, prompt, *controls) -> Iterator[Any]:
        asked = Asked(*controls)

        def job():
            if not edited or edited["background"] is None:
                raise ValueError("there is no picture yet; put one in, or take the last drawing")
            layers = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in edited["layers"]]
            mask = np.any(layers, axis=0) if layers else np.zeros((1, 1), bool)
            if not mask.any():
                raise ValueError("nothing is painted over; paint over what is to be drawn anew")
            picture = self._fitted(edited["background"])
            return self.model.inpaint_job(picture, mask, prompt, **asked.fields)

        yield from self._drawn(job, asked)

    def _extend(self, picture, way, prompt, *controls) -> Iterator[Any]:
        asked, join = Asked(*controls), []

        def job():
            if picture is None:
                raise ValueError("there is no picture yet; put one in, or take the last drawing")
            made, how = self.model.extend_job(self._fitted(picture), way, prompt, **asked.fields)
            join.append(how)
            return made

        for shown, _ in self._drawn(job, asked, lambda codes_Bij: join[0](codes_Bij)):
            yield shown

    def _think(self, prompt, *controls) -> Iterator[Any]:
        asked, ids, jobs = Asked(*controls), None, []

        def thinking():
            jobs.append(self.model.think_job(prompt, decode=asked.decode))
            return jobs[0]

        for ids, before in self._steps(thinking, asked):
            yield canvas.text(self.model, ids, before), None
        thought = self.model.read(ids)
        said = canvas.text(self.model, ids)

        def drawing():
            rule = rule_of(self.model.defaults.image, None, asked.fields)
            return self.model.drawing_job(jobs[0], [thought], rule)

        for shown, last in self._drawn(drawing, asked):
            yield said + shown, last

    def _drawn(self, job, asked, join=lambda codes_Bij: codes_Bij) -> Iterator[tuple[str, Any]]:
        """Snapshots of a drawing, and at the end the drawing itself."""
        ids = None
        for ids, before in self._steps(job, asked):
            codes = join(self.model.codes([ids]))[0]
            old = None if before is None else join(self.model.codes([before]))[0]
            yield canvas.drawing(self.model, codes, old), None
        codes_Bij = join(self.model.codes([ids]))
        [drawing] = self.model.drawings(codes_Bij)
        yield (
            canvas.drawing(self.model, codes_Bij[0]),
            drawing.enlarged(max(1, 384 // max(drawing.image.size))),
        )

    def _steps(self, job: Callable[[], Any], asked: Asked) -> Iterator[tuple[Any, Any]]:
        """(ids, ids of the step before) after every step. What goes wrong is shown."""
        try:
            before = None
            made = job()
            for [ids] in self.model.engine.steps(made, int(asked.seed or 0), self.model.adapter):
                yield ids.copy(), before
                before = ids.copy()
        except (ValueError, OSError, RuntimeError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    def _fitted(self, picture: Image.Image) -> Image.Image:
        """A picture that is an enlargement of the model's size, as this page shows them, at that size."""
        return shrunk(picture.convert("RGB"), self.model.image_size)
