"""Times a training step at the 8B's width: layers, loss and gradients, with our attention and others.

    mmada bench step              4 layers, rows of 1539 tokens, on this machine's device
    mmada bench step --layers 2 --rows 1 --length 387

One device, bfloat16 compute, float32 params, gradient descent (no optimizer library is needed: only jax,
flax and numpy). The implementations of attention take turns within one run. An MFU is printed where the
peak of the device is known, of this few layers and not of the 8B. On a CPU a tiny model runs, to see that
it does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmarks import timing
from mmada_jax.devices import chips
from mmada_jax.diffusion import loss
from mmada_jax.nets import transformer


def measure(args):
    """Times in ms, tokens per second and MFU of each implementation of attention."""
    device = jax.devices()[0]
    config = transformer.ModelConfig(n_layers=args.layers, remat=args.remat)
    B, L = args.rows, args.length
    if device.platform == "cpu":
        config, B, L = transformer.ModelConfig(128, 2, 4, 2, 256, 512, remat=args.remat), 2, 33
    names = {"tpu": ("tpu", "xla"), "gpu": ("cudnn", "xla")}.get(device.platform, ("cpu", "xla"))
    runs = {name: step(config, name, B, L) for name in names}
    ms = timing.in_ms(timing.take_turns(runs, args.repeats))
    # The head is multiplied with masked positions only.
    n_masked = round(float(jnp.sum(weights(B, L) > 0)))
    flops = 3 * transformer.forward_flops(config, B, L, n_masked * config.vocab)
    peak = chips.peak_tflops(device.device_kind)
    return {
        "device": device.device_kind, "layers": config.n_layers, "width": config.d_model, "rows": B,
        "length": L, "remat": config.remat, "repeats": args.repeats, "ms": ms,
        "mfu": {name: flops / (t["median"] * 1e9 * peak) for name, t in ms.items()} if peak else {},
    }  # fmt: skip


def as_text(report):
    """A line for each implementation."""
    B, L, ms = report["rows"], report["length"], report["ms"]
    lines = [
        f"{report['device']}, {report['layers']} layers of {report['width']}, {B} rows of {L} tokens, "
        f"remat {report['remat']}, medians of {report['repeats']} (quartiles)"
    ]
    for name, t in ms.items():
        mfu = f", MFU {report['mfu'][name]:.1%}" if report["mfu"] else ""
        speed, ratio = 1e3 * B * L / t["median"], ms["xla"]["median"] / t["median"]
        lines.append(
            f"attention {name:6} {timing.as_text(t).replace(' (', ' ms (')}, {speed:,.0f} tokens/s{mfu}, "
            f"{ratio:.2f} times xla's speed"
        )
    return "\n".join(lines)


def step(config, implementation, B, L):
    """A call without arguments: one step of gradient descent, half of the positions masked."""
    config = transformer.ModelConfig(**{**vars(config), "attention": implementation})
    tokens_BL = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab, (B, L)), jnp.int32)
    valid_BL = jnp.arange(L)[None] >= (jnp.arange(B) * L // (4 * B))[:, None]

    def total(params):
        h_BLD = transformer.hidden_states(params, config, tokens_BL, valid_BL)
        return loss.weighted_nll(h_BLD, params["head_DV"], tokens_BL, weights(B, L), 2048)[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def descend(params):
        return jax.tree.map(lambda p, g: p - np.float32(1e-3) * g, params, jax.grad(total)(params))

    params = jax.jit(functools.partial(transformer.init_params, config=config))(jax.random.key(0))

    def run():
        nonlocal params
        params = jax.block_until_ready(descend(params))

    return run


def weights(B, L):
    """[B, L], zero where a position isn't masked."""
    return jnp.asarray(np.random.default_rng(1).random((B, L)) < 0.5, jnp.float32) / (B * L)
