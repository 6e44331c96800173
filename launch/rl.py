"""Reinforcement learning of a model by a config; run again to resume.

    python launch/rl.py --config configs/unigrpo.py:digits --workdir runs/rl --config.init=../quickstart/cot
    python launch/rl.py --config configs/unigrpo.py:digits --workdir runs/rl --diagnose \
        --config.init=../quickstart/cot --maskings unigrpo,trace,exact --batches 6

--diagnose trains nothing and writes nothing: it measures, at the model in config.init, how well the
gradient under each masking repeats itself from batch to batch, and how well it agrees with the gradient
over every reveal of every rollout. That takes one process; where several train, they find each other as
those of launch/train.py do.
"""

import functools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags, logging

from launch import run
from launch.train import CONFIG, WORKDIR, connect
from mmada_jax.config import from_dict
from mmada_jax.train.rl.diagnose import diagnose
from mmada_jax.train.rl.loop import RLRun, train
from mmada_jax.train.rl.unigrpo import MASKINGS

DIAGNOSE = flags.DEFINE_bool("diagnose", False, "Measure the gradients of maskings; train nothing.")
COMPARED = flags.DEFINE_list("maskings", list(MASKINGS), "What --diagnose compares.")
BATCHES = flags.DEFINE_integer("batches", 6, "How many rollouts --diagnose takes for each task.")


def main(argv):
    """Trains, or measures gradients and prints a table."""
    logging.set_verbosity(logging.FATAL)  # what Orbax would log of an error is in what is reported of it
    if argv[1:]:
        raise ValueError(f"unexpected argument {argv[1]!r}; options begin with --")
    program = "launch/rl.py --diagnose" if DIAGNOSE.value else "launch/rl.py"
    connect(program, functools.partial(from_dict, RLRun))
    if not DIAGNOSE.value:
        train(CONFIG.value, WORKDIR.value)
        return
    for task, rows in diagnose(CONFIG.value, WORKDIR.value, COMPARED.value, BATCHES.value).items():
        print(f"{task}: {BATCHES.value} rollouts")
        print(f"  {'masking':10} {'batch to batch':>15} {'to every reveal':>16} {'norm':>8}")
        for masking, found in rows.items():
            print(
                f"  {masking:10} {found['between_batches']:15.3f} {found['with_every']:16.3f} "
                f"{found['norm']:8.3g}"
            )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    run(main)
