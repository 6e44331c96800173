"""Compiles a step for a TPU that isn't there: the same as `mmada aot`, without installing."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mmada_jax.programs.command import main

if __name__ == "__main__":
    main(["aot", *sys.argv[1:]])
