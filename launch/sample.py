"""Texts and pictures from a model: the same as `mmada sample`, without installing."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mmada_jax.programs.command import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
