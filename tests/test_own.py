"""Runs of one's own data: what follows from a folder, in all its forms; three pictures are enough."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import own as config_file
from mmada_jax.config import to_dict
from mmada_jax.programs.train import main
from mmada_jax.serve.api import MMaDA
from mmada_jax.train import own, runs
from tests.rl_toys import one_device  # noqa: F401


def configured(data, **values):
    return own.configurations(config_file.get_config().to_dict() | {"data": str(data)} | values)


def write_pictures(folder, n, size=(20, 24), mode="RGB", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(n):
        pixels = rng.integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{number:03}.png")


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_configuration_lists_every_field():
    assert set(config_file.get_config()) == {"program"} | {
        field.name for field in own.dataclasses.fields(own.OwnRun) if field.name != "program"
    }


def test_a_folder_for_each_class_is_drawn_and_named(tmp_path):
    for name in ("cats", "red_dogs"):
        write_pictures(tmp_path / "pets" / name, 5, (28, 28), "L")
    model, codec, told = configured(tmp_path / "pets")
    assert {task for task, share in model["mixture"].items() if share} == {"t2i", "mmu"}
    assert (codec["image_size"], codec["preset"], codec["model"]) == (28, "small", {"pixel_channels": 1})
    assert "10 records, grey pictures of 28x28 pixels -> 28x28 in 49 codes; tasks t2i, mmu" in told
    # Both configurations are whole, and rows fit the model.
    run, of_codec = runs.parse(model), runs.parse(codec)
    rows = run.max_text + 49 + 3
    assert rows <= run.model["max_len"] < rows + 64
    assert runs.codec_of(of_codec, tmp_path).pixel_channels == 1
    assert configured(tmp_path / "pets")[:2] == (model, codec)  # so that a run can be resumed


def test_captions_beside_pictures_and_long_pictures(tmp_path):
    write_pictures(tmp_path / "photos", 6, (90, 40))
    for number in range(4):
        (tmp_path / "photos" / f"{number:03}.txt").write_text("a very long story " * (number + 1))
    model, codec, told = configured(tmp_path / "photos")
    assert "4 records (left out: no caption 2), coloured pictures" in told
    assert codec["data"]["own"]["resize"] == model["data"]["t2i"]["own"]["resize"] == "pad"
    assert codec["image_size"] == 32 and "model" not in codec
    longest = configured(tmp_path / "photos", image_size=64, size="small")[0]
    assert longest["image_size"] == 64 and longest["model"]["d_model"] == 384


def test_questions_about_pictures_and_the_held_out_ones(tmp_path):
    write_pictures(tmp_path / "train" / "images", 3)
    turns = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "three"}]
    rows = [{"image": f"images/{n:03}.png", "messages": turns} for n in range(3)]
    write_lines(tmp_path / "train" / "questions.jsonl", rows)
    held_out = str(tmp_path / "train" / "questions.jsonl")
    model, codec, _ = configured(tmp_path / "train" / "questions.jsonl", held_out=held_out)
    assert set(model["data"]) == set(model["held_out"]) == {"mmu"}
    assert codec["held_out"]["own"]["path"] == held_out and codec["eval_every"]
    # Hugging Face's folders of images name their files and texts.
    write_lines(
        tmp_path / "train" / "images" / "metadata.jsonl",
        [{"file_name": f"{n:03}.png", "text": "a picture"} for n in range(3)],
    )
    model, _, _ = configured(tmp_path / "train" / "images")
    assert set(model["data"]) == {"t2i", "mmu"} and model["data"]["t2i"]["own"]["image"] == "file_name"


def test_texts_alone_need_no_image_tokenizer_of_their_own(tmp_path):
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    write_lines(tmp_path / "talks.jsonl", [{"messages": turns}] * 5)
    model, codec, told = configured(tmp_path / "talks.jsonl")
    assert codec is None and set(model["data"]) == {"lm_chat"} and "tasks lm_chat" in told
    write_lines(tmp_path / "texts" / "a.jsonl", [{"text": "once upon a time"}] * 5)
    assert set(configured(tmp_path / "texts")[0]["data"]) == {"lm"}


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (None, {}, "config.data is empty; name a folder or a file: --config.data=PATH"),
        ("nothing", {}, "config.data: .*nothing doesn't exist; the nearest folder that does is"),
        ("file.doc", {}, "file.doc ends with '.doc'; known are .jsonl, .json, .parquet, .tar, and folders"),
        ("empty/", {}, "config.data: .*empty has no record that can be used"),
        ("broken/", {}, "config.data: none of the records that were tried can be used; the first: .*a.png"),
        ("pictures/", {"size": "huge"}, "size is 'huge'; it must be one of 'tiny', 'small', 'base'"),
        ("pictures/", {"text_vocab": 20}, "text_vocab must be at least"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, make, values, message):
    data = "" if make is None else tmp_path / make
    if make == "file.doc":
        data.write_text("x")
    if make in ("empty/", "broken/"):
        data.mkdir()
    if make == "broken/":
        (data / "a.png").write_bytes(b"no picture")
    if make == "pictures/":
        write_pictures(data, 3)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        configured(data, **values)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_three_pictures_of_one_class_are_trained_and_drawn(tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "one_thing", 3, (16, 16))
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(runs.pathlib.Path(config_file.__file__)), "--config.data=one_thing"]
    words += ["--config.steps=2", "--config.image_steps=2", "--config.batch_size=4", "--workdir", "run"]
    main(words)
    assert "one_thing: 3 records, coloured pictures of 16x16" in capsys.readouterr().out
    model = MMaDA.load(tmp_path / "run")
    drawn = model.draw("one thing", steps=2)
    assert drawn.image.size == (16, 16)
    # The same command again finds nothing to do, and needs no folder but the data.
    main(words)
    assert "2 steps are done already" in capsys.readouterr().out
    assert to_dict(runs.parse(configured("one_thing", steps=2, batch_size=4)[0]))["steps"] == 2
