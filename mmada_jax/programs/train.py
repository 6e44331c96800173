"""Trains what a config describes; run again to resume.

    mmada train --config configs/pretrain.py:digits --workdir runs/digits
    mmada train --config configs/pretrain.py:digits,smoke --workdir /tmp/smoke \\
        --config.steps=10 --config.batch_size=16 --config.save_every=5

Several processes, on Slurm (srun) or a TPU pod, find each other; on Cloud TPU VMs pass --distributed.
Elsewhere start one with --process_id 0, one with 1 and so on:
    mmada train ... --coordinator HOST:PORT --num_processes 2 --process_id 0
All need the same workdir, on a file system that they share.
"""

from typing import TYPE_CHECKING

from mmada_jax import storage
from mmada_jax.programs.configured import add_processes, config_parser, connect, parse

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def main(argv: list[str]) -> None:
    """Trains; the image tokenizer first, if the model needs one and names none."""
    parser = config_parser(__doc__, "train", "where checkpoints and metrics go")
    add_processes(parser)
    args = parse(parser, argv)

    from ml_collections import ConfigDict

    from mmada_jax.train import runs
    from mmada_jax.train.supervised import check_run, train

    tokenizer = None
    if args.config.get("program") == "own":
        from mmada_jax.train import own

        model, tokenizer, told = own.configurations(args.config)
        print(told, flush=True)
        args.config = ConfigDict(model)
    connect(args, "mmada train", runs.parse)
    config, workdir = args.config, args.workdir
    if config.program == "model" and not config.get("image_tokenizer"):
        tokenizer = ConfigDict(tokenizer) if tokenizer else of_digits()
        with config.unlocked():
            config.image_tokenizer = "image_tokenizer"
        check_run(config, workdir, tokenizer)
        state = train(tokenizer, storage.path(workdir) / config.image_tokenizer)
        if int(state.step) < tokenizer.steps:
            return  # a signal
    train(config, workdir)


def of_digits() -> "ConfigDict":
    """The configuration of the image tokenizer of the digits. Raises ValueError where it isn't there."""
    try:
        from configs import vq
    except ImportError:
        raise ValueError(
            "config.image_tokenizer is empty, and there is no configs/vq.py by which to train one: "
            "name the folder of an image tokenizer, or call this in the repository's folder"
        ) from None
    return vq.get_config("digits")
