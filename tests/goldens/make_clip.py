"""Makes clip.json and clip.npz: what transformers' CLIPModel and its processor give for tiny random models.

python tests/goldens/make_clip.py [FOLDER]      needs the extra torch
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import transformers
from conftest import clip_tokenizer, golden_weights
from PIL import Image

from mmada_jax.nets import clip

EOS = 9  # below the largest id, so that the two ways to find the end of a text differ
PROMPTS = ["a handwritten seven", "two and three", "a handwritten seven", "a two", "three"]
IMAGES = (5, 30, 24, 3)
SIZES = [(24, 24), (31, 50), (57, 40), (24, 25), (9, 100), (225, 224)]


def config_of(eos: int, activation: str) -> transformers.CLIPConfig:
    """A tiny CLIP that ends texts with `eos`; with 2, as old files say, the largest id is the end."""
    text = {
        "vocab_size": 12, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 3, "max_position_embeddings": 10, "eos_token_id": eos,
        "hidden_act": activation, "bos_token_id": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 24, "patch_size": 8, "hidden_act": activation,
    }  # fmt: skip
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def shapes_of(model: torch.nn.Module) -> dict[str, list[int]]:
    """Key of the state dict -> shape."""
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def score_of(model: transformers.CLIPModel) -> np.ndarray:
    """100 times the cosine of each image and its prompt."""
    images = np.random.default_rng(0).uniform(-1, 1, IMAGES).astype(np.float32)
    texts, out = clip_tokenizer(EOS), []
    for image, prompt in zip(images, PROMPTS, strict=True):
        given = {
            "input_ids": torch.tensor([texts.encode(prompt).ids]),
            "pixel_values": torch.tensor(clip.preprocess(image[None], 24).transpose(0, 3, 1, 2)),
        }
        pair = model(**given)
        out.append(100 * float((pair.image_embeds * pair.text_embeds).sum()))
    return np.array(out, np.float32)


@torch.no_grad()
def make() -> tuple[dict, dict[str, np.ndarray]]:
    """What the two files hold."""
    rng = np.random.default_rng(0)
    models, arrays = [], {"pixels": rng.standard_normal((5, 3, 24, 24)).astype(np.float32)}
    words = rng.integers(3, 8, (4, 10)).astype(np.int32)
    for i, (eos, activation) in enumerate([(EOS, "quick_gelu"), (2, "gelu")]):
        model = transformers.CLIPModel(config_of(eos, activation)).eval()
        settings = {
            "config": json.loads(model.config.to_json_string()),
            "state_dict_shapes": shapes_of(model),
            "weights": {"seed": i, "scale": 0.2},
            "end": EOS if eos == EOS else 11,
        }
        state = {key: torch.tensor(value) for key, value in golden_weights(settings).items()}
        model.load_state_dict(state)
        tokens = words.copy()
        for row, end in zip(tokens, (9, 4, 6, 1), strict=True):
            row[end:] = settings["end"]
        given = {
            "input_ids": torch.tensor(tokens).long(), "pixel_values": torch.tensor(arrays["pixels"])
        }  # fmt: skip
        pixels, text = model.vision_model(given["pixel_values"]), model.text_model(given["input_ids"])
        arrays |= {
            f"{i}.tokens": tokens,
            f"{i}.image": model.visual_projection(pixels.pooler_output).numpy(),
            f"{i}.text": model.text_projection(text.pooler_output).numpy(),
            f"{i}.logits": model(**given).logits_per_image.numpy(),
        }  # fmt: skip
        models.append(settings)
        if i == 0:
            arrays["score"] = score_of(model)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    for size in SIZES:
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
        out = processor(picture, return_tensors="np")["pixel_values"]
        arrays["picture.{}x{}".format(*size)] = out.transpose(0, 2, 3, 1)
    with torch.device("meta"):
        published = shapes_of(transformers.CLIPModel(transformers.CLIPConfig()))
    settings = {
        "models": models, "sizes": SIZES, "score_prompts": PROMPTS, "score_images": IMAGES,
        "transformers": transformers.__version__, "vit_b_32_state_dict_shapes": published,
    }  # fmt: skip
    return settings, arrays


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1]) if sys.argv[1:] else pathlib.Path(__file__).parent
    settings, arrays = make()
    (folder / "clip.json").write_text(json.dumps(settings, indent=1) + "\n")
    np.savez_compressed(folder / "clip.npz", **arrays)
