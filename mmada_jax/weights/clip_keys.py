"""CLIP of a Hugging Face folder -> params: one strict key table, and the fields of its config.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mmada_jax import storage
from mmada_jax.files import read_json
from mmada_jax.nets import clip
from mmada_jax.tokens.tokenizer import read_tokenizer
from mmada_jax.weights import hub, lazy

# The config.json of older published models names this id as the end of text, by mistake. Then the end is
# the largest id of a text.
_WRONG_EOS = 2


def load(folder: storage.Name) -> tuple[dict[str, Any], clip.ClipConfig, Tokenizer]:
    """Params (numpy, float32), architecture and text tokenizer (cuts and fills to max_text) of a folder.

    Raises FileNotFoundError for a file that isn't there, ValueError for all that doesn't fit.
    """
    folder = storage.path(folder)
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; name the folder of a CLIP from Hugging Face")
    config = config_from_hf(read_json(folder / "config.json", dict))
    params = lazy.in_memory(params_of(hub.read_tensors(folder), config))
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    if tokenizer.get_vocab_size() > config.vocab:
        raise ValueError(
            f"the tokenizer of {folder} has {tokenizer.get_vocab_size()} entries, the model {config.vocab}"
        )
    if config.eos is not None and config.eos not in tokenizer.encode("a").ids:
        raise ValueError(f"the tokenizer of {folder} doesn't end texts with {config.eos}, the model's end")
    tokenizer.enable_truncation(config.max_text)
    tokenizer.enable_padding(length=config.max_text, pad_id=0)
    return params, config, tokenizer


def params_of(state: Mapping[str, Any], config: clip.ClipConfig) -> dict[str, Any]:
    """State dict -> params as Lazy arrays, float32. The constant position_ids of old files are checked
    and dropped. Raises on any key, shape or dtype amiss."""
    known = {
        "text_model.embeddings.position_ids": config.max_text,
        "vision_model.embeddings.position_ids": config.n_patches + 1,
    }
    wrong = [
        f"{key} doesn't count to {n}"
        for key, n in known.items()
        if key in state and not np.array_equal(np.ravel(state[key]), np.arange(n))
    ]
    rest = {key: value for key, value in state.items() if key not in known}
    return lazy.params_of(rest, key_table(config), np.dtype(np.float32), wrong)


def key_table(config: clip.ClipConfig) -> dict[str, lazy.Rule]:
    """PyTorch key -> where the array lies in params and how its axes stand."""
    table = {"logit_scale": lazy.Rule(("scale",), ())}
    V, T, P = config.vision.d_model, config.text.d_model, config.d_features
    for name, path, shape, order in (
        ("vision_model.embeddings.class_embedding", ("vision", "class_D"), (V,), None),
        ("vision_model.embeddings.patch_embedding.weight", ("vision", "patch_ijCD"),
         (config.patch, config.patch, 3, V), (3, 2, 0, 1)),
        ("vision_model.embeddings.position_embedding.weight", ("vision", "position_SD"),
         (config.n_patches + 1, V), None),
        ("vision_model.pre_layrnorm.weight", ("vision", "pre_scale_D"), (V,), None),
        ("vision_model.pre_layrnorm.bias", ("vision", "pre_bias_D"), (V,), None),
        ("vision_model.post_layernorm.weight", ("vision", "norm_scale_D"), (V,), None),
        ("vision_model.post_layernorm.bias", ("vision", "norm_bias_D"), (V,), None),
        ("visual_projection.weight", ("vision", "project_DP"), (V, P), (1, 0)),
        ("text_model.embeddings.token_embedding.weight", ("text", "embed_VD"), (config.vocab, T), None),
        ("text_model.embeddings.position_embedding.weight", ("text", "position_SD"),
         (config.max_text, T), None),
        ("text_model.final_layer_norm.weight", ("text", "norm_scale_D"), (T,), None),
        ("text_model.final_layer_norm.bias", ("text", "norm_bias_D"), (T,), None),
        ("text_projection.weight", ("text", "project_DP"), (T, P), (1, 0)),
    ):  # fmt: skip
        table[name] = lazy.Rule(path, shape, order)
    for side, tower in (("vision", config.vision), ("text", config.text)):
        D, H, F = tower.d_model, tower.n_heads, tower.d_mlp
        K = D // H
        block = {
            "layer_norm1.weight": ("attn_norm_scale_D", (D,), None, None),
            "layer_norm1.bias": ("attn_norm_bias_D", (D,), None, None),
            "self_attn.out_proj.weight": ("o_HKD", (H, K, D), (H * K, D), (1, 0)),
            "self_attn.out_proj.bias": ("o_bias_D", (D,), None, None),
            "layer_norm2.weight": ("mlp_norm_scale_D", (D,), None, None),
            "layer_norm2.bias": ("mlp_norm_bias_D", (D,), None, None),
            "mlp.fc1.weight": ("up_DF", (D, F), None, (1, 0)),
            "mlp.fc1.bias": ("up_bias_F", (F,), None, None),
            "mlp.fc2.weight": ("down_FD", (F, D), None, (1, 0)),
            "mlp.fc2.bias": ("down_bias_D", (D,), None, None),
        }
        for n in "qkv":
            block[f"self_attn.{n}_proj.weight"] = (f"{n}_DHK", (D, H, K), (D, H * K), (1, 0))
            block[f"self_attn.{n}_proj.bias"] = (f"{n}_bias_HK", (H, K), (H * K,), None)
        for layer in range(tower.n_layers):
            for name, (ours, shape, merged, order) in block.items():
                table[f"{side}_model.encoder.layers.{layer}.{name}"] = lazy.Rule(
                    (side, "blocks", ours), shape, order, merged, layer
                )
    return table


# What config.json leaves out has these values, those of ViT-B/32.
_TOWER = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
_TEXT = {
    **_TOWER, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
    "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407,
}  # fmt: skip
_VISION = {
    **_TOWER, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "num_channels": 3,
}  # fmt: skip


def config_from_hf(values: Mapping[str, Any]) -> clip.ClipConfig:
    """The fields of a config.json of CLIP -> the architecture. Unknown fields are ignored.

    Raises ValueError, naming each field, for another model_type or a value that isn't implemented.
    """
    if values.get("model_type") != "clip":
        raise ValueError(f"config.json has model_type {values.get('model_type')!r}; known: clip")
    wrong = []

    def fields(name: str, defaults: dict[str, Any]) -> dict[str, Any]:
        given = {**(values.get(name) or {}), **(values.get(f"{name}_dict") or {})}
        out = {key: given[key] if given.get(key) is not None else default
               for key, default in defaults.items()}  # fmt: skip
        for key, default in defaults.items():
            if type(default) is int and (type(out[key]) is not int or out[key] < 1):
                wrong.append(f"{name}.{key} is {out[key]!r}, it must be a positive int")
        if out["hidden_act"] not in ("quick_gelu", "gelu"):
            wrong.append(f"{name}.hidden_act is {out['hidden_act']!r}, known are quick_gelu and gelu")
        return out

    text, vision = fields("text_config", _TEXT), fields("vision_config", _VISION)
    d_features = values.get("projection_dim", 512)
    if type(d_features) is not int or d_features < 1:
        wrong.append(f"projection_dim is {d_features!r}, it must be a positive int")
    if vision["num_channels"] != 3:
        wrong.append(f"vision_config.num_channels is {vision['num_channels']!r}, only 3 is implemented")
    lazy.refuse(wrong, "config.json describes a model that can't be built")

    def tower(side: dict[str, Any]) -> clip.Tower:
        return clip.Tower(
            side["hidden_size"], side["num_hidden_layers"], side["num_attention_heads"],
            side["intermediate_size"], side["hidden_act"], float(side["layer_norm_eps"]),
        )  # fmt: skip

    return clip.ClipConfig(
        vision=tower(vision),
        text=tower(text),
        d_features=d_features,
        image_size=vision["image_size"],
        patch=vision["patch_size"],
        vocab=text["vocab_size"],
        max_text=text["max_position_embeddings"],
        eos=None if text["eos_token_id"] == _WRONG_EOS else text["eos_token_id"],
    )
