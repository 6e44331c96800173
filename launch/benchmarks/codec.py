"""Times a training step of the image tokenizer against the same network in plain PyTorch.

    mmada bench codec                             the preset "small" on 8 pictures of 64 pixels
    mmada bench codec --preset medium --rows 4

Both sides have the same weights, losses and optimizer (AdamW), float32, and take turns. The twin is the
network that travels with exported checkpoints (mmada_jax/weights/modeling_magvitv2.py).
"""

import argparse
import functools

import jax
import numpy as np

from launch.benchmarks import timing, twin
from mmada_jax.devices import sharding
from mmada_jax.nets import vq
from mmada_jax.train import optim, pictures, runs, supervised
from mmada_jax.weights import magvit_keys
from mmada_jax.weights.state import init_state, state_shardings

LR, ENTROPY, COMMITMENT = 1e-3, 0.1, 0.1


def measure(args: argparse.Namespace) -> dict:
    """Milliseconds of a step of each side, and the ratio of their medians."""
    codec = vq.PRESETS[args.preset]
    shape = (args.rows, args.side, args.side, codec.pixel_channels)
    pixels_BIJC = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    ours, params = our_step(codec, pixels_BIJC)
    runs_of, losses = {"jax": ours}, {"jax": ours()}
    try:
        runs_of["torch"] = twin_step(codec, params, pixels_BIJC)
        losses["torch"] = runs_of["torch"]()
    except ImportError as error:
        print(f"{error.name} is missing, ours is timed alone")
    ms = timing.in_ms(timing.take_turns(runs_of, args.repeats))
    ratio = ms["torch"]["median"] / ms["jax"]["median"] if "torch" in ms else None
    return {
        **timing.machine(), "preset": args.preset, "rows": args.rows, "side": args.side,
        "repeats": args.repeats, "ms": ms, "ratio": ratio, "first_loss": losses,
    }  # fmt: skip


def our_step(codec, pixels_BIJC):
    """A call that makes one step of ours and gives its loss; the params that it begins with."""
    run = runs.VQRun("vq", 1_000_000, len(pixels_BIJC), entropy=ENTROPY, commitment=COMMITMENT)
    mesh, root = sharding.make_mesh(devices=jax.devices()[:1]), jax.random.key(0)
    optimizer = optim.make(
        optim.OptimConfig(lr=LR, warmup=0, floor=1.0, clip=0.0, weight_decay=0.01), run.steps
    )
    objective = pictures.objective(run, codec)
    _, shardings = state_shardings(mesh, objective.init_params, objective.axes, optimizer)
    step_fn = supervised.make_step(objective, optimizer, mesh, shardings)
    with jax.set_mesh(mesh):
        state = init_state(root, objective.init_params, optimizer, shardings)
    params, batch = jax.device_get(state.params), sharding.put_batch(mesh, pixels_BIJC)

    def step():
        nonlocal state
        with jax.set_mesh(mesh):
            state, values = step_fn(state, root, batch)
        return float(jax.block_until_ready(values)["loss"])

    return step, params


def twin_step(codec, params, pixels_BIJC):
    """The same in PyTorch, with the same weights."""
    import torch
    import torch.nn.functional as F

    modeling = twin.module("mmada_jax/weights/modeling_magvitv2.py")
    values = magvit_keys.config_to_hf(codec)
    model = modeling.MAGVITv2(modeling.MAGVITv2Config(**values))
    model.load_state_dict(
        {key: torch.tensor(value) for key, value in magvit_keys.params_to_torch(params, codec).items()},
        strict=False,  # the quantiser's constants
    )
    adam = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    x = torch.tensor(pixels_BIJC).permute(0, 3, 1, 2).contiguous()

    def entropy(logit):
        p = torch.sigmoid(logit)
        return -p * F.logsigmoid(logit) - (1 - p) * F.logsigmoid(-logit)

    def step():
        adam.zero_grad(set_to_none=True)
        z = model.encoder(x)
        q = torch.where(z > 0, 1.0, -1.0)
        out = model.decoder(z + (q - z).detach())
        mean = torch.sigmoid(4 * z).mean(dim=(0, 2, 3)).clamp(1e-6, 1 - 1e-6)
        loss = ((out - x) ** 2).mean() + COMMITMENT * ((z - q) ** 2).mean()
        loss = loss + ENTROPY * (entropy(4 * z).mean() - entropy(torch.logit(mean)).mean())
        loss.backward()
        adam.step()
        return float(loss)

    return step


def as_text(report: dict) -> str:
    """A line for each side, and the ratio."""
    text, side = functools.partial(timing.as_text, digits=0), report["side"]
    lines = [
        f"{report['device']}, {report['preset']}, {report['rows']} pictures of {side} pixels; ms, medians "
        f"of {report['repeats']} (quartiles)"
    ]
    for name, ms in report["ms"].items():
        lines.append(f"{name:6}{text(ms)}, first loss {report['first_loss'][name]:.5f}")
    if report["ratio"]:
        lines.append(f"ours is {report['ratio']:.2f} times as fast")
    return "\n".join(lines)
