r"""Stage 2: mixed long chain of thought, one format for text, image understanding and image generation.

    mmada train --config configs/cot.py:digits --workdir runs/cot --config.init=../digits \
        --config.image_tokenizer=../digits/image_tokenizer
    mmada train --config configs/cot.py:8b,phase=1 --workdir runs/cot1

`digits`: sums in steps, the sum of the two digits in an image, and an image of what a sum comes to, each
thought first, between <think> and </think>; it starts from the run of configs/pretrain.py:digits.
`,full` and `,fast`: for a model of its `full` and `fast`.

`8b,phase=1` (2): the published phases, text alone and with images; they start from runs/phase3 and
runs/cot1. See configs/pretrain.py for the folders.

`,smoke` with any of them: a few steps of few rows of digits, to see that it runs.
"""

from ml_collections import ConfigDict

from mmada_jax.config import parse_arg

FORMS = ("full", "fast", "smoke")


def get_config(arg: str | None = None) -> ConfigDict:
    """See above."""
    arg = parse_arg(arg, presets=("digits", "8b"), preset="digits", forms=FORMS, form="", phase=0)
    form = arg["form"]
    if arg["preset"] == "8b":
        if form in ("full", "fast"):
            raise ValueError(f"8b has no {form} form; the digits have")
        config = phase_of_8b(arg["phase"] or 1)
        return smoke(config, of_digits()) if form == "smoke" else config
    if arg["phase"]:
        raise ValueError(f"digits has no phases; phase={arg['phase']} is for 8b")
    config = of_digits()
    if form == "smoke":
        return smoke(config, config)
    if form == "full":
        config.steps = 1250
        config.model.update(n_layers=4, unroll=4)
        config.optim.lr = 1.5e-3
    if form == "fast":
        config.steps = 80
        config.model.update(n_layers=2, unroll=1)
        config.optim.update(lr=3e-3, warmup=15)
    return config


def get_hyper(h) -> list[dict]:
    """The learning rate against the share of rows masked by prefix, for `mmada sweep`."""
    return h.product([h.sweep("optim.lr", [1e-3, 2e-3]), h.sweep("loss.prefix_rows", [0.0, 0.3, 0.6])])


def of_digits() -> ConfigDict:
    """The model of configs/pretrain.py:digits learns to think."""
    scans = {
        "t2i": {"captions": source("captions", format="digits")},
        "lm": {},
        "lm_chat": {
            "sums": source("sums", format="digits"),
            "text_cot": source("text_cot", format="digits", weight=2.0),
        },
        "mmu": {
            "reading": source("reading", format="digits"),
            "vqa_sum": source("vqa_sum", format="digits", weight=2.0),
        },
        "r2i": {"draw_sum": source("draw_sum", format="digits")},
    }
    return ConfigDict({
        "program": "model",
        "init": "../pretrain",
        "model": {"pad": "hard", "n_layers": 3, "unroll": 3},
        "image_tokenizer": "../image_tokenizer",
        "max_text": 24,
        "steps": 800,
        "batch_size": 32,
        "save_every": 200,
        "answer_block": 4,
        "think_prompt": "",
        "think_draw_prompt": "",
        "mixture": {"t2i": 3, "lm": 0, "lm_chat": 9, "mmu": 12, "r2i": 8},
        "data": scans,
        "held_out": {
            task: {name: {**values, "split": "validation"} for name, values in of_task.items()}
            for task, of_task in scans.items()
        },
        "loss": {
            "lm_chat": 3.0, "mmu": 3.0, "r2i": 3.0, "lm_per": "answer", "eps": 0.3,
            # With random masks alone the model reads two digits and doesn't add them: what a thought
            # leads to is learned from rows that are masked as decoding will meet them.
            "answer_mask": "mixture", "prefix_rows": 0.8, "prefix_next": 8,
        },
        "optim": {
            "name": "muon", "lr": 2.5e-3, "warmup": 30, "floor": 0.05, "b2": 0.99,
        },
    })  # fmt: skip


