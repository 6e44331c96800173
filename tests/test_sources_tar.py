"""Samples of tars come back; what is damaged is refused and what is left out is counted."""

import io
import json
import os
import re
import tarfile

import pytest
from data_files import DEEP, POINTER, picture, talk, write_tar
from PIL import Image

from mmada_jax.data import sources
from mmada_jax.data.sources import SourceConfig, open_source


def open_tar(path, members, **fields):
    write_tar(path, members)
    return open_source(SourceConfig(str(path), "webdataset", **fields))


def test_captions_beside_images(tmp_path):
    both = json.dumps({"caption": "of json", "prompt": "p", "long": ["a", "b"], "brief": "s"}).encode()
    prompt = json.dumps({"prompt": "of the prompt"}).encode()
    members = [
        ("./in/a.b.jpg", picture(9)),  # suffix b.jpg: no image of a sample
        ("./in/a.JPG", picture(0)),
        ("in/a.json", both),
        ("in/a.txt", b" of txt\n"),
        ("b.webp", picture(1)),
        ("b.json", prompt),
        ("c.png", picture(2)),
        ("c.caption", "größe".encode()),
    ]
    source = open_tar(tmp_path / "x.tar", members)
    found = {source[i].key: source[i] for i in range(3)}
    texts = {"x/in/a": ("of txt",), "x/b": ("of the prompt",), "x/c": ("größe",)}
    assert {key: record.texts for key, record in found.items()} == texts
    assert [found[key].image for key in texts] == [picture(i) for i in range(3)]
    named = open_tar(tmp_path / "x.tar", members, text="long", short="brief")
    assert named[0].texts == ("a", "b")
    assert named[0].short == "s"
    assert named.ignored == {"no caption": 1, "image with dots in its name": 1}
    with pytest.raises(ValueError, match="record 'x/b': the row has no 'long'; it has: prompt"):
        named[1]


def test_conversations_beside_images(tmp_path):
    row = {"talk": talk(3, ("human", "gpt"), ("from", "value"), "<image>\n"), "caption": "c"}
    members = [("a.png", picture(0)), ("a.json", json.dumps(row).encode())]
    record = open_tar(tmp_path / "x.tar", members, turns="talk")[0]
    assert record.turns == tuple(talk(3))
    assert record.texts == ()


def test_what_no_sample_has_is_left_out_and_counted(tmp_path):
    names = ("link", "hard", "device", "sparse")
    link, hard, device, sparse = (tarfile.TarInfo(f"{name}.jpg") for name in names)
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.png"
    device.type, sparse.type = tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    members = [
        folder, link, hard, device, sparse,
        ("a.png", picture(0)), ("a.txt", b"t"), ("a.pyd", b"code"), ("a.pickle", b"code"),
        ("/etc/b.png", picture(1)), ("../c.png", picture(2)), ("d/../../d.png", picture(3)),
        ("e.txt", b"no image"), ("f.png", picture(4)),
        ("g.png", b""), ("h.png", picture(5)), ("h.txt", b"x" * ((1 << 20) + 1)), ("._a.png", picture(6)),
    ]  # fmt: skip
    source = open_tar(tmp_path / "x.tar", members)
    assert [source[i].key for i in range(len(source))] == ["x/a"]
    assert source.ignored == {
        "link or special file": 4, "path outside of the tar": 3, "empty or too large": 2,
        "no image": 1, "no caption": 2, "hidden file": 1,
    }  # fmt: skip


def test_side_files_of_captions(tmp_path):
    members = [(f"{key}.jpg", picture(i)) for i, key in enumerate(("00a", "00b", "sub/00c"))]
    (tmp_path / "x").mkdir()
    for key in ("00a", "00c"):
        (tmp_path / "x" / f"{key}.caption").write_text(f"first of {key}\nsecond")
    source = open_tar(tmp_path / "x.tar", members, captions="{dir}/{tar}/{key}.caption")
    assert [source[i].texts for i in (0, 2)] == [("first of 00a",), ("first of 00c",)]
    with pytest.raises(ValueError, match=r"record 'x/00b': .*No such file.*/x/00b.caption"):
        source[1]
    relative = SourceConfig("x.tar", "webdataset", captions="x/{key}.caption")
    assert open_source(relative, str(tmp_path))[0].texts == ("first of 00a",)
    with pytest.raises(ValueError, match=r"no record that was tried can be read.*x/00a.nothing"):
        open_tar(tmp_path / "x.tar", members, captions="{dir}/{tar}/{key}.nothing")

    (tmp_path / "c.json").write_text(json.dumps({"00a": "one", "00c": ["two", "three"], "00b": []}))
    source = open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/c.json")
    assert [source[i].texts for i in range(len(source))] == [("one",), ("two", "three")]
    assert source.ignored == {"no caption": 1}
    first = source.fingerprint
    (tmp_path / "c.json").write_text(json.dumps({"00a": "two", "sub/00c": ["two", "three"], "00b": []}))
    assert open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/c.json").fingerprint != first

    (tmp_path / "c.txt").write_text("00a one")
    with pytest.raises(ValueError, match=r"c.txt: expected .json, .csv or a pattern"):
        open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/c.txt")
    with pytest.raises(ValueError, match="captions replace the keys long"):
        open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/c.json", text="long")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("between", [",", ";", "\t", ", "])
