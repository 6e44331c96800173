"""Tasks of lm-evaluation-harness: the same as `mmada evaluate`, without installing."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mmada_jax.programs.command import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
