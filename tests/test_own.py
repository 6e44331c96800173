"""Runs of one's own data: what follows from a folder, in all its forms; three pictures are enough."""

import gzip
import json
import pathlib
import re
import types

import numpy as np
import pytest
from PIL import Image

from configs import own as config_file
from launch import bench
from mmada_jax.config import to_dict
from mmada_jax.data import sources
from mmada_jax.measure import own as measured
from mmada_jax.programs.train import main
from mmada_jax.serve.api import MMaDA
from mmada_jax.train import own, pictures, runs
from mmada_jax.train.rows import open_pictures
from tests.rl_toys import one_device  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent


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


def exchange(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_the_pages_scripts_make_what_is_trained(tmp_path, monkeypatch):
    """The Python of docs/own_data.md, on pictures in the format of Fashion-MNIST."""
    monkeypatch.chdir(tmp_path)
    for part, n in (("train", 30), ("t10k", 20)):
        rng = np.random.default_rng(n)
        for name, head, values in (
            ("images-idx3", 16, rng.integers(0, 256, n * 28 * 28)), ("labels-idx1", 8, np.arange(n) % 10)
        ):  # fmt: skip
            with gzip.open(f"{part}-{name}-ubyte.gz", "wb") as file:
                file.write(bytes(head) + values.astype(np.uint8).tobytes())
    page = (ROOT / "docs/own_data.md").read_text()
    scripts = [
        block for block in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M) if "SOURCE" in block
    ]
    assert len(scripts) == 2
    for script in scripts:
        script = re.sub(r"SOURCE = .*", 'SOURCE = pathlib.Path(".")', script)
        exec(compile(script.replace("20000", "20").replace("2000", "5"), "own_data.md", "exec"), {})
    model, _, told = configured("fashion/train", held_out="fashion/test")
    assert "30 records, grey pictures of 28x28 pixels" in told and set(model["data"]) == {"t2i", "mmu"}
    _, _, told = configured("four/train/questions.jsonl")
    assert "60 records, grey pictures of 56x56 pixels -> 32x32 in 64 codes; tasks mmu" in told


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
    assert pictures.codec_of(of_codec, tmp_path).pixel_channels == 1
    assert configured(tmp_path / "pets")[:2] == (model, codec)  # so that a run can be resumed


def test_captions_beside_pictures_and_long_pictures(tmp_path):
    write_pictures(tmp_path / "photos", 6, (90, 40))
    for number in range(4):
        (tmp_path / "photos" / f"{number:03}.txt").write_text("a very long story " * (number + 1))
    model, codec, told = configured(tmp_path / "photos")
    assert "4 records (left out: no caption 2), coloured pictures" in told and "every picture" not in told
    assert codec["data"]["own"]["resize"] == model["data"]["t2i"]["own"]["resize"] == "pad"
    assert codec["image_size"] == 32 and "model" not in codec
    longest = configured(tmp_path / "photos", image_size=64, size="small")[0]
    assert longest["image_size"] == 64 and longest["model"]["d_model"] == 384


def test_questions_about_pictures_and_the_held_out_ones(tmp_path):
    write_pictures(tmp_path / "train" / "images", 3)
    rows = [{"image": f"images/{n:03}.png", "messages": exchange("how many?", "three")} for n in range(3)]
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


def test_mixed_data_trains_what_enough_of_it_is_for(tmp_path):
    write_pictures(tmp_path, 10, (16, 16))
    pictures = [{"image": f"{n:03}.png", "text": f"picture {n}"} for n in range(10)]
    write_lines(tmp_path / "half.jsonl", pictures + [{"text": f"once upon a time {n}"} for n in range(10)])
    model, codec, _ = configured(tmp_path / "half.jsonl")
    assert set(model["data"]) == {"t2i", "mmu", "lm"}
    # Texts are no pictures that can't be read.
    rows = pictures_program(codec, tmp_path).load(0)
    assert set(rows.skipped) == {"data.own: no picture"}
    write_lines(tmp_path / "few.jsonl", [*pictures, {"text": "once upon a time"}])
    assert set(configured(tmp_path / "few.jsonl")[0]["data"]) == {"t2i", "mmu"}


def pictures_program(codec, workdir):
    run = runs.parse(codec)
    return open_pictures(run, workdir, "data", 16, (16, 16, 3))


