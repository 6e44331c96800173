"""Small states of a run for the tests of checkpoints, and what damages them."""

import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax.nets import transformer
from mmada_jax.weights.checkpoint import Checkpoints
from mmada_jax.weights.state import TrainState, state_shardings

CONFIG = transformer.ModelConfig(
    d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_mlp=32, vocab=64, max_len=16, dtype="float32"
)


def place(mesh, optimizer):
    def init(key):
        return transformer.init_params(key, CONFIG)

    shapes, shardings = state_shardings(mesh, init, transformer.param_axes(CONFIG), optimizer)
    return init, shapes, shardings


def payload(step):
    """The largest file of a step: arrays, of which Orbax keeps no checksum."""
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tiny(step):
    """A state of a megabyte, and what it takes to restore it."""
    w = jnp.asarray(np.random.default_rng(step).normal(size=1 << 18), jnp.float32)
    return TrainState(np.int32(step), {"w": w}, {"count": jnp.int32(step)})


def restore_tiny(checkpoints, like=None):
    state = like or tiny(0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return checkpoints.restore(shapes, jax.tree.map(lambda _: one, state))


def steps_in(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def restore(workdir, shapes, shardings):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(shapes, shardings)


def counting(monkeypatch, module, name):
    """Lets a function of a module note the first argument of each of its calls; the list of these."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(args[0]) or function(*args))
    return calls


def raising(error):
    def call(*_, **__):
        raise error

    return call
