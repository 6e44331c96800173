"""Times a training step at the 8B's width: layers, loss and gradients, with our attention and others.

    python launch/benchmark_step.py              4 layers, rows of 1539 tokens, on this machine's device
    python launch/benchmark_step.py --layers 2 --rows 1 --length 387

One device, bfloat16 compute, float32 params, gradient descent (no optimizer library is needed: only jax,
flax and numpy). The implementations of attention take turns within one run. An MFU is printed where the
peak of the device is known, of this few layers and not of the 8B. On a CPU a tiny model runs, to see that
it does.
"""

import argparse
import functools
import json
import os
import pathlib
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_attention import repeats, time_in_turns

from mmada_jax.devices import chips
from mmada_jax.diffusion import loss
from mmada_jax.nets import transformer


def main(argv=None):
    """Prints one line per implementation, and JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1539)
    parser.add_argument("--remat", default="attention+middle+qkv+mlp")
    parser.add_argument("--repeats", type=repeats, default=10)
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures there")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    config = transformer.Config(n_layers=args.layers, remat=args.remat)
    B, L = args.rows, args.length
    if device.platform == "cpu":
        config, B, L = transformer.Config(128, 2, 4, 2, 256, 512, remat=args.remat), 2, 33
    names = {"tpu": ("tpu", "xla"), "gpu": ("cudnn", "xla")}.get(device.platform, ("plain", "xla"))
    runs = {name: step(config, name, B, L) for name in names}
    times = time_in_turns(runs, args.repeats)
    # The head is multiplied with masked positions only.
    n_masked = round(float(jnp.sum(weights(B, L) > 0)))
    flops = 3 * transformer.forward_flops(config, B, L, n_masked * config.vocab)
    peak = chips.peak_tflops(device.device_kind)
    print(
        f"{device.device_kind}, {config.n_layers} layers of {config.d_model}, {B} rows of {L} tokens, "
        f"remat {config.remat}, medians of {args.repeats} (quartiles)"
    )
    for name, t in times.items():
        mfu = f", MFU {flops / (t['median'] * 1e9 * peak):.1%}" if peak else ""
        speed, ratio = 1e3 * B * L / t["median"], times["xla"]["median"] / t["median"]
        print(
            f"attention {name:6} {t['median']:.1f} ms ({t['low']:.1f} - {t['high']:.1f}), "
            f"{speed:,.0f} tokens/s{mfu}, {ratio:.2f} times xla's speed"
        )
    report = {"device": device.device_kind, "layers": config.n_layers, "rows": B, "length": L, "ms": times}
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


def step(config, implementation, B, L):
    """A call without arguments: one step of gradient descent, half of the positions masked."""
    config = transformer.Config(**{**vars(config), "attention": implementation})
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


if __name__ == "__main__":
    main()
