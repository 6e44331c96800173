"""A workdir but for its arrays: who may write to it, its small files, and which steps it has.

WORKDIR/.lock               held by the run that writes here
WORKDIR/config.json         the configuration of the run
WORKDIR/model.json          which model the run trains (folder.py)
WORKDIR/tokenizer.json      the text tokenizer, of a model
WORKDIR/data.json           which data the run has
WORKDIR/files.sha256.json   the hashes of these files; the files are compared with them before they are read
WORKDIR/checkpoints/N       the arrays (checkpoint.py)
WORKDIR/image_tokenizer     a copy of the model's image tokenizer, a checkpoint (folder.py)
"""

import codecs
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mmada_jax import files, storage
from mmada_jax.bucket import Bucket
from mmada_jax.weights.manifest import COMMITTED, MANIFEST, VERSION

LOCK, BUSY = ".lock", "another process has this workdir, {}"
FILES = "files.sha256.json"
MISSING = "missing"  # stands for the hash of a file that isn't written yet
NAMES = CONFIG, MODEL, TOKENIZER, DATA = "config.json", "model.json", "tokenizer.json", "data.json"


# ---- One owner -----------------------------------------------------------------------------------


def claimed(workdir: storage.Name) -> contextlib.AbstractContextManager[Any]:
    """Holds the lock of a workdir, or in a bucket its lease. Raises ValueError if another run has it."""
    return storage.locked(storage.path(workdir) / LOCK, BUSY.format(workdir))


def refuse_busy(workdir: storage.Name) -> None:
    """Raises ValueError if another run has the workdir. Asked early, it saves reading data for a run that
    can't begin. The first process asks; nothing is written."""
    if jax.process_index() == 0:
        storage.refuse_locked(storage.path(workdir) / LOCK, BUSY.format(workdir))


# ---- Files ---------------------------------------------------------------------------------------


def write_files(workdir: storage.Name, texts: Mapping[str, str]) -> None:
    """Writes files of a workdir, texts by their names, each whole or not at all, and their hashes."""
    workdir = storage.path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    old = _hashes(workdir)
    there = {name: _hash(path) for name in texts if (path := workdir / name).is_file()}
    new = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    if all(old.get(name) == [new[name]] == [there.get(name)] for name in new):
        return
    # While files are written, the old and the new hash of each are right. So a workdir is whole again
    # whenever this program is killed.
    _write_hashes(workdir, old | {name: [there.get(name, MISSING), new[name]] for name in new})
    for name, text in texts.items():
        storage.write_whole(workdir / name, text)
    _write_hashes(workdir, old | {name: [new[name]] for name in new})


def record_files(folder: storage.Name) -> None:
    """Writes the hashes that the small files of a workdir or a checkpoint have now."""
    there = [path for name in NAMES if (path := storage.path(folder) / name).is_file()]
    _write_hashes(storage.path(folder), {path.name: [_hash(path)] for path in there})


def check_files(folder: storage.Name) -> None:
    """Raises FileNotFoundError or ValueError, naming it, if a small file of a workdir or a checkpoint is
    missing or has changed. A folder of an older version has no hashes, and is taken as it is."""
    folder = storage.path(folder)
    told = f"put it back (if you changed it yourself: mmada convert trust --src {folder})"
    if not (folder / FILES).is_file() and _is_recent(folder):
        raise FileNotFoundError(f"{folder} has no {FILES}; {told}")
    for name, hashes in _hashes(folder).items():
        if not (folder / name).is_file():
            if MISSING in hashes:
                continue
            raise FileNotFoundError(f"{folder} has no {name}; {told}")
        # A run that starts may have written the file between reading it and reading its hash: ask twice.
        if _changed(folder, name) and _changed(folder, name):
            raise ValueError(
                f"{folder / name} is damaged or was changed: its sha256 is another than in {FILES}; {told}"
            )


def _changed(folder: storage.Path, name: str) -> bool:
    return _hash(folder / name) not in _hashes(folder).get(name, [])


def _hash(path: storage.Path) -> str:
    """The SHA-256 of a file of text, without the byte order mark that some editors add."""
    return hashlib.sha256(path.read_bytes().removeprefix(codecs.BOM_UTF8)).hexdigest()


def _is_recent(folder: storage.Path) -> bool:
    """Whether the newest step of a workdir, or the params of a checkpoint, were written by a version that
    also writes hashes of the small files."""
    arrays = newest_step(folder) if has_step(folder) else folder / "params"
    try:
        return files.read_json(arrays / MANIFEST, dict).get("version", 1) >= VERSION
    except (OSError, ValueError):
        return False  # a damaged manifest is reported where the arrays are read


