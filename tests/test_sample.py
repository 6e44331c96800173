"""launch/sample.py: every task writes what it says; bad input is one clear error."""

import runpy
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from mmada_jax.data import digits

SAMPLE = str(ROOT / "launch" / "sample.py")


@pytest.fixture(scope="module")
def canvas(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "canvas.png"
    pixels = digits.canvas(*digits.load("test").pixels[:2])[..., 0]
    Image.fromarray(((pixels + 1) * 127.5).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def sample(model_workdir, tmp_path, monkeypatch, capsys):
    """Runs the program; (what it printed, the error it ended with or None)."""

    def call(*args, workdir=model_workdir):
        argv = [SAMPLE, "--workdir", str(workdir), "--out", str(tmp_path), *map(str, args)]
        monkeypatch.setattr(sys, "argv", argv)
        error = None
        try:
            runpy.run_path(SAMPLE, run_name="__main__")
        except SystemExit as exit:
            error = exit.code
        return capsys.readouterr().out.splitlines(), error

    return call


def size(path):
    with Image.open(path) as image:
        return image.size


def test_text_and_answer(sample, canvas):
    lines, error = sample("text", "7 + 2", "1 + 1", "--max-new", 4)
    assert error is None
    assert [line.split(":")[0] for line in lines] == ["7 + 2", "1 + 1"]
    lines, error = sample("answer", canvas, "--question", digits.ASK_TWO, "--max-new", 4)
    assert error is None
    assert lines[0].startswith(f"{canvas}:")


def test_pictures(sample, canvas):
    lines, _ = sample("draw", "a handwritten seven", "--steps", 2)
    assert size(lines[0]) == (256, 128)
    # What it wrote can be read again: an enlargement is brought back to the model's size.
    lines, error = sample("inpaint", lines[0], "--box", 0, 8, 8, 16, "--prompt", "a five", "--steps", 2)
    assert error is None
    assert size(lines[0]) == (256, 128)
    lines, _ = sample("extend", canvas, "--direction", "left", "--steps", 2, "--scale", 1)
    assert size(lines[0]) == (24, 8)


def test_think(sample):
    lines, error = sample("think", "draw 3+4", "draw 1+1", "--block", 1, "--steps", 2)
    assert error is None
    assert [line.split(":")[0] for line in lines[:2]] == ["draw 3+4", "draw 1+1"]
    assert [size(line) for line in lines[2:]] == [(256, 128)] * 2


def test_a_mask_file(sample, canvas, tmp_path):
    mask = tmp_path / "mask.png"
    Image.new("L", (16, 8), 255).save(mask)
    _, error = sample("inpaint", canvas, "--mask", mask, "--steps", 2)
    assert error is None
    Image.new("L", (8, 8), 255).save(mask)
    _, error = sample("inpaint", canvas, "--mask", mask)
    assert error.startswith("error: a mask has 8 x 8 pixels (rows, columns), its image 8 x 16")
    # By the reader of pictures, which starts no program.
    mask.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 8\n")
    _, error = sample("inpaint", canvas, "--mask", mask)
    assert error.startswith(f"error: {mask}: cannot identify image file")


def test_a_picture_of_another_size(sample, tmp_path):
    odd = tmp_path / "odd.png"
    Image.new("L", (20, 8)).save(odd)
    lines, error = sample("answer", odd, "--max-new", 4)
    assert error is None and lines[0].startswith(f"{odd}:")


def test_bad_input(sample, canvas, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    cases = {
        "cannot identify image file": ("answer", tmp_path / "text.png"),
        "No such file": ("answer", tmp_path / "none.png"),
        "box [0, 0, 9, 9] is empty or outside": ("inpaint", canvas, "--box", 0, 0, 9, 9),
        "say what to redraw": ("inpaint", canvas),
        "unknown schedule 'saw'": ("draw", "x", "--schedule", "saw"),
        "steps 3 are not divisible by the 2 blocks": (
            "text",
            "7",
            "--max-new",
            8,
            "--block",
            4,
            "--steps",
            3,
        ),
    }
    for message, args in cases.items():
        _, error = sample(*args)
        assert error.startswith("error: "), error
        assert message in error
    _, error = sample("draw", "x", workdir=tmp_path / "nowhere")
    assert "is no workdir of a training run" in error


def test_a_picture_of_too_many_pixels_is_not_decoded(sample, tmp_path):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 3_000)).save(bomb)
    _, error = sample("answer", bomb)
    assert "has 20000x3000 pixels; the limit is" in error
