"""Answers clients of OpenAI's API with a model: chat, pictures in and out, edits (docs/serving.md).

mmada serve --model runs/digits
mmada serve --model mmada-8b --int8 --port 8080 --adapter german=runs/german

SIGTERM or Ctrl-C ends it as soon as what runs is finished, a second one at once (status 143 or 130). A key
that clients must send is taken from the environment variable MMADA_API_KEY. Needs the extra `serve`.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from typing import Any

from mmada_jax import storage
from mmada_jax.programs.process import Parser, listening, quiet


def parser() -> Parser:
    """The command line."""
    top = Parser(__doc__, prog="mmada serve")
    top.add_argument("--model", required=True, metavar="FOLDER", help="training workdir, checkpoint, or "
                     "Hugging Face folder")  # fmt: skip
    top.add_argument("--name", help="what clients call it (default: the folder's name)")
    top.add_argument("--image-tokenizer", metavar="FOLDER", help="if the model's folder has none")
    top.add_argument("--int8", action="store_true", help="hold the matrices of the layers in 8 bits")
    top.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER",
                     help="adapters beside it, as another model; may be repeated")  # fmt: skip
    top.add_argument("--host", default="127.0.0.1", help="address to bind to (default: %(default)s)")
    top.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    top.add_argument("--slots", type=int, default=16, help="rows decoded at once (default: %(default)s)")
    top.add_argument("--queue", type=int, default=256, help="rows that may wait (default: %(default)s)")
    top.add_argument("--time-limit", type=float, default=600.0, metavar="SECONDS",
                     help="of a request (default: %(default)s)")  # fmt: skip
    return top


def main(argv: list[str]) -> None:
    """Loads the model and serves it until a signal comes."""
    args = parser().parse_args(argv)
    named = adapters_of(args.adapter)
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port is {args.port}; it must be from 0 to 65535")
    if not args.time_limit > 0:
        raise ValueError(f"--time-limit is {args.time_limit}; it must be positive")
    if args.queue < 1:
        raise ValueError(f"--queue is {args.queue}; it must be at least 1")
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError('this needs the extra serve: pip install "mmada_jax[serve]"') from error
    with listening(args.host, args.port) as sock:  # a port that is taken is said before the model is loaded
        quiet()
        from mmada_jax.serve.api import MMaDA
        from mmada_jax.serve.endpoint import Endpoint
        from mmada_jax.serve.guard import Limits

        weights = "int8" if args.int8 else "plain"
        model = MMaDA.load(
            args.model, image_tokenizer=args.image_tokenizer, weights=weights, adapters=named
        )
        limits = Limits(
            args.slots, args.queue, seconds=args.time_limit, key=os.environ.get("MMADA_API_KEY") or None
        )
        name = args.name or storage.resolved(args.model).name
        endpoint = Endpoint(model, name, limits)
        config = uvicorn.Config(
            endpoint.app, log_level="warning", access_log=False, timeout_keep_alive=30, lifespan="on",
            timeout_graceful_shutdown=round(limits.seconds + limits.upload),
        )  # fmt: skip
        sock.listen()  # who reads the address can connect
        print(model)
        print(f"{endpoint.engine.plan(model.rows.length)}")
        host, port = sock.getsockname()[:2]
        print(f"serving {', '.join(endpoint.names)} at http://{host}:{port}/v1", flush=True)
        asyncio.run(serve(uvicorn.Server(config), sock))
    print("stopped", flush=True)


def adapters_of(given: list[str]) -> dict[str, str]:
    """`NAME=FOLDER`, several of them. Raises ValueError for another form, and for a name that is there
    twice."""
    named: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--adapter is {text!r}; it must be NAME=FOLDER")
        if name in named:
            raise ValueError(f"--adapter names {name!r} twice; give each another name")
        named[name] = folder
    return named


async def serve(server: Any, sock: socket.socket) -> None:
    """Runs uvicorn's server until SIGTERM or Ctrl-C; then it finishes what runs, and takes nothing more."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        if server.should_exit:  # the second one: the devices may be busy, which nothing else can end
            os.write(2, b"ended at once; what ran is lost\n")
            os._exit(128 + number)
        print(f"{signal.Signals(number).name}: finishing what runs", file=sys.stderr, flush=True)
        server.should_exit = True

    # uvicorn's own handlers would end the process by the signal, and not with 0.
    server.capture_signals = contextlib.nullcontext
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    await server.serve(sockets=[sock])
