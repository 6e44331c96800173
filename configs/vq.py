"""Training the image tokenizer (MAGVIT-v2 with lookup-free quantisation).

    mmada train --config configs/vq.py:digits --workdir runs/vq

`digits`: canvases of scanned digits, 8x16 pixels -> 32 codes of 6 bits.
`,full` and `,fast`: more and fewer steps. `,smoke`: a few, to see that it runs.
"""

from ml_collections import ConfigDict

from mmada_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """See above."""
    arg = parse_arg(arg, presets=("digits",), preset="digits", forms=("full", "fast", "smoke"), form="")
    smoke = arg["form"] == "smoke"
    steps = {"": 180, "full": 400, "fast": 70, "smoke": 4}[arg["form"]]
    return ConfigDict({
        "program": "vq",
        "steps": steps,
        "batch_size": 32,
        "save_every": 200,
        "log_every": 1 if smoke else 50,
        "optim": {
            "lr": 3e-3, "warmup": 20, "floor": 0.01, "b2": 0.99, "weight_decay": 0.0,
        },
    })  # fmt: skip


def get_hyper(h) -> list[dict]:
    """The learning rate against the weight of the entropy, for `mmada sweep`."""
    return h.product([h.sweep("optim.lr", [1e-3, 3e-3]), h.sweep("entropy", [0.05, 0.1, 0.2])])


def get_space(s) -> dict:
    """What `mmada sweep --search` draws from."""
    return {"optim.lr": s.log_uniform(5e-4, 1e-2), "entropy": s.log_uniform(0.02, 0.5)}
