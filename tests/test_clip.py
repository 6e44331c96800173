"""CLIP in JAX is transformers' CLIPModel: features, logits, pictures and texts; and what isn't one."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from mmada_jax import clip
from mmada_jax.convert import clip as clip_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["a", "handwritten", "seven", "two", "three", "and"]
EOS = 9  # below the largest id, so that the two ways to find the end differ


def model_of(eos, activation, seed=0):
    text = {
        "vocab_size": 12, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 3, "max_position_embeddings": 10, "eos_token_id": eos,
        "hidden_act": activation,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 24, "patch_size": 8, "hidden_act": activation,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # away from the ones and zeros that would hide a mistake
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"<s>": 8, "</s>": EOS, "[u]": 10, **{word: i for i, word in enumerate(WORDS)}}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[u]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 8), ("</s>", EOS)])
    return made


@pytest.fixture(scope="module", params=[(EOS, "quick_gelu"), (2, "gelu")], ids=["eos", "largest"])
def both(request, tmp_path_factory):
    model = model_of(*request.param)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    return model, folder


def test_features_and_logits_equal_those_of_transformers(both):
    model, folder = both
    params, config, _ = clip_folder.load(folder)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((5, 3, 24, 24)).astype(np.float32)
    tokens = rng.integers(3, 8, (4, 10)).astype(np.int32)
    for row, end in zip(tokens, (9, 4, 6, 1), strict=True):
        row[end:] = EOS if config.eos else 11
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(tokens).long(), "pixel_values": torch.tensor(pixels)}
        want = model(**inputs)
        image = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
        text = model.text_projection(model.text_model(inputs["input_ids"]).pooler_output)
    ours_image = clip.image_features(params, config, pixels.transpose(0, 2, 3, 1))
    ours_text = clip.text_features(params, config, tokens)
    np.testing.assert_allclose(ours_image, image, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(ours_text, text, atol=1e-5, rtol=1e-5)
    logits = np.exp(params["scale"]) * clip.normalise(ours_image) @ clip.normalise(ours_text).T
    np.testing.assert_allclose(logits, want.logits_per_image, atol=1e-5, rtol=1e-5)


def test_the_image_of_a_row_does_not_depend_on_the_others(both):
    params, config, _ = clip_folder.load(both[1])
    pixels = np.random.default_rng(1).standard_normal((3, 24, 24, 3)).astype(np.float32)
    alone = clip.image_features(params, config, np.repeat(pixels[1:2], 3, axis=0))
    np.testing.assert_allclose(clip.image_features(params, config, pixels)[1], alone[1], atol=1e-5)


@pytest.mark.parametrize("size", [(24, 24), (31, 50), (57, 40), (24, 25), (9, 100), (225, 224)])
def test_pictures_are_prepared_as_by_the_processor(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    want = theirs(Image.fromarray(pixels), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
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


def test_long_texts_keep_their_end(both):
    _, config, texts = clip_folder.load(both[1])
    for n in (1, 8, 30):
        ids = texts.encode(" ".join(["two"] * n)).ids
        assert len(ids) == config.max_text and ids.count(EOS) == 1
        assert ids.index(EOS) == min(n + 1, config.max_text - 1)


def test_old_files_with_position_ids_are_read(both):
    model, _ = both
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    config = clip_folder.config_from_hf(model.config.to_dict())
    key = "text_model.embeddings.position_ids"
    old = state | {key: np.arange(10)[None]}
    a, b = (jax.tree.map(np.asarray, clip_folder.params_of(s, config)) for s in (state, old))
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))
    with pytest.raises(ValueError, match=f"{key} doesn't count to 10"):
        clip_folder.params_of(state | {key: np.arange(10)[None] + 1}, config)


def test_every_offender_is_listed_in_one_error(both):
    model, _ = both
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    config = clip_folder.config_from_hf(model.config.to_dict())
    state["more"] = state.pop("visual_projection.weight")
    state["logit_scale"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"\(3 problems\)") as error:
        clip_folder.params_of(state, config)
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
        clip_folder.config_from_hf({"model_type": "clip", **change})


def test_a_bare_config_is_vit_b_32():
    config = clip_folder.config_from_hf({"model_type": "clip"})
    shapes = {key: rule.torch_shape for key, rule in clip_folder.key_table(config).items()}
    with torch.device("meta"):
        theirs = transformers.CLIPModel(transformers.CLIPConfig())
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}


def test_folders_that_are_no_clip_are_refused(both, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        clip_folder.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no JSON"):
        clip_folder.load(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((both[1] / name).read_bytes())
    with pytest.raises(ValueError, match="no tokenizer"):
        clip_folder.load(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["eos_token_id"] = 5
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").write_bytes((both[1] / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="doesn't end texts with 5"):
        clip_folder.load(tmp_path)
