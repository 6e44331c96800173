"""Prepares data for training: any source -> shards of ArrayRecord, with its images as codes if wanted.

mmada prepare --format webdataset --path 'cc12m/{00000..01242}.tar' --out data/cc12m
mmada prepare --format llava --path mix.json --image_root images --out data/mix_512 \
        --image_tokenizer checkpoints/magvitv2 --image_size 512 --resize squash

A shard is written under another name, counted, and renamed; one that is finished is kept when the
command is given again, so that a run which was killed goes on. Records that can't be used are left out,
counted and named. dataset.json says what there is when all is done.

With --engine ray the same shards are written by workers of a Ray cluster (docs/cluster.md). Needs the extra
`cluster`.
"""

import argparse
import signal
import sys
import threading

from mmada_jax import storage
from mmada_jax.programs.process import Parser, quiet

FORMATS = ("tfds", "webdataset", "parquet", "jsonl", "llava", "imagefolder")
RESIZE = ("crop", "squash", "pad")
# Options that name fields of a source, and what each says.
FIELDS = {
    "text": "column, key or feature of the text",
    "turns": "the same of a conversation",
    "short": "the same of a short caption (r2i)",
    "image": "the same of the image",
    "captions": "a side file of captions",
    "image_root": "folder that the paths of images are relative to",
    "labels": "names of the classes of an image folder",
}


def parser() -> Parser:
    """The command line."""
    top = Parser(__doc__, prog="mmada prepare")
    top.add_argument("--format", required=True, choices=FORMATS, help="format of the source")
    top.add_argument("--path", required=True, help="file, folder, glob, or pattern as {00000..00099}.tar")
    top.add_argument("--out", required=True, help="folder to write: new, empty, or one to go on with")
    for name, what in FIELDS.items():
        top.add_argument(f"--{name}", default="", help=f"{what} (default: the format's usual)")
    top.add_argument("--split", default="train", help="split of a TFDS data set (default: train)")
    top.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle once (default: source's order)")
    top.add_argument("--records_per_shard", type=int, default=10_000, metavar="N", help="default: 10000")
    top.add_argument("--image_tokenizer", metavar="FOLDER", help="store the codes of images, not files")
    top.add_argument("--image_size", type=int, metavar="PIXELS", help="of the sides of what is encoded")
    top.add_argument(
        "--resize", choices=RESIZE, default="crop", help="how it comes to that (default: crop)"
    )
    top.add_argument("--keep_images", action="store_true", help="store the files beside the codes")
    top.add_argument(
        "--max_skipped", type=float, default=0.01, metavar="SHARE",
        help="give up if more of the records than this can't be used (default: 0.01)",
    )  # fmt: skip
    top.add_argument("--cache_dir", default="", metavar="FOLDER", help="keep what is read of a bucket")
    top.add_argument("--engine", choices=("plain", "ray"), default="plain", help="what writes the shards: "
                     "this process, one by one, or workers of a Ray cluster (default: plain)")  # fmt: skip
    of_ray = top.add_argument_group("options of --engine ray")
    of_ray.add_argument("--address", metavar="HOST:PORT", help="of a cluster that runs; auto: this "
                        "machine's (default: RAY_ADDRESS, or a cluster of its own)")  # fmt: skip
    of_ray.add_argument("--workers", type=int, metavar="N", help="default: one on each machine; with the "
                        "options below as many as there is room for")  # fmt: skip
    of_ray.add_argument("--worker_cpus", type=float, metavar="N", help="for each worker (default: 1)")
    of_ray.add_argument("--worker_gpus", type=float, metavar="N", help="for each worker (default: 0)")
    of_ray.add_argument("--worker_resources", type=resource, nargs="+", metavar="NAME=N", help="for each "
                        "worker, as TPU=4")  # fmt: skip
    return top


def resource(text: str) -> tuple[str, float]:
    """Reads `TPU=4`: a resource of Ray's, and how much of it."""
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be a name and a number, as TPU=4") from None


def main(argv: list[str]) -> None:
    """Prepares, and says what came of it."""
    options = vars(parser().parse_args(argv))
    engine = options.pop("engine")
    of_ray = {name: options.pop(name) for name in
              ("address", "workers", "worker_cpus", "worker_gpus", "worker_resources")}  # fmt: skip
    given = [f"--{name}" for name, value in of_ray.items() if value is not None]
    if engine == "plain" and given:
        raise ValueError(f"{', '.join(given)}: only for --engine ray")
    quiet()
    from mmada_jax import nearby
    from mmada_jax.data import sources
    from mmada_jax.model.prepare import Stopped, prepare

    nearby.use(options.pop("cache_dir"), 50)
    if engine == "ray":
        from mmada_jax.model.actors import OnRay

        options["engine"] = OnRay(
            of_ray["address"], of_ray["workers"], of_ray["worker_cpus"], of_ray["worker_gpus"] or 0,
            dict(of_ray["worker_resources"] or []),
        )  # fmt: skip
    of_source = {name: options.pop(name) for name in ("format", "path", "split", "resize", *FIELDS)}
    out, received = options.pop("out"), []

    def terminate(number, frame):
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
    try:
        report, skips = prepare(sources.SourceConfig(**of_source), out, **options)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + (received or [signal.SIGINT])[0])
    print(f"{report['records']:,} records in {len(report['shards'])} shards")
    if report["skipped"]:
        counts = ", ".join(f"{reason} {n:,}" for reason, n in report["skipped"].items())
        print(f"left out: {counts}" + (f"; as {skips.examples()}" if skips.all else ""))
    print(storage.path(out).absolute())
