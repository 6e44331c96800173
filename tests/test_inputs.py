"""What a person gives: one or many, in every form; everything else is one clear error."""

import itertools
import pathlib

import numpy as np
import pytest
from PIL import Image

from mmada_jax.diffusion.rules import PRESETS, ImageRule, TextRule
from mmada_jax.model import inputs
from mmada_jax.model.inputs import Defaults
from mmada_jax.tokens.tokenizer import TextTokenizer, chat

TURNS = [{"role": "user", "content": "7 + 8"}]
DIRECTIONS = ("left", "right", "up", "down")


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(["a three", chat("7+8", "15")], 320)


@pytest.mark.parametrize("one", ["three", "", "7+8", TURNS, tuple(TURNS * 2), np.array([3, 4, 5])])
def test_a_prompt_by_itself_is_one(one, tokenizer):
    vocab = tokenizer.vocab(4)
    alone, listed = inputs.prompts(one), inputs.prompts([one])
    assert (alone.one, listed.one) == (True, False)
    (a,), (b,) = ([inputs.prompt_ids(p, tokenizer, vocab) for p in g.items] for g in (alone, listed))
    assert a == b
    many = inputs.prompts(one for _ in range(3))
    assert [inputs.prompt_ids(p, tokenizer, vocab) for p in many.items] == [a] * 3


def test_prompts_in_other_containers():
    assert inputs.prompts(np.array(["a", "b"])) == (["a", "b"], False)
    assert inputs.prompts({"a": 1, "b": 2}.keys()) == (["a", "b"], False)
    assert [row.tolist() for row in inputs.prompts(np.array([[3, 4], [5, 6]])).items] == [[3, 4], [5, 6]]


