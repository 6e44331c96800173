"""A page to chat with a model and watch it draw: the same as `mmada page`, without installing."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mmada_jax.programs.command import main

if __name__ == "__main__":
    main(["page", *sys.argv[1:]])
