"""Folders of images, one for each class, and the texts of classes."""

import hashlib
import os
from collections.abc import Sequence

from mmada_jax.data.records import Record
from mmada_jax.data.sources.paths import IMAGES, find_files, find_folder, read_file, stamp_of
from mmada_jax.data.sources.rows import Columns, make_record
from mmada_jax.data.sources.source import Config, Records


class ImageFolder(Records):
    """Images whose text is the name of their class."""

    def __init__(self, config: Config, root: str):
        self._folder = find_folder(config, root)
        classes = sorted(e.name for e in os.scandir(self._folder) if e.is_dir() and e.name[0] != ".")
        if not classes:
            raise ValueError(f"{self._folder} has no folders; expected one for each class of images")
        labels = find_labels(config, root)
        self._texts = [name.replace("_", " ") for name in classes]
        if labels:
            self._texts = read_labels(labels, classes)
        self._files: list[tuple[int, str]] = []
        seen = hashlib.sha256()
        for number, name in enumerate(classes):
            for entry in sorted(os.scandir(os.path.join(self._folder, name)), key=lambda e: e.name):
                _, _, suffix = entry.name.rpartition(".")
                if suffix.lower() in IMAGES and entry.name[0] != "." and entry.is_file():
                    self._files.append((number, f"{name}/{entry.name}"))
                    seen.update(f"{name}/{entry.name}:{entry.stat().st_size}\n".encode(errors="replace"))
        stamp = seen.digest() + stamp_of([*filter(None, [labels])])
        super().__init__(config, len(self._files), stamp)

    def _key(self, index: int) -> str:
        return self._files[index][1]

    def _read(self, index: int) -> Record:
        number, name = self._files[index]
        row = {"image": name, "text": self._texts[number]}
        return make_record(name, row, Columns(image=("image",), text=("text",)), self._folder)


def find_labels(config: Config, root: str) -> str:
    """The path of the file of labels; empty if the config names none."""
    return find_files(config.labels, root)[0] if config.labels else ""


def read_labels(path: str, names: Sequence[str]) -> list[str]:
    """The text of each class of `names`, from lines that start with its name or its index."""
    lines = [line.strip() for line in read_file(path).decode().splitlines() if line.strip()]
    known, found = {*names, *map(str, range(len(names)))}, {}
    for line in lines:
        for key, _, text in (line.partition(":"), line.replace("\t", " ").partition(" ")):
            if key.strip() in known:
                found[key.strip()] = text.strip()
                break
    # An index means something only in a list of the very same classes.
    by_index = [str(i) for i in range(len(names))]
    keys = by_index if found.keys() >= set(by_index) and len(lines) == len(names) else names
    keys = names if found.keys() >= set(names) else keys
    missing = [key for key in keys if not found.get(key)]
    if missing:
        raise ValueError(
            f"{path} names no class {missing[0]!r} ({len(missing)} of {len(names)} lack a name); give "
            f"{len(names)} lines `index: name`, or a line `folder: name` for each"
        )
    return [found[key] for key in keys]
