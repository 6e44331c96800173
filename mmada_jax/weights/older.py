"""Which model is in a workdir without model.json: all that were made before there was one.

A run that is resumed writes its model.json, and so does `mmada convert trust`. So these workdirs become
fewer. Nothing but `open_folder` and that command asks.
"""

from collections.abc import Mapping
from typing import Any

from mmada_jax import storage
from mmada_jax.files import read_json
from mmada_jax.nets import vq
from mmada_jax.weights import magvit_keys
from mmada_jax.weights.workdir import CONFIG, MODEL, read_config

# Fields of config.json that described the model of a workdir of RL.
DESCRIPTION = ("architecture", "computed", "generation")


def describe(workdir: storage.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The model.json that a workdir with this config.json would have.

    Raises KeyError for a damaged config.json, and ValueError for a workdir that has lost its model.json, or
    is one of stage 1 or 2: its model follows from its whole configuration, which isn't known here.
    """
    if config["program"] == "vq":
        fields = magvit_keys.config_to_hf(vq.PRESETS[config["preset"]])
        return {"config": fields, "computed": {}, "generation": {}, "image_tokenizer": None}
    if describes_rl(config):
        fields = dict(config["architecture"])
        dtype = fields.pop("dtype")
        return {
            "config": fields,
            "computed": _computed(workdir, config) | {"dtype": dtype},
            "generation": config.get("generation", {}),
            "image_tokenizer": str(_image_tokenizer(workdir, config)) if fields["codebook_size"] else None,
        }
    if config["program"] == "rl":
        raise ValueError(f"{workdir} has no {MODEL}, which says what model it holds; put it back")
    raise ValueError(
        f"{workdir} has no {MODEL}, which says what model it holds: it was made by an older version. "
        f"mmada convert trust --src {workdir} writes it, and so does resuming the run"
    )


def describes_rl(config: Mapping[str, Any]) -> bool:
    """Whether this config.json of a workdir of RL describes the model."""
    return config.get("program") == "rl" and "architecture" in config


def _computed(workdir: storage.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """How the model of a workdir of RL is computed. Where its config.json doesn't say it, the model that
    the run began with does, if it is a workdir and still there; the run changes some of it."""
    if "computed" in config:
        return config["computed"]
    files = [storage.resolved(storage.join(workdir, config["init"])) / name for name in (MODEL, CONFIG)]
    told = [read_json(path, dict) for path in files if path.is_file()]
    return next((values["computed"] for values in told if "computed" in values), {}) | config["model"]


def _image_tokenizer(workdir: storage.Path, config: Mapping[str, Any]) -> storage.Path:
    """The image tokenizer of a workdir of RL: in there, or where the run that it began with has it."""
    while not (workdir / "image_tokenizer").is_dir() and "program" in config:
        if config["image_tokenizer"]:
            return storage.resolved(storage.join(workdir, config["image_tokenizer"]))
        begun = storage.resolved(storage.join(workdir, config["init"]))
        if not (begun / CONFIG).is_file():
            break  # the run that it began with has moved
        workdir, config = begun, read_config(begun)
    return workdir / "image_tokenizer"
