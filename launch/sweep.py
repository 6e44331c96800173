"""Trains every trial of a sweep: the same as `mmada sweep`, without installing."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mmada_jax.programs.command import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
