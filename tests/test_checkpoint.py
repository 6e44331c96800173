"""Checkpoints: there and back on other meshes, retention, what is missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmada_jax import optim, sharding, transformer
from mmada_jax.checkpoint import Checkpoints, check_workdir, claim_workdir, read_config
from mmada_jax.state import TrainState, init_state, state_shardings

CONFIG = transformer.Config(
    d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_mlp=32, vocab=64, max_len=16, dtype="float32"
)


def place(mesh, optimizer):
    def init(key):
        return transformer.init_params(key, CONFIG)

    shapes, shardings = state_shardings(mesh, init, transformer.param_axes(CONFIG), optimizer)
    return init, shapes, shardings


def test_a_state_comes_back_on_another_mesh(tmp_path):
    optimizer = optim.make(optim.Config(), 10)
    init, _, eight = place(sharding.make_mesh(fsdp=4, tensor=2), optimizer)
    state = init_state(jax.random.key(0), init, optimizer, eight)
    state = state._replace(step=jnp.int32(7))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    _, shapes, one = place(sharding.make_mesh(devices=jax.devices()[:1]), optimizer)
    with Checkpoints(tmp_path) as checkpoints:
        back = checkpoints.restore(shapes, one)
        alone = checkpoints.restore_params(shapes.params, one.params)
    assert int(back.step) == 7
    jax.tree.map(np.testing.assert_array_equal, back, state)
    jax.tree.map(np.testing.assert_array_equal, alone, state.params)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(back.params))


def test_moments_lie_as_their_params_do():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    for name in ("adamw", "muon"):
        _, shapes, shardings = place(mesh, optim.make(optim.Config(name=name), 10))
        wanted = {
            (path[-1].key, x.shape): s.spec
            for (path, x), s in zip(
                jax.tree.leaves_with_path(shapes.params), jax.tree.leaves(shardings.params), strict=True
            )
        }
        found = 0
        for (path, x), s in zip(
            jax.tree.leaves_with_path(shapes.opt_state), jax.tree.leaves(shardings.opt_state), strict=True
        ):
            if hasattr(path[-1], "key"):  # a param's moment; the rest are counters and constants
                assert s.spec == wanted[path[-1].key, x.shape], (name, path)
                found += 1
        assert found >= len(wanted)


def test_the_newest_few_are_kept_and_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(TrainState(np.int32(step), {"w": jnp.ones(2)}, {"count": jnp.int32(0)}))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]


def test_an_unfinished_save_is_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(TrainState(np.int32(1), {"w": jnp.ones(2)}, {"count": jnp.int32(0)}))
    (tmp_path / "checkpoints/2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1


def test_what_is_missing_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoints.restore_params({}, {})
    with pytest.raises(FileNotFoundError, match=r"no workdir of a training run: config\.json is missing"):
        read_config(tmp_path / "elsewhere")


def test_a_workdir_holds_one_model(tmp_path):
    config = {"preset": "digits", "model": {"dtype": "float32"}, "steps": 3}
    check_workdir(tmp_path / "new", config, ("preset", "model"))
    claim_workdir(tmp_path, config)
    assert read_config(tmp_path) == config
    check_workdir(tmp_path, config | {"steps": 5}, ("preset", "model"))
    with pytest.raises(ValueError, match=r"model\.dtype is 'float32' there and 'bfloat16' now"):
        check_workdir(tmp_path, config | {"model": {"dtype": "bfloat16"}}, ("preset", "model"))
