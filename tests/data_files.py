"""Small files of every format, for the tests of what reads them."""

import io
import json
import tarfile

import numpy as np
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


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 16031000\n"
DEEP = "[" * 200_000
