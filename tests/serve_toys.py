"""An endpoint in a thread, the official client, and pictures to send, for its tests."""

import base64
import contextlib
import io
import socket
import threading

import numpy as np
import pytest
from PIL import Image

from mmada_jax.data.images import png_of
from tests.api_toys import two_canvases, untrained_model  # noqa: F401

openai = pytest.importorskip("openai", reason="needs the extra serve")
pytest.importorskip("fastapi", reason="needs the extra serve")
SHORT = {"max_tokens": 8, "extra_body": {"block_length": 4}}
ASK = [{"role": "user", "content": "what is 3 plus 4?"}]
FAST = {"steps": 3, "guidance": 1.0}


@contextlib.contextmanager
def serving(model, **limits):
    """The endpoint of a model in a thread, and its address."""
    import uvicorn

    from mmada_jax.serve.endpoint import Endpoint
    from mmada_jax.serve.guard import Limits

    endpoint = Endpoint(model, "digits", Limits(**limits))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()  # who comes before the server does waits for it
        server = uvicorn.Server(uvicorn.Config(endpoint.app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield endpoint, f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(name="served", scope="module")
def served_model(model):
    with serving(model, body=1 << 20, queue=64) as made:
        yield made


@pytest.fixture(name="client", scope="module")
def client_of_it(served):
    with openai.OpenAI(base_url=f"{served[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, messages=ASK, **fields):
    return client.chat.completions.create(**({"model": "digits", "messages": messages} | SHORT | fields))


def url_of(picture):
    """A picture of Pillow's as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png_of(picture)).decode()


def opened(b64):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


@pytest.fixture(name="picture")
def picture_of_a_canvas(canvases):
    return Image.fromarray(((canvases[0, ..., 0] + 1) * 127.5).astype(np.uint8))
