"""Loads an endpoint with many clients at once: latencies, errors, and whether its memory stays as it is.

    mmada bench load --model runs/quickstart/unigrpo
    mmada bench load --model runs/quickstart/unigrpo --clients 8 --seconds 20

The endpoint is `mmada serve` in a process of its own; the clients are the official one's, each in a thread:
chat, a stream, a drawing, a picture in, one after the other.
"""

import argparse
import base64
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

from mmada_jax.progress import progress

NAME = "model"
ASK = [{"role": "user", "content": "7 + 12"}]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each kind of request, errors, and the memory of the endpoint in time."""
    launch = pathlib.Path(__file__).parent.parent / "serve.py"
    command = [sys.executable, str(launch), "--model", args.model, "--name", NAME, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stdout.readline, "")
            address = next((line.split()[-1] for line in lines if "/v1" in line), None)
            if address is None:
                raise RuntimeError("the endpoint didn't start; what it says is above")
            report = _load(address, args, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
        report["exit"] = process.wait()
    return report


def _load(address, args, pid):
    import openai

    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)
    picture = client.images.generate(model=NAME, prompt="a handwritten seven").data[0].b64_json
    url = f"data:image/png;base64,{picture}"
    about = [
        {"type": "text", "text": "which digit is this?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]

    def stream():
        for _ in client.chat.completions.create(model=NAME, messages=ASK, stream=True):
            pass

    kinds = {
        "chat": lambda: client.chat.completions.create(model=NAME, messages=ASK),
        "stream": stream,
        "drawing": lambda: base64.b64decode(
            client.images.generate(model=NAME, prompt="a handwritten seven").data[0].b64_json
        ),
        "picture in": lambda: client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": about}]
        ),
    }
    seconds, errors, memory = {kind: [] for kind in kinds}, [], []

    def work(until, first):
        turn = first
        while time.monotonic() < until:
            kind = list(kinds)[turn % len(kinds)]
            turn, began = turn + 1, time.monotonic()
            try:
                kinds[kind]()
                seconds[kind].append(time.monotonic() - began)
            except Exception as error:  # whatever it is, it counts
                errors.append(f"{kind}: {type(error).__name__}: {error}"[:200])

    def run(length, what):
        until = time.monotonic() + length
        threads = [threading.Thread(target=work, args=(until, n)) for n in range(args.clients)]
        for thread in threads:
            thread.start()
        with progress(what, round(length), "s") as bar:
            while any(thread.is_alive() for thread in threads):
                time.sleep(1)
                memory.append(_resident(pid))
                bar.update(1)

    run(args.warm, "warming up")  # until all sizes of lanes are compiled
    for times in (*seconds.values(), errors, memory):
        times.clear()
    began = time.monotonic()
    run(args.seconds, "loading")
    spent = time.monotonic() - began
    quarter = max(1, len(memory) // 4)
    early, late = memory[:quarter], memory[-quarter:]
    return {
        "clients": args.clients, "seconds": spent, "errors": errors, "cores": os.cpu_count(),
        "requests": {
            kind: {
                "count": len(times), "p50": statistics.median(times),
                "p99": statistics.quantiles(times, n=100)[-1],
            }
            for kind, times in seconds.items() if len(times) > 1
        },
        "memory_mb": {
            "first": statistics.mean(early) / 1e6, "last": statistics.mean(late) / 1e6,
            "every_second": [round(size / 1e6) for size in memory],
        },
    }  # fmt: skip


def _resident(pid):
    """Bytes of memory of a process."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['clients']} clients for {report['seconds']:.0f} s on {report['cores']} cores",
             f"{'':12}{'count':>8}{'p50 s':>8}{'p99 s':>8}"]  # fmt: skip
    for kind, of in report["requests"].items():
        lines.append(f"{kind:12}{of['count']:8}{of['p50']:8.2f}{of['p99']:8.2f}")
    first, last = report["memory_mb"]["first"], report["memory_mb"]["last"]
    lines.append(
        f"memory {first:.0f} MB in the first quarter, {last:.0f} in the last ({last / first - 1:+.1%})"
    )
    lines.append(f"errors {len(report['errors'])}, the endpoint ended with {report['exit']}")
    return "\n".join([*lines, *sorted(set(report["errors"]))[:5]])
