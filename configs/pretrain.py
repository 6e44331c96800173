"""Stage 1: one model on text, image understanding and image generation together.

    python launch/train.py --config configs/pretrain.py:digits --workdir runs/digits

`digits`: scans of handwritten digits; the image tokenizer is trained first if there is none.
`,fast`: half of the layers, a third of the steps. `,smoke`: a few steps of few rows, to see that it runs.
"""

from ml_collections import ConfigDict

from mmada_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """See above."""
    arg = parse_arg(arg, presets=("digits",), preset="digits", fast=False, smoke=False)
    smoke = arg["smoke"]
    config = ConfigDict({
        "program": "model",
        "preset": arg["preset"],
        "model": {"dtype": "float32", "attention": "auto", "pad": "hard", "remat": "none"},
        "image_tokenizer": "",  # workdir of a configs/vq.py run; empty: WORKDIR/image_tokenizer
        "steps": 6 if smoke else 1000,
        "batch_size": 8 if smoke else 32,
        "seed": 0,
        "save_every": 3 if smoke else 200,
        "keep": 2,
        "log_every": 1 if smoke else 50,
        "text_vocab": 384,
        "max_text": 22,
        "cond_dropout": 0.1,
        # Reading is harder to learn than drawing from scans as few as these.
        "mixture": {"t2i": 8, "lm": 2, "lm_chat": 5, "mmu": 17},
        "loss": {
            "t2i": 1.0, "lm": 0.1, "lm_chat": 0.5, "mmu": 3.0, "r2i": 1.0, "lm_per": "token",
            "schedule": "cosine", "min_ratio": 0.0,
            # The reference has 1e-3. Answers of a few tokens are read with nearly all of them
            # hidden, and the weight 1/p of rows with a small p is mostly noise: a model this
            # small reads twice as well after 250 steps without those rows.
            "eps": 0.3,
        },
        "optim": {
            "name": "muon", "lr": 2e-3, "warmup": 50, "floor": 0.05, "b1": 0.9, "b2": 0.99,
            "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0, "moments": "float32",
        },
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
    })  # fmt: skip
    if arg["fast"] and not smoke:
        # Fewer layers and larger steps reach further in two minutes; text can wait.
        config.steps = 340
        config.model.update(n_layers=2, unroll=2)
        config.mixture.update(t2i=12, lm=1, lm_chat=1, mmu=18)
        config.optim.update(lr=4e-3, warmup=25)
    return config
