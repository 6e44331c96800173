"""PyTorch loads what is exported, and a workdir, its export and a checkpoint of that are the same model."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import golden_weights, load_golden
from folders import (
    VALUES,
    VQ,
    call,
    publish,
    random_vq,
)

from mmada_jax.devices import sharding
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.model.inputs import Defaults
from mmada_jax.nets import transformer, vq
from mmada_jax.serve.api import MMaDA
from mmada_jax.tokens.tokenizer import chat
from mmada_jax.weights import lazy, llada_keys, magvit_keys
from mmada_jax.weights.convert import from_torch, to_torch
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.inspect import inspect
from mmada_jax.weights.manifest import hash_of


@pytest.fixture(scope="module")
def weights():
    return golden_weights(load_golden("backbone_gqa")[0])


@pytest.fixture(scope="module")
def exported(model_workdir, tmp_path_factory):
    """A training workdir as a Hugging Face folder, its image tokenizer in it."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    to_torch(model_workdir, folder)
    return folder


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def close(ours, theirs, tolerance):
    """Relative error of all values together. (In bfloat16 each side is 1.8e-2 from float32's.)"""
    theirs = theirs.detach().float().numpy()
    assert ours.shape == theirs.shape
    assert np.linalg.norm(np.asarray(ours, np.float32) - theirs) < tolerance * np.linalg.norm(theirs)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_logits_of_the_exported_folder(weights, tmp_path, transformers, dtype, tolerance):
    import torch

    from_torch(publish(tmp_path / "src", weights), tmp_path / "ours", dtype=dtype)
    to_torch(tmp_path / "ours", tmp_path / "back")
    source = open_folder(tmp_path / "ours")
    assert source.dtype == dtype
    config = dataclasses.replace(source.config, dtype=dtype)
    params = lazy.in_memory(source.params)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab, (3, 20)).astype(np.int32)
    valid = np.arange(20) >= np.array([[0], [7], [2]])
    h = transformer.hidden_states(params, config, ids, valid)
    ours = np.asarray(transformer.unembed(params, config, h))
    for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM):
        model, loading = auto.from_pretrained(
            tmp_path / "back", trust_remote_code=True, output_loading_info=True
        )
        assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert next(model.parameters()).dtype == getattr(torch, dtype)
        with torch.inference_mode():
            theirs = model(torch.from_numpy(ids).long(), torch.from_numpy(valid).long()).logits
            pairs = torch.from_numpy(valid[:, None, :, None] & valid[:, None, None, :])
            biased = model(torch.from_numpy(ids).long(), attention_bias=pairs).logits
        close(ours[valid], theirs[torch.from_numpy(valid)], tolerance)
        close(ours[valid], biased[torch.from_numpy(valid)], tolerance)
    model(torch.from_numpy(ids).long()).logits.sum().backward()  # also after inference


# What PyTorch's own classes read of config.json, with the values that all published models share.
PUBLISHED = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "attention_dropout": 0.0,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "bias_for_layer_norm": False,
    "block_group_size": 1, "block_type": "llama", "embedding_dropout": 0.0, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mlp_ratio": 4, "multi_query_attention": None, "precision": "amp_bf16",
    "residual_dropout": 0.0, "rope": True, "rope_full_precision": True, "scale_logits": False,
    "use_cache": False, "weight_tying": False,
}  # fmt: skip


SIZES = {
    "d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "embedding_size",
    "max_sequence_length", "rope_theta", "rms_norm_eps",
}  # fmt: skip


