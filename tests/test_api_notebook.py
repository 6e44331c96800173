"""At home in a notebook: what is given and returned, keywords, checks before compute, what is shown."""

import dataclasses
import io
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from mmada_jax.data import digits
from mmada_jax.diffusion.rules import ImageRule, TextRule
from mmada_jax.model import vision
from mmada_jax.model.inputs import Defaults
from mmada_jax.model.results import Drawing, Text
from mmada_jax.serve.api import MMaDA
from mmada_jax.weights.checkpoint import Checkpoints
from mmada_jax.weights.state import TrainState
from tests.api_toys import FAST, two_canvases, untrained_model  # noqa: F401


def parts(result):
    """What can be compared of a result."""
    if isinstance(result, tuple):
        return [part for one in result for part in parts(one)]
    return [result.text if isinstance(result, Text) else getattr(result, "codes", result)]


def test_one_gives_one_and_a_list_gives_a_list(model, canvases, tmp_path):
    path, mask = tmp_path / "canvas.png", np.ones((8, 16), bool)
    Image.fromarray(((canvases[0, ..., 0] + 1) * 127.5).astype(np.uint8)).save(path)
    said, drawn = {"max_new": 4, "seed": 4}, {"steps": 2, "seed": 4}
    calls = {
        "generate": (lambda wrap: model.generate(wrap("7 + 2"), **said), Text),
        "answer": (lambda wrap: model.answer(wrap(path), "which?", **said), Text),
        "asked": (lambda wrap: model.answer(path, wrap("which?"), **said), Text),
        "draw": (lambda wrap: model.draw(wrap("a three"), **drawn), Drawing),
        "inpaint": (lambda wrap: model.inpaint(wrap(path), mask, **drawn), Drawing),
        "masks": (lambda wrap: model.inpaint(path, wrap(mask), **drawn), Drawing),
        "extend": (lambda wrap: model.extend(path, "up", wrap("a three"), **drawn), Drawing),
        "think": (lambda wrap: model.think_and_draw(wrap("draw 3"), block=8, **drawn), tuple),
        "pixels": (lambda wrap: model.pixels(wrap(path)), np.ndarray),
        "encode": (lambda wrap: model.encode(wrap(str(path))), np.ndarray),
        "decode": (lambda wrap: model.decode(np.array(wrap(np.zeros((4, 8), int)))), np.ndarray),
    }
    for name, (call, kind) in calls.items():
        one, many = call(lambda x: x), call(lambda x: [x])
        assert isinstance(one, kind) and len(many) == 1, name
        for a, b in zip(parts(one), parts(many[0]), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert len(model.answer([path, path], "which?", **said)) == 2
    assert len(model.answer(path, ["which?", "how many?"], **said)) == 2


def test_fields_of_the_rule_are_keywords(model):
    rule = TextRule(block=4, temperature=0.5)
    assert model.text_job("7", rule, 8, steps=4).rule == dataclasses.replace(rule, steps=4)
    assert model.draw_job("a", steps=3, guidance=0).rule == ImageRule(steps=3, guidance=0)
    assert model.draw_job("a").unconditional is not None
    assert model.draw_job("a", guidance=0).unconditional is None


def test_defaults_are_those_of_the_model(model):
    # This one was trained on the digits.
    assert model.draw_job("a").rule == ImageRule(steps=12, guidance=1.0)
    assert model.defaults.question == digits.ASK_ONE
    published = dataclasses.replace(model, defaults=Defaults())
    assert published.draw_job("a").rule == ImageRule(steps=15, guidance=3.5)


def test_all_is_checked_before_anything_is_computed(model, canvases, monkeypatch):
    def computed(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(MMaDA, "run", computed)
    monkeypatch.setattr(vision.Vision, "encode", computed)
    long, picture, mask = "a very long prompt " * 40, canvases[0], np.ones((8, 16), bool)
    huge = dataclasses.replace(model, grid=(256, 256), max_text=512)
    masked = np.array([5, model.vocab.mask])
    for call in (
        lambda: model.generate("7", temperature=-1),
        lambda: model.generate("7", max_new=0),
        lambda: model.generate([]),
        lambda: model.generate([{"role": "user"}]),
        lambda: model.generate(masked),
        lambda: model.answer(picture, long),
        lambda: model.answer(picture, [{"content": "which?"}]),
        lambda: model.answer(picture, "?", temperature=-1),
        lambda: model.answer([], "?"),
        lambda: model.draw("a", steps=0),
        lambda: model.draw("a", temperature=-0.1),
        lambda: model.draw("a", TextRule()),
        lambda: model.draw(masked),
        lambda: model.draw([["a"]]),
        lambda: model.think_and_draw("draw", guidance=-1),
        lambda: model.think_and_draw("draw", block=0),
        lambda: model.think_and_draw(masked),
        lambda: model.inpaint(picture, mask, long),
        lambda: model.inpaint(picture, mask, schedule="saw"),
        lambda: model.inpaint([], []),
        lambda: model.extend(picture, "out"),
        lambda: model.extend(picture, "up", long),
        lambda: model.extend(picture, "up", steps=-3),
        lambda: huge.draw("a"),
        lambda: huge.think_and_draw("a"),
        lambda: huge.inpaint(picture, mask),
        lambda: huge.extend(picture),
        lambda: huge.answer(picture, "which?"),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            call()
    with pytest.raises(ValueError, match=r"66051 tokens: 512 of text, 256 x 256 .* takes 128"):
        huge.draw("a")


def test_a_seed_is_an_integer(model):
    for seed in ("7", 1.5, None, [1.5]):
        with pytest.raises(ValueError, match=r"the seed is .*; it must be an integer"):
            model.draw("a", FAST, seed=seed)


def test_a_row_that_does_not_fit_is_refused_when_loaded(model_workdir):
    with pytest.raises(ValueError, match=r"rows with an image have 1051 tokens: 24 .* takes 128"):
        MMaDA.load(model_workdir, image_size=64)
    with pytest.raises(ValueError, match="takes 128"):
        MMaDA.load(model_workdir, max_text=100)
    assert MMaDA.load(model_workdir, image_size=(8, 8), max_text=20).image_size == (8, 8)


def test_an_older_step_can_be_loaded(model, model_workdir, tmp_path):
    shutil.copytree(model_workdir, tmp_path / "run")
    later = jax.tree.map(lambda x: np.asarray(x) + 1, model.params)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(TrainState(np.int32(5), later, {"count": np.int32(0)}))
    for step, params in ((None, later), (5, later), (1, model.params)):
        loaded = MMaDA.load(tmp_path / "run", step=step).params
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(FileNotFoundError, match=r"no step 3 in .*; it has 1, 5"):
        MMaDA.load(tmp_path / "run", step=3)


def test_watching_shows_what_is_revealed(model, canvases):
    job = model.draw_job("a handwritten seven", FAST)
    shown = list(model.watch(job, seed=5))
    assert len(shown) == FAST.steps
    hidden = [(drawing.codes < 0).sum() for drawing in shown]
    assert hidden == sorted(hidden, reverse=True) and hidden[0] > 0 == hidden[-1]
    np.testing.assert_array_equal(shown[-1].codes, model.draw("a handwritten seven", FAST, seed=5).codes)
    grey = np.asarray(shown[0].image)[(shown[0].codes < 0).repeat(2, 0).repeat(2, 1)]
    assert (grey == 128).all()
    job = model.answer_job([canvases[0]], ["which?"], max_new=4)
    texts = list(model.watch(job))
    assert [len(step) for step in texts] == [1] * len(texts)
    assert any("▁" in text.text for (text,) in texts[:-1])


def test_what_is_shown_is_short(model):
    text, drawing = Text("7+2=9", np.arange(5)), model.draw("a", FAST)
    for thing in (model, model.vision, text, drawing):
        assert len(repr(thing)) < 400 and "\n" not in repr(thing), type(thing)
    assert (str(text), repr(text)) == ("7+2=9", "Text(text='7+2=9')")
    assert text == Text("7+2=9", np.arange(4))
    assert repr(drawing) == "Drawing(8 x 16 pixels, 4 x 8 codes)"
    picture = Image.open(io.BytesIO(drawing._repr_png_()))
    assert picture.size == (256, 128)
    small = picture.resize((16, 8), Image.Resampling.BOX)
    np.testing.assert_array_equal(np.asarray(small), np.asarray(drawing.image))
    for part in ("tokens", "8 x 16 pixels", "8 devices", "parameters"):
        assert part in repr(model)


def test_the_package_offers_the_model_and_imports_nothing():
    import mmada_jax

    assert mmada_jax.MMaDA is MMaDA and {"MMaDA", "TextRule", "ImageRule"} <= set(dir(mmada_jax))
    with pytest.raises(AttributeError, match="has no attribute 'MMaDa'"):
        mmada_jax.MMaDa  # noqa: B018
    code = "import mmada_jax, sys; print(sorted({'jax', 'numpy', 'PIL', 'orbax'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
