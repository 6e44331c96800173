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
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax

from mmada_jax import disk, files
from mmada_jax.weights.manifest import MANIFEST, VERSION

LOCK, BUSY = ".lock", "another process has this workdir, {}"
FILES = "files.sha256.json"
MISSING = "missing"  # stands for the hash of a file that isn't written yet
NAMES = CONFIG, MODEL, TOKENIZER, DATA = "config.json", "model.json", "tokenizer.json", "data.json"


# ---- One owner -----------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: str | pathlib.Path, busy: str) -> Iterator[TextIO]:
    """Holds the lock of the file `path`, which is made with its folders. The kernel releases the lock when
    the process ends, however it ends.

    Raises ValueError, with the text `busy` and the owner, if another process has the lock. If the file
    system knows no locks, a warning says so.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", errors="replace") as file:
        _take(file, busy)
        about = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n"
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the owner's name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), about.encode())
        yield file


def claimed(workdir: str | pathlib.Path) -> contextlib.AbstractContextManager[TextIO]:
    """Holds the lock of a workdir. Raises ValueError if another run has it."""
    return locked(pathlib.Path(workdir) / LOCK, BUSY.format(workdir))


def refuse_busy(workdir: str | pathlib.Path) -> None:
    """Raises ValueError if another run has the workdir. Asked early, it saves reading data for a run that
    can't begin. The first process asks; nothing is written."""
    path = pathlib.Path(workdir) / LOCK
    if jax.process_index() == 0 and path.is_file():
        with path.open("a+", errors="replace") as file:
            _take(file, BUSY.format(workdir))


def _take(file: TextIO, busy: str) -> None:
    """Locks a file until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read(200).strip() or "a process that isn't known"
        raise ValueError(f"{busy} (taken by {owner}); wait or end it") from error
    except OSError as error:
        print(
            f"warning: {file.name} can't be locked ({error.strerror}); make sure that no "
            "other program writes there",
            file=sys.stderr, flush=True,
        )  # fmt: skip


# ---- Files ---------------------------------------------------------------------------------------


def write_files(workdir: str | pathlib.Path, texts: Mapping[str, str]) -> None:
    """Writes files of a workdir, texts by their names, each whole or not at all, and their hashes."""
    workdir = pathlib.Path(workdir)
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
        disk.write_whole(workdir / name, text)
    _write_hashes(workdir, old | {name: [new[name]] for name in new})


def record_files(folder: str | pathlib.Path) -> None:
    """Writes the hashes that the small files of a workdir or a checkpoint have now."""
    there = [path for name in NAMES if (path := pathlib.Path(folder) / name).is_file()]
    _write_hashes(pathlib.Path(folder), {path.name: [_hash(path)] for path in there})


def check_files(folder: str | pathlib.Path) -> None:
    """Raises FileNotFoundError or ValueError, naming it, if a small file of a workdir or a checkpoint is
    missing or has changed. A folder of an older version has no hashes, and is taken as it is."""
    folder = pathlib.Path(folder)
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


def _changed(folder: pathlib.Path, name: str) -> bool:
    return _hash(folder / name) not in _hashes(folder).get(name, [])


def _hash(path: pathlib.Path) -> str:
    """The SHA-256 of a file of text, without the byte order mark that some editors add."""
    return hashlib.sha256(path.read_bytes().removeprefix(codecs.BOM_UTF8)).hexdigest()


def _is_recent(folder: pathlib.Path) -> bool:
    """Whether the newest step of a workdir, or the params of a checkpoint, were written by a version that
    also writes hashes of the small files."""
    arrays = newest_step(folder) if has_step(folder) else folder / "params"
    try:
        return files.read_json(arrays / MANIFEST, dict).get("version", 1) >= VERSION
    except (OSError, ValueError):
        return False  # a damaged manifest is reported where the arrays are read


def _hashes(folder: pathlib.Path) -> dict[str, list[str]]:
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


def _write_hashes(folder: pathlib.Path, hashes: Mapping[str, list[str]]) -> None:
    disk.write_whole(folder / FILES, json.dumps(dict(hashes), indent=1))


# ---- The configuration ---------------------------------------------------------------------------


def read_config(workdir: str | pathlib.Path) -> dict[str, Any]:
    """config.json of a workdir. Raises FileNotFoundError if there is none, ValueError if it is damaged."""
    path = pathlib.Path(workdir) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no workdir of a training run: {path.name} is missing")
    return files.read_json(path, dict)


def check_workdir(
    workdir: str | pathlib.Path,
    config: dict[str, Any],
    fixed: tuple[str, ...],
    free: tuple[str, ...] = (),
    absent: Mapping[str, Any] | None = None,
) -> None:
    """Raises ValueError if the workdir is damaged, or holds another model.

    The top-level groups of the configuration in `fixed` must be those of the run that made the workdir,
    but for the keys in `free`. Other groups may change when a run is resumed. `absent` are the values that
    groups had before there were fields for them, in older versions."""
    path = pathlib.Path(workdir) / CONFIG
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
    workdir: str | pathlib.Path,
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


def newest_step(workdir: str | pathlib.Path, step: int | None = None) -> pathlib.Path:
    """The folder of the newest complete step of a workdir, or of `step`. The folder has a manifest.

    Raises FileNotFoundError if there is no such step. Nothing is created or cleaned up.
    """
    folder = disk.resolved(workdir) / "checkpoints"
    if not has_step(workdir):
        raise FileNotFoundError(f"no checkpoint in {folder}; train first, or name another workdir")
    known = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    if step is not None and step not in known:
        raise FileNotFoundError(f"no step {step} in {folder}; it has {', '.join(map(str, known))}")
    return folder / str(known[-1] if step is None else step)


def has_step(workdir: str | pathlib.Path) -> bool:
    """Whether a workdir has a complete step. Orbax writes a step under another name and then renames it."""
    folder = pathlib.Path(workdir) / "checkpoints"
    return folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())
