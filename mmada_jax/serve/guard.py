"""What the endpoint lets in: with the right key, up to a size, and as JSON or a form."""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import time
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from mmada_jax.data.images import MAX_BYTES
from mmada_jax.serve.replies import RefusedError, error


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the endpoint takes: `slots` rows at once, `queue` rows that wait, bodies of `body` bytes,
    `seconds` for a request; its body may take `upload` seconds to arrive. With a `key` clients must send it
    as their bearer token."""

    slots: int = 16
    queue: int = 256
    body: int = MAX_BYTES // 2
    seconds: float = 600.0
    upload: float = 60.0
    key: str | None = None


class Guarded:
    """Lets in what has the key, and bodies up to a size."""

    def __init__(self, app: Any, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """A request, as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        problem, most, taken = None, self.limits.body, 0
        if self.limits.key and scope["path"].startswith("/v1/"):
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self.limits.key.encode()):
                problem = RefusedError("the API key is missing or wrong", 401, "invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            problem = problem or RefusedError(f"the body is too large; at most {most} bytes are taken", 413)
        if problem:
            status, more, body = error(problem)
            await JSONResponse(body, status, more)(scope, receive, send)
            return

        whole, until = False, time.monotonic() + self.limits.upload

        async def bounded():
            nonlocal taken, whole
            if whole:  # what comes now is that the client hangs up
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                text = f"the body didn't arrive within {self.limits.upload:.0f} s"
                raise RefusedError(text, 408) from None
            whole = not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > most:
                raise RefusedError(f"the body is too large; at most {most} bytes are taken", 413)
            return message

        with contextlib.suppress(ClientDisconnect):  # there is nobody to tell
            await self.app(scope, bounded, send)


async def json_of(request: Request) -> Any:
    """The body of a request. Raises RefusedError for what is no JSON."""
    body = await request.body()
    try:
        # A large one is read in a thread, so that others don't wait for it.
        return json.loads(body) if len(body) < 1 << 16 else await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError) as problem:
        raise RefusedError(f"the body is no JSON: {problem}") from None


# Fields of a form that are texts, whatever they look like.
_TEXTS = ("prompt", "model", "size", "decode", "extend", "user", "stream_mode", "response_format")


def value_of(name: str, text: str) -> Any:
    """A field of a form as JSON would have it: numbers and true are no texts there."""
    if name in _TEXTS or len(text) > 100:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int | float) else text
