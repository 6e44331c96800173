"""Folders that were prepared, by us or by TFDS, and folders of images."""

import json
import re

import pytest
from data_files import POINTER, N, picture, talk, write_images, write_prepared, write_shard

from mmada_jax.data.records import LeftOut, Record
from mmada_jax.data.sources import SourceConfig, open_source


def test_prepared_records_tell_what_they_are(tmp_path):
    info = write_prepared(tmp_path / "p")
    source = open_source(SourceConfig("p"), str(tmp_path))
    assert source.info == info | {"image_tokenizer": "ab12", "codes": 0}
    bare = open_source(SourceConfig("p/*.array_record"), str(tmp_path))
    assert len(bare) == N
    assert bare.info == {}


def test_shards_that_are_not_whole_are_refused(tmp_path):
    folder = tmp_path / "p"
    write_prepared(folder)
    shard = folder / "00001.array_record"
    whole = shard.read_bytes()

    def refused(message, path="p", kind=ValueError):
        with pytest.raises(kind, match=message):
            open_source(SourceConfig(path), str(tmp_path))

    for size in range(0, len(whole) - 1, len(whole) // 7):
        shard.write_bytes(whole[:size])
        refused(
            r"00001.array_record (is no whole|has 0 records instead of 14: it is trunc).*; delete it and"
        )
        refused("00001.array_record (is no whole|has no records).*; fetch", "p/*.array_record")
    write_shard(shard, [Record("r", texts=("t",))] * 13)
    refused("00001.array_record has 13 records instead of 14: it is truncated; delete it and run")
    write_shard(shard, [])
    refused("00001.array_record has no records: it is empty or truncated; fetch", "p/*.array_record")
    shard.unlink()
    refused("the shard .*00001.array_record is missing; delete it", kind=FileNotFoundError)


def test_a_dataset_json_must_fit(tmp_path):
    folder = tmp_path / "p"
    info = write_prepared(folder)
    changes = [{"records": 5}, {"shards": None}, {"shards": {"00000.array_record": "10"}}]
    for change in changes:
        (folder / "dataset.json").write_text(json.dumps(info | change))
        with pytest.raises(ValueError, match=r"dataset.json doesn't add up; prepare the records again"):
            open_source(SourceConfig(str(folder)))
    (folder / "dataset.json").write_text(json.dumps(info | {"shards": {"../x": N}}))
    with pytest.raises(ValueError, match=r"path '../x' leads out of"):
        open_source(SourceConfig(str(folder)))
    (folder / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset.json is no JSON"):
        open_source(SourceConfig(str(folder)))
    with pytest.raises(ValueError, match="is a folder among several paths"):
        open_source(SourceConfig(f"{folder} {folder}/00000.array_record"))
    (folder / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset.json doesn't exist; mmada prepare writes it"):
        open_source(SourceConfig(str(folder)))


def test_a_damaged_record_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "x.array_record"
    write_shard(path, [Record(f"r{i}", picture(i), texts=("t",)) for i in range(N)])
    data = bytearray(path.read_bytes())
    data[data.find(picture(7)[-40:])] ^= 1
    path.write_bytes(data)
    source = open_source(SourceConfig(str(path)))
    for i in set(range(N)) - {7}:
        assert source[i].image == picture(i)
    with pytest.raises(ValueError, match=r"x.array_record: record 'x.array_record:7': .+"):
        source[7]


def test_tfds_features_are_chosen_by_name(tfds_folder, tmp_path):
    def opened(**fields):
        source = open_source(SourceConfig(str(tfds_folder), "tfds", **fields))
        return {source[i].image: source[i] for i in range(len(source))}

    assert len(opened(split="test")) == 3
    lists = open_source(SourceConfig(str(tfds_folder), "tfds", image="images"))
    read, left_out = {}, []
    for i in range(N):
        try:
            read[lists[i].texts[0]] = lists[i].image
        except LeftOut as error:
            left_out.append(error.why)
    assert read == {f"caption {i}": picture(i) for i in range(N) if i != 1}
    assert left_out == ["several images"]
    assert len(opened(split="train[:50%]")) == N // 2
    usual, several, kinds = opened(), opened(text="several"), opened(text="kind", turns="talk")
    (tmp_path / "labels").write_text("cat: a small cat\ndog: a big dog")
    labelled = opened(text="kind", labels=f"{tmp_path}/labels")
    for i in range(N):
        assert usual[picture(i)].texts == (f"caption {i}",)
        assert several[picture(i)].texts == (f"a {i}", f"b {i}")
        assert kinds[picture(i)].texts == (("cat", "dog")[i % 2],)
        assert kinds[picture(i)].turns == tuple(talk(i))
        assert labelled[picture(i)].texts == (("a small cat", "a big dog")[i % 2],)


def test_tfds_folders_that_do_not_fit_are_errors(tfds_folder, tmp_path):
    known = "image, images, kind, several, talk, text"
    with pytest.raises(ValueError, match=f"has no 'caption'; it has: {known}"):
        open_source(SourceConfig(str(tfds_folder), "tfds", text="caption"))
    for split in ("dev", "train[:"):
        with pytest.raises(ValueError, match=f"has no split '{re.escape(split)}'; known: train, test"):
            open_source(SourceConfig(str(tfds_folder), "tfds", split=split))
    with pytest.raises(FileNotFoundError, match=r"name the folder of a prepared version, such as .*/1.0.0"):
        open_source(SourceConfig(str(tfds_folder.parent), "tfds"))
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="is no dataset that TFDS can read"):
        open_source(SourceConfig(str(tmp_path), "tfds"))


def test_tfds_shards_that_are_not_whole_are_refused(tfds_folder, tmp_path):
    for path in tfds_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (shard,) = tmp_path.glob("*train.array_record*")
    config, fingerprint = (
        SourceConfig(str(tmp_path), "tfds"),
        open_source(SourceConfig(str(tfds_folder), "tfds")).fingerprint,
    )
    assert open_source(config).fingerprint == fingerprint
    write_shard(shard, [Record("r", texts=("t",))] * 5)
    with pytest.raises(ValueError, match=f"has 5 records instead of {N}: it is truncated; prepare the"):
        open_source(config)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"the shard .*train.array_record.* is missing"):
        open_source(config)


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        ("0: tench, Tinca tinca\n1: goldfish\n", ["tench, Tinca tinca", "goldfish"]),
        ("n02 gold fish\nn01\ttench\n", ["tench", "gold fish"]),
        ("n02: a: b\nn01: tench\nn03: other", ["tench", "a: b"]),
        (None, ["n01", "n02"]),
    ],
)
def test_names_of_classes(tmp_path, lines, texts):
    for i, name in enumerate(("n02", "n01")):
        write_images(tmp_path / "images" / name, i + 1)
    (tmp_path / "images" / "n01" / "readme.txt").write_text("no image")
    (tmp_path / "images" / ".cache").mkdir()
    if lines:
        (tmp_path / "labels").write_text(lines)
    config = SourceConfig("images", "imagefolder", labels="labels" if lines else "")
    source = open_source(config, str(tmp_path))
    assert [source[i].key for i in range(3)] == ["n01/0.png", "n01/1.png", "n02/0.png"]
    assert [source[i].texts for i in range(3)] == [(texts[0],), (texts[0],), (texts[1],)]


