r"""Stage 3: UniGRPO, reinforcement learning on text and images.

    mmada rl --config configs/unigrpo.py:digits --workdir runs/rl \
        --config.init=../quickstart/cot  # and to measure only: --diagnose
    mmada rl --config configs/unigrpo.py:totals --workdir runs/rl_totals --config.init=../totals_short
    mmada aot --config configs/unigrpo.py:8b --topology v5p:4x4x8 --step rollout

`digits`: two turns of sums of four digits in text, thought first, then one of drawing a digit without
guidance in four steps; it starts from the run of configs/cot.py:digits. Its masks are those of the
rollout itself ("exact"). What it reaches, and what it doesn't, is in docs/results.md. `,full` and `,fast`:
more and fewer iterations, for a model of its `full` and `fast`.

`totals`: long sums with their running totals, answers of 111 tokens, by a model of configs/totals.py:short
that isn't perfect yet. Rollouts reveal all tokens that are certain in a step, and record no less for it.
48 such answers say less about the gradient than as many short ones: with the digits' rate of learning a
model gets worse (docs/rl.md).

`8b`: the paper's masks, rewards and tasks (eps, beta and the learning rate, which it doesn't give, are
those of dLLM-RL). It reads DATA/math.jsonl, DATA/geometry.jsonl and DATA/drawing.jsonl, one {"prompt",
"answer", "image"} a line, and starts from runs/cot2.

`,smoke` with any of them: two iterations of few rows, of digits for `8b` too, to see that it runs.
"""

from ml_collections import ConfigDict

from mmada_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """See above."""
    arg = parse_arg(
        arg, presets=("digits", "totals", "8b"), preset="digits", forms=("full", "fast", "smoke"), form=""
    )
    form = arg["form"]
    if form in ("full", "fast") and arg["preset"] != "digits":
        raise ValueError(f"{arg['preset']} has no {form} form; the digits have")
    config = {"digits": of_digits, "totals": of_totals, "8b": of_8b}[arg["preset"]]()
    if form == "full":
        config.iterations = 72
        config.tasks.arithmetic.update(groups=24, turns=3)
        config.optim.warmup = 30
    if form == "fast":
        config.iterations, config.objective.mu, config.optim.warmup = 4, 2, 2
        config.tasks.arithmetic.turns = 1
    if form == "smoke":
        return smoke(config, config if arg["preset"] == "totals" else of_digits())
    return config


def of_digits() -> ConfigDict:
    """What works at this size."""
    return ConfigDict({
        "program": "rl",
        "init": "../cot",
        "model": {"dtype": "float32", "attention": "auto", "remat": "none"},
        "iterations": 24,
        "tasks": {
            "arithmetic": {
                "layout": "lm_chat",
                "data": {"path": "text_cot", "format": "digits", "split": "prompts"},
                "rewards": {"exact": 2.0, "format": 0.5},
                "groups": 12,
                "update_groups": 12,
                "turns": 2,
                "max_prompt": 18,
                "max_new": 24,
                "text": {"steps": 24, "block": 1, "temperature": 1.0, "remask": "largest"},
            },
            "drawing": {
                "layout": "t2i",
                "data": {"path": "t2i_one", "format": "digits"},
                "rewards": {"digit": 1.0},
                "groups": 10,
                "update_groups": 10,
                "image": {"steps": 4, "guidance": 0.0},
            },
        },
        "objective": {
            "masking": "exact", "mu": 4, "beta": 0.0, "kl": "old",
        },
        "reference_dtype": "float32",
        "save_every": 20,
        "samples_every": 20,
        "optim": {
            "lr": 1e-4, "warmup": 16, "floor": 0.1, "b2": 0.98, "weight_decay": 0.0,
        },
    })  # fmt: skip


def of_totals() -> ConfigDict:
    """The settings of the digits, for one task of long answers, with smaller steps."""
    config = of_digits()
    config.init = "../totals_short"
    config.iterations, config.optim.lr = 40, 2e-5
    del config.objective["mu"]  # the default; only a form of the digits has another one
    config.tasks = {
        "totals": {
            "layout": "lm_chat",
            "data": {"path": "1", "format": "totals"},
            "rewards": {"exact": 2.0, "format": 0.5},
            "groups": 6,
            "update_groups": 6,
            "max_prompt": 128,
            "max_new": 112,
            "text": {"block": 16, "temperature": 1.0, "remask": "largest", "threshold": 0.9},
        },
    }
    return config


def of_8b() -> ConfigDict:
    """The paper's method on the model of 8 billion parameters. Its objective has the defaults."""
    return ConfigDict({
        "program": "rl",
        "init": "../cot2",
        "image_tokenizer": "../magvitv2",
        "data_root": "../data",
        "model": {"dtype": "bfloat16", "attention": "auto", "remat": "attention+middle+qkv+mlp"},
        "iterations": 300,
        "tasks": {
            "math": words() | {
                "layout": "lm_chat",
                "data": {"path": "math.jsonl"},
                "rewards": {"correct": 2.0, "format": 0.5},
            },
            "geometry": words() | {
                "layout": "mmu",
                "data": {"path": "geometry.jsonl"},
                "rewards": {"correct": 2.0, "format": 0.5},
            },
            "drawing": {
                "layout": "t2i",
                "data": {"path": "drawing.jsonl"},
                "rewards": {"clip": 0.1, "image_reward": 0.1},
                "reward_settings": {
                    "clip": {"folder": "../clip"},
                    "image_reward": {"folder": "../image_reward"},
                },
                "groups": 128,
                "update_groups": 128,
            },
        },
        "seed": 10086,
        "loss_chunk": 2048,
        "optim": {
            "lr": 1e-6, "warmup": 0, "floor": 1.0, "weight_decay": 0.0,
        },
    })  # fmt: skip


def words() -> dict:
    """How the 8B answers."""
    return {
        "groups": 128,
        "update_groups": 128,
        "text": {"steps": 256, "block": 32, "temperature": 1.0},
    }


def smoke(config: ConfigDict, of_tasks: ConfigDict) -> ConfigDict:
    """The objective and optimizer of `config` for two iterations of few prompts of the tasks of another."""
    small = of_tasks.copy_and_resolve_references()
    small.objective = config.get("objective", ConfigDict()).copy_and_resolve_references()
    small.optim = config.optim.copy_and_resolve_references()
    small.reference_dtype = config.get("reference_dtype", "bfloat16")
    small.objective.mu = 2
    small.objective.responses = 4
    small.optim.warmup = 1
    for task in small.tasks.values():
        task.update(groups=4, update_groups=4, turns=1)
    if "drawing" in small.tasks:
        small.tasks.drawing.image.steps = 3
    small.update(iterations=2, save_every=1, samples_every=1)
    return small
