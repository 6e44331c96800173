r"""Long sums with their running totals: a text task whose answers have hundreds of tokens (data/totals.py).

    mmada train --config configs/totals.py:short --workdir runs/totals_short
    mmada train --config configs/totals.py:long --workdir runs/totals --config.init=../totals_short \
        --config.image_tokenizer=../totals_short/image_tokenizer

`short`: one round, in rows of 230 tokens. The model learns here where to copy terms from, and to add.
`long`: one to four rounds, in rows of 554 tokens, answers of up to 435 of them. It starts from `short`.

`,smoke` with any of them: a few steps of a small model, to see that it runs.
"""

from ml_collections import ConfigDict

from mmada_jax.config import parse_arg

STAGES = {
    "short": {
        "rounds": "1", "max_text": 195, "steps": 600, "rows": 12, "lr": 4e-3,
        "eps": 0.2, "prefix_rows": 0.0,
    },
    "long": {
        "rounds": "1-4", "max_text": 519, "steps": 1000, "rows": 8, "lr": 3e-3,
        "eps": 0.1, "prefix_rows": 0.75,
    },
}  # fmt: skip
SMOKE = STAGES["short"] | {"steps": 2, "rows": 8, "lr": 1e-3, "prefix_rows": 0.5}


def get_config(arg: str | None = None) -> ConfigDict:
    """See above."""
    arg = parse_arg(arg, presets=tuple(STAGES), preset="long", forms=("smoke",), form="")
    smoke = arg["form"] == "smoke"
    stage = SMOKE if smoke else STAGES[arg["preset"]]
    goes_on = arg["preset"] == "long" and not smoke
    source = {"path": stage["rounds"], "format": "totals"}
    layers = 1 if smoke else 4
    return ConfigDict({
        "program": "model",
        "init": "../totals_short" if goes_on else "",
        "model": {
            "n_layers": layers, "unroll": layers, "max_len": 1280,
            # Two wide heads pass over the scores of attention half as often as four.
            "n_heads": 2, "n_kv_heads": 2,
            # With RoPE's usual 500000 heads need more steps to find the token a few places before.
            "rope_theta": 10000.0,
        },
        "text_vocab": 0 if goes_on else 384,
        "max_text": stage["max_text"],
        "steps": stage["steps"],
        "batch_size": stage["rows"],
        "save_every": 200,
        "log_every": 1 if smoke else 25,
        "mixture": {"t2i": 0, "lm": 0, "lm_chat": 1, "mmu": 0, "r2i": 0},
        "data": {"lm_chat": {"totals": source}},
        "held_out": {"lm_chat": {"totals": source | {"split": "validation"}}},
        "loss": {
            "lm_chat": 1.0, "eps": stage["eps"],
            # With random masks alone a total is mostly read from the line after it, and hardly ever added.
            # Copying is learned sooner without these rows.
            "answer_mask": "mixture", "prefix_rows": stage["prefix_rows"], "prefix_next": 32,
            # Decoding reveals the tokens of a block in any order.
            "prefix_shown": 0.6,
        },
        "optim": {
            "name": "muon", "lr": stage["lr"], "warmup": 2 if smoke else 30, "floor": 0.05, "b2": 0.99,
        },
    })  # fmt: skip
