"""Networks that judge rebuilt pictures: LPIPS and the Frechet distance, against the packages themselves."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from goldens import make_judges
from PIL import Image
from safetensors.numpy import save_file

from mmada_jax.nets import inception, lpips
from mmada_jax.train import metrics, pictures
from mmada_jax.train.supervised import train
from mmada_jax.weights import judge_keys
from mmada_jax.weights.checkpoint import newest_params
from mmada_jax.weights.lazy import in_memory
from tests.rl_toys import one_device  # noqa: F401

GOLDENS = pathlib.Path(__file__).parent / "goldens"  # what the packages give; make_judges.py made it
SETTINGS, ARRAYS = json.loads((GOLDENS / "judges.json").read_text()), np.load(GOLDENS / "judges.npz")


@pytest.fixture(name="images", scope="module")
def eight_pictures():
    """Squares of a colour with noise, [8, 40, 40, 3] in [-1, 1]."""
    return make_judges.pictures_of(0)


def state_of(name):
    return make_judges.state_of(SETTINGS[name]["shapes"], SETTINGS[name]["seed"])


@pytest.fixture(name="lpips_folder", scope="module")
def folder_of_lpips(tmp_path_factory):
    """A random VGG16 with heads, under the keys of the package, which has the heads twice."""
    folder, state = tmp_path_factory.mktemp("lpips"), state_of("lpips")
    twice = {key.replace("lin", "lins."): x for key, x in state.items() if key.startswith("lin")}
    constant = {
        "scaling_layer.shift": np.float32(lpips.SHIFT).reshape(1, 3, 1, 1),
        "scaling_layer.scale": np.float32(lpips.SCALE).reshape(1, 3, 1, 1),
    }
    save_file(state | twice | constant, folder / "model.safetensors")
    return folder


def test_lpips_is_that_of_the_package(lpips_folder, images):
    params, a, b = in_memory(judge_keys.load_lpips(lpips_folder)), images[:4], images[4:]
    np.testing.assert_allclose(lpips.distance(params, a, b), ARRAYS["distance"], rtol=2e-5)
    np.testing.assert_array_equal(lpips.distance(params, a, a), 0)
    grey, wide = images[..., :1], np.repeat(images[..., :1], 3, axis=-1)
    np.testing.assert_allclose(
        lpips.distance(params, grey[:4], grey[4:]), lpips.distance(params, wide[:4], wide[4:]), rtol=1e-6
    )


def test_the_distance_has_a_gradient_where_all_is_dark(lpips_folder, images):
    params = in_memory(judge_keys.load_lpips(lpips_folder))
    params["stage_0"]["conv_1"]["b_D"] = np.full(64, -100, np.float32)  # no channel is on anywhere
    grads = jax.grad(lambda x: lpips.distance(params, x, images[:1]).sum())(images[1:2])
    assert np.all(np.isfinite(grads))


def test_lpips_of_torchvisions_keys(lpips_folder, tmp_path):
    renamed = {re.sub(r"^net\.slice\d", "features", key): x for key, x in state_of("lpips").items()}
    renamed["classifier.0.weight"] = np.zeros((2, 3), np.float32)
    save_file(renamed, tmp_path / "model.safetensors")
    one, two = (in_memory(judge_keys.load_lpips(path)) for path in (lpips_folder, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, two)

    save_file(renamed | {"scaling_layer.shift": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"scaling_layer.shift isn't \(-0.03"):
        judge_keys.load_lpips(tmp_path)
    save_file(renamed | {"features.99.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected features\.99\.weight"):
        judge_keys.load_lpips(tmp_path)


@pytest.fixture(name="inception_folder", scope="module")
def folder_of_inception(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    counter = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros(1, np.float32)}
    save_file(state_of("inception") | counter, folder / "model.safetensors")
    return folder


def test_the_features_of_fid_are_those_of_the_package(inception_folder, images):
    got = pictures.inception_features(judge_keys.load_inception(inception_folder), images[:3], size=2)
    assert got.shape == (3, inception.FEATURES)
    np.testing.assert_allclose(got, ARRAYS["features"], atol=1e-4 * np.abs(ARRAYS["features"]).max())


def test_the_frechet_distance_is_that_of_the_package():
    rng = np.random.default_rng(3)
    a_NF, b_NF = rng.normal(0, 1, (50, 8)), rng.normal(0.3, 1.7, (40, 8)) @ rng.normal(0, 1, (8, 8))
    np.testing.assert_allclose(pictures.frechet(a_NF, b_NF), SETTINGS["frechet"], rtol=1e-6)
    assert abs(pictures.frechet(a_NF, a_NF)) < 1e-9
    # Fewer pictures than features: the covariances have no full rank.
    few = rng.normal(0, 1, (5, 64))
    np.testing.assert_allclose(pictures.frechet(few, few + 2), 4 * 64, rtol=1e-9)
    with pytest.raises(ValueError, match="at least two"):
        pictures.frechet(few[:1], few)


@pytest.mark.slow
def test_training_with_both(lpips_folder, inception_folder, images, tmp_path):
    folder = tmp_path / "squares"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(((image + 1) * 127.5).astype(np.uint8)).save(folder / f"{number}.png")
    source = {"squares": {"path": str(folder), "format": "imagefolder"}}
    run = {
        "program": "vq", "preset": "small", "steps": 3, "batch_size": 4, "log_every": 1, "image_size": 32,
        "data": source, "held_out": source, "eval_every": 3, "eval_rows": 8, "samples": 0,
        "perceptual": 0.5, "lpips": str(lpips_folder), "inception": str(inception_folder),
        "optim": {"lr": 1e-3, "warmup": 1},
    }  # fmt: skip
    train(run, tmp_path / "one")
    rows = metrics.read(tmp_path / "one" / "metrics.jsonl")
    first = rows[0]
    parts = first["reconstruction"] + 0.1 * (first["entropy"] + first["commitment"])
    np.testing.assert_allclose(first["loss"], parts + 0.5 * first["perceptual"], rtol=1e-5)
    assert rows[-1]["held_out_rfid"] > 0
    # The network that judges isn't saved with what it has judged.
    saved = newest_params(tmp_path / "one")[0]
    assert set(saved) == {"encoder", "decoder"}


def test_what_is_missing_is_said_before_anything_is_computed(tmp_path, images):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "one.png")
    source = {"one": {"path": str(tmp_path), "format": "imagefolder"}}
    run = {
        "program": "vq", "preset": "small", "steps": 1, "batch_size": 1, "image_size": 32, "data": source,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"perceptual is 0.5 and lpips is ''"):
        train(run | {"perceptual": 0.5}, tmp_path / "run")
    with pytest.raises(ValueError, match="image_size is 8; with perceptual it must be at least 16"):
        train(run | {"perceptual": 0.5, "lpips": "x", "image_size": 8}, tmp_path / "run")
    with pytest.raises(ValueError, match="perceptual needs pictures of your own"):
        train(
            {"program": "vq", "steps": 1, "batch_size": 1, "perceptual": 0.5, "lpips": "x"},
            tmp_path / "run",
        )
    of_one = {"eval_every": 1, "eval_rows": 1, "held_out": source, "inception": "x"}
    with pytest.raises(ValueError, match="eval_rows is 1; the distance by inception needs at least 2"):
        train(run | of_one, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        train(run | {"perceptual": 0.5, "lpips": str(tmp_path / "nowhere")}, tmp_path / "run")
    more = {"eval_every": 1, "held_out": source, "inception": str(tmp_path)}
    with pytest.raises(FileNotFoundError, match="neither"):
        train(run | more, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