def phase_of_8b(phase: int) -> ConfigDict:
    """Stages 2.1 and 2.2 of MMaDA-8B, as published, and rows that think before they draw.

    The paper describes the latter; the reference has their layout and loss, no script that trains them
    and no share of them. Here they have one row in five and the coefficient of image understanding.
    """
    if phase not in (1, 2):
        raise ValueError(f"phase is {phase}; the chain of thought has the phases 1 and 2")
    thoughts = {
        name: source(name, think=True) for name in ("ai2d_cot", "clevr_cot", "docvqa_cot", "geo_cot")
    }
    data = {
        "t2i": {name: source(name) for name in ("journeydb", "laion_aesthetics")},
        "lm": {},
        "lm_chat": {"text_cot": source("text_cot")},
        "mmu": thoughts | {"laion_aesthetics": source("laion_aesthetics", weight=4.0)},
        "r2i": {"r2i": source("r2i", think=True)},
    }
    mixture = {"t2i": 1, "lm": 0, "lm_chat": 2, "mmu": 1, "r2i": 1}
    coefficients = {"t2i": 1.0, "lm": 0.5, "lm_chat": 0.5, "mmu": 0.5, "r2i": 0.5}
    if phase == 2:
        # The reference draws the source of a step's text and image rows, ours has its share in each batch.
        data["lm"] = {"refinedweb": source("refinedweb")}
        data["lm_chat"] = {"instructions": source("instructions")}
        data["mmu"] = {name: values | {"weight": 3.5 / 4} for name, values in thoughts.items()}
        data["mmu"] |= {
            "llava_665k": source("llava_665k", weight=5.5, resize="squash"),
            "clevr_cogent": source("clevr_cogent", weight=0.5, resize="squash"),
            "geo170k": source("geo170k", weight=0.5, resize="pad"),
        }
        mixture = {"t2i": 50, "lm": 2, "lm_chat": 98, "mmu": 50, "r2i": 50}
        # A task's coefficient counts its rows once, however many: 0.6 shared by the two kinds of text.
        coefficients = {"t2i": 0.05, "lm": 0.6 * 0.02, "lm_chat": 0.6 * 0.98, "mmu": 0.4, "r2i": 0.4}
    return ConfigDict({
        "program": "model",
        "preset": "llada-8b",
        "init": "../phase3" if phase == 1 else "../cot1",
        "model": {"pad": "hard", "remat": "attention+middle+qkv+mlp"},  # see configs/pretrain.py
        "image_tokenizer": "../magvitv2",
        "image_size": 512,
        "max_text": 512,
        "steps": 1_000_000,
        "batch_size": 256,
        "loss_chunk": 2048,
        "seed": 10086,
        "save_every": 10_000,
        "eval_every": 1000,
        "eval_rows": 256,
        "mixture": mixture,
        "data_root": "../data",
        "data": data,
        "held_out": {
            task: {name: {**of, "path": f"{of['path']}_held_out"} for name, of in of_task.items()}
            for task, of_task in data.items()
        },
        "loss": {
            **coefficients, "lm_per": "answer",
        },
        "optim": {
            "floor": 0.1,  # the reference configures it, its cosine ignores it and ends at 0
        },
    })  # fmt: skip


def source(path: str, **values) -> dict:
    """One source; mmada_jax/data/sources/source.py says what it may have beside its path."""
    return {"path": path} | values


def smoke(config: ConfigDict, digits: ConfigDict) -> ConfigDict:
    """The tasks, losses and optimizer of `config` for six steps of a small model on digits."""
    small = digits.copy_and_resolve_references()
    for group in ("loss", "optim"):
        small[group] = config[group].copy_and_resolve_references()
    small.optim.warmup = 2
    small.model.update(n_layers=2, unroll=1)
    small.update(
        steps=6, batch_size=8, save_every=3, log_every=1, init="", text_vocab=384, image_tokenizer=""
    )
    if config is not digits:  # a phase of the 8b: rows of each of its tasks
        small.mixture.update(config.mixture)
        small.mixture.lm = 0  # two rows of 250 there
        small.update(batch_size=16)
    return small
