"""Files of a user's own and a configuration that reads them, for the tests of whole runs."""

import io
import json
import shutil
import tarfile
import zlib

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from mmada_jax.data.records import Record, pack
from mmada_jax.nets import vq
from mmada_jax.tokens.tokenizer import TextTokenizer, chat
from mmada_jax.weights import lazy, magvit_keys
from mmada_jax.weights.arrays import write_params
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.workdir import record_files

VQ = vq.VQConfig(32, (1, 2), (1, 1), (1, 2), (1, 1), bits=6)
SIZE, N_CODES = 8, 16
STEPS = 6
N = 2 * STEPS  # records of a source: the rows of a task in a run


# ---- Files -----------------------------------------------------------------------------------------


def jpeg(i):
    pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((25, 20)).save(file, "JPEG")
    return file.getvalue()


def huge():
    """The start of a PNG of 20000x20000 pixels; the rest would never be read."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (20000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def write_tar(path, images):
    with tarfile.open(path, "w") as tar:
        for i, (suffix, data) in enumerate(images):
            for end, content in ((suffix, data), ("txt", f"picture {i}".encode())):
                member = tarfile.TarInfo(f"{i:03}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_codes(folder, image_tokenizer):
    """Records with codes, as launch/prepare.py leaves them."""
    folder.mkdir()
    shard, rng = "shard-00000-of-00001.array_record", np.random.default_rng(0)
    writer = ArrayRecordWriter(str(folder / shard), "group_size:1")
    for i in range(N):
        codes_N = rng.integers(0, VQ.codebook_size, N_CODES)
        writer.write(pack(Record(str(i), codes=codes_N, texts=(f"picture {i}",))))
    writer.close()
    about = {
        "records": N,
        "shards": {shard: N},
        "codes": N_CODES,
        "image_size": SIZE,
        "image_tokenizer": lazy.sha256(open_folder(image_tokenizer).tensors()),
    }
    (folder / "dataset.json").write_text(json.dumps(about))


def write_image_tokenizer(folder):
    """A checkpoint of an image tokenizer of RGB images, random."""
    shapes = jax.eval_shape(lambda key: vq.init_params(key, VQ), jax.random.key(0))
    rng = np.random.default_rng(0)

    def random(x):
        array = 0.1 * rng.standard_normal(x.shape, np.float32)
        return lazy.Lazy(x.shape, array.dtype, lambda index: array[index])

    write_params(folder / "params", jax.tree.map(random, shapes), None)
    (folder / "config.json").write_text(json.dumps(magvit_keys.config_to_hf(VQ)))
    record_files(folder)


@pytest.fixture(scope="module", name="files")
def own_files(tmp_path_factory):
    """A folder with data in four formats, some of it bad, an image tokenizer, and one of text."""
    folder = tmp_path_factory.mktemp("files")
    write_image_tokenizer(folder / "image_tokenizer")
    sentences = [f"picture {i}" for i in range(N)] + [f"the text of line {i}" for i in range(N)]
    TextTokenizer.train([*sentences, chat("say 1", "one")], 320).save(folder / "tokenizer.json")
    data = folder / "data"
    data.mkdir()
    pictures = [("jpg", jpeg(i)) for i in range(N)]
    write_tar(data / "pictures.tar", [*pictures[:-1], ("jpg", jpeg(0)[:200])])
    write_tar(data / "huge.tar", [*pictures[:-1], ("png", huge())])
    whole = (data / "pictures.tar").read_bytes()
    (data / "cut.tar").write_bytes(whole[: len(whole) // 2])
    table = pyarrow.table({"text": [f"the text of line {i}" for i in range(N)]})
    pyarrow.parquet.write_table(table, data / "texts.parquet", row_group_size=3)
    talks = [
        [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": f"say {i} " * (99 * (i == 5) or 1)},
        ]
        for i in range(N)
    ]
    (data / "talks.jsonl").write_text("".join(json.dumps({"turns": talk}) + "\n" for talk in talks))
    write_codes(data / "codes", folder / "image_tokenizer")
    shutil.copytree(data / "codes", data / "cut_codes")
    (shard,) = (data / "cut_codes").glob("*.array_record")
    shard.write_bytes(shard.read_bytes()[:-100])
    return folder


@pytest.fixture(scope="module", name="config")
def config_of_files(smoke_config, files):
    """configs/pretrain.py:digits,smoke for a tiny model on those files."""
    source = {"weight": 1.0}
    data = {
        "t2i": {"pictures": source | {"path": "pictures.tar", "format": "webdataset"}},
        "lm": {"texts": source | {"path": "texts.parquet", "format": "parquet"}},
        "lm_chat": {"talks": source | {"path": "talks.jsonl", "format": "jsonl"}},
        "mmu": {"pictures": source | {"path": "huge.tar", "format": "webdataset"}},
        "r2i": {},
    }
    return smoke_config | {
        "preset": "tiny",
        "text_vocab": 0,
        "text_tokenizer": str(files / "tokenizer.json"),
        "image_tokenizer": str(files / "image_tokenizer"),
        "image_size": SIZE,
        "max_text": 64,
        "steps": STEPS,
        "batch_size": 8,
        "save_every": 1,
        "mixture": {"t2i": 1, "lm": 1, "lm_chat": 1, "mmu": 1, "r2i": 0},
        "data_root": str(files / "data"),
        "data": data,
        "held_out": data,
        "eval_rows": 8,
        "samples": 2,
    }


def changed(config, changes):
    """A configuration with the values at dotted keys replaced."""
    config = json.loads(json.dumps(config))
    for key, value in changes.items():
        *groups, name = key.split(".")
        at = config
        for group in groups:
            at = at[group]
        at[name] = value
    return config


def codes(path="codes", **values):
    return {"codes": {"path": path, "format": "arrayrecord"} | values}
