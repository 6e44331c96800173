"""Which model is in a workdir without model.json: all that were made before there was one.

A run that is resumed writes its model.json, so these workdirs become fewer. Nothing but `open_folder` asks.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from mmada_jax.disk import resolved
from mmada_jax.nets import vq
from mmada_jax.weights import magvit_keys
from mmada_jax.weights.workdir import MODEL, read_config


def describe(workdir: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The model.json that a workdir with this config.json would have.

    Raises KeyError for a damaged config.json, and ValueError for a workdir of stage 1 or 2: its model
    follows from its whole configuration, which isn't known here.
    """
    if config["program"] == "vq":
        fields = magvit_keys.config_to_hf(vq.PRESETS[config["preset"]])
        return {"config": fields, "computed": {}, "generation": {}, "image_tokenizer": None}
    if config["program"] == "rl" and "architecture" in config:
        fields = config["architecture"]
        return {
            "config": fields,
            "computed": {"dtype": fields["dtype"], **config.get("computed", {})},
            "generation": config.get("generation", {}),
            "image_tokenizer": str(_image_tokenizer(workdir, config)) if fields["codebook_size"] else None,
        }
    raise ValueError(
        f"{workdir} has no {MODEL}, which says what model it holds: it was made by an older version. "
        f"mmada convert trust --src {workdir} writes it, and so does resuming the run"
    )


def _image_tokenizer(workdir: pathlib.Path, config: Mapping[str, Any]) -> pathlib.Path:
    """The image tokenizer of a workdir of RL: in there, or where the run that it began with has it."""
    while not (workdir / "image_tokenizer").is_dir() and "program" in config:
        if config["image_tokenizer"]:
            return resolved(workdir / config["image_tokenizer"])
        begun = resolved(workdir / config["init"])
        if not (begun / "config.json").is_file():
            break  # the run that it began with has moved
        workdir, config = begun, read_config(begun)
    return workdir / "image_tokenizer"
