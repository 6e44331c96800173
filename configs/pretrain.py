r"""Stage 1: one model on text, image understanding and image generation together.

    mmada train --config configs/pretrain.py:digits --workdir runs/digits

    mmada train --config configs/pretrain.py:8b,phase=1 --workdir runs/phase1
    mmada aot --config configs/pretrain.py:8b,phase=3 --topology v5p:4x4x4

`digits`: scans of handwritten digits; the image tokenizer is trained first if there is none.
`,full`: a layer more and more steps; `,fast`: a layer less and fewer steps. docs/results.md says
what each reaches.

`8b,phase=1` (2, 3): the published phases of MMaDA-8B. What they read lies beside the workdir: in data/
folders that `mmada prepare` made, named as below, each with one of held-out records, NAME_held_out;
the phase before (runs/phase1 for runs/phase2), or for the first start/ (LLaDA with an image vocabulary);
and magvitv2/, the last two by `mmada convert`.

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
    # The shorter a run, the fewer layers and the larger steps reach furthest.
    if form == "full":
        config.steps = 1200
        config.model.update(n_layers=4, unroll=4)
        config.mixture.update(t2i=10, lm_chat=8, mmu=13)
        config.optim.update(lr=2e-3, warmup=50)
    if form == "fast":
        config.steps = 160
        config.model.update(n_layers=2, unroll=1)  # one layer is compiled, not both
        config.mixture.update(t2i=14, lm_chat=1, mmu=16)
        config.loss.lm_chat = 0.5
        config.optim.update(lr=4e-3, warmup=20)
    return config


def get_hyper(h) -> list[dict]:
    """The learning rate against the share of reading, for `mmada sweep`."""
    return h.product([h.sweep("optim.lr", [1e-3, 2e-3, 4e-3]), h.sweep("mixture.mmu", [8, 17])])


def get_space(s) -> dict:
    """What `mmada sweep --search` draws from."""
    return {"optim.lr": s.log_uniform(5e-4, 1e-2), "mixture.mmu": s.integer(4, 24)}


def of_digits() -> ConfigDict:
    """A model of a million parameters on canvases of one or two digits."""
    scans = {
        "t2i": {"captions": source("captions", format="digits")},
        "lm": {"statements": source("statements", format="digits")},
        "lm_chat": {"sums": source("sums", format="digits")},
        "mmu": {"reading": source("reading", format="digits")},
        "r2i": {},
    }
    return ConfigDict({
        "program": "model",
        # `pad` is as in the preset. Runs that began with it named can only be resumed with it named.
        "model": {"pad": "hard", "n_layers": 3, "unroll": 3},
        "text_vocab": 384,
        "max_text": 24,
        "steps": 750,
        "batch_size": 32,
        "save_every": 200,
        "answer_block": 4,
        # Reading is harder to learn than drawing from scans as few as these.
        "mixture": {"t2i": 9, "lm": 1, "lm_chat": 6, "mmu": 16, "r2i": 0},
        "data": scans,
        "held_out": {
            task: {name: {**values, "split": "validation"} for name, values in of_task.items()}
            for task, of_task in scans.items()
        },
        "loss": {
            # Of the target of an lm_chat row most is padding; without a large coefficient sums of two
            # digits, which stage 2 thinks with, aren't learned.
            "lm_chat": 8.0, "mmu": 3.0,
            # The reference has 1e-3. Answers of a few tokens are read with nearly all of them
            # hidden, and the weight 1/p of rows with a small p is mostly noise: a model this
            # small reads twice as well after 250 steps without those rows.
            "eps": 0.3,
        },
        "optim": {
            "name": "muon", "lr": 3e-3, "warmup": 30, "floor": 0.05, "b2": 0.99,
        },
    })  # fmt: skip


def phase_of_8b(phase: int) -> ConfigDict:
    """The three pretraining phases of MMaDA-8B, as published."""
    if phase not in (1, 2, 3):
        raise ValueError(f"phase is {phase}; pretraining has the phases 1, 2 and 3")
    # Pixels of an image; tokens of the text slot; learning rate; task of the text; rows of drawing, text
    # and reading; coefficients of text and reading (the coefficient of drawing is 1). The text of the third
    # phase are instructions. Only their answers are hidden.
    size, text, lr, lm, shares, (text_loss, mmu_loss) = {
        1: (256, 128, 1e-4, "lm", (7, 2, 6), (0.1, 1.0)),
        2: (256, 256, 5e-5, "lm", (7, 2, 3), (0.1, 0.5)),
        3: (512, 512, 5e-5, "lm_chat", (4, 1, 1), (0.4, 0.5)),
    }[phase]
    data = {task: {} for task in ("t2i", "lm", "lm_chat", "mmu", "r2i")}
    # The reference says which datasets a phase has, and no shares within a task.
    drawn = {
        1: ("imagenet",),
        2: ("sa1b", "cc12m", "laion_aesthetics"),
        3: ("journeydb", "laion_aesthetics", "text_to_image_2m"),
    }[phase]
    data["t2i"] = {name: source(name) for name in drawn}
    data[lm] = {"instructions": source("instructions")} if lm == "lm_chat" else {
        "refinedweb": source("refinedweb")
    }  # fmt: skip
    data["mmu"] = {name: source(name) for name in ("sa1b", "cc12m", "laion_aesthetics")}
    return ConfigDict({
        "program": "model",
        "preset": "llada-8b",
        "init": "../start" if phase == 1 else f"../phase{phase - 1}",
        "model": {
            "pad": "hard",
            # What a layer keeps for its backward pass. Without mlp it needs half the memory.
            "remat": "attention+middle+qkv+mlp",
        },
        "image_tokenizer": "../magvitv2",
        "image_size": size,
        "max_text": text,
        "steps": 500_000 if phase == 1 else 1_000_000,
        # The paper has 1280 rows in a batch: batch_size=1280, and accumulate=5 where 256 fit at a time.
        "batch_size": 256,
        "loss_chunk": 2048,
        "seed": 10086,
        "save_every": 10_000,
        "eval_every": 1000,
        "eval_rows": 256,
        "cut_long": phase < 3,  # the reference drops what is too long from the third phase on
        "mixture": {"t2i": 0, "lm": 0, "lm_chat": 0, "mmu": 0, "r2i": 0}
        | dict(zip(("t2i", lm, "mmu"), shares, strict=True)),
        "data_root": "../data",
        "data": data,
        "held_out": {
            task: {name: {**of, "path": f"{of['path']}_held_out"} for name, of in of_task.items()}
            for task, of_task in data.items()
        },
        "loss": {
            "lm": text_loss, "lm_chat": text_loss, "mmu": mmu_loss,
        },
        "optim": {
            "lr": lr,
            # The reference configures 0.1 in the phases 2 and 3 and none in the first; its cosine ignores
            # it and ends at 0 in all.
            "floor": 0.0 if phase == 1 else 0.1,
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
    small.update(steps=6, batch_size=8, save_every=3, log_every=1)
    small.cut_long = config.get("cut_long", False)
    if config is not digits:  # a phase of the 8b: rows of each of its tasks
        small.mixture.update(config.mixture)
        small.update(batch_size=16)
    return small
