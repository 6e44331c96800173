r"""Drawing pages of handwritten digits: pictures of 256 tokens that a program judges (data/digits.py).

    mmada train --config configs/pages.py --workdir runs/pages --config.image_tokenizer=../quickstart/vq

A page has 32x32 pixels, four lines of four scans, and its caption says the digit of each line. The image
tokenizer is the one of the canvases of one or two digits (configs/vq.py); without one it is trained first.

`,smoke`: a few steps of a small model, to see that it runs.
"""

from ml_collections import ConfigDict

from mmada_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """See above."""
    arg = parse_arg(arg, presets=("pages",), preset="pages", forms=("smoke",), form="")
    smoke = arg["form"] == "smoke"
    layers = 1 if smoke else 4
    source = {"path": "pages", "format": "digits"}
    return ConfigDict({
        "program": "model",
        "model": {
            "n_layers": layers, "unroll": layers, "max_len": 320,
            # Two wide heads pass over the scores of attention half as often as four.
            "n_heads": 2, "n_kv_heads": 2,
            "rope_theta": 10000.0,
        },
        "image_size": 32,
        "text_vocab": 384,
        "max_text": 32,
        "steps": 2 if smoke else 900,
        "batch_size": 8 if smoke else 16,
        "save_every": 200,
        "log_every": 1 if smoke else 25,
        "mixture": {"t2i": 1, "lm": 0, "lm_chat": 0, "mmu": 0, "r2i": 0},
        "data": {"t2i": {"pages": source}},
        "held_out": {"t2i": {"pages": source | {"split": "validation"}}},
        "optim": {
            "name": "muon", "lr": 3e-3, "warmup": 2 if smoke else 30, "floor": 0.05, "b2": 0.99,
        },
    })  # fmt: skip
