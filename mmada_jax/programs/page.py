"""A page to chat with a model and to watch it draw, inpaint, extend and think, step by step.

mmada page --model runs/quickstart/unigrpo

Open the address that it prints. Ctrl-C or SIGTERM ends it. Needs the extra `page`.
"""

import os
import signal
import threading

from mmada_jax import storage
from mmada_jax.programs.process import Parser, listening, quiet


def parser() -> Parser:
    """The command line."""
    top = Parser(__doc__, prog="mmada page")
    top.add_argument("--model", required=True, metavar="FOLDER", help="training workdir, checkpoint, or "
                     "Hugging Face folder")  # fmt: skip
    top.add_argument("--image-tokenizer", metavar="FOLDER", help="if the model's folder has none")
    top.add_argument("--int8", action="store_true", help="hold the matrices of the layers in 8 bits")
    top.add_argument("--host", default="127.0.0.1", help="address to bind to (default: %(default)s)")
    top.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    return top


def main(argv: list[str]) -> None:
    """Loads the model and shows the page until a signal comes."""
    args = parser().parse_args(argv)
    if not 0 < args.port < 65536:
        raise ValueError(f"--port is {args.port}; it must be from 1 to 65535")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is told to anybody
    try:
        import gradio
    except ImportError as error:
        raise ImportError('this needs the extra page: pip install "mmada_jax[page]"') from error
    with listening(args.host, args.port):
        pass  # a port that is taken is said before the model is loaded
    quiet()
    from mmada_jax.serve.api import MMaDA
    from mmada_jax.serve.page import CSS, Page

    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    weights = "int8" if args.int8 else "plain"
    model = MMaDA.load(args.model, image_tokenizer=args.image_tokenizer, weights=weights)
    page = Page(model, storage.resolved(args.model).name)
    threading.Thread(target=page.warm_up, daemon=True).start()
    # Fonts of the visitor's own: nothing is fetched from elsewhere.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.blocks.launch(
        server_name=args.host, server_port=args.port, share=False, quiet=True, prevent_thread_lock=True,
        theme=theme, css=CSS, footer_links=[], ssr_mode=False, max_file_size="64mb", show_error=True,
    )  # fmt: skip
    print(f"open http://{args.host}:{args.port}", flush=True)
    over.wait()
    page.blocks.close()
    print("stopped", flush=True)
    os._exit(0)  # a thread may still compile, and an interpreter that ends meanwhile is aborted
