"""Conversion against `cp` of the same bytes, and the memory that it takes.

    mmada bench convert                # 8B-shaped: 16 GB of random bfloat16, 50 GB of disk
    mmada bench convert --shrink 4     # widths and vocabulary a quarter: 1/16 of it

Makes a checkpoint as Hugging Face shards it, copies it, converts it there and back, and compares the
hashes. Each conversion is a process of its own, beside which its anonymous memory (RssAnon) is
sampled; each is set against the mean of a `cp` before and one after it. All are timed until the bytes
are on the disk (sync). The claim is the RATIO of the rates; the times belong to one disk.
Everything is deleted at the end.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from mmada_jax.weights import hub, lazy, llada_keys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def measure(args: argparse.Namespace) -> dict:
    """All numbers of a run."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return there_and_back(pathlib.Path(folder), args.shrink)


def as_text(report: dict) -> str:
    """The table."""
    lines = [
        f"\n{report['gigabytes']:.2f} GB in {report['files']} files, hashes equal: {report['equal']}",
        f"{'':12}{'seconds':>9}{'MB/s':>8}{'cp, MB/s':>10}{'RATIO':>8}{'peak anonymous, GB':>20}",
    ]
    for way in ("from-torch", "to-torch"):
        row = report[way]
        lines.append(
            f"{way:12}{row['seconds']:9.1f}{row['rate']:8.0f}{row['cp_rate']:10.0f}{row['ratio']:8.2f}"
            f"{row['peak_anonymous_gb']:20.2f}"
        )
    return "\n".join(lines)


def there_and_back(folder: pathlib.Path, shrink: int) -> dict:
    """All numbers of a run in `folder`."""
    src = folder / "published"
    n_bytes = make(src, shrink)
    ours, back = folder / "ours", folder / "back"
    copies = [copy(src, folder / "copy")]
    there = convert_in_process("from-torch", src, ours)
    copies.append(copy(src, folder / "copy"))
    again = convert_in_process("to-torch", ours, back)
    copies.append(copy(src, folder / "copy"))
    report = {"shrink": shrink, "gigabytes": n_bytes / 1e9, "files": len(list(src.glob("*.safetensors")))}
    for way, result, pair in (("from-torch", there, copies[:2]), ("to-torch", again, copies[1:])):
        rate, cp_rate = n_bytes / 1e6 / result["seconds"], n_bytes / 1e6 / (sum(pair) / 2)
        report[way] = result | {"rate": rate, "cp_rate": cp_rate, "ratio": rate / cp_rate}
    report["equal"] = fingerprint(src) == fingerprint(back)
    return report


def make(folder: pathlib.Path, shrink: int) -> int:
    """A folder as LLaDA is published, 1/shrink as wide, random in every bit. Returns its bytes."""
    values = {
        "model_type": "mmada", "d_model": 4096 // shrink, "n_layers": 32, "n_heads": 32 // shrink,
        "mlp_hidden_size": 12288 // shrink, "vocab_size": 134656 // shrink, "codebook_size": 8192 // shrink,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 2**16, 1 << 24, np.uint16).view(ml_dtypes.bfloat16)

    def random(index):
        shape = [s.stop - s.start for s in index]
        return np.resize(np.roll(pool, rng.integers(len(pool))), shape)

    table = llada_keys.key_table(llada_keys.config_from_hf(values))
    tensors = {key: lazy.Lazy(rule.torch_shape, pool.dtype, random) for key, rule in table.items()}
    hub.write_tensors(folder, tensors, shard=hub.SHARD // shrink**2)
    return sum(tensor.nbytes for tensor in tensors.values())


def copy(src: pathlib.Path, dst: pathlib.Path) -> float:
    """Seconds of `cp -r`, from a disk that is at rest until it is again."""
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", src, dst], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(dst)
    return seconds


def convert_in_process(way: str, src: pathlib.Path, dst: pathlib.Path) -> dict:
    """Seconds and peak anonymous memory of `mmada convert`."""
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    command = [sys.executable, ROOT / "launch" / "convert.py", way, "--src", src, "--dst", dst]
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            anonymous = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max(peak, *map(int, anonymous))
        except (OSError, TypeError):  # it has just ended
            pass
        time.sleep(0.01)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{way} failed")
    return {"seconds": seconds, "peak_anonymous_gb": peak * 1024 / 1e9}


def fingerprint(folder: pathlib.Path) -> str:
    """The hash of all tensors of a folder."""
    state = hub.read_tensors(folder)
    tensors = {
        key: lazy.Lazy(tensor.shape, tensor.dtype, lambda index, tensor=tensor: tensor[index])
        for key, tensor in state.items()
    }
    return lazy.sha256(tensors)
