"""Trains what a config describes; run again to resume.

    python launch/train.py --config configs/pretrain.py:digits --workdir runs/digits
    python launch/train.py --config configs/pretrain.py:digits,smoke --workdir /tmp/smoke \
        --config.steps=10 --config.batch_size=16 --config.save_every=5
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import app, flags, logging
from ml_collections import config_flags

from configs import vq
from mmada_jax.train import check, train

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE:ARG, as configs/pretrain.py:digits.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.")


def main(argv):
    """Trains; the image tokenizer first, if the model needs one and names none."""
    logging.set_verbosity(logging.WARNING)
    if argv[1:]:
        raise ValueError(f"unexpected argument {argv[1]!r}; options begin with --")
    config, workdir = CONFIG.value, WORKDIR.value
    if config.program == "model" and not config.image_tokenizer:
        config.image_tokenizer = "image_tokenizer"
        check(config, workdir, vq.get_config("digits"))
        train(vq.get_config("digits"), os.path.join(workdir, config.image_tokenizer))
    train(config, workdir)


def parse_flags(argv):
    """Flags and config overrides; an unknown key is one line, not a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        sys.exit("error: unknown config key {}".format(str(error.args[0]).replace("\n", ". ")))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        app.run(main, flags_parser=parse_flags)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("MMADA_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
