"""Stage 1: one model on text, image understanding and image generation together.

    python launch/train.py --config configs/pretrain.py:digits --workdir runs/digits

    python launch/aot.py --config configs/pretrain.py:8b,phase=3 --topology v5p:4x4x4

`digits`: scans of handwritten digits; the image tokenizer is trained first if there is none.
`,fast`: half of the layers, a third of the steps. `,smoke`: a few steps of few rows, to see that it runs.
`8b,phase=1` (2, 3): the published phases, without their data: for launch/aot.py.
"""

from ml_collections import ConfigDict

from mmada_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """See above."""
    arg = parse_arg(arg, presets=("digits", "8b"), preset="digits", fast=False, smoke=False, phase=0)
    if arg["preset"] == "8b":
        if arg["fast"] or arg["smoke"]:
            raise ValueError("8b has no form that is fast or for smoke tests; the digits have")
        return phase_of_8b(arg["phase"] or 1)
    if arg["phase"]:
        raise ValueError(f"digits has no phases; phase={arg['phase']} is for 8b")
    smoke = arg["smoke"]
    config = ConfigDict({
        "program": "model",
        "preset": arg["preset"],
        "data": "digits",
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


def phase_of_8b(phase: int) -> ConfigDict:
    """The three pretraining phases of MMaDA-8B, as published; each starts from the one before."""
    if phase not in (1, 2, 3):
        raise ValueError(f"phase is {phase}; pretraining has the phases 1, 2 and 3")
    # Pixels of an image, tokens of the text slot, learning rate, rows and coefficients of the tasks.
    # The text of the third phase are instructions, whose answers alone are hidden.
    size, text, lr, lm, shares, coefficients = {
        1: (256, 128, 1e-4, "lm", (7, 2, 6), (1.0, 0.1, 1.0)),
        2: (256, 256, 5e-5, "lm", (7, 2, 3), (1.0, 0.1, 0.5)),
        3: (512, 512, 5e-5, "lm_chat", (4, 1, 1), (1.0, 0.4, 0.5)),
    }[phase]
    t2i, text_loss, mmu = coefficients
    return ConfigDict({
        "program": "model",
        "preset": "llada-8b",
        "data": "none",
        "image_size": size,
        "max_text": text,
        "model": {
            "dtype": "bfloat16", "attention": "auto", "pad": "hard",
            # What a layer keeps for its backward pass. Without mlp it needs half the memory.
            "remat": "attention+middle+qkv+mlp",
        },
        "image_tokenizer": "",
        "steps": 500_000 if phase == 1 else 1_000_000,
        "batch_size": 256,
        "accumulate": 1,
        "loss_chunk": 2048,
        "seed": 10086,
        "save_every": 10_000,
        "keep": 2,
        "log_every": 50,
        "cond_dropout": 0.1,
        "mixture": dict(zip(("t2i", lm, "mmu"), shares, strict=True)),
        "loss": {
            "t2i": t2i, "lm": text_loss, "lm_chat": text_loss, "mmu": mmu, "r2i": 1.0,
            "lm_per": "token", "schedule": "cosine", "min_ratio": 0.0, "eps": 1e-3,
        },
        "optim": {
            "name": "adamw", "lr": lr, "warmup": 5000, "floor": 0.0 if phase == 1 else 0.1,
            "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0,
            "moments": "float32",
        },
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
    })  # fmt: skip
