"""Reading the records that are prepared: which of them can be used, and their images as codes."""

import collections
import dataclasses
import functools
import itertools
import typing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mmada_jax import storage
from mmada_jax.data import images, sources
from mmada_jax.data.records import LeftOut, Record
from mmada_jax.devices import sharding
from mmada_jax.model.vision import Vision
from mmada_jax.weights import lazy
from mmada_jax.weights.folder import open_image_tokenizer

# Images that a device encodes in one call.
IMAGES = 8
# Records that are written together where nothing is encoded.
RECORDS = 64
# If so many records from the start can't be used, the source is the wrong one, or it is read wrongly.
HOPELESS = 1000


@dataclasses.dataclass(frozen=True)
class Skip:
    """A record that is left out, and why."""

    index: int
    key: str
    reason: str
    error: str = ""


class Skips:
    """What was left out of the shards of a source of `records`, and how many records were seen."""

    def __init__(self, share: float, records: int, shards: Iterable[storage.Path]):
        self._share, self._records = share, records
        self._seen: collections.Counter[storage.Path] = collections.Counter()
        self._skips: dict[storage.Path, list[Skip]] = {shard: [] for shard in shards}
        self._all_seen = self._all_skips = 0

    @property
    def all(self) -> list[Skip]:
        """In the order of the shards, whichever was written first."""
        return [skip for skips in self._skips.values() for skip in skips]

    def add(self, shard: storage.Path, seen: int, skips: list[Skip]) -> None:
        """Counts. Raises ValueError, naming examples, as soon as more than the share is left out, or
        all of a good many from the start."""
        self._seen[shard] += seen
        self._skips[shard] += skips
        self._all_seen += seen
        self._all_skips += len(skips)
        n = self._all_skips
        if n > self._share * self._records or n == self._all_seen >= HOPELESS:
            raise ValueError(
                f"{n:,} of the first {self._all_seen:,} records can't be used, of {self._records:,} "
                f"--max_skipped allows {int(self._share * self._records):,}: {self.examples()}"
            )

    def forget(self, shard: storage.Path) -> int:
        """Takes back what was counted of a shard that has to be written again: so many records."""
        seen = self._seen.pop(shard, 0)
        self._all_seen -= seen
        self._all_skips -= len(self._skips[shard])
        self._skips[shard] = []
        return seen

    def examples(self) -> str:
        """The first five."""
        return "; ".join(
            " ".join(filter(None, ["record", str(skip.index), skip.key and f"({skip.key})"]))
            + f": {skip.reason}"
            + (f", {skip.error}" if skip.error else "")
            for skip in self.all[:5]
        )


Loaded = tuple[int, Record, np.ndarray | None]


def read(
    source: sources.Source, size: int | None, how: images.Resize, keep: bool, index: int
) -> Loaded | Skip:
    """Reads a record and decodes its image, to see that it can be and, with `size`, into the pixels
    [I, J, 3] to encode. Without `keep` the record comes back without its image."""
    try:
        record = source[index]
    except LeftOut as error:
        return Skip(index, "", error.why, str(error))
    except ValueError as error:
        return Skip(index, "", "unreadable record", str(error))
    if not (record.turns or any(text.strip() for text in record.texts)):
        return Skip(index, record.key, "no text")
    if record.image is None:
        return Skip(index, record.key, "no image") if size else (index, record, None)
    try:
        if isinstance(record.image, bytes):
            image, data = images.open_image(record.image), record.image
        else:
            image = images.to_image(record.image)
            data = images.png_of(image) if keep else None
        pixels = images.resize(image, size, how) if size else None
    except ValueError as error:
        return Skip(index, record.key, "unreadable image", str(error))
    return index, dataclasses.replace(record, image=data if keep else None), pixels


def ahead(pool: ThreadPoolExecutor, load: Callable[[int], typing.Any], indices: list[int]) -> Iterator:
    """Calls `load` for each index, in threads, and yields the results in order. At most 4 * RECORDS results
    wait to be taken."""
    waiting, indices = collections.deque(), iter(indices)
    for index in itertools.islice(indices, 4 * RECORDS):
        waiting.append(pool.submit(load, index))
    while waiting:
        yield waiting.popleft().result()
        for index in itertools.islice(indices, 1):
            waiting.append(pool.submit(load, index))


class Encoder:
    """The image tokenizer in a folder of any kind, on all devices: pixels -> codes."""

    def __init__(self, path: str, size: int):
        folder = open_image_tokenizer(path)
        down, channels = folder.config.downsampling, folder.config.pixel_channels
        if size % down or channels != 3:
            raise ValueError(
                f"the image tokenizer in {path} takes {channels} channels and sides divisible by {down}; "
                f"images are to have 3 and {size}"
            )
        self.size, self.codes = size, (size // down) ** 2
        self.sha256 = lazy.sha256(folder.tensors())
        self._folder = folder

    @functools.cached_property
    def _vision(self) -> Vision:
        # Devices are taken when they are needed: where actors encode, their driver needs none.
        return Vision.place(self._folder.params, self._folder.config, sharding.make_mesh())

    @property
    def batch(self) -> int:
        """Images that are encoded in one call."""
        return IMAGES * self._vision.mesh.size

    def __call__(self, pixels: list[np.ndarray]) -> np.ndarray:
        """At most `batch` images uint8 [I, J, 3] -> codes int32 [n, N]."""
        batch = np.zeros((self.batch, self.size, self.size, 3), np.uint8)
        batch[: len(pixels)] = pixels
        return self._vision.encode(batch).reshape(self.batch, -1)[: len(pixels)]
