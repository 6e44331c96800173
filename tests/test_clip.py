"""CLIP in JAX is transformers' CLIPModel: features, logits, pictures and texts; and what isn't one."""

import json

import jax
import numpy as np
import pytest
from conftest import load_golden, write_clip
from PIL import Image

from mmada_jax.nets import clip
from mmada_jax.weights import clip_keys

SETTINGS, ARRAYS = load_golden("clip")  # what transformers gives; goldens/make_clip.py made it
EOS = SETTINGS["models"][0]["end"]


@pytest.fixture(scope="module", params=[0, 1], ids=["eos", "largest"])
def model(request, tmp_path_factory):
    """(its number, its state dict, its folder)"""
    folder = tmp_path_factory.mktemp("clip")
    return request.param, write_clip(SETTINGS["models"][request.param], folder), folder


def test_features_and_logits_equal_those_of_transformers(model):
    i, _, folder = model
    params, config, _ = clip_keys.load(folder)
    image = clip.image_features(params, config, ARRAYS["pixels"].transpose(0, 2, 3, 1))
    text = clip.text_features(params, config, ARRAYS[f"{i}.tokens"])
    np.testing.assert_allclose(image, ARRAYS[f"{i}.image"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(text, ARRAYS[f"{i}.text"], atol=1e-5, rtol=1e-5)
    logits = np.exp(params["scale"]) * clip.normalise(image) @ clip.normalise(text).T
    np.testing.assert_allclose(logits, ARRAYS[f"{i}.logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.torch
def test_the_goldens_are_what_transformers_gives():
    from goldens import make_clip

    settings, arrays = make_clip.make()
    assert settings["vit_b_32_state_dict_shapes"] == SETTINGS["vit_b_32_state_dict_shapes"]
    for ours, theirs in zip(settings["models"], SETTINGS["models"], strict=True):
        assert ours["state_dict_shapes"] == theirs["state_dict_shapes"]
    assert arrays.keys() == ARRAYS.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, ARRAYS[name], atol=1e-4, err_msg=name)


def test_the_image_of_a_row_does_not_depend_on_the_others(model):
    params, config, _ = clip_keys.load(model[2])
    pixels = np.random.default_rng(1).standard_normal((3, 24, 24, 3)).astype(np.float32)
    alone = clip.image_features(params, config, np.repeat(pixels[1:2], 3, axis=0))
    np.testing.assert_allclose(clip.image_features(params, config, pixels)[1], alone[1], atol=1e-5)


@pytest.mark.parametrize("size", SETTINGS["sizes"], ids=str)
def test_pictures_are_prepared_as_by_the_processor(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    want = ARRAYS["picture.{}x{}".format(*size)]
    np.testing.assert_allclose(clip.preprocess([pixels], 24), want, atol=1e-5)
    np.testing.assert_allclose(clip.preprocess([Image.fromarray(pixels)], 24), want, atol=1e-5)


def test_floats_in_one_channel_are_pictures_too():
    canvas = np.full((8, 16, 1), -1, np.float32)
    canvas[:, 4:12] = 1
    out = clip.preprocess([canvas, np.zeros((9, 9, 3), np.uint8)], 8)
    assert out.shape == (2, 8, 8, 3) and out.dtype == np.float32
    white, black = (1 - np.array(clip.MEAN)) / clip.DEVIATION, -np.array(clip.MEAN) / clip.DEVIATION
    np.testing.assert_allclose(out[0, 4, 4], white, atol=1e-5)
    np.testing.assert_allclose(out[1, 4, 4], black, atol=1e-5)


def test_long_texts_keep_their_end(model):
    _, config, texts = clip_keys.load(model[2])
    for n in (1, 8, 30):
        ids = texts.encode(" ".join(["two"] * n)).ids
        assert len(ids) == config.max_text and ids.count(EOS) == 1
        assert ids.index(EOS) == min(n + 1, config.max_text - 1)


def test_old_files_with_position_ids_are_read(model):
    i, state, _ = model
    config = clip_keys.config_from_hf(SETTINGS["models"][i]["config"])
    key = "text_model.embeddings.position_ids"
    old = state | {key: np.arange(10)[None]}
    a, b = (jax.tree.map(np.asarray, clip_keys.params_of(s, config)) for s in (state, old))
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    with pytest.raises(ValueError, match=f"{key} doesn't count to 10"):
        clip_keys.params_of(state | {key: np.arange(10)[None] + 1}, config)


def test_every_offender_is_listed_in_one_error(model):
    i, state, _ = model
    state, config = dict(state), clip_keys.config_from_hf(SETTINGS["models"][i]["config"])
    state["more"] = state.pop("visual_projection.weight")
    state["logit_scale"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"\(3 problems\)") as error:
        clip_keys.params_of(state, config)
    for part in ("missing visual_projection.weight", "unexpected more", "logit_scale has shape"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "model_type 'siglip'"),
        ({"projection_dim": 0}, "projection_dim is 0"),
        ({"text_config": {"hidden_act": "relu"}}, "text_config.hidden_act is 'relu'"),
        ({"vision_config": {"num_channels": 1}}, "num_channels is 1"),
        ({"vision_config": {"patch_size": 33}}, "multiple of patch=33"),
        ({"text_config": {"num_attention_heads": 7}}, "multiple of n_heads=7"),
        ({"vision_config": {"image_size": [224, 224]}}, r"image_size is \[224, 224\]"),
    ],
)
def test_other_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        clip_keys.config_from_hf({"model_type": "clip", **change})


def test_a_bare_config_is_vit_b_32():
    config = clip_keys.config_from_hf({"model_type": "clip"})
    shapes = {key: rule.torch_shape for key, rule in clip_keys.key_table(config).items()}
    published = SETTINGS["vit_b_32_state_dict_shapes"]
    assert shapes == {key: tuple(shape) for key, shape in published.items()}


def test_folders_that_are_no_clip_are_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        clip_keys.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no JSON"):
        clip_keys.load(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model[2] / name).read_bytes())
    with pytest.raises(ValueError, match="no tokenizer"):
        clip_keys.load(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["eos_token_id"] = 5
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").write_bytes((model[2] / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="doesn't end texts with 5"):
        clip_keys.load(tmp_path)
