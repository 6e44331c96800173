r"""A model of your own data: name a folder or a file, and the rest follows from it (docs/own_data.md).

    mmada train --config configs/own.py --config.data=flowers/train --workdir runs/flowers
    mmada train --config configs/own.py --config.data=talks.jsonl --config.size=small --workdir runs/talks

Pictures in folders that are named like what they show, pictures with captions beside them (`1.png` and
`1.txt`), JSON lines, Parquet, tars. `--config.held_out=PATH` measures other data while it trains. Sizes:
tiny (1 million parameters), small (15), base (100).
"""

from ml_collections import ConfigDict

from mmada_jax.config import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """See above."""
    parse_arg(arg, presets=("own",), preset="own", forms=(), form="")
    return ConfigDict({
        "program": "own",
        "data": "",
        "held_out": "",
        "format": "",
        "size": "tiny",
        "steps": 0,
        "image_steps": 0,
        "image_size": 0,
        "text_vocab": 0,
        "text_tokenizer": "",
        "batch_size": 32,
        "seed": 0,
        "max_skipped": 0.5,
        "data_may_change": False,
        "cache_dir": "",
        "cache_gib": 50.0,
    })  # fmt: skip
