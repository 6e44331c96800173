"""An untrained model and what it is given, for the tests of what users import."""

import numpy as np
import pytest

from mmada_jax.data import digits
from mmada_jax.diffusion.rules import ImageRule
from mmada_jax.serve.api import MMaDA

FAST = ImageRule(steps=3, guidance=1.0)


@pytest.fixture(scope="module", name="model")
def untrained_model(model_workdir):
    return MMaDA.load(model_workdir)


@pytest.fixture(scope="module", name="canvases")
def two_canvases():
    return np.stack([digits.canvas(*digits.load("test").pixels[i : i + 2]) for i in range(2)])
