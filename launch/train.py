"""Trains what a config describes; run again to resume.

    python launch/train.py --config configs/pretrain.py:digits --workdir runs/digits
    python launch/train.py --config configs/pretrain.py:digits,smoke --workdir /tmp/smoke \
        --config.steps=10 --config.batch_size=16 --config.save_every=5

Several processes, on Slurm (srun) or a TPU pod, find each other; on Cloud TPU VMs pass --distributed.
Elsewhere start one with --process_id 0, one with 1 and so on:
    python launch/train.py ... --coordinator HOST:PORT --num_processes 2 --process_id 0
All need the same workdir, on a file system that they share.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
from absl import flags, logging
from ml_collections import config_flags

from configs import vq
from launch import keep_memory, run
from mmada_jax.config import to_dict
from mmada_jax.devices.distributed import initialize_distributed, together
from mmada_jax.train.runs import parse
from mmada_jax.train.supervised import check, train

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE:ARG, as configs/pretrain.py:digits.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, the same for all processes."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "Whether this is one of several processes that jax detects; default: if the "
    "environment of Slurm or TPUs says so."
)  # fmt: skip
TIMEOUT = flags.DEFINE_integer("connect_timeout", 300, "Seconds to wait for the other processes.")


def connect(program: str, parse: Callable[[Any], Any] = parse) -> None:
    """Meets the other processes of the run; all must run the same program with the same configuration,
    which `parse` makes whole."""
    initialize_distributed(
        COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, DISTRIBUTED.value, TIMEOUT.value
    )
    with together(program, TIMEOUT.value) as same:
        config = to_dict(parse(CONFIG.value))
        same |= {"config": config, "workdir": os.path.abspath(WORKDIR.value)}
    with together(program, TIMEOUT.value) as same:  # devices are asked for when all are sure to do so
        same |= {"devices": jax.local_device_count(), "kind of device": jax.devices()[0].device_kind}
    keep_memory()


def main(argv):
    """Trains; the image tokenizer first, if the model needs one and names none."""
    logging.set_verbosity(logging.FATAL)  # what Orbax would log of an error is in what is reported of it
    if argv[1:]:
        raise ValueError(f"unexpected argument {argv[1]!r}; options begin with --")
    connect("launch/train.py")
    config, workdir = CONFIG.value, WORKDIR.value
    if config.program == "model" and not config.get("image_tokenizer"):
        with config.unlocked():
            config.image_tokenizer = "image_tokenizer"
        tokenizer = vq.get_config("digits")
        check(config, workdir, tokenizer)
        state = train(tokenizer, os.path.join(workdir, config.image_tokenizer))
        if int(state.step) < tokenizer.steps:
            return  # a signal
    train(config, workdir)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    run(main)
