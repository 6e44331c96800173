"""What `mmada prepare --engine ray` costs on one machine, against its plain loop: rate, and start.

    mmada bench prepare                 # three runs of each, in turns
    mmada bench prepare --workers 2 --pictures 3200

Pictures with captions in a tar become codes of a random image tokenizer. The rate is that from the end of
the first shard to the end of the last one; the start is all before the first shard. Needs the extra
`cluster`. Everything is deleted at the end.
"""

import argparse
import io
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib import metadata

import numpy as np
from safetensors.numpy import save_file

from launch.benchmarks.data import caption, picture
from mmada_jax import cluster
from mmada_jax.nets import vq
from mmada_jax.weights import magvit_keys

ENGINES = ("plain", "ray")
ROOT = pathlib.Path(__file__).parent.parent.parent
TOKENIZER = vq.VQConfig(32, (1, 2), (1, 1), (1, 2), (1, 1), bits=6)


def measure(args: argparse.Namespace) -> dict:
    """All numbers of a run."""
    cluster.require("mmada bench prepare")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = pathlib.Path(name)
        make(folder, args.pictures, args.side)
        runs = {engine: [] for engine in ENGINES}
        for _ in range(args.repeats):
            for engine in ENGINES:
                runs[engine].append(run(folder, engine, args))
    rate = {engine: statistics.median(rate for rate, _ in runs[engine]) for engine in ENGINES}
    return {
        "pictures": args.pictures, "shards": args.shards, "image_size": args.image_size,
        "workers": args.workers, "repeats": args.repeats, "cores": os.cpu_count(),
        "load": os.getloadavg()[0], "ray": metadata.version("ray"), "jax": metadata.version("jax"),
        "rates": {engine: [rate for rate, _ in runs[engine]] for engine in ENGINES},
        "records_per_second": rate, "ratio": rate["ray"] / rate["plain"],
        "start": {engine: statistics.median(start for _, start in runs[engine]) for engine in ENGINES},
    }  # fmt: skip


def as_text(report: dict) -> str:
    """The table."""
    lines = [
        f"\n{report['pictures']} pictures to codes at {report['image_size']} px in {report['shards']} "
        f"shards; {report['cores']} cores, load {report['load']:.1f}, ray {report['ray']}, jax "
        f"{report['jax']}",
        f"{'':8}{'records/s':>12}{'start':>10}   medians of {report['repeats']}",
    ]
    for engine in ENGINES:
        rate, start = report["records_per_second"][engine], report["start"][engine]
        each = ", ".join(f"{rate:.0f}" for rate in report["rates"][engine])
        lines.append(f"{engine:8}{rate:12.1f}{start:8.1f} s   records/s {each}")
    return "\n".join([*lines, f"ray / plain: {report['ratio']:.2f}"])


def run(folder: pathlib.Path, engine: str, args: argparse.Namespace) -> tuple[float, float]:
    """Records per second between the first and the last shard, and the seconds before the first one."""
    out = folder / "out"
    words = {
        "format": "webdataset", "path": folder / "pictures.tar", "out": out, "engine": engine,
        "image_tokenizer": folder / "tokenizer", "image_size": args.image_size,
        "records_per_shard": args.pictures // args.shards,
    }  # fmt: skip
    if engine == "ray":
        words["workers"] = args.workers
    command = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "mmada_jax.programs.command", "prepare", *command],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        raise ChildProcessError(f"mmada prepare --engine {engine} failed: {done.stderr.strip()}")
    ends = sorted(path.stat().st_mtime for path in out.glob("*.array_record"))
    for path in out.iterdir():
        path.unlink()
    shard = args.pictures // args.shards
    rate = shard * (len(ends) - 1) / (ends[-1] - ends[0])
    at_once = args.workers if engine == "ray" else 1
    return rate, ends[0] - begun - shard * at_once / rate


def make(folder: pathlib.Path, count: int, side: int) -> None:
    """The tar, and the image tokenizer."""
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for i in range(count):
            for suffix, data in (("jpg", picture(rng, side)), ("txt", caption(i).encode())):
                member = tarfile.TarInfo(f"{i:06}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    weights = {
        key: (0.1 * rng.standard_normal(rule.torch_shape)).astype(np.float32)
        for key, rule in magvit_keys.key_table(TOKENIZER).items()
    }
    (folder / "tokenizer").mkdir()
    save_file(weights | magvit_keys.constants(TOKENIZER), folder / "tokenizer" / "model.safetensors")