def test_the_exported_config_has_all_fields_of_the_published_one(exported, weights, tmp_path):
    values = json.loads((exported / "config.json").read_text())
    assert {name: values.get(name, "missing") for name in PUBLISHED} == PUBLISHED
    assert {"mask_token_id", "eos_token_id", "pad_token_id", "codebook_size", *SIZES} <= values.keys()
    # Also of a model whose own config.json left fields to their defaults; what it says stays.
    from_torch(publish(tmp_path / "src", weights, VALUES | {"init_std": 0.01}), tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back")
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: values.get(name, "missing") for name in PUBLISHED} == PUBLISHED | {"init_std": 0.01}
    assert values.keys() >= SIZES


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_llada_with_one_kv_head_loads_too(tmp_path, transformers, caplog):
    values = {k: v for k, v in VALUES.items() if k not in ("n_kv_heads", "codebook_size")}
    values |= {"model_type": "llada", "multi_query_attention": True}
    table = llada_keys.key_table(llada_keys.config_from_hf(values))
    rng = np.random.default_rng(0)
    state = {k: rng.standard_normal(r.torch_shape).astype(np.float32) for k, r in table.items()}
    from_torch(publish(tmp_path / "src", state, values), tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back")
    model = transformers.AutoModel.from_pretrained(tmp_path / "back", trust_remote_code=True)
    assert model.config.model_type == "llada"
    assert model.config.n_kv_heads == 1
    assert "instantiate" not in caplog.text
    assert model.state_dict().keys() == state.keys()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_codes_and_pixels_of_the_exported_image_tokenizer(transformers, tmp_path):
    import torch

    settings, arrays = load_golden("magvit")
    config = magvit_keys.config_from_shapes(settings["state_dict_shapes"])
    state = golden_weights(settings) | magvit_keys.constants(config)
    from_torch(publish(tmp_path / "src", state, {}), tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "back")
    model = transformers.AutoModel.from_pretrained(tmp_path / "back", trust_remote_code=True)
    source = open_folder(tmp_path / "back")
    params = lazy.in_memory(source.params)
    with torch.inference_mode():
        pixels = torch.from_numpy(arrays["pixels"])
        latents, codes = model.encoder(pixels), model.get_code(pixels)
        rebuilt = model.decode_code(codes)
    ours = vq.latents(params, source.config, arrays["pixels"].transpose(0, 2, 3, 1))
    close(np.asarray(ours).transpose(0, 3, 1, 2), latents, 1e-5)
    np.testing.assert_array_equal(vq.quantize(ours).reshape(codes.shape), codes)
    back = vq.decode(params, source.config, vq.quantize(ours))
    close(np.asarray(back).transpose(0, 3, 1, 2), rebuilt, 1e-5)
    np.testing.assert_allclose(rebuilt, arrays["reconstruction"], atol=1e-4)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_exported_tokenizer_renders_the_same_conversation(exported, transformers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    ours = open_folder(exported).tokenizer()
    turns = [
        {"role": "user", "content": " 7 + 2 "},
        {"role": "assistant", "content": "9"},
        {"role": "user", "content": "and 3?"},
    ]
    for messages in (turns[:1], turns):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == str(chat(messages))
        assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(chat(messages))


@pytest.fixture(scope="module")
def models(model_workdir, exported, tmp_path_factory):
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "ours"
    from_torch(exported, checkpoint)
    paths = {"workdir": model_workdir, "Hugging Face folder": exported, "checkpoint": checkpoint}
    return paths, {kind: MMaDA.load(path) for kind, path in paths.items()}


def test_all_three_do_the_same(models):
    paths, loaded = models
    assert {inspect(path)["kind"] for path in paths.values()} == set(paths)
    assert len({inspect(path)["sha256"] for path in paths.values()}) == 1
    first, *others = loaded.values()
    rule, prompts = ImageRule(steps=3, guidance=1.0), ["a handwritten seven", "a three and a five"]
    drawn = [d.codes for d in first.draw(prompts, rule, seed=3)]
    text = [t.text for t in first.generate(["7 + 2"], TextRule(steps=4, block=8), max_new=8)]
    for other in others:
        assert (other.vocab, other.grid, other.max_text) == (first.vocab, first.grid, first.max_text)
        assert other.defaults == first.defaults != Defaults()
        np.testing.assert_array_equal([d.codes for d in other.draw(prompts, rule, seed=3)], drawn)
        assert [t.text for t in other.generate(["7 + 2"], TextRule(steps=4, block=8), max_new=8)] == text


def test_inspect_tells_whether_the_vocabulary_fits(models, weights, tmp_path, capsys):
    for kind, path in models[0].items():
        report = inspect(path)
        assert report["vocabulary"]["ok"], report
        assert report["vocabulary"]["image_codes"] == 64
        assert (report["step"] is not None) == (kind == "workdir")
        assert report["image_tokenizer"]
    capsys.readouterr()
    src = publish(tmp_path / "src", weights)
    assert call("inspect", "--src", src, "--json") is None
    assert json.loads(capsys.readouterr().out)["vocabulary"]["problem"] == "there is no tokenizer.json"
    shutil.copy(models[0]["checkpoint"] / "tokenizer.json", src)
    assert call("inspect", "--src", src) is None
    out = capsys.readouterr().out
    assert "sha256" in out
    assert "382,368" in out


def test_a_tokenizer_of_another_model_is_a_warning_and_then_an_error(models, weights, tmp_path, capsys):
    src = publish(tmp_path / "src", weights)
    text = (models[0]["checkpoint"] / "tokenizer.json").read_text()
    (src / "tokenizer.json").write_text(text.replace("<|soi|>", "<|image|>"))
    from_torch(src, tmp_path / "ours")
    assert (
        "warning: the model can be converted but not used: the tokenizer isn't" in capsys.readouterr().err
    )
    assert not inspect(tmp_path / "ours")["vocabulary"]["ok"]
    with pytest.raises(ValueError, match=r"isn't LLaDA's: it has \d+ entries, expected 126349"):
        MMaDA.load(tmp_path / "ours")


def test_a_mesh_and_a_dtype_can_be_asked_for(models):
    paths, loaded = models
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    for kind, path in paths.items():
        model = MMaDA.load(path, mesh=mesh, dtype="bfloat16")
        axes = transformer.param_axes(model.config)
        want = sharding.tree_shardings(mesh, axes, model.params)
        for (name, leaf), place in zip(
            jax.tree.leaves_with_path(model.params), jax.tree.leaves(want), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), name
            assert leaf.dtype == "bfloat16"
        assert model.config.dtype == "bfloat16"
        whole = loaded[kind].params["blocks"]["q_DHK"]
        np.testing.assert_array_equal(
            np.asarray(model.params["blocks"]["q_DHK"]), np.asarray(whole).astype(ml_dtypes.bfloat16)
        )
    assert len(model.draw(["a handwritten seven"], ImageRule(steps=2))) == 1
    one = MMaDA.load(paths["checkpoint"], mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    rule = ImageRule(steps=3, guidance=1.0)
    np.testing.assert_array_equal(
        one.draw(["a handwritten two"], rule)[0].codes,
        loaded["checkpoint"].draw(["a handwritten two"], rule)[0].codes,
    )


def test_without_an_image_tokenizer_there_is_text_alone(models, tmp_path):
    shutil.copytree(models[0]["checkpoint"], tmp_path / "bare")
    vision = tmp_path / "vision"
    (tmp_path / "bare" / "image_tokenizer").rename(vision)
    model = MMaDA.load(tmp_path / "bare")
    assert len(model.generate(["7 + 2"], max_new=4)) == 1
    for use in (
        lambda: model.draw(["a handwritten two"]),
        lambda: model.answer([np.zeros((8, 16, 1), np.float32)], ["?"]),
    ):
        with pytest.raises(ValueError, match=r"without an image tokenizer .* image_tokenizer=FOLDER"):
            use()
    model = MMaDA.load(tmp_path / "bare", image_tokenizer=vision)
    assert len(model.draw(["a handwritten two"], ImageRule(steps=2))) == 1
    publish(tmp_path / "other", random_vq(dataclasses.replace(VQ, bits=5)), {})
    with pytest.raises(ValueError, match="has 32 codes, the model 64; they don't belong together"):
        MMaDA.load(tmp_path / "bare", image_tokenizer=tmp_path / "other")
    with pytest.raises(ValueError, match="isn't made of multiples of 2 pixels"):
        MMaDA.load(tmp_path / "bare", image_tokenizer=vision, image_size=(8, 15))
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        MMaDA.load(tmp_path / "bare")


# The first 16 digits of the SHA-256 of each file. They may change only with a line in CHANGELOG.md.
BYTES = {
    "config.json": "d921132bd3d47462",
    "generation_config.json": "19dc4ae02d4e94cf",
    "image_tokenizer/config.json": "c592e9bd6d9b40ea",
    "image_tokenizer/manifest.sha256.json": "01418cbde96ddedb",
    "image_tokenizer/model.safetensors": "fecd5350bd192056",
    "image_tokenizer/modeling_magvitv2.py": "1d8a85c1c00e76bb",
    "manifest.sha256.json": "7dee373074d5141c",
    "model.safetensors": "89a92f3dbea3774c",
    "modeling_mmada.py": "aa54df33b7603ccd",
}


def test_the_bytes_of_an_exported_folder_stay_as_they_are(weights, tmp_path):
    # What somebody has published must be what the same checkpoint gives today.
    src = publish(tmp_path / "src", weights, VALUES | {"codebook_size": 64})
    from_torch(src, tmp_path / "ours", image_tokenizer=publish(tmp_path / "vq", random_vq(), {}))
    to_torch(tmp_path / "ours", tmp_path / "back")
    files = [path for path in sorted((tmp_path / "back").rglob("*")) if path.is_file()]
    hashes = {str(file.relative_to(tmp_path / "back")): hash_of(file)[:16] for file in files}
    assert hashes == BYTES