def test_a_csv_as_spreadsheets_of_all_countries_write_it(tmp_path, between, newline, encoding):
    lines = [["image", "question", "solution"], ["a.png", "Which?", '"one; two, ""three"""']]
    text = newline.join(map(between.join, lines)) + newline
    (tmp_path / "q.csv").write_bytes(text.encode(encoding))
    source = open_tar(tmp_path / "x.tar", [("a.png", picture(0))], captions=f"{tmp_path}/q.csv")
    assert [turn["content"] for turn in source[0].turns] == ["Which?", 'one; two, "three"']


def test_a_csv_in_another_encoding_names_the_line(tmp_path):
    (tmp_path / "q.csv").write_bytes("image,question,solution\na.png,é,s".encode("latin-1"))
    with pytest.raises(ValueError, match=r"q.csv, line 2: byte 0xe9 is no UTF-8"):
        open_tar(tmp_path / "x.tar", [("a.png", picture(0))], captions=f"{tmp_path}/q.csv")


def test_questions_of_a_csv_become_a_record_each(tmp_path):
    lines = ["id,image,question,solution", '1,a.png,"q, 1","s\n1"', "2,b.jpg,q2,s2", "3,a.png,q3,s3", "4"]
    (tmp_path / "q.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    members = [(f"{key}.png", picture(i)) for i, key in enumerate("abc")]
    source = open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/q.csv")
    found = {source[i].key: source[i] for i in range(len(source))}
    assert {key: tuple(t["content"] for t in record.turns) for key, record in found.items()} == {
        "x/a": ("q, 1", "s\n1"), "x/a#1": ("q3", "s3"), "x/b": ("q2", "s2")
    }  # fmt: skip
    assert [t["role"] for t in found["x/b"].turns] == ["user", "assistant"]
    assert found["x/a#1"].image == picture(0)
    assert source.ignored == {"no caption": 1}
    (tmp_path / "q.csv").write_text("image,question\na.png,q")
    with pytest.raises(ValueError, match=r"q.csv has no 'solution'; it has: image, question"):
        open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/q.csv")


def test_truncated_tars_are_refused_wherever_they_end(tmp_path):
    path = tmp_path / "x.tar"
    members = [(f"{i}.{s}", b) for i in range(3) for s, b in (("png", picture(i)), ("txt", b"t"))]
    write_tar(path, members)
    whole, kinds = path.read_bytes(), set()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for size in range(0, end + 512, 256):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.tar.*; fetch it again") as caught:
            open_source(SourceConfig(str(path), "webdataset"))
        kinds.add(re.search("(in the data of|at a header|no tar)", str(caught.value))[0])
        if kinds >= {"at a header"}:
            assert re.search(r"byte \d+", str(caught.value))
    assert kinds == {"in the data of", "at a header", "no tar"}
    damaged = bytearray(whole)
    damaged[end - 1024 + 20] ^= 255  # in the last header
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"x.tar is damaged: there is no header at byte {end - 1024}"):
        open_source(SourceConfig(str(path), "webdataset"))


def test_tars_without_samples_and_with_too_many_members_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"has no record that can be used \(no image: 1; no caption: 1\)"):
        open_tar(tmp_path / "x.tar", [("a.txt", b"t"), ("b.png", picture(0))])
    monkeypatch.setattr(sources.webdataset, "MAX_MEMBERS", 3)
    with pytest.raises(ValueError, match="refused after 4 members"):
        open_tar(tmp_path / "x.tar", [(f"{i}.txt", b"t") for i in range(4)])


def test_a_tar_that_shrinks_is_noticed(tmp_path):
    source = open_tar(tmp_path / "x.tar", [("a.txt", b"t"), ("a.png", picture(0))])
    os.truncate(tmp_path / "x.tar", 2000)
    with pytest.raises(
        ValueError, match=r"record 'x/a': .* ends before byte .*changed since it was opened"
    ):
        source[0]


# ---- What vanishes ---------------------------------------------------------------------------------


def captioned(names, first=0):
    """Members of samples: image and caption."""
    return [(f"{name}.{s}", b) for i, name in enumerate(names, first) for s, b in (
        ("png", picture(i)), ("txt", f"caption {i}".encode()))]  # fmt: skip


def member_starts(path):
    with tarfile.open(path) as tar:
        return [member.offset for member in tar.getmembers()]


