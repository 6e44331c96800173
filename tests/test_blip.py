"""ImageReward: its encoders against those of transformers, its head by hand, what doesn't fit."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mmada_jax.nets import blip, clip
from mmada_jax.train.rl.rewards.functions import Combined
from mmada_jax.train.rl.rewards.pictures import ImageReward
from mmada_jax.weights import blip_keys

CONFIG = blip.BlipConfig(
    image_size=32, patch=16, d_vision=128, n_vision_layers=2, n_vision_heads=2, d_vision_mlp=96, vocab=20,
    max_positions=40, d_text=64, n_text_layers=3, n_text_heads=1, d_text_mlp=80, head=(24, 12, 8, 4, 1),
)  # fmt: skip
PROMPTS = ["a red cat", "a cat", "the red red cat sits", "a"]


def state_of(seed=0):
    """Random tensors under the keys of the published file, norms about 1."""
    rng, state = np.random.default_rng(seed), {}
    for key, rule in blip_keys.key_table(CONFIG).items():
        x = rng.standard_normal(rule.torch_shape).astype(np.float32)
        is_norm = "norm" in key.lower() and key.endswith("weight")
        state[key] = 1 + 0.1 * x if is_norm else x * np.float32(0.15 if x.ndim > 1 else 0.05)
    return state


def bert_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "the", "red", "cat", "sits"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


@pytest.fixture(name="folder", scope="module")
def folder_of_image_reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    unused = {"blip.text_encoder.embeddings.position_ids": np.arange(40)[None]}
    save_file(state_of() | unused, folder / "model.safetensors")
    bert_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(name="pictures", scope="module")
def four_pictures():
    return np.random.default_rng(1).integers(0, 256, (4, 40, 56, 3)).astype(np.uint8)


def test_the_encoders_are_those_of_transformers(folder, pictures):
    """BLIP in transformers is another implementation of the same networks, with keys of its own."""
    torch = pytest.importorskip("torch", reason="needs torch: bash launch/test.sh --all")
    transformers = pytest.importorskip("transformers")
    params, config, tokenizer = blip_keys.load(folder)
    assert config == CONFIG
    state = {key: torch.from_numpy(x) for key, x in state_of().items()}

    vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(
        hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=16, layer_norm_eps=1e-6,
    )).eval()  # fmt: skip
    names = {
        "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding", "norm.": "post_layernorm.",
        "blocks": "encoder.layers", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection",
        "norm1": "layer_norm1", "norm2": "layer_norm2",
    }  # fmt: skip
    theirs = {}
    for key, x in state.items():
        if key.startswith("blip.visual_encoder."):
            key = key.removeprefix("blip.visual_encoder.")
            for old, new in names.items():
                key = key.replace(old, new) if old != "norm." or key.startswith("norm.") else key
            theirs[key] = x
    vision.load_state_dict(theirs)
    pixels = clip.preprocess(list(pictures), 32)
    with torch.no_grad():
        seen = vision(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state
    ours = blip.image_states(params["vision"], config, pixels)
    np.testing.assert_allclose(ours, seen.numpy(), atol=2e-5)

    text = transformers.BlipTextModel(transformers.BlipTextConfig(
        vocab_size=20, hidden_size=64, encoder_hidden_size=128, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=1, max_position_embeddings=40,
    ), add_pooling_layer=False).eval()  # fmt: skip
    prefix = "blip.text_encoder."
    of_text = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
    missing, unexpected = text.load_state_dict(of_text, strict=False)
    assert not unexpected
    assert all("position_ids" in key for key in missing)
    codes = tokenizer.encode_batch(PROMPTS)
    ids = torch.tensor([code.ids for code in codes])
    mask = torch.tensor([code.attention_mask for code in codes])
    with torch.no_grad():
        states = text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state
        h = states[:, 0]
        for number in (0, 2, 4, 6, 7):
            h = torch.nn.functional.linear(
                h, state[f"mlp.layers.{number}.weight"], state[f"mlp.layers.{number}.bias"]
            )
    want = (h[:, 0].numpy() - 0.16717362830052426) / 1.0333394966054072
    got = ImageReward(folder, batch=3)(PROMPTS, [""] * 4, list(pictures), None)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.std(want) > 0.01


def test_a_reward_depends_on_its_own_picture_and_prompt(folder, pictures):
    score = ImageReward(folder, batch=4)
    whole = score(PROMPTS, [""] * 4, list(pictures), None)
    for i in range(4):
        alone = score(PROMPTS[i : i + 1], [""], list(pictures[i : i + 1]), None)
        np.testing.assert_allclose(alone, whole[i : i + 1], atol=1e-5)
    assert len({round(float(x), 4) for x in whole}) == 4


def test_it_is_a_reward_by_name(folder, pictures):
    with Combined({"image_reward": 0.5}, {"image_reward": {"folder": str(folder), "batch": 4}}) as combined:
        total, _ = combined(PROMPTS, [""] * 4, list(pictures), None)[:2]
    want = ImageReward(folder)(PROMPTS, [""] * 4, list(pictures), None)
    np.testing.assert_allclose(total, 0.5 * want, atol=1e-5)
    with pytest.raises(ValueError, match="set its folder"):
        Combined({"image_reward": 1.0})


def test_the_published_sizes():
    shapes = {key: rule.torch_shape for key, rule in blip_keys.key_table(blip.BlipConfig()).items()}
    assert blip_keys.config_from_shapes(shapes) == blip.BlipConfig()
    vision = sum(np.prod(shape) for key, shape in shapes.items() if "visual" in key)
    assert vision == 303_301_632  # ViT-L/16 without a head


def test_what_does_not_fit(folder, tmp_path):
    bert_tokenizer().save(str(tmp_path / "tokenizer.json"))
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="aren't the tensors of ImageReward"):
        blip_keys.load(tmp_path)
    state = state_of()
    state.pop("mlp.layers.4.bias")
    save_file(state | {"mlp.layers.9.weight": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing mlp.layers.4.bias"):
        blip_keys.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="bert-base-uncased"):
        blip_keys.load(tmp_path)
    plain = Tokenizer(models.WordLevel({"a": 0, "[PAD]": 1, "[CLS]": 2}, unk_token="a"))
    plain.save(str(tmp_path / "tokenizer.json"))
    save_file(state_of(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="isn't BERT's"):
        blip_keys.load(tmp_path)


def test_padding_changes_nothing():
    """Attention of a prompt's padding changes nothing."""
    params = jax.tree.map(np.asarray, blip_keys.lazy.in_memory(
        blip_keys.lazy.params_of(state_of(), blip_keys.key_table(CONFIG), np.dtype(np.float32))
    ))  # fmt: skip
    pixels = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    tokens = np.array([[2, 4, 7, 3, 0, 0]])
    valid = tokens > 0
    one = blip.rewards(params, CONFIG, pixels, tokens, valid)
    other = blip.rewards(params, CONFIG, pixels, np.where(valid, tokens, 9), valid)
    np.testing.assert_allclose(one, other, atol=1e-6)
