"""What the endpoint refuses, how it bears load, and how it ends."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from conftest import ROOT
from PIL import Image

from mmada_jax.data import images
from mmada_jax.serve.tickets import FullError
from tests.api_toys import two_canvases, untrained_model  # noqa: F401
from tests.programs import Program
from tests.serve_toys import (  # noqa: F401
    ASK,
    FAST,
    chat,
    client_of_it,
    openai,
    opened,
    picture_of_a_canvas,
    png_of,
    served_model,
    serving,
    url_of,
)

# ---- What is refused --------------------------------------------------------------------------------


def test_errors_have_the_shape_of_openais(client, picture, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    large, image = url_of(Image.new("L", (40, 40))), {"type": "image_url", "image_url": {"url": ""}}

    def with_url(url):
        return [{"role": "user", "content": [image | {"image_url": {"url": url}}]}]

    data, pictured = url_of(picture), {"modalities": ["image"]}
    cases = (
        ({"model": "another"}, 404, "model", "no model 'another'; known: digits"),
        ({"top_p": 0.5}, 400, "top_p", "not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "not supported"),
        ({"temperature": -1}, 400, "temperature", "at least 0"),
        ({"n": 99}, 400, "n", "at most 16"),
        ({"extra_body": {"stepz": 1}}, 400, "stepz", "did you mean 'steps'?"),
        ({"extra_body": {"decode": "slow"}}, 400, None, "exact or"),
        ({"max_tokens": 10_000}, 400, None, "ask for fewer new tokens"),
        ({"messages": []}, 400, "messages", "at least one"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, 400, "messages[0]", "role"),
        ({"messages": with_url("https://example.com/a.png")}, 400, "messages[0]", "nothing is fetched"),
        ({"messages": with_url("/etc/hostname")}, 400, "messages[0]", "nothing is fetched"),
        ({"messages": with_url("data:image/png;base64,%%%")}, 400, "messages[0]", "base64"),
        ({"messages": with_url("data:image/png,raw")}, 400, "messages[0]", "must be base64"),
        ({"messages": with_url("data:image/png;base64,AAAA")}, 400, "messages[0]", "identify"),
        ({"messages": with_url(large)}, 400, "messages[0]", "40x40 pixels; the limit is 1000"),
        ({"messages": with_url(data) + with_url(data)}, 400, "messages", "2 pictures"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, None, "don't fit"),
        (pictured | {"messages": with_url(data)}, 400, "messages", "can't be given"),
        (pictured | {"stream": True}, 400, "stream", "denoise"),
        ({"modalities": ["audio"]}, 400, "modalities", "audio"),
        ({"modalities": ["text", "image"], "extra_body": {"decode": "cached"}}, 400, None, "exact or fast"),
        (pictured | {"extra_body": {"steps": 33}}, 400, "steps", "has 32 tokens"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({"stop": ""}, 400, "stop", "an empty text"),
        ({"max_completion_tokens": 3}, 400, "max_tokens", "differ; give one"),
        ({"modalities": ["image"], "stop": "a"}, 400, "stop", "about texts; modalities asks for none"),
        ({"stop": "a" * 300}, 400, "stop", "256 characters"),
        ({"extra_body": {"block_length": 3}}, 400, "block_length", "power of two"),
        ({"extra_body": {"top_p": True}}, 400, "top_p", "not supported"),
        ({"stream_options": {"include_usage": "no"}}, 400, "stream_options.include_usage", "of type bool"),
        (
            {"messages": [{"role": "user", "content": "a" * 5000}]},
            400,
            None,
            "5000 characters; at most 4096",
        ),
    )
    for fields, status, param, text in cases:
        with pytest.raises(openai.APIStatusError) as caught:
            chat(client, **fields)
        error = caught.value.body
        assert caught.value.status_code == status, fields
        assert text in error["message"], error
        assert error["param"] == param, error
        assert {"message", "type", "param", "code"} == set(error)
    with pytest.raises(openai.BadRequestError, match="this model draws 16x8"):
        client.images.generate(prompt="a seven", size="1024x1024")
    with pytest.raises(openai.BadRequestError, match="either a mask"):
        client.images.edit(image=("a.png", png_of(picture)), prompt="a five")
    with pytest.raises(openai.BadRequestError, match="cannot identify"):
        client.images.edit(image=("a.png", b"none"), mask=("b.png", b"none"), prompt="a five")
    twice = [("a.png", png_of(picture)), ("b.png", png_of(picture))]
    with pytest.raises(openai.BadRequestError, match="image is there twice"):
        client.images.edit(image=twice, prompt="a five", extra_body={"extend": "up"})
    with pytest.raises(openai.NotFoundError, match="no such path"):
        client.embeddings.create(model="digits", input="x")


def post(url, data, headers=()):
    """Status and body of a request by hand."""
    request = urllib.request.Request(
        url, data, {"Content-Type": "application/json", **dict(headers)}, method="POST"
    )
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def test_bodies_are_bounded_and_must_be_json(served):
    url = f"{served[1]}/v1/chat/completions"
    for body, status, text in (
        (b"{", 400, "no JSON"),
        (b"[1]", 400, "JSON object"),
        (b"[" * 100_000, 400, "no JSON"),
        (b'{"messages": [], "stream_options": ' + b'{"a": ' * 600 + b"1" + b"}" * 601, 400, ""),
        (b"x" * (1 << 20 | 1), 413, "too large"),
        ((b"x" * (1 << 16) for _ in range(40)), 413, "too large"),  # in chunks, its length isn't said
    ):
        with contextlib.suppress(urllib.error.URLError):  # the rest of a body may find nobody to take it
            got, error, _ = post(url, body)
            assert (got, text in error["error"]["message"]) == (status, True), error


def test_a_body_that_never_comes_is_given_up(model):
    with serving(model, upload=0.3) as (endpoint, url), socket.socket() as sock:
        host, port = url.removeprefix("http://").split(":")
        sock.connect((host, int(port)))
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        sock.settimeout(10)
        assert b" 408 " in sock.recv(1000)
        assert endpoint.engine.live == 0


def test_a_key(model):
    with serving(model, key="sesame") as (_, url):
        for key, works in (("sesame", True), ("Sesame", False), ("sesame2", False)):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            if works:
                assert client.models.list().data
            else:
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()
        with urllib.request.urlopen(f"{url}/health") as reply:
            assert reply.status == 200


# ---- Load, ends -------------------------------------------------------------------------------------


@pytest.fixture(name="slow")
def slow_turns(served, monkeypatch):
    """Every turn of the engine takes a while."""
    turn = served[0].engine._advance

    def slowly(lane):
        time.sleep(0.05)
        turn(lane)

    monkeypatch.setattr(served[0].engine, "_advance", slowly)


LONG = {"max_tokens": 64, "stream": True, "extra_body": {"block_length": 4, "stream_mode": "denoise"}}


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_who_hangs_up_gives_the_slot_back(client, served, slow, monkeypatch):
    engine, stream = served[0].engine, chat(client, **LONG)
    next(iter(stream))
    wait_for(lambda: engine.live == 1)
    [ticket] = [ticket for lane in engine._lanes.values() for ticket in lane.tickets if ticket]
    stream.close()
    wait_for(lambda: engine.live == 0, 3)
    assert (ticket.state, ticket.steps < 64) == ("cancelled", True)
    # The same without a stream, where nothing is written that could fail.
    monkeypatch.setattr(served[0].engine, "_advance", lambda lane: time.sleep(0.02))  # it never ends
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=0.4), max_tokens=64, extra_body={"block_length": 1, "seed": 1})
    wait_for(lambda: engine.live == 0, 3)
    monkeypatch.undo()
    assert chat(client).choices


def test_a_request_has_a_limit_of_time(client, served, slow, monkeypatch):
    endpoint = served[0]
    monkeypatch.setattr(endpoint, "limits", dataclasses.replace(endpoint.limits, seconds=0.2))
    with pytest.raises(openai.InternalServerError, match=r"its limit is 0.2 s") as caught:
        chat(client, max_tokens=64)
    assert caught.value.status_code == 504
    with pytest.raises(openai.APIError, match=r"its limit is 0.2 s"):
        list(chat(client, **LONG))


def test_a_full_queue_says_when_to_come_again(client, served, monkeypatch):
    def full(*_, **__):
        raise FullError("64 rows wait, the queue takes 64")

    monkeypatch.setattr(served[0].engine, "submit", full)
    with pytest.raises(openai.RateLimitError) as caught:
        chat(client)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.body["code"] == "queue_full"


def test_many_at_once_and_the_metrics(client, served):
    before = served[0].engine.counters["rows"]
    wrong = []

    def ask():
        try:
            assert chat(client).choices
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert served[0].engine.counters["rows"] == before + 40
    with urllib.request.urlopen(f"{served[1]}/metrics") as reply:
        lines = dict(
            line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if not line.startswith("#")
        )
    assert float(lines['mmada_rows_total{outcome="done"}']) >= 40
    assert float(lines["mmada_tokens_total"]) > 0
    assert float(lines["mmada_steps_total"]) > 0
    assert float(lines["mmada_first_token_seconds_count"]) >= 40
    assert float(lines["mmada_slots"]) == 16
    assert (float(lines["mmada_slots_busy"]), float(lines["mmada_queue"])) == (0, 0)


def test_what_the_engine_cannot_is_a_server_error(served, monkeypatch):
    def fail(*_):
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr(served[0].engine, "_join", fail)
    body = json.dumps({"messages": ASK, "max_tokens": 4}).encode()
    status, error, _ = post(f"{served[1]}/v1/chat/completions", body)
    assert status == 500
    assert "secret" not in json.dumps(error)


def test_an_engine_that_stumbles_tells_all_who_wait(client, served, monkeypatch):
    seat, broken = served[0].engine._seat, []

    def stumble():
        if not broken:
            broken.append(True)
            raise RuntimeError("a defect")
        return seat()

    monkeypatch.setattr(served[0].engine, "_seat", stumble)
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client)
    assert caught.value.response.headers["connection"] == "close"
    assert chat(client).choices  # it goes on with the next one


def test_a_model_and_an_adapter_need_two_names(model):
    from mmada_jax.serve.endpoint import Endpoint

    with pytest.raises(ValueError, match="both called 'german'"):
        Endpoint(dataclasses.replace(model, adapters={"german": None}), "german")


@pytest.mark.slow
def test_the_program_finishes_what_runs_and_ends_with_0(model_workdir, free_port):
    command = [
        ROOT / "launch" / "serve.py",
        "--model",
        model_workdir,
        "--name",
        "digits",
        "--port",
        free_port,
    ]
    with Program(command, {"MMADA_API_KEY": "sesame"}) as program:
        lines = iter(program.stdout.readline, "")
        assert any(f":{free_port}/v1" in line for line in lines)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{free_port}/v1", api_key="sesame", max_retries=0)
        stream = chat(client, **LONG)
        next(iter(stream))
        os.kill(program.pid, signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason
        assert program.wait(60) == 0
        with pytest.raises(openai.APIConnectionError):
            chat(client)


@pytest.mark.slow
def test_a_second_signal_ends_the_program_at_once(model_workdir, free_port):
    command = [ROOT / "launch" / "serve.py", "--model", model_workdir]
    with Program([*command, "--name", "digits", "--port", free_port]) as program:
        lines = iter(program.stdout.readline, "")
        assert any(f":{free_port}/v1" in line for line in lines)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{free_port}/v1", api_key="none", max_retries=0)
        next(iter(chat(client, **LONG)))
        for _ in range(2):
            os.kill(program.pid, signal.SIGTERM)
            time.sleep(0.1)
        assert program.wait(10) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--adapter", "german"], "NAME=FOLDER"),
        (["--adapter", "a=x", "--adapter", "a=y"], "'a' twice"),
        (["--port", "99999"], "from 0 to 65535"),
        (["--time-limit", "0"], "must be positive"),
        (["--queue", "0"], "at least 1"),
    ],
)
def test_what_the_program_refuses(more, text):
    from mmada_jax.programs.serve import main

    with pytest.raises(ValueError, match=text):
        main(["--model", "nowhere", *more])


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(served):
    from mmada_jax.programs.serve import main

    with pytest.raises(OSError, match="choose another --port"):
        main(["--model", "nowhere", "--port", served[1].rpartition(":")[2]])
