"""ImageReward's published file -> params: one strict key table, and the architecture from its shapes."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mmada_jax import storage
from mmada_jax.nets import blip
from mmada_jax.tokens.tokenizer import read_tokenizer
from mmada_jax.weights import hub, lazy

D_HEAD = 64  # of all published encoders; shapes don't tell it
# Layers of the head in the file: dropout stands between the first ones.
_HEAD = (0, 2, 4, 6, 7)
# What the file holds beside what is computed: counters of positions, and BERT's pooler.
_UNUSED = r"blip\.text_encoder\.(embeddings\.position_ids|pooler\..*)"


def load(folder: storage.Name) -> tuple[dict[str, Any], blip.BlipConfig, Tokenizer]:
    """Params (numpy, float32), architecture and text tokenizer (cuts and fills to MAX_TEXT) of a folder
    with ImageReward's tensors and the tokenizer.json of bert-base-uncased.

    Raises FileNotFoundError for a file that isn't there, ValueError for all that doesn't fit.
    """
    folder = storage.path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json; put that of bert-base-uncased beside ImageReward's weights"
        )
    state = {key: x for key, x in hub.read_tensors(folder).items() if not re.fullmatch(_UNUSED, key)}
    try:
        config = config_from_shapes({key: tuple(x.shape) for key, x in state.items()})
        params = lazy.in_memory(lazy.params_of(state, key_table(config), np.dtype(np.float32)))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    if tokenizer.get_vocab_size() > config.vocab:
        raise ValueError(
            f"the tokenizer of {folder} has {tokenizer.get_vocab_size()} entries, the model {config.vocab}"
        )
    pad = tokenizer.token_to_id("[PAD]")
    if pad is None or tokenizer.token_to_id("[CLS]") not in tokenizer.encode("a").ids[:1]:
        raise ValueError(f"the tokenizer of {folder} isn't BERT's: texts don't begin with [CLS]")
    tokenizer.enable_truncation(blip.MAX_TEXT)
    tokenizer.enable_padding(length=blip.MAX_TEXT, pad_id=pad)
    return params, config, tokenizer


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> blip.BlipConfig:
    """The architecture of tensors of these shapes. Raises ValueError if they aren't ImageReward's."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    needed = {
        f"{vision}.patch_embed.proj.weight": 4, f"{vision}.pos_embed": 3,
        f"{vision}.blocks.0.mlp.fc1.weight": 2,
        f"{text}.embeddings.word_embeddings.weight": 2, f"{text}.embeddings.position_embeddings.weight": 2,
        f"{text}.encoder.layer.0.intermediate.dense.weight": 2,
        **{f"mlp.layers.{number}.weight": 2 for number in _HEAD},
    }  # fmt: skip
    wrong = [f"missing {key}" for key in needed if key not in shapes]
    wrong += [
        f"{key} has shape {shapes[key]}" for key, n in needed.items() if len(shapes.get(key, "n" * n)) != n
    ]
    lazy.refuse(wrong, "these aren't the tensors of ImageReward")

    def layers(pattern: str) -> int:
        numbers = [int(found[1]) for key in shapes if (found := re.match(pattern, key))]
        return max(numbers) + 1

    patches, d_vision = shapes[f"{vision}.pos_embed"][1:]
    patch, side = shapes[f"{vision}.patch_embed.proj.weight"][-1], round((patches - 1) ** 0.5)
    vocab, d_text = shapes[f"{text}.embeddings.word_embeddings.weight"]
    if side * side != patches - 1 or d_vision % D_HEAD or d_text % D_HEAD:
        raise ValueError(
            f"{patches} positions, widths {d_vision} and {d_text}: pictures must be squares, and heads "
            f"have {D_HEAD} channels"
        )
    return blip.BlipConfig(
        image_size=side * patch, patch=patch, d_vision=d_vision,
        n_vision_layers=layers(rf"{vision}\.blocks\.(\d+)\."), n_vision_heads=d_vision // D_HEAD,
        d_vision_mlp=shapes[f"{vision}.blocks.0.mlp.fc1.weight"][0], vocab=vocab,
        max_positions=shapes[f"{text}.embeddings.position_embeddings.weight"][0], d_text=d_text,
        n_text_layers=layers(rf"{text}\.encoder\.layer\.(\d+)\."), n_text_heads=d_text // D_HEAD,
        d_text_mlp=shapes[f"{text}.encoder.layer.0.intermediate.dense.weight"][0],
        head=tuple(shapes[f"mlp.layers.{number}.weight"][0] for number in _HEAD),
    )  # fmt: skip