def test_texts_that_are_too_long_are_told_or_refused(tmp_path):
    write_pictures(tmp_path, 10, (16, 16))

    def told(n_long):
        texts = ["word " * 300 if n < n_long else f"picture {n}" for n in range(10)]
        rows = [{"image": f"{n:03}.png", "text": text} for n, text in enumerate(texts)]
        write_lines(tmp_path / "a.jsonl", rows)
        return configured(tmp_path / "a.jsonl", text_vocab=300)[2]

    assert "texts of up to 128 tokens (20% are longer)" in told(2)
    with pytest.raises(
        ValueError, match=r"most texts of .* are too long for a model of size tiny: a median"
    ):
        told(8)


@pytest.mark.parametrize("name", ["two words", "it's", 'a "b"', "a\\b", "tab\there", "[x]"])
def test_folders_may_have_any_name(tmp_path, name):
    write_pictures(tmp_path / name / "class", 2)
    assert "2 records" in configured(tmp_path / name)[2]
    write_pictures(tmp_path / "{a}" / "class", 2)
    with pytest.raises(ValueError, match="has braces, which name several files; rename it"):
        configured(tmp_path / "{a}")


def test_cases_are_of_all_classes(tmp_path):
    for name in "abcdefgh":
        write_pictures(tmp_path / name, 10, (8, 8))
    source = sources.open_source(sources.SourceConfig(str(tmp_path), "imagefolder"))
    model = types.SimpleNamespace(image_size=(8, 8), vq_config=types.SimpleNamespace(pixel_channels=1))
    some = measured.some(source, model, 40)
    assert some.pixels_BIJC.shape == (40, 8, 8, 1) and len(set(some.names[:16])) > 4
    assert len(measured.some(source, model, 1000).names) == 80


def test_texts_alone_need_no_image_tokenizer_of_their_own(tmp_path):
    write_lines(tmp_path / "talks.jsonl", [{"messages": exchange("2 + 2", "4")}] * 5)
    model, codec, told = configured(tmp_path / "talks.jsonl")
    assert codec is None and set(model["data"]) == {"lm_chat"} and "tasks lm_chat" in told
    assert "the image tokenizer of the digits stands in" in told
    write_lines(tmp_path / "texts" / "a.jsonl", [{"text": "once upon a time"}] * 5)
    assert set(configured(tmp_path / "texts")[0]["data"]) == {"lm"}


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (None, {}, "config.data is empty; name a folder or a file: --config.data=PATH"),
        ("nothing", {}, "config.data: .*nothing doesn't exist; the nearest folder that does is"),
        ("pictures/", {"held_out": "no"}, "config.held_out: .*no doesn't exist; the nearest folder"),
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
    words = ["--config", config_file.__file__, "--config.data=one_thing"]
    words += ["--config.steps=2", "--config.image_steps=2", "--config.batch_size=4", "--workdir", "run"]
    main(words)
    told = capsys.readouterr().out
    assert "one_thing: 3 records, coloured pictures of 16x16" in told
    assert "'one thing' for every picture" in told
    model = MMaDA.load(tmp_path / "run")
    drawn = model.draw("one thing", steps=2)
    assert drawn.image.size == (16, 16)
    # What it is worth is measured on any pictures with names, and on questions.
    for name in ("one_thing", "another"):
        write_pictures(tmp_path / "test" / name, 4, (16, 16), seed=len(name))
    rows = [{"image": "test/one_thing/000.png", "messages": exchange("what?", "one thing")}] * 12
    write_lines(tmp_path / "questions.jsonl", rows)
    named = bench.main(["own", "--model", "run", "--train", "test", "--test", "test", "--each", "2",
                        "--sheet", "sheet.png"])["counts"]  # fmt: skip
    totals = {name: count["total"] for name, count in named.items()}
    assert totals == {"named": 8, "named_by_judge": 8, "drawn": 4, "redrawn": 4, "half_grey": 4}
    assert named["named_by_judge"]["correct"] == 8  # it has seen them
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (2 * 2 * 18, 2 * 2 * 18)
    asked = bench.main(["own", "--model", "run", "--test", "questions.jsonl", "--n", "11"])["counts"]
    assert {name: count["total"] for name, count in asked.items()} == {"what?": 11, "all": 11}
    with pytest.raises(ValueError, match="drawings are judged by what a judge has learned: --train"):
        bench.main(["own", "--model", "run", "--test", "test"])
    # The same command again finds nothing to do, and needs no folder but the data.
    main(words)
    assert "2 steps are done already" in capsys.readouterr().out
    assert to_dict(runs.parse(configured("one_thing", steps=2, batch_size=4)[0]))["steps"] == 2