def test_a_picture_by_itself_is_one(tmp_path):
    shades = np.zeros((8, 16), np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(shades).save(path)
    colours = np.zeros((8, 16, 3), np.uint8)
    for one in (
        path,
        str(path),
        path.read_bytes(),
        Image.fromarray(shades),
        shades,
        shades[..., None],
        colours,
    ):
        assert inputs.pictures(one).one
        given = inputs.pictures([one, one])
        assert len(given.items) == 2 and not given.one
    for array in (np.zeros((3, 8, 16)), np.zeros((3, 8, 16, 1)), np.zeros((3, 8, 2), bool)):
        given = inputs.pictures(array)
        assert len(given.items) == 3 and not given.one


def test_what_is_given_alone_goes_with_each_of_the_others():
    one, two = inputs.prompts("a"), inputs.prompts(["b", "c"])
    assert inputs.together(x=one, y=two) == ([["a", "a"], ["b", "c"]], False)
    assert inputs.together(x=one, y=one) == ([["a"], ["a"]], True)
    assert inputs.together(x=inputs.prompts(["a"]), y=one) == ([["a"], ["a"]], False)
    with pytest.raises(ValueError, match=r"numbers differ: \{'y': 2, 'z': 3\}"):
        inputs.together(x=one, y=two, z=inputs.prompts(["a"] * 3))


WRONG = {
    "at least one prompt or image": [[], (), np.zeros((0, 3), int), iter(())],
    "NoneType is no prompt": [None],
    "int is no prompt": [7],
    "a prompt is int 1; it must be": [[1, 2, 3]],
    "a prompt is bytes": [b"three"],
    "a prompt is dict": [TURNS[0], ["a", TURNS[0]]],
    "a prompt is list": [[[]], [["a", "b"]]],
    "has no text as its 'content'": [
        [{"role": "user"}],
        [{"role": "user", "content": None}],
    ],
    "turn 2 of a conversation has no text as its 'role'": [
        [*TURNS, {"content": "7"}],
        [TURNS, [*TURNS, {}]],
    ],
    "must be one row of integers": [np.zeros(0, int), np.array(3), [np.zeros(3)], [np.zeros((1, 2), int)]],
    "is outside of the vocabulary": [np.array([-1]), np.array([3, 2**40])],
    "half of a surrogate pair": ["\ud83d"],
}


def all_ids(of, given, tokenizer, vocab):
    return [of(prompt, tokenizer, vocab) for prompt in inputs.prompts(given).items]


@pytest.mark.parametrize("message", WRONG)
def test_other_prompts_are_refused(message, tokenizer):
    vocab = tokenizer.vocab(4)
    for given in WRONG[message]:
        for of in (inputs.prompt_ids, inputs.caption_ids):
            with pytest.raises(ValueError, match=message if of is inputs.prompt_ids else ".") as error:
                all_ids(of, given, tokenizer, vocab)
            assert "\n" not in str(error.value)


def test_the_mask_in_ids_is_refused(tokenizer):
    vocab = tokenizer.vocab(4)
    masked = np.array([3, vocab.mask])
    for of in (inputs.prompt_ids, inputs.caption_ids):
        for given in (masked, ["three", masked], masked[None]):
            with pytest.raises(ValueError, match="a prompt of ids holds the mask"):
                all_ids(of, given, tokenizer, vocab)


def test_a_preset_gives_several_fields_of_a_rule_and_fields_by_name_come_after_it():
    fast = PRESETS["text"]["fast"]
    assert inputs.rule_of(TextRule(block=8), None, {"decode": "fast"}) == TextRule(block=8, **fast)
    changes = {"decode": "fast", "window": 16, "block": None}
    assert inputs.rule_of(TextRule(), None, changes) == TextRule(**fast | {"window": 16})
    assert inputs.rule_of(ImageRule(), None, {"decode": "exact"}) == ImageRule()
    for default, message in ((TextRule(), "exact or cached or fast"), (ImageRule(), "exact or fast")):
        with pytest.raises(ValueError, match=f"decode is 'quick'; for {default.modality} it is {message}"):
            inputs.rule_of(default, None, {"decode": "quick"})


def test_fields_of_a_rule_by_name():
    rule = inputs.rule_of(ImageRule(steps=7), None, {"guidance": 2.0, "temperature": None})
    assert rule == ImageRule(steps=7, guidance=2.0)
    assert inputs.rule_of(ImageRule(), ImageRule(steps=3), {"guidance": 0}) == ImageRule(
        steps=3, guidance=0
    )
    for fields, message in (
        ({"step": 3}, "ImageRule has no field 'step'; did you mean 'steps'?"),
        ({"block": 3}, "ImageRule has no field 'block'"),
        ({"temperature": -1}, "temperature"),
        ({"guidance": float("nan")}, "guidance"),
        ({"steps": 0}, "steps"),
        ({"steps": "3"}, "steps"),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            inputs.rule_of(ImageRule(), None, fields)
    for rule in (TextRule(), 12, "cosine"):
        with pytest.raises(ValueError, match=r"the rule is .*; give ImageRule"):
            inputs.rule_of(ImageRule(), rule, {})


@pytest.mark.parametrize("bad", [0, -1, 1.5, "4", True, [4], [4, 4, 4], [4, 0], [[4, 4]]])
def test_numbers_of_new_tokens(bad):
    assert inputs.counts(4, 2) == inputs.counts([4, 4], 2) == inputs.counts(np.array([4, 4]), 2) == [4, 4]
    with pytest.raises(ValueError, match="max_new"):
        inputs.counts(bad, 2)


def test_defaults_are_read_and_written():
    assert Defaults.of({}) == Defaults() == Defaults.of(Defaults().values())
    assert Defaults().image == ImageRule(steps=15, guidance=3.5)
    own = {"image_steps": 7, "image_guidance": 0.5, "block_length": 4, "max_new_tokens": 9, "question": "?"}
    assert Defaults.of(own | {"do_sample": True, "temperature": 0.6}).values() == own
    for key, value in (("image_steps", "many"), ("image_guidance", -1), ("max_new_tokens", 1.5),
                       ("max_new_tokens", 0), ("block_length", 0), ("question", 3)):  # fmt: skip
        with pytest.raises(ValueError, match=r"generation_config\.json: "):
            Defaults.of(own | {key: value})


@pytest.mark.parametrize("size", [0, -8, 2.5, "8", (8,), (8, 8, 8), (8, 0), (8, 7), 9])
def test_sizes_of_images(size):
    assert inputs.image_grid({}, 2, 8) == inputs.image_grid({}, 2, (8, 8)) == (4, 4)
    assert inputs.image_grid({"image_grid": [4, 8]}, 2) == (4, 8)
    assert inputs.image_grid({}, 16) == (32, 32)
    with pytest.raises(ValueError, match="image_size"):
        inputs.image_grid({}, 2, size)


def test_a_row_that_is_too_long_is_told_in_numbers():
    inputs.check_row(24, (4, 8), 2, 59)
    with pytest.raises(
        ValueError, match=r"66051 tokens: 512 of text, 256 x 256 .* 512 x 512 pixels.* takes 128"
    ):
        inputs.check_row(512, (256, 256), 2, 128)


@pytest.mark.parametrize("grid", list(itertools.product((2, 3, 4, 5), (2, 3, 6, 7))))
def test_extensions_are_mirror_images(grid):
    old = np.arange(2 * np.prod(grid)).reshape(2, *grid)

    def extend(old, direction):
        """With -1 for what is drawn."""
        beyond = inputs.beyond(direction, grid)
        kept = np.roll(old, beyond.shift, (1, 2))
        return beyond.join(old, np.where(beyond.hidden_ij, -1, kept))

    for direction, opposite, axis in (("left", "right", 2), ("up", "down", 1)):
        made = extend(old, direction)
        np.testing.assert_array_equal(np.flip(extend(np.flip(old, axis), opposite), axis), made)
        half = grid[axis - 1] // 2
        new, kept = np.split(made, [half], axis)
        np.testing.assert_array_equal(kept, old)
        assert (new == -1).all()


def test_what_cannot_be_extended():
    with pytest.raises(ValueError, match="unknown direction 'out'; known: right, left, down, up"):
        inputs.beyond("out", (4, 4))
    with pytest.raises(ValueError, match="1 x 4 tokens has no half to extend it up by"):
        inputs.beyond("up", (1, 4))


def test_paths_are_not_taken_apart():
    assert inputs.pictures(pathlib.Path("a.png")) == ([pathlib.Path("a.png")], True)
