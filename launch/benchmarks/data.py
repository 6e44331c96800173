"""What the input of training delivers on this machine, without a model: images per second.

    mmada bench data                       # 1, 2 and 4 threads
    mmada bench data --threads 8 --side 512 --image_size 512

Makes pictures with captions and has them as training does, half of the rows to draw and half to read:
`tars` are JPEG files in webdataset tars, decoded and resized, rows with their pixels; `codes` are
records of `mmada prepare` that hold the codes of the image, so that no picture is decoded. All of it
is in the page cache. Everything is deleted at the end.
"""

import argparse
import functools
import io
import json
import os
import pathlib
import sys
import tarfile
import tempfile
import time

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image, ImageDraw

from mmada_jax.data import pipeline, sources
from mmada_jax.data.records import Record, pack
from mmada_jax.tokens.tokenizer import TextTokenizer, chat

CODEBOOK, DOWN, MAX_TEXT = 8192, 16, 128
ROWS = {"t2i": 8, "mmu": 8}
N_ROWS = sum(ROWS.values())


def measure(args: argparse.Namespace) -> dict:
    """All numbers of a run."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return deliver(pathlib.Path(folder), args)


def as_text(report: dict) -> str:
    """The table."""
    lines = [
        f"\n{report['images']} images, shorter side {report['side']}, {report['kilobytes']:.0f} kB each, "
        f"to {report['image_size']} px; {os.cpu_count()} cores, load {report['load']:.1f}",
        "images/s" + "".join(f"{f'{n} threads':>12}" for n in report["threads"]),
    ]
    for name, rates in report["images_per_second"].items():
        lines.append(f"{name:8}" + "".join(f"{rate:12.0f}" for rate in rates.values()))
    return "\n".join(lines)


def deliver(folder: pathlib.Path, args: argparse.Namespace) -> dict:
    """All numbers of a run in `folder`."""
    n_bytes, n_codes = make(folder, args.images, args.side, args.image_size)
    report = {
        "threads": args.threads, "workers": args.workers, "images": args.images, "side": args.side,
        "image_size": args.image_size, "seconds": args.seconds,
        "kilobytes": n_bytes / args.images / 1e3, "load": os.getloadavg()[0],
    }  # fmt: skip
    report["images_per_second"] = {
        name: {threads: rate(load, threads, args.workers, args.seconds) for threads in args.threads}
        for name, load in (
            ("tars", loader(folder / "tars", "webdataset", n_codes, args.image_size)),
            ("codes", loader(folder / "codes", "arrayrecord", n_codes, args.image_size)),
        )
    }
    return report


def rate(load: functools.partial, threads: int, workers: int, seconds: float) -> float:
    """Images per second from the second step on."""
    batches = pipeline.iterate(load, 0, sys.maxsize >> 1, threads, workers)
    next(batches)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        steps += 1
    passed = time.perf_counter() - start
    batches.close()
    return steps * N_ROWS / passed


def loader(folder: pathlib.Path, format: str, n_codes: int, size: int) -> functools.partial:
    """step -> the rows of a batch, as training gets them."""
    config = sources.SourceConfig(path=str(folder), format=format)
    data = {task: {"pictures": config} for task in ROWS}
    opened = pipeline.open_sources(data, tuple(ROWS))
    tokenizer = TextTokenizer.train([caption(i) for i in range(100)] + [chat("a", "b")], 384)
    shape = pipeline.Shape(MAX_TEXT, n_codes, (size, size, 3))
    rows = pipeline.Pipeline(tokenizer, tokenizer.vocab(CODEBOOK), data, opened, ROWS, shape, seed=0)
    return functools.partial(rows.load, which=range(N_ROWS))


def make(folder: pathlib.Path, count: int, side: int, size: int) -> tuple[int, int]:
    """The pictures in tars and as codes; returns the bytes of the JPEG files and the codes of each."""
    (folder / "tars").mkdir()
    (folder / "codes").mkdir()
    rng, n_bytes, n_codes = np.random.default_rng(0), 0, (size // DOWN) ** 2
    shard = "shard-00000-of-00001.array_record"
    writer = ArrayRecordWriter(str(folder / "codes" / shard), "group_size:1")
    with tarfile.open(folder / "tars" / "00000.tar", "w") as tar:
        for i in range(count):
            file = picture(rng, side)
            n_bytes += len(file)
            for suffix, data in (("jpg", file), ("txt", caption(i).encode())):
                member = tarfile.TarInfo(f"{i:06}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            codes_N = rng.integers(0, CODEBOOK, n_codes)
            writer.write(pack(Record(f"{i:06}", codes=codes_N, texts=(caption(i),))))
    writer.close()
    about = {"records": count, "shards": {shard: count}, "codes": n_codes, "image_size": size}
    (folder / "codes" / "dataset.json").write_text(json.dumps(about))
    return n_bytes, n_codes


def picture(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG as large as one of a photograph: light and shade, edges, and a grain."""
    size = (side * 4 // 3, side)
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.integers(0, side, 2)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(
            (x, y, x + rng.integers(8, side // 2), y + rng.integers(8, side // 2)),
            tuple(rng.integers(256, size=3)),
        )
    grain = rng.normal(0, 9, (size[1], size[0], 1))
    pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def caption(i: int) -> str:
    """A caption of some twenty words."""
    return (
        f"The image shows picture number {i}, in which ellipses and rectangles of many colours lie over "
        "soft light and shade. It has the grain of a photograph."
    )
