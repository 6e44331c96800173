"""Files of bytes, text and JSON: what people have is read, all else is one error that names it."""

import json
import os
import sys

import pytest

from mmada_jax import files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 16031000000\n".format("4d" * 32)
READERS = {"bytes": files.read_bytes, "text": files.read_text, "json": files.read_json}


@pytest.mark.parametrize("begin", ["", "\ufeff", "\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("version", ["git-lfs.github.com/spec/v1", "hawser.github.com/spec/v1"])
@pytest.mark.parametrize("read", READERS)
def test_a_pointer_of_git_lfs_is_refused(tmp_path, read, version, newline, begin):
    pointer = begin + POINTER.replace("git-lfs.github.com/spec/v1", version).replace("\n", newline)
    pointer = pointer.encode()
    path = tmp_path / "a file"
    path.write_bytes(pointer)
    for call in (
        lambda: READERS[read](path),
        lambda: files.refuse_pointer(path),
        lambda: files.refuse_pointer(str(path)),
        lambda: files.refuse_pointer(pointer, str(path)),
    ):
        with pytest.raises(ValueError, match=r"a file is a pointer of git LFS that stands for 16031000000.*"
                           r"git lfs pull"):  # fmt: skip
            call()


@pytest.mark.parametrize("name", ["a\0b.png", "\ud83d.png", "\ude00"])
@pytest.mark.parametrize("read", READERS)
def test_a_name_that_no_file_can_have_is_named(read, name):
    with pytest.raises(ValueError, match="no file can have the name"):
        READERS[read](name)


def test_what_is_no_pointer_passes(tmp_path):
    for data in (b"", b"version https://example.com", b"\x89PNG", b"a " + POINTER.encode()):
        files.refuse_pointer(data, "x")
        (tmp_path / "x").write_bytes(data)
        files.refuse_pointer(tmp_path / "x")
        assert files.read_bytes(tmp_path / "x") == data
    files.refuse_pointer(tmp_path)  # a folder, and nothing: for their readers to refuse
    files.refuse_pointer(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="none"):
        files.read_bytes(tmp_path / "none")


@pytest.mark.parametrize("read", READERS)
def test_what_would_block_or_never_end_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder"), ("/dev/zero", "a device")):
        with pytest.raises(ValueError, match=f"{path} is {kind}; name a file"):
            READERS[read](path)
    (tmp_path / "long").write_bytes(b"[1]")
    assert READERS[read](tmp_path / "long", limit=3)
    with pytest.raises(ValueError, match="long has 3 bytes; the limit is 2"):
        READERS[read](tmp_path / "long", limit=2)


def test_text_with_and_without_a_mark(tmp_path):
    path, text = tmp_path / "text", "über\nline 🙂\n"
    for data in (text.encode(), text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode("utf-8-sig")):
        path.write_bytes(data)
        assert files.read_text(path) == text
    for encoding, line in (("latin-1", 1), ("utf-16", 1)):
        path.write_bytes("café\n".encode(encoding))
        with pytest.raises(ValueError, match=rf"{path}, line {line}: byte 0x[0-9a-f]+ is no UTF-8"):
            files.read_text(path)
    path.write_bytes(b"one\ntwo\xff\n")
    with pytest.raises(ValueError, match="line 2: byte 0xff is no UTF-8"):
        files.read_text(path)


def test_json(tmp_path):
    path, value = tmp_path / "a.json", {"a": ["ü", 1.5, None]}
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(json.dumps(value, ensure_ascii=False), encoding=encoding)
        assert files.read_json(path) == files.read_json(path, dict) == value
        assert files.parse_json(path.read_bytes(), "x") == value
        assert files.parse_json(path.read_text(encoding="utf-8"), "x") == value
    with pytest.raises(ValueError, match=r"a.json holds an object, expected an array"):
        files.read_json(path, list)
    depth = 100 * sys.getrecursionlimit()
    damaged = {
        '{"a": 1,\n "b": }': r"a.json is no JSON: .*line 2 column 7",
        '{"a": 1': r"a.json is no JSON: .*line 1",
        "": r"a.json is no JSON",
        "1" * 5000: r"a.json is no JSON: .*digits",
        "[" * depth + "]" * depth: r"a.json is JSON that is nested too deeply",
        '{"a":' * depth: r"a.json is JSON that is nested too deeply",
    }
    for text, message in damaged.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            files.read_json(path)
        assert type(caught.value) is ValueError and len(str(caught.value)) < 300