def test_a_hole_of_zeros_is_refused_wherever_it_begins(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, captioned(range(20)))
    whole, starts = path.read_bytes(), member_starts(path)
    for at in starts[1:-1]:  # a hole over a header, with samples after it
        path.write_bytes(whole[:at] + bytes(1024) + whole[at + 1024 :])
        with pytest.raises(
            ValueError, match=rf"x.tar goes on at byte \d+, .* end at byte {at}: part of it"
        ):
            open_source(SourceConfig(str(path), "webdataset"))
    for at in starts[1:12]:  # a download into a file of its full size that stopped
        path.write_bytes(whole[:at] + bytes(len(whole) - at))
        with pytest.raises(ValueError, match=rf"x.tar ends with {len(whole) - at} bytes of zeros"):
            open_source(SourceConfig(str(path), "webdataset"))


def test_what_follows_the_end_of_a_tar_is_refused(tmp_path):
    first, second, path = tmp_path / "a.tar", tmp_path / "b.tar", tmp_path / "x.tar"
    write_tar(first, captioned(range(3)))
    write_tar(second, captioned(range(3, 6)))
    for more in (second.read_bytes(), b"\0" * 700 + b"trailing", b"x"):
        path.write_bytes(first.read_bytes() + more)
        with pytest.raises(ValueError, match="it is several tars in a row; fetch it again, or split it"):
            open_source(SourceConfig(str(path), "webdataset"))


def test_the_ends_that_writers_make_are_all_right(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, captioned(range(3)))
    whole, last = path.read_bytes(), member_starts(path)[-1]
    end = last + 1024
    assert not any(whole[end:])
    for blocks in (1, 2, 3, (len(whole) - end) // 512):
        path.write_bytes(whole[: end + 512 * blocks])
        assert len(open_source(SourceConfig(str(path), "webdataset"))) == 3


def test_images_that_are_passed_over_are_counted_by_reason(tmp_path):
    gif, bmp = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, "GIF")
    Image.new("RGB", (4, 4)).save(bmp, "BMP")
    members = [
        ("v1.0/a.gif", gif.getvalue()), ("v1.0/a.txt", b"read"),
        ("b.BMP", bmp.getvalue()), ("b.txt", b"too"), ("c.v2.jpg", picture(0)), ("c.v2.txt", b"dots"),
        ("d.tiff", b"t"), ("d.cls", b"1"), ("e.tar.svg", b"s"), ("f.mp4", b"video"), ("f.cls", b"1"),
        ("g.png", picture(1)), ("g.jpg", picture(2)), ("g.txt", b"two"),
        ("h.png", picture(3)), ("h.txt", b"first"), ("h.txt", b"second"),
    ]  # fmt: skip
    source = open_tar(tmp_path / "x.tar", members)
    assert [source[i].texts[0] for i in range(len(source))] == ["read", "too", "two", "second"]
    assert source.ignored == {
        "image with dots in its name": 1, "format of images that isn't read": 2, "no image": 1,
        "another image of a sample": 1, "name that comes again": 1,
    }  # fmt: skip


def test_members_that_are_pointers_or_zeros_are_bad_records(tmp_path):
    members = captioned(range(6))
    members[1] = ("0.txt", b"\xef\xbb\xbfcaption of a file with a mark")
    members[2] = ("1.png", POINTER)
    members[5] = ("2.txt", POINTER)
    members[7] = ("3.txt", bytes(40))
    members[9] = ("4.json", DEEP.encode())
    source = open_tar(tmp_path / "x.tar", members)
    assert source[0].texts == ("caption of a file with a mark",)
    assert source[5].texts == ("caption 5",)
    for i, reason in (
        (1, "git lfs pull"),
        (2, "git lfs pull"),
        (3, "zero bytes"),
        (4, "nested too deeply"),
    ):
        with pytest.raises(ValueError, match=f"record 'x/{i}': .*{reason}"):
            source[i]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_captions_of_a_side_file_may_be_by_the_name_of_the_image(tmp_path, mark):
    table = {"0000.png": "zero", "sub/0001.JPG": ["one", "eins"], "0002": "two", "dots.v2": "no"}
    (tmp_path / "c.json").write_text(mark + json.dumps(table))
    members = [(f"{key}.png", picture(0)) for key in ("0000", "sub/0001", "0002")]
    source = open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/c.json")
    assert [source[i].texts for i in range(3)] == [("zero",), ("one", "eins"), ("two",)]
    for text, message in (
        (DEEP, "nested too deeply"),
        (POINTER.decode(), "git lfs pull"),
        ("[]", "an array"),
    ):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ValueError, match=f"c.json .*{message}"):
            open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/c.json")
    (tmp_path / "c.csv").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"c.csv .*git lfs pull"):
        open_tar(tmp_path / "x.tar", members, captions=f"{tmp_path}/c.csv")
