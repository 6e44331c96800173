"""Manifests: the size and the SHA-256 of every file of a checkpoint, and the comparison with the files.

Orbax keeps no checksum of its data: a flipped bit would come back as a wrong weight. So every checkpoint
gets a manifest when it is complete, and is compared with the manifest before anything is read.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmada_jax import files
from mmada_jax.disk import write_whole
from mmada_jax.weights.lazy import refuse

MANIFEST = "manifest.sha256.json"
VERSION = 2  # of a manifest; a workdir with a step of version 2 has hashes of its small files (workdir.py)
PARTS = ("params", "opt_state")  # folders of arrays within the folder of a step
TREE = "_METADATA"  # Orbax's description of the arrays of a folder


def write_manifest(folder: str | pathlib.Path) -> None:
    """Writes the size and the sha256 of every file below `folder` into its manifest."""
    folder = pathlib.Path(folder)
    listed = {
        name: {"size": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in _hashes_below(folder).items()
    }
    write_whole(folder / MANIFEST, json.dumps({"version": VERSION, "files": listed}, indent=1))


def verify_manifest(folder: str | pathlib.Path, part: str = "") -> None:
    """Raises ValueError, naming them, if files below `folder` are missing, cut or changed."""
    refuse(find_damage(folder, part), f"{folder} is damaged; use another copy (of a run: train again, it "
           "goes on from the step before)")  # fmt: skip


def find_damage(folder: str | pathlib.Path, part: str = "") -> list[str]:
    """A line for each file below `folder` that is missing, cut or changed.

    `part` limits the comparison to one folder within `folder`, as "params". A manifest that is missing, or
    that lists no arrays, counts as damage. Each process hashes a part of the files, and all processes find
    something if one does.
    """
    folder = pathlib.Path(folder)
    try:
        listed = files.read_json(folder / MANIFEST, dict)["files"]
        wrong = [
            f"{tree} is not in {MANIFEST}: the arrays are missing"
            for tree in _trees(folder)
            if tree.startswith(part) and tree not in listed
        ]
        # Orbax would read such a file, so what it holds must be known.
        wrong += [
            f"{name} is not in {MANIFEST}, so that nothing tells whether it is whole"
            for name in _files_below(folder, _is_data)
            if name.startswith(part) and name not in listed
        ]
        mine = sorted(name for name in listed if name.startswith(part))
        mine = mine[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor(_threads()) as pool:
            found = pool.map(lambda name: difference(folder / name, listed[name]), mine)
            wrong += [f"{name} {what}" for name, what in zip(mine, found, strict=True) if what]
    except FileNotFoundError:
        wrong = [
            f"{MANIFEST} is missing, without which nothing can be verified (if you know that the files are "
            f"as they should be: mmada convert trust --src {_home(folder)})"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = [f"{MANIFEST} can't be read: {error!r}"]
    if jax.process_count() > 1:
        counts = multihost_utils.process_allgather(np.int32(len(wrong)))
        if not wrong and counts.any():
            wrong = [f"process {int(np.flatnonzero(counts)[0])} found damaged files"]
    return wrong


def _home(folder: pathlib.Path) -> pathlib.Path:
    """The folder that users know: the workdir of a step, or the checkpoint around `params`."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent


def _trees(folder: pathlib.Path) -> list[str]:
    """The descriptions of arrays that must be in `folder`; none if Orbax didn't write the folder."""
    if any((folder / name).is_dir() for name in PARTS):
        return [f"{name}/{TREE}" for name in PARTS]
    return [TREE] if folder.name in PARTS else []


def fingerprint(folder: str | pathlib.Path) -> str:
    """A SHA-256 that tells folders of weights apart: of the manifest or, where a folder has none as those
    from Hugging Face, of the hashes of all its files."""
    folder = pathlib.Path(folder)
    if (folder / MANIFEST).is_file():
        return hash_of(folder / MANIFEST)
    return hashlib.sha256(json.dumps(_hashes_below(folder)).encode()).hexdigest()


def difference(path: pathlib.Path, want: Mapping[str, Any]) -> str | None:
    """How a file differs from its `size` and `sha256` in a manifest; None if it doesn't."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != want["size"]:
        return f"has {path.stat().st_size} bytes instead of {want['size']}"
    try:
        return None if hash_of(path) == want["sha256"] else "has changed: its sha256 is another"
    except OSError as error:  # the disk reports a sector that can't be read
        return f"can't be read: {error.strerror}"


def hash_of(path: pathlib.Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes_below(folder: pathlib.Path) -> dict[str, str]:
    names = _files_below(folder)
    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(names, pool.map(lambda name: hash_of(folder / name), names), strict=True))


def _is_data(path: pathlib.PurePath) -> bool:
    """Whether a file of this path within a checkpoint or an exported folder holds arrays."""
    own = len(path.parts) == 1 and path.suffix == ".safetensors"
    return own or path.name == "manifest.ocdbt" or "d" in path.parts[:-1]


def _files_below(
    folder: pathlib.Path, which: Callable[[pathlib.PurePath], bool] = lambda path: True
) -> list[str]:
    # Orbax writes time stamps into the second file when it commits a step, after the manifest.
    skip = (MANIFEST, "_CHECKPOINT_METADATA")
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and str(path.relative_to(folder)) not in skip and which(path.relative_to(folder))
    )


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
