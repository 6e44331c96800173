"""An endpoint for clients of OpenAI's API: the same as `mmada serve`, without installing."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mmada_jax.programs.command import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
