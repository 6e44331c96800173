"""Manifests: the size and a hash of every file of a checkpoint, and the comparison with the files.

Orbax keeps no checksum of its data: a flipped bit would come back as a wrong weight. So every checkpoint
gets a manifest when it is complete, and is compared with the manifest before anything is read. The hash is
SHA-256; in a bucket it is the CRC32C that the storage computes and keeps of each object, so that a manifest
is written, and compared, by one listing.
"""

import base64
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmada_jax import files, storage
from mmada_jax.bucket import Bucket
from mmada_jax.outages import Unserved
from mmada_jax.storage import File, write_whole
from mmada_jax.weights.lazy import refuse

MANIFEST = "manifest.sha256.json"
VERSION = 2  # of a manifest; a workdir with a step of version 2 has hashes of its small files (workdir.py)
PARTS = ("params", "opt_state")  # folders of arrays within the folder of a step
TREE = "_METADATA"  # Orbax's description of the arrays of a folder


COMMITTED = "commit_success.txt"  # Orbax's mark in a bucket that a step, or one folder of it, is complete


def write_manifest(folder: storage.Name) -> None:
    """Writes the size and the hash of every file below `folder` into its manifest."""
    folder = storage.path(folder)
    there = _files_below(folder)
    if isinstance(folder, Bucket):
        listed = {name: {"size": file.size, "crc32c": file.crc32c} for name, file in there.items()}
    else:
        listed = {
            name: {"size": there[name].size, "sha256": digest} for name, digest in _hashes_of(there).items()
        }
    write_whole(folder / MANIFEST, json.dumps({"version": VERSION, "files": listed}, indent=1))


def verify_manifest(folder: storage.Name, part: str = "") -> None:
    """Raises ValueError, naming them, if files below `folder` are missing, cut or changed."""
    refuse(find_damage(folder, part), f"{folder} is damaged; use another copy (of a run: train again, it "
           "goes on from the step before)")  # fmt: skip


def find_damage(folder: storage.Name, part: str = "") -> list[str]:
    """A line for each file below `folder` that is missing, cut or changed.

    `part` limits the comparison to one folder within `folder`, as "params". A manifest that is missing, or
    that lists no arrays, counts as damage. Each process hashes a part of the files, and all processes find
    something if one does.
    """
    folder = storage.path(folder)
    try:
        listed = files.read_json(folder / MANIFEST, dict)["files"]
        there = _files_below(folder)
        wrong = [
            f"{tree} is not in {MANIFEST}: the arrays are missing"
            for tree in _trees(folder, there)
            if tree.startswith(part) and tree not in listed
        ]
        # Orbax would read such a file, so what it holds must be known.
        wrong += [
            f"{name} is not in {MANIFEST}, so that nothing tells whether it is whole"
            for name in there
            if _is_data(pathlib.PurePosixPath(name)) and name.startswith(part) and name not in listed
        ]
        mine = sorted(name for name in listed if name.startswith(part))
        mine = mine[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor(_threads()) as pool:
            found = pool.map(lambda name: difference(there.get(name), listed[name]), mine)
            wrong += [f"{name} {what}" for name, what in zip(mine, found, strict=True) if what]
    except FileNotFoundError:
        wrong = [
            f"{MANIFEST} is missing, without which nothing can be verified (if you know that the files are "
            f"as they should be: mmada convert trust --src {_home(folder)})"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wrong = [f"{MANIFEST} can't be read: {error!r}"]
        if storage.is_outage(error):  # the files may be whole
            wrong = [_UNSERVED + str(error)]
    if jax.process_count() > 1:
        told = "\n".join(wrong).encode()[:_TOLD].ljust(_TOLD)
        found = multihost_utils.process_allgather(np.frombuffer(told, np.uint8))
        texts = [bytes(np.asarray(text)).decode(errors="replace").strip() for text in found]
        # All of them say the same: the first process prints it.
        wrong = list(dict.fromkeys(line for text in texts for line in text.splitlines()))
    if unserved := next((line for line in wrong if line.startswith(_UNSERVED)), ""):
        raise Unserved(unserved.removeprefix(_UNSERVED))
    return wrong


_UNSERVED = "unserved: "  # begins what isn't damage
_TOLD = 2000  # bytes of what a process tells the others of its damaged files


def _home(folder: storage.Path) -> storage.Path:
    """The folder that users know: the workdir of a step, or the checkpoint around `params`."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent


def _trees(folder: storage.Path, there: Mapping[str, File]) -> list[str]:
    """The descriptions of arrays that must be in `folder`; none if Orbax didn't write the folder."""
    if any(name.partition("/")[0] in PARTS for name in there):
        return [f"{name}/{TREE}" for name in PARTS]
    return [TREE] if folder.name in PARTS else []


def fingerprint(folder: storage.Name) -> str:
    """A SHA-256 that tells folders of weights apart: of the manifest or, where a folder has none as those
    from Hugging Face, of the hashes of all its files."""
    folder = storage.path(folder)
    if (folder / MANIFEST).is_file():
        return hash_of(folder / MANIFEST)
    return hashlib.sha256(json.dumps(_hashes_of(_files_below(folder))).encode()).hexdigest()


def difference(file: File | None, want: Mapping[str, Any]) -> str | None:
    """How a file differs from its `size` and `sha256` or `crc32c` in a manifest; None if it doesn't."""
    if file is None:
        return "is missing"
    if file.size != want["size"]:
        return f"has {file.size} bytes instead of {want['size']}"
    kind = "crc32c" if "crc32c" in want else "sha256"
    try:
        found = hash_of(file.path) if kind == "sha256" else file.crc32c or _crc32c_of(file.path)
    except OSError as error:  # the disk reports a sector that can't be read
        return f"can't be read: {error.strerror or error}"
    return None if found == want[kind] else f"has changed: its {kind} is another"


def hash_of(path: storage.Path) -> str:
    """The SHA-256 of a file."""
    with storage.open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _crc32c_of(path: storage.Path) -> str:
    """The CRC32C of a file, as a bucket writes it. Raises ValueError if what computes it isn't
    installed."""
    try:
        import google_crc32c
    except ImportError as error:
        raise ValueError(
            f"{path.name} came from a bucket, whose checksums need google-crc32c: "
            "pip install 'mmada_jax[gcp]'"
        ) from error
    seen = google_crc32c.Checksum()
    with storage.open_file(path) as file:
        while block := file.read(1 << 20):
            seen.update(block)
    return base64.b64encode(seen.digest()).decode()


def _hashes_of(there: Mapping[str, File]) -> dict[str, str]:
    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(there, pool.map(lambda file: hash_of(file.path), there.values()), strict=True))


def _is_data(path: pathlib.PurePath) -> bool:
    """Whether a file of this path within a checkpoint or an exported folder holds arrays."""
    own = len(path.parts) == 1 and path.suffix == ".safetensors"
    return own or path.name == "manifest.ocdbt" or "d" in path.parts[:-1]


def _files_below(folder: storage.Path) -> dict[str, File]:
    # Orbax writes time stamps into the second file when it commits a step, after the manifest. The third
    # one commits it, in a bucket.
    skip = (MANIFEST, "_CHECKPOINT_METADATA", COMMITTED)
    return {name: file for name, file in storage.files_below(folder).items() if name not in skip}


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