def _hashes(folder: storage.Path) -> dict[str, list[str]]:
    path = folder / FILES
    if not path.is_file():
        return {}
    try:
        hashes = files.read_json(path, dict, keys=(CONFIG,))
        if not all(isinstance(of_file, list) for of_file in hashes.values()):
            raise ValueError(f"{path} is damaged: it holds other values than lists of hashes")
    except ValueError as error:
        raise ValueError(
            f"{error}; put back what was there, or write it anew: mmada convert trust --src {folder}"
        ) from error
    return hashes


def _write_hashes(folder: storage.Path, hashes: Mapping[str, list[str]]) -> None:
    storage.write_whole(folder / FILES, json.dumps(dict(hashes), indent=1))


# ---- The configuration ---------------------------------------------------------------------------


def read_config(workdir: storage.Name) -> dict[str, Any]:
    """config.json of a workdir. Raises FileNotFoundError if there is none, ValueError if it is damaged."""
    path = storage.path(workdir) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no workdir of a training run: {path.name} is missing")
    return files.read_json(path, dict)


def check_workdir(
    workdir: storage.Name,
    config: dict[str, Any],
    fixed: tuple[str, ...],
    free: tuple[str, ...] = (),
    absent: Mapping[str, Any] | None = None,
) -> None:
    """Raises ValueError if the workdir is damaged, or holds another model.

    The top-level groups of the configuration in `fixed` must be those of the run that made the workdir,
    but for the keys in `free`. Other groups may change when a run is resumed. `absent` are the values that
    groups had before there were fields for them, in older versions."""
    path = storage.path(workdir) / CONFIG
    check_files(workdir)
    if not path.is_file():
        if has_step(workdir):
            raise ValueError(
                f"{workdir} has checkpoints but no {CONFIG}; put it back, or choose an empty workdir"
            )
        return
    lists = lambda values: json.loads(json.dumps(values))  # noqa: E731  # of tuples, as the file has them
    old, new = lists(dict(absent or {})) | read_config(workdir), lists(config)
    different = [
        f"{key} is {a!r} there and {b!r} now"
        for group in fixed
        for key, a, b in differences(group, old.get(group), new.get(group))
        if key not in free
    ]
    if different:
        raise ValueError(
            f"{workdir} holds another model ({different[0]}); choose an empty workdir or the "
            "configuration that it was made with"
        )


def claim_workdir(
    workdir: storage.Name,
    config: Mapping[str, Any],
    texts: Mapping[str, str] | None = None,
    model: Mapping[str, Any] | None = None,
) -> None:
    """Writes the config.json of a workdir, its model.json if it holds a `model`, and other files by their
    names. The first process does."""
    if jax.process_index() == 0:
        # config.json comes last: that of older versions describes the model, until model.json is there.
        described = {MODEL: json.dumps(model, indent=1)} if model else {}
        write_files(workdir, {**described, **(texts or {}), CONFIG: json.dumps(config, indent=1)})


def differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, old value, new value) for each value that differs between two trees of dicts."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(f"{path}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield path, old, new


# ---- Steps ---------------------------------------------------------------------------------------


def newest_step(workdir: storage.Name, step: int | None = None) -> storage.Path:
    """The folder of the newest complete step of a workdir, or of `step`. The folder has a manifest.

    Raises FileNotFoundError if there is no such step. Nothing is created or cleaned up.
    """
    folder, known = storage.resolved(workdir) / "checkpoints", steps(workdir)
    if not known:
        raise FileNotFoundError(f"no checkpoint in {folder}; train first, or name another workdir")
    if step is not None and step not in known:
        raise FileNotFoundError(f"no step {step} in {folder}; it has {', '.join(map(str, known))}")
    return folder / str(known[-1] if step is None else step)


def has_step(workdir: storage.Name) -> bool:
    """Whether a workdir has a complete step."""
    return bool(steps(workdir))


def steps(workdir: storage.Name) -> list[int]:
    """The complete steps of a workdir, in order. On a disk Orbax writes a step under another name and then
    renames it. In a bucket it writes under the final name, and at last an object that commits the step."""
    folder = storage.path(workdir) / "checkpoints"
    if isinstance(folder, Bucket):
        there = [path for path in folder.iterdir() if path.name.isdigit()]
        return sorted(int(path.name) for path in there if (path / COMMITTED).is_file())
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
