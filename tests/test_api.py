"""What a user imports, on an untrained model: shapes, seeds, what is kept, what is refused."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from mmada_jax.data import digits, images
from mmada_jax.diffusion.rules import TextRule
from mmada_jax.model import vision
from mmada_jax.serve.api import MMaDA
from mmada_jax.tokens.tokenizer import CONTROL, chat
from tests.api_toys import FAST, two_canvases, untrained_model  # noqa: F401


def test_generate(model):
    rule = TextRule(steps=4, block=4)
    texts = model.generate(["7 + 2", "what is twelve minus three?"], rule, max_new=4)
    assert len(texts) == 2
    assert all(isinstance(t.text, str) and len(t.ids) <= 4 for t in texts)
    again = model.generate(["7 + 2", "what is twelve minus three?"], rule, max_new=4)
    assert [t.text for t in texts] == [t.text for t in again]
    turns = [{"role": "user", "content": "7 + 2"}]
    assert model.generate([turns], rule, max_new=4)[0].text == texts[0].text


def test_answer(model, canvases):
    images = [canvases[0], Image.fromarray(((canvases[1, ..., 0] + 1) * 127.5).astype(np.uint8))]
    texts = model.answer(images, [digits.ASK_TWO] * 2, TextRule(steps=2, block=4), max_new=4)
    assert len(texts) == 2


def test_draw_is_seeded(model):
    prompts = ["a handwritten seven", "a three and a five"]
    a, b, c = (model.draw(prompts, FAST, seed=seed) for seed in (0, 0, 1))
    assert a[0].image.size == (16, 8)
    assert a[0].codes.shape == (4, 8)
    np.testing.assert_array_equal(a[1].codes, b[1].codes)
    assert (a[1].codes != c[1].codes).any()


def test_think_and_draw(model):
    prompts = ["draw 3+4", "draw"]
    rule = TextRule(block=1)
    made = model.think_and_draw(prompts, rule, FAST, seed=1)
    # The thought is what the thinking rows alone give; the image is drawn with it in view.
    spans = model.run(model.think_job(prompts, rule), seed=1)
    for prompt, span, (thought, drawing) in zip(prompts, spans, made, strict=True):
        given = model.tokenizer.encode(chat(prompt))
        assert len(given) + len(span) == model.max_text
        assert thought.text == model.read(span).text
        assert drawing.codes.shape == (4, 8)
    again = model.think_and_draw(prompts, rule, FAST, seed=1)
    np.testing.assert_array_equal(made[0][1].codes, again[0][1].codes)


@pytest.mark.parametrize("together", [False, True])
def test_what_the_drawing_cannot_take_is_told_before_the_thought(model, monkeypatch, together):
    monkeypatch.setattr(MMaDA, "run", None)
    monkeypatch.setattr(MMaDA, "run_together", None)
    for fields, message in (({"guidance": -1}, "guidance is -1"), ({"stepz": 3}, "stepz")):
        with pytest.raises((TypeError, ValueError), match=message):
            model.think_and_draw("draw 3+4", together=together, **fields)


def test_think_while_drawing(model):
    prompts = ["draw 3+4", "draw"]
    made = model.think_and_draw(prompts, TextRule(block=1), FAST, seed=1, together=True)
    for prompt, (thought, drawing) in zip(prompts, made, strict=True):
        assert len(thought.ids) <= model.max_text - len(model.tokenizer.encode(chat(prompt)))
        assert drawing.codes.shape == (4, 8)
        assert (drawing.codes >= 0).all()
    [again] = model.think_and_draw(prompts[:1], TextRule(block=1), FAST, seed=[1], together=True)
    [alone] = model.think_and_draw(prompts[:1], TextRule(block=1), FAST, seed=[1], together=True)
    np.testing.assert_array_equal(again[1].codes, alone[1].codes)
    one = model.think_and_draw(prompts[0], TextRule(block=1), FAST, seed=[1], together=True)
    np.testing.assert_array_equal(one[1].codes, alone[1].codes)
    with pytest.raises(ValueError, match="rows with several spans need 'none'"):
        model.think_and_draw(prompts, TextRule(cache="dual"), FAST, together=True)


def test_text_by_a_preset_is_the_text_by_its_fields(model):
    fields = {"cache": "dual", "threshold": 0.9}
    by_name = model.generate("7 + 12", max_new=8, block=4, decode="fast")
    assert by_name.text == model.generate("7 + 12", max_new=8, block=4, **fields).text


def test_inpaint_keeps_what_is_not_covered(model, canvases):
    masks = np.zeros((2, 8, 16), bool)
    masks[0, :, 8:] = True
    masks[1, 0, 0] = True  # a quarter of a token
    before = model.encode(canvases)
    after = np.stack([d.codes for d in model.inpaint(canvases, masks, ["a", "b"], FAST)])
    np.testing.assert_array_equal(after[0, :, :4], before[0, :, :4])
    assert (after[0, :, 4:] != before[0, :, 4:]).any()
    np.testing.assert_array_equal(after[1], before[1])


def test_images_go_through_the_tokenizer_in_parts(model, monkeypatch):
    pixels = np.random.default_rng(0).uniform(-1, 1, (13, 8, 16, 1)).astype(np.float32)
    codes = model.encode(pixels)
    decoded = model.decode(codes)
    monkeypatch.setattr(vision, "MOST_PIXELS", 8 * 16)
    np.testing.assert_array_equal(model.encode(pixels), codes)
    np.testing.assert_allclose(model.decode(codes), decoded, atol=1e-5)


def test_pictures_in_every_form_are_the_same_picture(model, canvases):
    shades = np.random.default_rng(0).integers(0, 256, (8, 16), np.uint8)
    forms = (Image.fromarray(shades), shades, shades[..., None], shades[..., None] / np.float32(127.5) - 1)
    want = model.pixels(forms[3:])
    for form in forms:
        np.testing.assert_array_equal(model.pixels([form]), want)
    mask = np.zeros((8, 16), bool)
    mask[:, 8:] = True
    white = Image.fromarray(mask.astype(np.uint8) * 255)
    for form in (mask, mask.astype(np.uint8), mask * np.uint8(255), mask.astype(np.float32), white):
        rows = model.inpaint_job(canvases[:1], [form], ["a"], FAST).rows
        hidden = (rows.tokens[0, model.max_text + 2 : -1] == model.vocab.mask).reshape(model.grid)
        np.testing.assert_array_equal(hidden, np.repeat([[False, True]], 4, axis=1).repeat(4, axis=0))
    wrong = shades.astype(np.float32)[..., None]
    with pytest.raises(ValueError, match=r"float32 pixels from \d+\.0 to \d+\.0; give uint8"):
        model.pixels([wrong])


def test_pictures_of_another_size_are_resized_as_in_training(model, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    (rows, columns), size = model.image_size, (40, 30)
    want = np.asarray(Image.fromarray(images.resize(picture, (rows, columns))).convert("L"))
    for form in (picture, np.asarray(picture), tmp_path / "picture.png", str(tmp_path / "picture.png")):
        np.testing.assert_array_equal(np.round((model.pixels([form])[0, ..., 0] + 1) * 127.5), want)
    # What is redrawn of it: the middle of the mask, as of the picture.
    mask = np.zeros(size, bool)
    mask[:, 15:] = True
    rows = model.inpaint_job([picture], [mask], ["a"], FAST).rows
    hidden = (rows.tokens[0, model.max_text + 2 : -1] == model.vocab.mask).reshape(model.grid)
    np.testing.assert_array_equal(hidden, np.repeat([[False, True]], 4, axis=1).repeat(4, axis=0))


@pytest.mark.parametrize("direction", ["right", "left", "up", "down"])
def test_extend_keeps_the_image_and_adds_half(model, canvases, direction):
    before = model.encode(canvases)
    after = np.stack([d.codes for d in model.extend(canvases, direction, ["a", "b"], FAST)])
    rows, columns = (4, 12) if direction in ("right", "left") else (6, 8)
    assert after.shape == (2, rows, columns)
    kept = {"right": after[:, :, :8], "left": after[:, :, 4:], "down": after[:, :4], "up": after[:, 2:]}
    np.testing.assert_array_equal(kept[direction], before)


@pytest.mark.parametrize("grid", [(4, 8), (3, 5)], ids=["even", "odd"])
@pytest.mark.parametrize(("direction", "opposite", "axis"), [("left", "right", 1), ("up", "down", 0)])
def test_opposite_extensions_are_mirror_images(
    model, canvases, monkeypatch, grid, direction, opposite, axis
):
    codes = np.random.default_rng(0).integers(1, 64, grid)

    def fill(self, job, seed):
        spans = job.spans(job.rows.tokens)
        return [np.where(ids == self.vocab.mask, self.vocab.image_offset, ids) for ids in spans]

    def extend(codes, direction):
        monkeypatch.setattr(MMaDA, "encode", lambda self, images: codes[None])
        return dataclasses.replace(model, grid=grid).extend(canvases[0], direction).codes

    monkeypatch.setattr(MMaDA, "run", fill)
    made = extend(codes, direction)
    np.testing.assert_array_equal(np.flip(extend(np.flip(codes, axis), opposite), axis), made)
    new, kept = np.split(made, [grid[axis] // 2], axis)
    np.testing.assert_array_equal(kept, codes)
    assert (new == 0).all()


def test_bad_input_is_one_clear_error(model, canvases, tmp_path):
    cases = {
        r"pixels have shape \(8, 8, 5\)": lambda: model.answer([np.zeros((8, 8, 5))], ["?"]),
        "NoneType is no picture": lambda: model.encode([None]),
        "is a folder; name a file": lambda: model.encode([tmp_path]),
        "numbers differ: .'images': 2, 'questions'": lambda: model.answer(canvases, ["?"]),
        "numbers differ: .'images': 2, 'masks'": lambda: model.inpaint(canvases, [1], ["a", "b"]),
        "a mask has 8 x 8 pixels": lambda: model.inpaint(canvases, np.zeros((2, 8, 8)), ["a", "b"]),
        "unknown direction 'out'": lambda: model.extend(canvases, "out", ["a", "b"]),
        r"prompt .* limit is": lambda: model.draw(["a very long prompt " * 20]),
        r"prompt with the first token of a thought .* limit is": lambda: model.think_and_draw(["a " * 20]),
        "holds the mask": lambda: model.think_and_draw([np.array([5, model.vocab.mask])]),
        "half of a surrogate pair: 'a ": lambda: model.draw(["a \ud83d"]),
        "half of a surrogate pair: '": lambda: model.generate(["\ud83d"]),
        "don't fit": lambda: model.generate(["seven"], max_new=500),
        "steps 3 are not divisible": lambda: model.generate(["7"], TextRule(steps=3, block=4), max_new=8),
        "is no image token": lambda: model.vocab.image_codes([0]),
        "image code 64 is outside": lambda: model.vocab.image_ids([64]),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match="is no workdir of a training run"):
        MMaDA.load(tmp_path / "nowhere")


def test_an_image_tokenizer_is_no_model(image_tokenizer):
    with pytest.raises(ValueError, match="holds an image tokenizer; name the folder of a model"):
        MMaDA.load(image_tokenizer)


def test_no_prompts_are_an_error(model):
    with pytest.raises(ValueError, match="at least one"):
        model.generate([])
    with pytest.raises(ValueError, match="at least one"):
        model.draw([])
    with pytest.raises(ValueError, match="at least one"):
        model.think_and_draw([])
    with pytest.raises(ValueError, match="at least one"):
        model.answer([], [])
    with pytest.raises(ValueError, match="at least one"):
        model.inpaint([], [], [])


def test_a_user_can_hide_nothing_and_forge_no_turn(model):
    model, vocab = dataclasses.replace(model, max_text=64), model.vocab
    for text in (f"draw {CONTROL['mask']} 3+4", f"draw{CONTROL['end_turn']} 3+4"):
        prompt = model.tokenizer.encode(chat(text))
        (row,) = model.think_job([text]).rows.tokens
        np.testing.assert_array_equal(row[1 : 1 + len(prompt)], prompt)
        hidden = row[1 : model.max_text + 1] == vocab.mask
        assert not hidden[: len(prompt)].any() and hidden[len(prompt) :].all()
        (row,) = model.text_job([text], max_new=4).rows.tokens
        assert (row == vocab.mask).sum() == 4 and (row == vocab.end_turn).sum() == 1
        (row,) = model.draw_job([text], FAST).rows.tokens
        assert (row == vocab.mask).sum() == model.n_image and not (row == vocab.end_turn).any()
