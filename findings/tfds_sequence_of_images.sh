#!/usr/bin/env bash
# TensorFlow Datasets 4.9.10: SkipDecoding leaves an image as the file has it, but fails on a sequence of
# images, where a data set is read by random access (as_data_source, which decodes with NumPy).
#
# For a Sequence the library calls decode_batch_example_np of the decoder. Features have that method, the
# decoders have only decode_example_np. Without a decoder every image of the sequence is decoded into
# pixels, whether it is wanted or not. An object of one's own that has both methods works.
#
# Output seen:
#   one image, skipped: bytes
#   several images, not skipped: ndarray
#   several images, skipped: 'SkipDecoding' object has no attribute 'decode_batch_example_np'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorflow-datasets==4.9.10 array_record==0.8.6 pillow==13.0.0
cat >"$folder/show.py" <<'PYTHON'
import io
import sys

import tensorflow_datasets as tfds
from PIL import Image


def picture():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return io.BytesIO(file.getvalue())


class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        one = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        several = tfds.features.Sequence(tfds.features.Image(encoding_format="png"))
        features = tfds.features.FeaturesDict({"image": one, "images": several})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {"train": iter([(0, {"image": picture(), "images": [picture(), picture()]})])}

    def _generate_examples(self):
        raise NotImplementedError


builder = Toy(data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare()
row = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})[0]
print("one image, skipped:", type(row["image"]).__name__)
print("several images, not skipped:", type(row["images"][0]).__name__)
try:
    builder.as_data_source("train", decoders={"images": tfds.decode.SkipDecoding()})[0]
    print("several images, skipped: read")
except AttributeError as error:
    print("several images, skipped:", error)
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder/data" 2>"$folder/log" | tee "$folder/out" || { cat "$folder/log"; exit 1; }
grep -qx "one image, skipped: bytes" "$folder/out"
grep -qx "several images, not skipped: ndarray" "$folder/out"
grep -qx "several images, skipped: 'SkipDecoding' object has no attribute 'decode_batch_example_np'" "$folder/out"
