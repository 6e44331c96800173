"""Folders of images, with captions beside the images, or one folder for each class."""

import collections
import hashlib
import posixpath
from collections.abc import Callable, Iterator, Sequence

from mmada_jax import files, storage
from mmada_jax.data.records import Record
from mmada_jax.data.sources.paths import (
    IMAGES,
    MAX_IMAGE,
    MAX_TEXT,
    UNREAD_IMAGES,
    below,
    find_files,
    find_folder,
    read_file,
    stamp_of,
)
from mmada_jax.data.sources.rows import Columns, make_record
from mmada_jax.data.sources.source import Records, SourceConfig


class ImageFolder(Records):
    """A record for each image. Its text is the content of the text file beside it (`dog.txt` of `dog.png`),
    else the name of its class. Where there are no classes, images without a text file are left out, unless
    no image has one: then the text is the name of the folder."""

    def __init__(self, config: SourceConfig, root: str):
        self._folder = find_folder(config, root)
        scan = _scanner(self._folder)
        inside = scan("")
        classes = sorted(e.name for e in inside if e.is_dir and e.name[0] != ".")
        labels = find_labels(config, root)
        self._texts = [name.replace("_", " ") for name in classes]
        if labels:
            self._texts = read_labels(labels, classes)
        # (number of the class, path, path of the caption or an empty text)
        self._files: list[tuple[int, str, str]] = []
        ignored: collections.Counter[str] = collections.Counter()
        seen = hashlib.sha256()
        if not classes:
            classes, self._texts = [""], [posixpath.basename(self._folder).replace("_", " ")]
        else:
            for entry in inside:
                if not entry.is_dir and _is_image(entry.name):
                    ignored["image outside of the folders of classes"] += 1
        for number, name in enumerate(classes):
            for path, size, caption, length in _images_below(scan, name, ignored):
                self._files.append((number, path, caption))
                seen.update(f"{path}:{size}\n".encode(errors="replace"))
                if caption:
                    seen.update(f"{caption}:{length}\n".encode(errors="replace"))
        if classes == [""] and any(caption for _, _, caption in self._files):
            ignored["no caption"] += sum(not caption for _, _, caption in self._files)
            self._files = [file for file in self._files if file[2]]
        stamp = seen.digest() + stamp_of([*filter(None, [labels])])
        super().__init__(config, len(self._files), stamp, +ignored)

    def _key(self, index: int) -> str:
        return self._files[index][1]

    def _read(self, index: int) -> Record:
        number, name, caption = self._files[index]
        said = ""
        if caption:
            path = below(self._folder, caption)
            said = files.decode(read_file(path, limit=MAX_TEXT), path).strip()
        row = {"image": name, "text": said or self._texts[number]}
        return make_record(name, row, Columns(image=("image",), text=("text",)), self._folder)


def _scanner(folder: str) -> Callable[[str], list[storage.Place]]:
    """A function that gives what lies directly in a folder below `folder`, by its name there. All that lies
    in a bucket is listed at once."""
    where = storage.path(folder)
    if not storage.in_bucket(where):
        return lambda name: storage.scan(where / name)
    inside: dict[str, dict[str, storage.Place]] = collections.defaultdict(dict)
    for path, file in storage.files_below(where).items():
        around, _, name = path.rpartition("/")
        inside[around][name] = storage.Place(name, False, True, False, file.size)
        while around:
            above, _, name = around.rpartition("/")
            inside[above].setdefault(name, storage.Place(name, True, False))
            around = above
    return lambda name: list(inside[name].values())


def _images_below(
    scan: Callable[[str], list[storage.Place]], name: str, ignored: collections.Counter[str]
) -> Iterator[tuple[str, int, str, int]]:
    """(path, size in bytes, path of the caption, its size) of each image at any depth below the folder
    `name`, in order. The path is empty if there is no text file beside the image.

    `ignored` counts the files that are left out. Hidden files are counted only if they are pictures.
    """
    entries = sorted(scan(name), key=lambda entry: entry.name)
    stems = {entry.name.rpartition(".")[0] for entry in entries if _is_image(entry.name)}
    captions = {e.name[:-4]: e for e in entries if _suffix(e.name) == "txt" and e.name[:-4] in stems}
    beside = {entry.name for entry in captions.values()}
    prefix = f"{name}/" if name else ""
    for entry in entries:
        path = f"{prefix}{entry.name}"
        if entry.name in beside:
            continue
        if entry.name[0] == ".":
            ignored["hidden file"] += _is_image(entry.name)
            continue
        if entry.is_dir and not entry.is_link:
            yield from _images_below(scan, path, ignored)
        elif entry.is_dir:
            ignored["link to a folder"] += 1  # the link may lead to a folder above it
        elif not _is_image(entry.name):
            ignored["no image"] += 1
        elif not entry.is_file:
            ignored["broken link or no regular file"] += 1
        elif _suffix(entry.name) in UNREAD_IMAGES:
            ignored["format of images that isn't read"] += 1
        else:
            caption = captions.get(entry.name.rpartition(".")[0])
            if caption and not caption.size:
                caption = None  # an empty file says nothing
            yield path, entry.size, *((prefix + caption.name, caption.size) if caption else ("", 0))


def _is_image(name: str) -> bool:
    return _suffix(name) in IMAGES + UNREAD_IMAGES


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def find_labels(config: SourceConfig, root: str) -> str:
    """The path of the file of labels, or an empty text if the config names no such file."""
    return find_files(config.labels, root)[0] if config.labels else ""


def read_labels(path: str, names: Sequence[str]) -> list[str]:
    """The text of each class of `names`. A line of the file starts with a class's name or index."""
    lines = [line.strip() for line in files.read_text(path, MAX_IMAGE).splitlines() if line.strip()]
    known, found = {*names, *map(str, range(len(names)))}, {}
    for line in lines:
        for key, _, text in (line.partition(":"), line.replace("\t", " ").partition(" ")):
            if key.strip() in known:
                found[key.strip()] = text.strip()
                break
    # Indices are trusted only if the file lists as many classes as there are.
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
