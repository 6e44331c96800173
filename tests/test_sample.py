"""launch/sample.py: every task writes what it says; bad input is one clear error."""

import dataclasses
import json
import runpy
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from mmada_jax.data import digits
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.serve.api import MMaDA
from mmada_jax.weights.convert import to_torch
from mmada_jax.weights.manifest import MANIFEST

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
        argv = argv if workdir else [SAMPLE, *map(str, args)]
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


# ---- Options -----------------------------------------------------------------------------------------


@pytest.fixture
def jobs(monkeypatch):
    """What would be decoded; nothing is."""
    seen = []

    def run(self, job, seed):
        seen.append(job)
        raise ValueError("enough")

    monkeypatch.setattr(MMaDA, "run", run)
    return seen


def folder_of(model_workdir, folder, **values):
    """A converted model whose folder tells nothing but these fields of a generation_config.json."""
    to_torch(model_workdir, folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_defaults_belong_to_the_folder_of_the_model(sample, jobs, canvas, model_workdir, tmp_path):
    plain = folder_of(model_workdir, tmp_path / "plain")
    own = folder_of(model_workdir, tmp_path / "own", image_steps=7, image_guidance=2.0, question="what?")
    rules = {
        model_workdir: (ImageRule(steps=12, guidance=1.0), digits.ASK_ONE),
        plain: (ImageRule(steps=15, guidance=3.5), "Please describe this image in detail."),
        own: (ImageRule(steps=7, guidance=2.0), "what?"),
    }
    for folder, (rule, question) in rules.items():
        assert sample("draw", "x", workdir=folder)[1] == "error: enough"
        assert jobs.pop().rule == rule
        sample("extend", canvas, "--steps", 4, workdir=folder)
        assert jobs.pop().rule == dataclasses.replace(rule, steps=4)
        for more in ((), ("--question", question)):
            sample("answer", canvas, "--max-new", 4, *more, workdir=folder)
        given, asked = jobs.pop(), jobs.pop()
        np.testing.assert_array_equal(given.rows.tokens, asked.rows.tokens)
        assert given.rule == TextRule()
    (own / "generation_config.json").write_text('{"image_steps": "many"}')
    assert "generation_config.json: steps" in sample("draw", "x", workdir=own)[1]


def test_options_stand_before_and_after_the_task(sample, jobs, model_workdir, tmp_path):
    options = {
        "--model": [model_workdir], "--out": [tmp_path], "--seed": [3], "--image-size": ["8x8"],
        "--max-text": [20], "--step": [1], "--steps": [5], "--guidance": [0],
    }  # fmt: skip
    flat = [word for name, words in options.items() for word in (name, *words)]
    for cut in range(0, len(flat) + 1, 2):
        _, error = sample(*flat[:cut], "draw", "a three", *flat[cut:], workdir=None)
        assert error == "error: enough"
        job = jobs.pop()
        assert (job.rule, job.rows.tokens.shape) == (ImageRule(steps=5, guidance=0), (1, 20 + 16 + 3))


def test_what_the_model_cannot_take_is_told_in_numbers(sample, jobs, model_workdir, tmp_path, capsys):
    for args, message in (
        (
            ("draw", "x", "--image-size", "512"),
            "rows with an image have 65563 tokens: 24 of text, 256 x 256",
        ),
        (("draw", "x", "--max-text", "100"), "have 135 tokens: 100 of text"),
        (("draw", "x", "--image-size", "8x9"), "isn't made of multiples of 2 pixels"),
        (("draw", "x", "--step", "7"), "no step 7 in"),
        (("draw", "x", "--temperature", "-1"), "temperature"),
        (("text", "x", "--max-new", "0"), "max_new is 0"),
    ):
        _, error = sample(*args)
        assert error.startswith("error: ") and message in error and "\n" not in error
    plain = folder_of(model_workdir, tmp_path / "plain")
    values = json.loads((plain / "config.json").read_text())
    for name in ("image_grid", "max_text"):
        del values[name]
    (plain / "config.json").write_text(json.dumps(values))
    (plain / MANIFEST).unlink()
    _, error = sample("draw", "x", workdir=plain)
    assert "have 66051 tokens: 512 of text, 256 x 256 of an image of 512 x 512 pixels" in error
    assert (
        sample("draw", "x", "--image-size", "8x16", "--max-text", 24, workdir=plain)[1] == "error: enough"
    )
    assert "no step" in sample("draw", "x", "--step", 1, workdir=plain)[1]
    assert len(jobs) == 1


OTHERS = (
    "draw --box 0 0 1 1", "text --scale 2", "answer --prompt x", "extend --block 2", "paint --steps 2",
    "draw --st 2", "draw --image-size 1x2x3",
)  # fmt: skip


@pytest.mark.parametrize("words", OTHERS)
def test_options_of_other_tasks_are_refused(sample, words):
    task, *options = words.split()
    _, code = sample(task, "x", *options)
    assert code == 2
