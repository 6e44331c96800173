"""LLaDA and MMaDA <-> params: one strict key table, and the fields of their config.json."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmada_jax.nets import transformer
from mmada_jax.tokens.vocab import Vocab
from mmada_jax.weights import lazy

MODEL_TYPES = ("llada", "mmada")
EMBEDDING, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"


def key_table(config: transformer.ModelConfig) -> dict[str, lazy.Rule]:
    """PyTorch key -> where the array lies in params and how its axes stand."""
    D, H, G, K, F = config.d_model, config.n_heads, config.n_kv_heads, config.d_head, config.d_mlp
    table = {
        EMBEDDING: lazy.Rule(("embed_VD",), (config.vocab, D)),
        "model.transformer.ln_f.weight": lazy.Rule(("norm_D",), (D,)),
    }
    if not config.tied:
        table[HEAD] = lazy.Rule(("head_DV",), (D, config.vocab), (1, 0))
    # The PyTorch layout is [out, in]; `merged` names the axes of ours that make up `out` and `in`.
    block = {
        "attn_norm": ("attn_norm_D", (D,), None, None),
        "q_proj": ("q_DHK", (D, H, K), (D, H * K), (1, 0)),
        "k_proj": ("k_DGK", (D, G, K), (D, G * K), (1, 0)),
        "v_proj": ("v_DGK", (D, G, K), (D, G * K), (1, 0)),
        "attn_out": ("o_HKD", (H, K, D), (H * K, D), (1, 0)),
        "ff_norm": ("mlp_norm_D", (D,), None, None),
        "ff_proj": ("gate_DF", (D, F), None, (1, 0)),
        "up_proj": ("up_DF", (D, F), None, (1, 0)),
        "ff_out": ("down_FD", (F, D), None, (1, 0)),
    }
    for layer in range(config.n_layers):
        for name, (ours, shape, merged, order) in block.items():
            table[f"model.transformer.blocks.{layer}.{name}.weight"] = lazy.Rule(
                ("blocks", ours), shape, order, merged, layer
            )
    return table


def params_of(
    state: Mapping[str, Any], config: transformer.ModelConfig, dtype: np.dtype | None
) -> dict[str, Any]:
    """State dict -> params as Lazy arrays. A head that a tied model has beside its embedding must equal it,
    and is dropped. Raises ValueError on any key, shape or dtype amiss."""
    wrong = []
    if config.tied and {EMBEDDING, HEAD} <= state.keys():
        if not np.array_equal(state[EMBEDDING], state[HEAD]):
            wrong.append(f"{HEAD} isn't {EMBEDDING}, but {TIED[0]} says so")
        state = {key: tensor for key, tensor in state.items() if key != HEAD}
    return lazy.params_of(state, key_table(config), dtype, wrong)


def params_from_torch(state: Mapping[str, np.ndarray], config: transformer.ModelConfig) -> dict[str, Any]:
    """PyTorch state dict (numpy arrays) -> params in memory. Raises on any key or shape amiss."""
    return lazy.in_memory(lazy.params_of(state, key_table(config)))


def params_to_torch(params: Mapping[str, Any], config: transformer.ModelConfig) -> dict[str, np.ndarray]:
    """Params -> PyTorch state dict of numpy arrays in memory."""
    return lazy.in_memory(lazy.tensors_of(params, key_table(config)))


TIED = ("weight_tying", "tie_word_embeddings")
# Fields of config.json whose other values describe models that aren't implemented. The first value is the
# one that is implemented.
_FIXED = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "rope": (True,),
    "rope_full_precision": (True,),
    "rope_scaling": (None,),
    "alibi": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "attention_layer_norm": (False,),
    "activation_type": ("silu",),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "bias_for_layer_norm": (False, None),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
}


def config_from_hf(values: Mapping[str, Any], **overrides: Any) -> transformer.ModelConfig:
    """The fields of a config.json of LLaDA or MMaDA -> the architecture. Unknown fields are ignored.

    Raises ValueError, naming each field, for what isn't implemented (ALiBi, learned positions,
    biases, other blocks), a missing field or another model_type. `overrides` set fields of the config.
    """
    if values.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"config.json has model_type {values.get('model_type')!r}; known: {', '.join(MODEL_TYPES)}"
        )
    wrong = [
        f"{name} is {values[name]!r}, only {allowed[0]!r} is implemented"
        + (" (learned positions are not)" if name == "rope" else "")
        for name, allowed in _FIXED.items()
        if name in values and values[name] not in allowed
    ]

    def number(*names: str, default: Any = None, kind: type = int) -> Any:
        """The first of these fields that is there and not null."""
        name = next((name for name in names if values.get(name) is not None), None)
        value = default if name is None else values[name]
        if value is None:
            wrong.append(f"{' or '.join(names)} is missing")
        elif type(value) not in (int, kind) or not value > 0:
            wrong.append(f"{name} is {value!r}, it must be a positive {kind.__name__}")
        return value

    d_model, n_heads = number("d_model"), number("n_heads")
    one_kv_head = values.get("multi_query_attention") and values.get("n_kv_heads") is None
    d_mlp = number("mlp_hidden_size", "mlp_ratio", kind=float)
    if values.get("mlp_hidden_size") is None and not wrong:
        d_mlp = d_mlp * d_model
    fields = {
        "d_model": d_model,
        "n_layers": number("n_layers"),
        "n_heads": n_heads,
        "n_kv_heads": 1 if one_kv_head else number("n_kv_heads", default=n_heads or 1),
        "vocab": number("embedding_size", "vocab_size"),
        "max_len": number("max_sequence_length", default=transformer.ModelConfig.max_len),
        "rope_theta": number("rope_theta", default=transformer.ModelConfig.rope_theta, kind=float),
        "norm_eps": number("rms_norm_eps", default=transformer.ModelConfig.norm_eps, kind=float),
    }
    codes = values.get("codebook_size")
    if codes is not None and (type(codes) is not int or codes < 0):
        wrong.append(f"codebook_size is {codes!r}, it must be a number of image codes")
    # The published classes read the first of these; files that lack it may have the other.
    tied = next((values[name] for name in TIED if values.get(name) is not None), False)
    if type(tied) is not bool:
        wrong.append(f"{TIED[0]} or {TIED[1]} is {tied!r}, it must be true or false")
    lazy.refuse(wrong, "config.json describes a model that can't be built")
    fields |= {"tied": tied}
    fields |= {"d_mlp": int(d_mlp), "rope_theta": float(fields["rope_theta"])}
    return transformer.ModelConfig(**fields | overrides)


def control_ids(values: Mapping[str, Any]) -> dict[str, int]:
    """The ids that a config.json gives to control tokens, by their names. Raises ValueError for what is no
    id."""
    found = {}
    for name in ("bos", "eos", "mask"):
        given = values.get(f"{name}_token_id")
        ids = given if type(given) is list else [given]  # some give all ids that end a text
        if given is None:
            continue
        if not ids or any(type(one) is not int or one < 0 for one in ids):
            raise ValueError(f"{name}_token_id of config.json is {given!r}; it must be an id, or null")
        found[name] = ids[0]
    return found


# All other fields of the published config.json, with their values. PyTorch's classes of LLaDA and MMaDA
# read every one of these fields and have no defaults.
_PUBLISHED = {
    **{name: allowed[0] for name, allowed in _FIXED.items()},
    **dict.fromkeys(TIED, False),
    "alibi_bias_max": 8.0,
    "attention_layer_norm_with_affine": True,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "precision": "amp_bf16",
    "use_cache": False,
}
del _PUBLISHED["rope_scaling"]  # the published config.json doesn't have it; later models do


def resolved(values: Mapping[str, Any], config: transformer.ModelConfig) -> dict[str, Any]:
    """The fields of a config.json, completed with all fields that the published one has."""
    sizes = {
        "n_kv_heads": config.n_kv_heads,
        "mlp_hidden_size": config.d_mlp,
        "vocab_size": config.vocab,
        "embedding_size": config.vocab,
        **dict.fromkeys(TIED, config.tied),
    }
    numbers = {
        "max_sequence_length": config.max_len,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
    }
    return {**_PUBLISHED, **numbers, **values, **sizes}


def config_to_hf(
    config: transformer.ModelConfig, vocab: Vocab, grid: tuple[int, int], max_text: int
) -> dict[str, Any]:
    """Architecture and vocabulary of a model trained here -> the fields of MMaDA's config.json.

    `image_grid` (rows and columns of image tokens) and `max_text` (tokens of the text slot) are our own
    fields. The published config.json doesn't have them.
    """
    fields = {
        "model_type": "mmada",
        "architectures": ["MMadaModelLM"],
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "new_vocab_size": config.vocab,
        "llm_vocab_size": vocab.image_offset,
        "codebook_size": vocab.codebook_size,
        "num_vq_tokens": math.prod(grid),
        "num_new_special_tokens": 0,
        "mask_token_id": vocab.mask,
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
        "pad_token_id": vocab.eos,
        "image_grid": list(grid),
        "max_text": max_text,
    }
    return resolved(fields, config)


def grown_config(values: Mapping[str, Any], codes: int, controls: int = 0) -> dict[str, Any]:
    """The fields of LLaDA's config.json -> the fields for the MMaDA that `grow` makes of it, with rows for
    so many codes, and for control tokens that the embedding had no rows for."""
    if codes < 1:
        raise ValueError(f"{codes} image codes can't be added; MMaDA has 8192")
    if values.get("codebook_size"):
        raise ValueError(
            f"this model has an image vocabulary of {values['codebook_size']} codes already; "
            "leave --add-image-vocab out"
        )
    old = config_from_hf(values).vocab
    new = {
        "model_type": "mmada",
        "architectures": ["MMadaModelLM"],
        **dict.fromkeys(("vocab_size", "embedding_size", "new_vocab_size"), old + controls + codes),
        "llm_vocab_size": old,
        "codebook_size": codes,
        "num_new_special_tokens": 0,
    }
    return {**values, **new}


def grow(params: Mapping[str, Any], more: int) -> dict[str, Any]:
    """Params of LLaDA (Lazy) -> those of MMaDA before training: `more` rows in embedding and head.

    Every new row is the mean of all old rows in float32, cast to their dtype, as the reference's resizing
    gives it. Unused rows behind the tokenizer's ids keep their values.
    """
    grown = {
        name: _with_means(params[name], more, axis)
        for name, axis in (("embed_VD", 0), ("head_DV", 1))
        if name in params
    }
    return {**params, **grown}


def _with_means(array: lazy.Lazy, more: int, axis: int) -> lazy.Lazy:
    """A matrix with `more` rows (axis 0) or columns (axis 1) that are the mean of the old ones."""
    old = array.shape[axis]
    shape = tuple(n + more * (i == axis) for i, n in enumerate(array.shape))

    @functools.cache
    def mean() -> np.ndarray:
        total = sum(array.read(index).sum(axis, dtype=np.float64) for index in lazy.pieces(array, axis))
        return (total / old).astype(np.float32).astype(array.dtype)

    def read(index: lazy.Index) -> np.ndarray:
        along, across = index[axis], index[1 - axis]
        kept = slice(min(along.start, old), min(along.stop, old))
        part = array.read((kept, across) if axis == 0 else (across, kept))
        new = along.stop - along.start - part.shape[axis]
        line = np.expand_dims(mean()[across], axis)
        return np.concatenate([part, np.repeat(line, new, axis)], axis) if new else part

    return lazy.Lazy(shape, array.dtype, read)
