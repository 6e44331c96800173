"""The endpoint: OpenAI's API in front of an engine, by FastAPI (the extra `serve`).

    app = Endpoint(model).app            # for uvicorn; `mmada serve` runs it

The event loop reads, waits and writes. Jobs are made and pictures are encoded and decoded in threads of
their own, and the engine decodes in its thread. Who hangs up gives the slots back.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from mmada_jax.diffusion.decode import Job
from mmada_jax.model.results import HIDDEN
from mmada_jax.serve import requests
from mmada_jax.serve.api import MMaDA
from mmada_jax.serve.engine import Engine
from mmada_jax.serve.guard import Guarded, Limits, json_of, value_of
from mmada_jax.serve.meters import Meters
from mmada_jax.serve.replies import RefusedError, TextReply, error, png, usage
from mmada_jax.serve.tickets import Every, FullError, Ticket

# How often a waiting request looks whether its client is still there, in seconds.
LOOK_EVERY = 0.2


class Watched:
    """The rows of a job, as one request waits for them."""

    def __init__(
        self, engine: Engine, meters: Meters, job: Job, seeds: list[int], every: Every | None, **named: Any
    ):
        """Submits the job; with `every`, a step or a block, all that becomes of its rows is kept in order.
        Raises what `Engine.submit` raises."""
        loop, self._news = asyncio.get_running_loop(), asyncio.Queue()
        self.job, self.seeds, self._meters = job, seeds, meters
        self._dropped: set[int] = set()

        def tell(ticket: Ticket) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._news.put_nowait, (ticket.number, ticket.ids, ticket.over))

        if every:
            named |= {"every": every, "progress": tell}
        self.tickets = engine.submit(job, seeds, at_end=tell, **named)

    async def news(self, request: Request) -> AsyncIterator[tuple[int, np.ndarray, bool]]:
        """(number, ids, whether it is over) of rows as they change, until all are over. Raises what went
        wrong with one, and RefusedError when the client has hung up. Whoever stops listening gives the
        slots back."""
        ended, looked = set(), time.monotonic()
        try:
            while len(ended) < len(self.tickets):
                if time.monotonic() - looked > LOOK_EVERY:
                    looked = time.monotonic()
                    if await request.is_disconnected():
                        raise RefusedError("the client has hung up", 499)
                try:
                    number, ids, over = await asyncio.wait_for(self._news.get(), LOOK_EVERY)
                except TimeoutError:
                    continue
                if over:
                    ended.add(number)
                    if self.tickets[number].error and number not in self._dropped:
                        raise self.tickets[number].error
                if ids is not None:
                    yield number, ids, over
        finally:
            for ticket in self.tickets:
                ticket.cancel()
                self._meters.count(ticket, ticket.number in self._dropped)

    async def result(self, request: Request) -> list[np.ndarray]:
        """The ids of all spans."""
        async for _ in self.news(request):
            pass
        return [ticket.ids for ticket in self.tickets]

    def drop(self, number: int) -> None:
        """Gives up a row of which enough is known."""
        self._dropped.add(number)
        self.tickets[number].cancel()


class Endpoint:
    """A model as a service. `names` are the ids of the models that clients name, each with its adapter."""

    def __init__(self, model: MMaDA, name: str = "mmada", limits: Limits | None = None):
        self.model, self.name, self.started = model, name, int(time.time())
        self.limits = limits = limits or Limits()
        if name in model.adapters:
            raise ValueError(f"the model and an adapter are both called {name!r}; give one another name")
        self.names = {name: "", **{adapter: adapter for adapter in model.adapters}}
        self.engine = Engine(model, slots=limits.slots, queue=limits.queue)
        self.meters = Meters(self.engine)
        self.pool, self._preparing = concurrent.futures.ThreadPoolExecutor(2, "requests"), 0
        self.app = FastAPI(title="mmada_jax", docs_url=None, redoc_url=None, lifespan=self._lifespan)
        self.app.add_middleware(Guarded, limits=limits)
        for kind in (RefusedError, ValueError, FullError, TimeoutError, Exception):
            self.app.add_exception_handler(kind, self._error)
        for status, what in ((404, "there is no such path"), (405, "this path takes another method")):
            self.app.add_exception_handler(status, functools.partial(self._error_of, what, status))
        self.app.get("/health")(self.health)
        self.app.get("/metrics")(self.metrics)
        self.app.get("/v1/models")(self.models)
        self.app.get("/v1/models/{name:path}")(self.one_model)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.post("/v1/images/generations")(self.generations)
        self.app.post("/v1/images/edits")(self.edits)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """The engine works as long as the app does, and finishes what was submitted."""
        del app
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.close)
        self.pool.shutdown(wait=False)

    # ---- What isn't decoding --------------------------------------------------------------------

    async def health(self) -> dict[str, Any]:
        """Whether the endpoint answers, and what it is doing."""
        return {"status": "ok", **self.meters.now()}

    async def metrics(self) -> Response:
        """Prometheus's metrics."""
        return Response(self.meters.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        """The model, and its adapters as further models."""
        return {"object": "list", "data": [self._about(name) for name in self.names]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """One of these."""
        self._adapter(name)
        return self._about(name)

    def _about(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "mmada_jax"}

    def _adapter(self, name: str) -> str:
        if name not in self.names:
            raise RefusedError(
                f"there is no model {name!r}; known: {', '.join(self.names)}",
                404,
                "model_not_found",
                "model",
            )
        return self.names[name]

    # ---- Chat -----------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await json_of(request)
        asked = requests.read(requests.Chat, body, leave=("messages",))
        of, adapter = requests.conversation(body.get("messages")), self._adapter(asked.model or self.name)
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model or self.name,
        }
        if "image" in asked.modalities:
            return await self._chat_of_images(request, asked, of, adapter, head)
        job = await self._in_thread(requests.chat_job, self.model, asked, of)
        every = None
        if asked.stream or asked.stop:  # a text to stop at is looked for after each block
            every = "step" if asked.stream and asked.stream_mode == "denoise" else "block"
        watched = self._submit(job, asked, adapter, every)
        replies = [TextReply(self.model, asked.stop) for _ in job.length_B]
        n_image = 0 if of.picture is None else self.model.n_image

        def told():
            return usage([job], watched.tickets, sum(reply.tokens for reply in replies), n_image)

        if asked.stream:
            return _stream(self._chat_events(request, asked, watched, replies, head, told))
        async for number, ids, over in watched.news(request):
            if not replies[number].finish:
                replies[number].take(ids, final=over)
                if replies[number].finish and not over:
                    watched.drop(number)
        choices = [
            {"index": i, "message": reply.message(), "finish_reason": reply.finish, "logprobs": None}
            for i, reply in enumerate(replies)
        ]
        return JSONResponse({"object": "chat.completion", **head, "choices": choices, "usage": told()})

    async def _chat_events(self, request, asked, watched, replies, head, told):
        """The chunks of a stream: stable text as it comes, and with `denoise` the whole canvas after every
        step."""
        chunk = {"object": "chat.completion.chunk", **head}

        def choice(index, delta, finish=None, **more):
            made = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
            return chunk | {"choices": [made]} | more

        for i in range(len(replies)):
            yield choice(i, {"role": "assistant", "content": ""})
        async for number, ids, over in watched.news(request):
            reply = replies[number]
            if reply.finish:
                continue
            delta = reply.take(ids, final=over)
            canvas = {}
            if asked.stream_mode == "denoise":
                canvas = {"canvas": self._canvas(watched.job, ids)}
            if delta or canvas:
                yield choice(number, delta, **canvas)
            if reply.finish:
                watched.drop(number)  # its end is there; what follows isn't wanted
                yield choice(number, {}, reply.finish)
        if asked.stream_options.include_usage:
            yield chunk | {"choices": [], "usage": told()}

    async def _chat_of_images(self, request, asked, of, adapter, head):
        """A drawing of what the last turn says; with the modality `text` too, after a thought about it."""
        if asked.stream and asked.stream_mode != "denoise":
            raise RefusedError(
                "drawings are streamed with stream_mode 'denoise'; leave stream out otherwise",
                param="stream",
            )
        if of.picture is not None:
            raise RefusedError("a picture can't be given where one is drawn", param="messages")
        make = requests.thought_job if "text" in asked.modalities else requests.draw_job
        job = await self._in_thread(make, self.model, asked, of)
        watched = self._submit(job, asked, adapter, "step" if asked.stream else None)
        events = self._images_of(request, asked, adapter, watched)
        if asked.stream:
            base = {"object": "chat.completion.chunk", **head}
            return _stream(base | event async for event in events)
        choices, told = [], {}
        async for event in events:
            if "usage" in event:
                choices, told = event["choices"], event["usage"]
        for choice in choices:
            choice["message"] = choice.pop("delta")
        return JSONResponse({"object": "chat.completion", **head, "choices": choices, "usage": told})

    async def _images_of(self, request, asked, adapter, watched):
        """Snapshots of thoughts and drawings, if they are streamed, and at the end the whole messages.
        `watched` are the thoughts, or the drawings if there are none."""
        job, jobs, tickets = watched.job, [watched.job], []

        def snapshot(number, canvas):
            empty = {"index": number, "delta": {}, "finish_reason": None, "logprobs": None}
            return {"choices": [empty], "canvas": canvas}

        thoughts = [None] * len(job.length_B)
        if job.rule.modality == "text":
            async for number, ids, _ in watched.news(request):
                if asked.stream:
                    yield snapshot(number, self._canvas(job, ids))
            tickets += watched.tickets
            thoughts = [self.model.read(ticket.ids) for ticket in watched.tickets]
            rule = requests.drawing_rule(self.model, asked)
            jobs.append(await self._in_thread(self.model.drawing_job, job, thoughts, rule))
            watched = self._submit(jobs[-1], asked, adapter, "step" if asked.stream else None)
        async for number, ids, _ in watched.news(request):
            if asked.stream:
                yield snapshot(number, {"image": await self._in_thread(self._url, ids)})
        tickets += watched.tickets
        choices, written = [], sum(len(thought.ids) for thought in thoughts if thought)
        for number, (thought, ticket) in enumerate(zip(thoughts, watched.tickets, strict=True)):
            reply, url = TextReply(self.model), await self._in_thread(self._url, ticket.ids)
            if thought:
                reply.take(thought.ids, final=True)
            images = [{"type": "image_url", "index": 0, "image_url": {"url": url}}]
            message = reply.message() | {"images": images}
            choices.append({"index": number, "delta": message, "finish_reason": "stop", "logprobs": None})
        completion = written + int(jobs[-1].length_B.sum())
        yield {"choices": choices, "usage": usage(jobs, tickets, completion)}

    def _canvas(self, job, ids):
        """A text of which some is still hidden."""
        text = self.model.results(dataclasses.replace(job, one=True), [ids], HIDDEN)
        return {"text": text.text, "hidden": int((ids == self.model.vocab.mask).sum())}

    # ---- Images ---------------------------------------------------------------------------------

    async def generations(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        asked = requests.read(requests.Images, await json_of(request))
        self._adapter(asked.model or self.name)  # raises, before anything is computed
        if asked.extend:
            raise RefusedError("extend is a field of /v1/images/edits", param="extend")
        if not asked.prompt:
            raise RefusedError("the request lacks a prompt", param="prompt")
        requests.check_size(self.model, asked.size)
        job = await self._in_thread(requests.draw_job, self.model, asked)
        return await self._draw(request, asked, requests.Drawn(job, None), "image_generation")

    async def edits(self, request: Request) -> Response:
        """POST /v1/images/edits, a form with the files `image` and `mask`."""
        files, body = {}, {}
        async with self._form(request) as form:
            for key, value in form.multi_items():
                key, to = key.removesuffix("[]"), files if isinstance(value, UploadFile) else body
                if key in to:
                    raise RefusedError(f"{key} is there twice; one is taken", param=key)
                to[key] = await value.read() if to is files else value_of(key, value)
        if unknown := files.keys() - {"image", "mask"}:
            raise RefusedError(f"unknown file {min(unknown)!r}; known: image, mask", param=min(unknown))
        asked = requests.read(requests.Images, body)
        self._adapter(asked.model or self.name)
        if "image" not in files:
            raise RefusedError("an edit needs a file `image`", param="image")
        pictures = {name: requests.checked(data, name) for name, data in files.items()}
        requests.check_size(self.model, asked.size, asked.extend)
        drawn = await self._in_thread(
            requests.edit_job, self.model, asked, pictures["image"], pictures.get("mask")
        )
        return await self._draw(request, asked, drawn, "image_edit")

    @contextlib.asynccontextmanager
    async def _form(self, request):
        """The form of a request, whose files are gone afterwards."""
        try:
            form = await request.form(max_files=4, max_fields=50, max_part_size=1 << 20)
        except HTTPException as problem:  # what Starlette makes of a form that can't be read
            raise RefusedError(f"the body is no form: {problem.detail}") from None
        try:
            yield form
        finally:
            await form.close()

    async def _draw(self, request, asked, drawn, event):
        every = "step" if asked.stream else None
        watched = self._submit(drawn.job, asked, self._adapter(asked.model or self.name), every)
        tokens = int(drawn.job.length_B.sum())
        about = {"output_format": "png"}
        if drawn.join is None:  # an extended picture is larger
            about["size"] = "{1}x{0}".format(*self.model.image_size)
        about |= {"quality": "auto", "background": "opaque", "created_at": int(time.time())}
        if asked.stream:
            return _stream(self._draw_events(request, asked, watched, drawn.join, event, about, tokens))
        spans = await watched.result(request)
        pictures = await self._in_thread(self._pictures, spans, drawn.join)
        return JSONResponse({
            **{name: value for name, value in about.items() if name != "created_at"},
            "created": about["created_at"],
            "data": [
                {"b64_json": picture, "seed": seed}
                for picture, seed in zip(pictures, watched.seeds, strict=True)
            ],
            "usage": usage([drawn.job], watched.tickets, tokens),
        })  # fmt: skip

    async def _draw_events(self, request, asked, watched, join, event, about, tokens):
        """Partial images as OpenAI streams them: `partial_images` of each, spread over its steps, all steps
        with `denoise`; then the finished ones."""
        steps = watched.job.rule.steps
        wanted = steps if asked.stream_mode == "denoise" else asked.partial_images or 0
        marks = {math.ceil(steps * (i + 1) / (wanted + 1)) for i in range(wanted)}
        seen, shown = [0] * len(watched.tickets), [0] * len(watched.tickets)
        async for number, ids, _ in watched.news(request):
            seen[number] += 1
            hidden = bool((ids == self.model.vocab.mask).any())
            if hidden and (asked.stream_mode == "denoise" or seen[number] in marks):
                [picture] = await self._in_thread(self._pictures, [ids])
                yield about | {
                    "type": f"{event}.partial_image", "b64_json": picture, "index": number,
                    "partial_image_index": shown[number],
                }  # fmt: skip
                shown[number] += 1
        pictures = await self._in_thread(self._pictures, [x.ids for x in watched.tickets], join)
        for number, picture in enumerate(pictures):
            made = {"type": f"{event}.completed", "b64_json": picture, "index": number}
            last = number == len(pictures) - 1  # the usage is that of all of them
            told = {"usage": usage([watched.job], watched.tickets, tokens)} if last else {}
            yield about | made | told

    def _pictures(self, spans, join=None):
        """The PNGs of codes, in base64. With `join` the codes are a part of the picture."""
        codes_Bij = self.model.codes(spans)
        return [png(drawing) for drawing in self.model.drawings(join(codes_Bij) if join else codes_Bij)]

    def _url(self, ids):
        return f"data:image/png;base64,{self._pictures([ids])[0]}"

    # ---- Running --------------------------------------------------------------------------------

    def _submit(self, job: Job, asked: requests.Decoding, adapter: str, every: Every | None) -> Watched:
        if len(job.length_B) > self.limits.queue:
            raise RefusedError(
                f"n is {len(job.length_B)}; at most {self.limits.queue} rows may wait", param="n"
            )
        named = {"time_limit": self.limits.seconds, "adapter": adapter}
        return Watched(self.engine, self.meters, job, asked.seeds, every, **named)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._preparing >= self.limits.queue:
            raise FullError(f"{self._preparing} requests wait to be read; come again later")
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)
        finally:
            self._preparing -= 1

    async def _error_of(self, what: str, status: int, request: Request, problem: Exception) -> Response:
        del problem
        return await self._error(request, RefusedError(f"{what}: {request.url.path}", status))

    async def _error(self, request: Request, problem: Exception) -> Response:
        del request
        status, headers, body = error(problem, self.meters.wait)
        return JSONResponse(body, status, headers)


def _stream(events: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Events as a client of OpenAI reads them; what goes wrong on the way is one of them."""

    async def lines():
        try:
            async for event in events:
                kind = f"event: {event['type']}\n" if "type" in event else ""
                yield f"{kind}data: {json.dumps(event)}\n\n"
        except Exception as problem:
            if getattr(problem, "status", 0) == 499:
                return
            yield f"event: error\ndata: {json.dumps(error(problem)[2])}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")
