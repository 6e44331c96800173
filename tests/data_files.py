"""Small files of every format, for the tests of what reads them."""

import contextlib
import io
import json
import tarfile

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mmada_jax.data.records import Record, pack

N = 24


def picture(i):
    """A PNG unlike the others, incompressible, of 1 to 2 kB."""
    file = io.BytesIO()
    side = 18 + i % 7
    pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def talk(i, roles=("user", "assistant"), names=("role", "content"), head=""):
    values = (f"{head}question {i}", f"answer {i}")
    return [dict(zip(names, pair, strict=True)) for pair in zip(roles, values, strict=True)]


def write_tar(path, members):
    """Members are (name, bytes), or TarInfos of links and devices."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))


def write_shard(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(pack(record))
    writer.close()


def write_prepared(folder, counts=(10, N - 10)):
    folder.mkdir(exist_ok=True)
    names, at = [f"{i:05d}.array_record" for i in range(len(counts))], 0
    for name, count in zip(names, counts, strict=True):
        write_shard(
            folder / name,
            [
                Record(f"r{i}", picture(i), np.arange(i + 1), (f"caption {i}",), tuple(talk(i)), "short")
                for i in range(at, at + count)
            ],
        )
        at += count
    info = {"records": at, "shards": dict(zip(names, counts, strict=True)), "image_size": 32}
    (folder / "dataset.json").write_text(json.dumps(info | {"image_tokenizer": "ab12", "codes": 0}))
    return info


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_images(folder, count=N):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(picture(i))


def write_tfds(folder):
    import tensorflow_datasets as tfds

    class SourcesToy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "images": tfds.features.Sequence(tfds.features.Image(encoding_format="png")),
                "text": tfds.features.Text(),
                "several": tfds.features.Sequence(tfds.features.Text()),
                "talk": tfds.features.Sequence(
                    {"role": tfds.features.Text(), "content": tfds.features.Text()}
                ),
                "kind": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(N), "test": self._generate_examples(3)}

        def _generate_examples(self, n):
            for i in range(n):
                row = {"image": io.BytesIO(picture(i)), "text": f"caption {i}", "talk": talk(i)}
                row["images"] = [io.BytesIO(picture(i)) for _ in range(2 if i == 1 else 1)]
                yield i, row | {"several": [f"a {i}", f"b {i}"], "kind": ("cat", "dog")[i % 2]}

    SourcesToy(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "sources_toy" / "1.0.0"


def write_every_format(root):
    """Folders and files of all formats but TFDS, with names as people give them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_prepared(root / "prepared")
    write_images(root / "images")
    odd = root / "ä #1%?&+"
    write_images(odd)
    write_lines(odd / "a b'c.jsonl", [{"image": f"{i}.png", "text": f"caption {i}"} for i in range(N)])
    write_prepared(odd / "prepared [1]*", (N,))
    write_lines(root / "a.jsonl", [{"image": f"{i}.png", "text": f"caption {i}"} for i in range(N)])
    (root / "in").mkdir()
    write_lines(root / "in/a.jsonl", [{"image": "images/0.png", "text": "c"}] * 3)
    write_lines(root / "in/b.jsonl", [{"text": "ü"}, {"text": "x" * 100_000}])
    (root / "in/c.jsonl").write_text('\n \n{"text": "d"}')
    llava = [{"id": i, "image": f"{i}.png"} for i in range(N)] + [{"id": 99}, {"image": ["1.png", "2.png"]}]
    for i, row in enumerate(llava):
        row["conversations"] = talk(i, ("human", "gpt"), ("from", "value"), "<image>\n")
    (root / "llava.json").write_text(json.dumps(llava))
    for name, value in {"bytes": picture, "paths": lambda i: {"bytes": None, "path": f"{i}.png"}}.items():
        table = {"text": [f"caption {i}" for i in range(N)], "image": [value(i) for i in range(N)]}
        pq.write_table(pa.table(table), root / f"{name}.parquet", row_group_size=5)
    (root / "tars/more").mkdir(parents=True)
    for shard in range(2):
        numbers = range(shard * N // 2, (shard + 1) * N // 2)
        members = [(f"{i:04d}.{s}", b) for i in numbers for s, b in (
            ("png", picture(i)), ("txt", f"caption {i}\n".encode()), ("cls", b"7"))]  # fmt: skip
        write_tar(root / f"tars/more/{shard:05d}.tar", [*members, ("x.png", picture(1)), ("y.tif", b"2")])
        for i in numbers:
            write_file(root / f"tars/more/{shard:05d}/{i:04d}.txt", f"beside {i}\nmore".encode())
    (root / "captions.json").write_text(json.dumps({f"{i:04d}": [f"one {i}", "two"] for i in range(N)}))
    (root / "captions.csv").write_text("image,question,solution\n0001.png,What?,It.\n0001.png,Why?,So.\n")
    for i in range(N):
        write_file(root / f"classes/big_cat_{i // 10}/deep/{i:04d}.png", picture(i))
    write_file(root / "classes/lonely.png", picture(1))
    write_file(root / "classes/big_cat_0/notes.pdf", b"1")
    (root / "labels.txt").write_text("cat: a cat\ndog: a dog\n")
    (root / "names.txt").write_text("".join(f"big_cat_{i}: cat {i}\n" for i in range(3)))
    for i in range(6):
        write_file(root / f"captioned/{i}.png", picture(i))
        write_file(root / f"captioned/{i}.txt", f"caption {i}".encode() if i % 3 else b"")


def write_file(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_codes(folder):
    for shard in range(2):
        of_shard = [Record(f"r{i}", codes=np.arange(256), texts=(f"caption {i}",)) for i in range(100)]
        write_shard(folder / f"{shard}.array_record", of_shard)


@contextlib.contextmanager
def fresh_cache(folder):
    """This process's copies of what it reads lie below a folder, and it knows nothing of objects."""
    from mmada_jax import nearby, outages

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        for name in (nearby.FOLDER, nearby.GIB):
            patch.setenv(name, "")  # so that it is put back whatever a test does
            patch.delenv(name)
        patch.setattr(nearby, "_facts", {})
        patch.setattr(nearby, "_full", {})
        outages.unanswered.clear()
        yield


class Counted:
    """The requests that come while the block runs: those that read bytes, and the others."""

    def __init__(self, proxy):
        self.proxy = proxy

    def __enter__(self):
        self.begin = len(self.proxy.requests)
        return self

    def __exit__(self, *_):
        came = self.proxy.requests[self.begin :]
        self.reads = [request for request in came if request.reads]
        self.others = len(came) - len(self.reads)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 16031000\n"
DEEP = "[" * 200_000
