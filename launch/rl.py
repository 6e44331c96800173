"""Reinforcement learning by a config: the same as `mmada rl`, without installing."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mmada_jax.programs.command import main

if __name__ == "__main__":
    main(["rl", *sys.argv[1:]])
