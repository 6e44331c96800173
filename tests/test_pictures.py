"""Training of the image tokenizer on pictures of one's own: losses, averages, measures, bad input."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from mmada_jax.data import pipeline
from mmada_jax.nets import vq
from mmada_jax.train import metrics, optim, pictures, runs
from mmada_jax.train.supervised import check_run, train
from mmada_jax.weights.folder import open_image_tokenizer
from mmada_jax.weights.lazy import in_memory
from tests.rl_toys import one_device  # noqa: F401

ARCHITECTURE = {
    "channels": 32, "encoder_mult": (1, 1), "encoder_blocks": (1, 1), "decoder_mult": (1, 1),
    "decoder_blocks": (1, 1), "bits": 4,
}  # fmt: skip
CODEC = vq.VQConfig(**ARCHITECTURE)


@pytest.fixture(name="folder", scope="module")
def folder_of_squares(tmp_path_factory):
    """Sixteen pictures in two classes, of several sizes and modes."""
    folder, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for number in range(16):
        path = folder / ("bright", "dark")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        side = 16 + number
        pixels = rng.integers(0, 128, (side, side + 3, 3)) + 128 * (number % 2 == 0)
        image = Image.fromarray(pixels.astype(np.uint8))
        image.convert(("RGB", "L", "RGBA", "P")[number % 4]).save(path)
    return folder


def config_of(folder, **values):
    source = {"path": str(folder), "format": "imagefolder"}
    return {
        "program": "vq", "steps": 4, "batch_size": 8, "save_every": 2, "log_every": 1, "image_size": 16,
        "model": ARCHITECTURE, "data": {"squares": source},
        "optim": {"lr": 1e-3, "warmup": 1},
    } | values  # fmt: skip


def test_pictures_of_all_sizes_and_modes_become_pixels(folder):
    source = runs.sources.SourceConfig(str(folder), "imagefolder")
    opened = pipeline.open_pictures({"squares": source})
    rows = pipeline.Pictures({"data": {"squares": source}}, {"data": opened}, {"data": 16}, 0, (16, 16, 3))
    first, again = rows.load(0).rows, rows.load(0).rows
    assert first.shape == (16, 16, 16, 3) and first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    # Every picture once in an epoch; a part of the rows is the same as all of them.
    assert len({picture.tobytes() for picture in first}) == 16
    np.testing.assert_array_equal(rows.load(1, [3, 5]).rows, rows.load(1).rows[[3, 5]])
    grey = pipeline.Pictures({"data": {"squares": source}}, {"data": opened}, {"data": 4}, 0, (16, 16, 1))
    assert grey.load(0).rows.shape == (4, 16, 16, 1)


def test_what_cannot_be_read_is_replaced_and_counted(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "some")
    (tmp_path / "some" / "dark" / "15.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    source = runs.sources.SourceConfig(str(tmp_path / "some"), "imagefolder")
    opened = pipeline.open_pictures({"some": source})
    rows = pipeline.Pictures({"data": {"some": source}}, {"data": opened}, {"data": 16}, 0, (16, 16, 3))
    assert rows.load(0).skipped == {"data.some: unreadable": 1}


@pytest.mark.slow
def test_training_with_all_of_it_resumes_to_the_bit_and_is_measured(folder, tmp_path):
    more = {
        "adversarial": 0.1, "adversarial_start": 2, "average": 0.9, "eval_every": 2, "eval_rows": 8,
        "held_out": {"squares": {"path": str(folder), "format": "imagefolder"}}, "samples": 3,
    }  # fmt: skip
    config = config_of(folder, **more)
    config["optim"]["floor"] = 1.0  # or the learning rate would follow the number of steps
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for n in steps:
            train(config | {"steps": n}, tmp_path / name)
    one, two = (open_image_tokenizer(tmp_path / name) for name in ("whole", "parts"))
    assert set(one.params) == {"encoder", "decoder"}
    jax.tree.map(np.testing.assert_array_equal, in_memory(one.params), in_memory(two.params))
    row = metrics.read(tmp_path / "whole" / "metrics.jsonl")[-1]
    assert 0 < row["held_out_psnr"] < 60 and -1 <= row["held_out_ssim"] <= 1
    assert 0 < row["held_out_codes_used"] <= 1 <= row["held_out_perplexity"] <= 16
    with Image.open(tmp_path / "whole/samples/00000004.png") as image:
        assert image.size == (3 * 18, 2 * 18)
    # It is a start for another run, whose discriminator begins anew.
    start = config_of(folder, init="../whole", model={}, adversarial=0.1, steps=1)
    train(start, tmp_path / "next")
    assert open_image_tokenizer(tmp_path / "next").config == one.config


def test_neither_the_codec_nor_its_judge_has_a_gradient_in_the_other():
    run = runs.VQRun("vq", 1, 1, adversarial=0.5, adversarial_start=3, entropy=0.0, commitment=0.0)
    of = pictures.objective(run, CODEC)
    params = jax.jit(of.init_params)(jax.random.key(0))
    x_BIJC = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)

    @jax.jit
    def grads(params, step):
        return jax.grad(lambda params: of.loss(params, of.prepare(None, x_BIJC, step))[0])(params)

    before, after = grads(params, 2), grads(params, 3)
    assert not any(np.any(g) for g in jax.tree.leaves(before["discriminator"]))
    assert any(np.any(g) for g in jax.tree.leaves(after["discriminator"]))

    @jax.jit
    def apart(params):
        """Each of the two objectives by itself."""

        def of_codec(codec):
            rebuilt = vq.rebuild(codec, CODEC, x_BIJC)
            judged = vq.realness(params["discriminator"], CODEC, rebuilt.pixels_BIJC)
            return rebuilt.terms["reconstruction"] - 0.5 * jnp.mean(judged)

        def of_judge(discriminator):
            rebuilt_BIJC = vq.rebuild(params, CODEC, x_BIJC).pixels_BIJC
            real, made = (vq.realness(discriminator, CODEC, x) for x in (x_BIJC, rebuilt_BIJC))
            return jnp.mean(jnp.maximum(0, 1 - real)) + jnp.mean(jnp.maximum(0, 1 + made))

        codec = {half: params[half] for half in ("encoder", "decoder")}
        return jax.grad(of_codec)(codec) | {"discriminator": jax.grad(of_judge)(params["discriminator"])}

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), after, apart(params))


def test_averages_follow_what_is_learned():
    config = optim.OptimConfig(lr=0.1, warmup=0, weight_decay=0.0, clip=0.0, floor=1.0)
    optimizer = optim.averaged(optim.make(config, 10), 0.5)
    params = {"w": jnp.zeros(3), "learned": {"w": jnp.zeros(3)}, "other": jnp.ones(2)}
    state, mean = optimizer.init(params), np.zeros(3)
    for n in range(1, 6):
        grads = {"w": jnp.zeros(3), "learned": {"w": jnp.full(3, 1.0)}, "other": jnp.ones(2)}
        if n == 3:
            grads["other"] = jnp.full(2, jnp.nan)  # the update is skipped
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        accepted = n - (n >= 3)
        if n != 3:
            rate = 1 - min(0.5, (1 + accepted) / (10 + accepted))
            mean = mean + rate * (np.asarray(params["learned"]["w"]) - mean)
        np.testing.assert_allclose(params["w"], mean, rtol=1e-5)
    assert float(params["learned"]["w"][0]) < float(params["w"][0]) < 0
    assert int(state.skipped) == 1


def test_measures_of_pictures():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2, 16, 12, 1)).astype(np.float32)
    same = pictures.compare(x, x)
    assert same["ssim"] == pytest.approx(1, abs=1e-5) and same["psnr"] > 100
    # An error of 0.2 everywhere: 20 log10(2 / 0.2).
    assert pictures.compare(x, x + np.float32(0.2))["psnr"] == pytest.approx(20, abs=1e-3)
    noisy = np.clip(x + rng.normal(0, 0.5, x.shape), -1, 1).astype(np.float32)
    assert pictures.compare(x, noisy)["ssim"] < 0.9
    assert pictures.usage(np.array([0, 0, 1, 1]), 8) == pytest.approx({"codes_used": 0.25, "perplexity": 2})


def test_a_codebook_that_collapses_is_told_with_the_remedy(folder, tmp_path):
    run, mesh, codec = check_run(config_of(folder), tmp_path)
    program = pictures.program(run, tmp_path, mesh, codec)
    assert program.remark({"codes_used": 9.0}) is None
    assert "2 different codes in a batch of 512 tokens, out of 16: the codebook collapses; raise" in (
        program.remark({"codes_used": 2.0})
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 0}, "image_size is 0 and data names 1 sources; pictures of your own need both"),
        ({"data": {}}, "image_size is 16 and data names 0 sources"),
        ({"image_size": 15}, "image_size 15 isn't a multiple of the image tokenizer's 2 pixels; choose 14"),
        ({"eval_every": 2}, "eval_every is 2 and held_out is empty"),
        ({"init": "x"}, "model .* has no effect: the architecture is that of init"),
        ({"model": {}, "init": "nowhere"}, "no image tokenizer: .*nowhere"),
        ({"preset": "huge"}, "unknown preset 'huge'; known: magvitv2, medium, small, digits"),
        ({"model": {"channels": 48}}, "channels=48 must be a multiple of 32"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_written(folder, tmp_path, values, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        train(config_of(folder, **values), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_folder_of_pictures_is_not_the_same_run(folder, tmp_path):
    train(config_of(folder, steps=1), tmp_path / "run")
    shutil.copytree(folder, tmp_path / "fewer")
    (tmp_path / "fewer/dark/01.png").unlink()
    with pytest.raises(ValueError, match=r"was trained on other data: .*records was 16 and is 15"):
        train(config_of(tmp_path / "fewer", steps=2), tmp_path / "run")