@pytest.mark.parametrize(
    ("lines", "missing"),
    [
        ("n01: a", "'n02' \\(1 of 2"),
        ("0: a", "'n01' \\(2 of 2"),
        ("0: a\n1: b\n2: c", "'n01' \\(2 of 2"),  # of more classes than there are: another order
        ("n01: a\nn02:", "'n02' \\(1 of 2"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_errors(tmp_path, lines, missing):
    for name in ("n01", "n02"):
        write_images(tmp_path / "images" / name, 1)
    (tmp_path / "labels").write_text(lines)
    with pytest.raises(ValueError, match=f"labels names no class {missing}"):
        open_source(SourceConfig("images", "imagefolder", labels="labels"), str(tmp_path))


def texts_of(folder):
    source = open_source(SourceConfig(str(folder), "imagefolder"))
    return {source[i].key: source[i].texts[0] for i in range(len(source))}, source


def test_a_folder_of_pictures_has_captions_beside_them_or_its_own_name(tmp_path):
    folder = tmp_path / "red_cats"
    write_images(folder, 3)
    names = sorted(path.name for path in folder.iterdir())
    found, bare = texts_of(folder)
    assert found == dict.fromkeys(names, "red cats")
    (folder / names[0]).with_suffix(".txt").write_text("a cat that sleeps\n")
    (folder / names[2]).with_suffix(".txt").write_text("\ufeffa cat that sits")
    (folder / "readme.txt").write_text("no caption of a picture")
    found, source = texts_of(folder)
    assert found == {names[0]: "a cat that sleeps", names[2]: "a cat that sits"}
    assert source.ignored == {"no caption": 1, "no image": 1}
    (folder / names[0]).with_suffix(".txt").write_text("a cat that slept")
    assert len({bare.fingerprint, source.fingerprint, texts_of(folder)[1].fingerprint}) == 3
    (folder / names[0]).with_suffix(".txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is no UTF-8"):
        texts_of(folder)


def test_blank_captions_are_none(tmp_path):
    write_images(tmp_path / "cats" / "tabby", 2)
    first, second = sorted((tmp_path / "cats" / "tabby").iterdir())
    first.with_suffix(".txt").write_text("")
    second.with_suffix(".txt").write_text(" \n")
    assert set(texts_of(tmp_path / "cats")[0].values()) == {"tabby"}
    first.rename(tmp_path / "cats" / first.name)
    assert set(texts_of(tmp_path / "cats" / "tabby")[0].values()) == {"tabby"}


def test_a_caption_is_more_than_the_name_of_a_class(tmp_path):
    write_images(tmp_path / "cats" / "tabby", 2)
    first, second = sorted((tmp_path / "cats" / "tabby").iterdir())
    first.with_suffix(".txt").write_text("it sleeps")
    found, source = texts_of(tmp_path / "cats")
    assert found == {f"tabby/{first.name}": "it sleeps", f"tabby/{second.name}": "tabby"}
    assert not source.ignored


def test_folders_without_images_are_errors(tmp_path):
    (tmp_path / "bare" / "class").mkdir(parents=True)
    with pytest.raises(ValueError, match="bare has no record that can be used"):
        open_source(SourceConfig("bare", "imagefolder"), str(tmp_path))


def test_pictures_of_an_image_folder_are_read_or_counted(tmp_path):
    names = ["a.png", "b.gif", "c.bmp", "d.JPEG", "more/e.png", "more/deep/f.jfif", "one.two.png"]
    for name in names:
        (tmp_path / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cat" / name).write_bytes(picture(0))
    for name in ["g.tiff", "more/h.heic", "notes.txt", ".hidden.png"]:
        (tmp_path / "cat" / name).write_bytes(b"x")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "cats").symlink_to(tmp_path / "cat")
    (tmp_path / "dog" / "i.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "dog" / "j.png").symlink_to(tmp_path / "cat" / "a.png")
    (tmp_path / "k.png").write_bytes(picture(1))
    source = open_source(SourceConfig(str(tmp_path), "imagefolder"))
    found = {source[i].key: source[i].texts[0] for i in range(len(source))}
    assert found == {f"cat/{name}": "cat" for name in names} | {"dog/j.png": "dog"}
    assert source.ignored == {
        "format of images that isn't read": 2, "no image": 1, "link to a folder": 1,
        "broken link or no regular file": 1, "image outside of the folders of classes": 1,
        "hidden file": 1,
    }  # fmt: skip


def test_labels_are_utf8_with_or_without_a_mark(tmp_path):
    write_images(tmp_path / "images" / "n01", 1)
    config = SourceConfig("images", "imagefolder", labels="labels")
    (tmp_path / "labels").write_text("\ufeffn01: größe")
    assert open_source(config, str(tmp_path))[0].texts == ("größe",)
    for data, message in (
        ("n01: größe".encode("latin-1"), "labels, line 1: byte 0xf6 is no UTF-8"),
        (POINTER, "labels is a pointer of git LFS"),
    ):
        (tmp_path / "labels").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            open_source(config, str(tmp_path))


def test_pointers_in_place_of_prepared_files_are_named(tmp_path, tfds_folder):
    write_prepared(tmp_path / "p")
    (tmp_path / "p" / "00001.array_record").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"00001.array_record is a pointer of git LFS"):
        open_source(SourceConfig("p"), str(tmp_path))
    (tmp_path / "p" / "dataset.json").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"dataset.json is a pointer of git LFS"):
        open_source(SourceConfig("p"), str(tmp_path))
    for path in tfds_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("features.json", "dataset_info.json"):
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(ValueError, match=f"{name} is a pointer of git LFS"):
            open_source(SourceConfig(str(tmp_path), "tfds"))


def test_what_was_left_out_in_preparing_is_known_to_the_source(tmp_path):
    info = write_prepared(tmp_path / "p")
    (tmp_path / "p" / "dataset.json").write_text(json.dumps(info | {"skipped": {"no image": 7}}))
    assert open_source(SourceConfig("p"), str(tmp_path)).ignored == {"no image": 7}
