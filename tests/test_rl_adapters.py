"""Adapters trained by reward: their base is the frozen reference, and a run resumes to the bit."""

import jax
import numpy as np
import pytest

from mmada_jax.nets import lora
from mmada_jax.serve.api import MMaDA
from mmada_jax.train.rl.loop import train
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.workdir import newest_step
from tests.rl_toys import history, one_device, params, rl_config, stopped_in, toy_rewards  # noqa: F401


@pytest.mark.parametrize(
    ("ahead", "kl", "dtype"),
    [
        (0, "reference", "float32"),
        pytest.param(1, "reference", "int8", marks=pytest.mark.slow),
    ],
)
def test_adapters_learn_by_reward_and_their_base_is_the_reference(config, tmp_path, ahead, kl, dtype):
    objective = config["objective"] | {"kl": kl, "beta": 0.1 * (kl == "reference")}
    config |= {
        "lora": {"rank": 2, "alpha": 4.0}, "base_dtype": dtype, "objective": objective, "ahead": ahead,
        "iterations": 4, "tasks": {"text": config["tasks"]["text"] | {"rewards": {"long": 1.0}}},
    }  # fmt: skip
    config["optim"] = config["optim"] | {"lr": 1e-2, "floor": 1.0}
    train(config, tmp_path / "whole")
    with stopped_in(2):
        assert int(train(config, tmp_path / "parts").step) == 4  # two iterations of mu 2
    train(config, tmp_path / "parts")
    whole, parts = params(tmp_path / "whole"), params(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert np.any(whole["q_DHK"]["b_NRO"])
    # The checkpoint holds no reference; the divergence from it is that of the base.
    held = newest_step(tmp_path / "whole") / "opt_state"
    assert "reference" not in (held / "_METADATA").read_text()
    divergence = history(tmp_path / "whole", "text/kl")
    assert divergence[0] < 1e-6
    if kl == "reference":
        assert divergence[-1] > 1e-6
    opened = open_folder(tmp_path / "whole")
    assert opened.adapter.lora == lora.LoraConfig(2, 4.0)
    assert MMaDA.load(tmp_path / "whole").generate("1+1", max_new=2).text is not None