def key_table(config: blip.BlipConfig) -> dict[str, lazy.Rule]:
    """PyTorch key -> where the array lies in params and how its axes stand."""
    D, N = config.d_vision, config.n_patches + 1
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    table = {
        f"{vision}.cls_token": lazy.Rule(("vision", "class_11D"), (1, 1, D)),
        f"{vision}.pos_embed": lazy.Rule(("vision", "position_1SD"), (1, N, D)),
        f"{vision}.patch_embed.proj.weight": lazy.Rule(
            ("vision", "patch_ijCD"), (config.patch, config.patch, 3, D), (3, 2, 0, 1)
        ),
        f"{vision}.patch_embed.proj.bias": lazy.Rule(("vision", "patch_bias_D"), (D,)),
        **_norm_rules(f"{vision}.norm", ("vision",), "norm", D),
    }
    for layer in range(config.n_vision_layers):
        table |= _vision_block(f"{vision}.blocks.{layer}", layer, config)
    T = config.d_text
    for name, ours, rows in (
        ("word", "embed_VD", config.vocab),
        ("position", "position_TD", config.max_positions),
    ):
        table[f"{text}.embeddings.{name}_embeddings.weight"] = lazy.Rule(("text", ours), (rows, T))
    table |= _norm_rules(f"{text}.embeddings.LayerNorm", ("text",), "norm", T)
    for layer in range(config.n_text_layers):
        table |= _text_block(f"{text}.encoder.layer.{layer}", layer, config)
    inputs = T
    for number, (theirs, width) in enumerate(zip(_HEAD, config.head, strict=True)):
        path = ("head", f"layer_{number}")
        table[f"mlp.layers.{theirs}.weight"] = lazy.Rule((*path, "w_DF"), (inputs, width), (1, 0))
        table[f"mlp.layers.{theirs}.bias"] = lazy.Rule((*path, "bias_F"), (width,))
        inputs = width
    return table


def _vision_block(key, layer, config):
    D, H, F, K, path = (
        config.d_vision,
        config.n_vision_heads,
        config.d_vision_mlp,
        D_HEAD,
        ("vision", "blocks"),
    )
    return {
        f"{key}.attn.qkv.weight": lazy.Rule(
            (*path, "qkv_DnHK"), (D, 3, H, K), (1, 0), (D, 3 * H * K), layer
        ),
        f"{key}.attn.qkv.bias": lazy.Rule((*path, "qkv_bias_nHK"), (3, H, K), None, (3 * H * K,), layer),
        f"{key}.attn.proj.weight": lazy.Rule((*path, "o_HKD"), (H, K, D), (1, 0), (H * K, D), layer),
        f"{key}.attn.proj.bias": lazy.Rule((*path, "o_bias_D"), (D,), None, None, layer),
        **_norm_rules(f"{key}.norm1", path, "attn_norm", D, layer),
        **_norm_rules(f"{key}.norm2", path, "mlp_norm", D, layer),
        **_mlp_rules(f"{key}.mlp.fc1", f"{key}.mlp.fc2", path, D, F, layer),
    }


def _text_block(key, layer, config):
    D, H, F, K, path = config.d_text, config.n_text_heads, config.d_text_mlp, D_HEAD, ("text", "blocks")
    table = _mlp_rules(f"{key}.intermediate.dense", f"{key}.output.dense", path, D, F, layer)
    table |= _norm_rules(f"{key}.output.LayerNorm", path, "mlp_norm", D, layer)
    for theirs, ours, norm in (("attention", "", "attn_norm"), ("crossattention", "cross_", "cross_norm")):
        for name, n in (("query", "q"), ("key", "k"), ("value", "v")):
            inputs = config.d_vision if ours and n != "q" else D
            table[f"{key}.{theirs}.self.{name}.weight"] = lazy.Rule(
                (*path, f"{ours}{n}_DHK"), (inputs, H, K), (1, 0), (inputs, H * K), layer
            )
            table[f"{key}.{theirs}.self.{name}.bias"] = lazy.Rule(
                (*path, f"{ours}{n}_bias_HK"), (H, K), None, (H * K,), layer
            )
        table[f"{key}.{theirs}.output.dense.weight"] = lazy.Rule(
            (*path, f"{ours}o_HKD"), (H, K, D), (1, 0), (H * K, D), layer
        )
        table[f"{key}.{theirs}.output.dense.bias"] = lazy.Rule(
            (*path, f"{ours}o_bias_D"), (D,), None, None, layer
        )
        table |= _norm_rules(f"{key}.{theirs}.output.LayerNorm", path, norm, D, layer)
    return table


def _norm_rules(key, path, name, width, layer=None):
    return {
        f"{key}.{theirs}": lazy.Rule((*path, f"{name}_{ours}_D"), (width,), None, None, layer)
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    }


def _mlp_rules(up, down, path, width, hidden, layer):
    return {
        f"{up}.weight": lazy.Rule((*path, "up_DF"), (width, hidden), (1, 0), None, layer),
        f"{up}.bias": lazy.Rule((*path, "up_bias_F"), (hidden,), None, None, layer),
        f"{down}.weight": lazy.Rule((*path, "down_FD"), (hidden, width), (1, 0), None, layer),
        f"{down}.bias": lazy.Rule((*path, "down_bias_D"), (width,), None, None, layer),
    }
