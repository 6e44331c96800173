"""Checkpoints through Orbax: asynchronous, atomic, verified before they are read.

WORKDIR/config.json          the configuration of a training run
WORKDIR/checkpoints/N        params and optimizer state after N steps, the newest few
FOLDER/params                params alone, streamed there by a conversion

Orbax keeps no checksum of the data: a flipped bit would come back as a wrong weight. So every
checkpoint gets a manifest of sizes and hashes when it is complete, and is compared with it before
anything is restored. A run whose newest checkpoint is damaged goes on from the one before; a checkpoint
that can't be written costs the run nothing but that checkpoint.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils

from mmada_jax.convert import Lazy, leaves, pieces, refuse, tree
from mmada_jax.state import TrainState

MANIFEST = "manifest.sha256.json"

# Axes of params are stored in chunks of these lengths, so that a process of a sharded restore reads
# little more than its own part, and a conversion can read a matrix by rows and by columns.
CHUNKS = {"layers": 1, "embed": 256, "vocab": 8192}


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager: leaving it finishes the last save, and
    raises OSError if that failed. A save before the last one that fails is reported on stderr and
    counted in `failed`."""

    def __init__(self, workdir: str | pathlib.Path, keep: int = 2):
        self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
        self.failed = 0
        self._saving: int | None = None
        self._nbytes = 0  # of the state that is being saved
        self._problem = ""  # of the last save
        after = ocp.options.AsyncOptions(
            post_finalization_callback=self._write_manifest,
            # The writers would wait for minutes for a folder that can't be made.
            create_directories_asynchronously=False,
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True, async_options=after
            ),
        )

    def __enter__(self):
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, kind, *_):
        newest = self.latest()
        self._attempt(self._manager.close)
        self._clear()
        sys.unraisablehook = self._hook
        if self._problem and kind is None:
            raise OSError(
                f"{self._problem}; the newest complete step is {newest or 'none'}: make room in "
                f"{self.folder} and run again"
            )
        self._warn()

    def latest(self) -> int | None:
        """The newest complete step, None if there is none. Waits for the save that is under way."""
        self._attempt(self._manager.wait_until_finished)
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts saving `state` under its step; does nothing if that step is there already."""
        step = int(state.step)
        if step == self.latest():  # one save at a time: `_saving` is the one under way
            return
        self._warn()
        self._clear()
        self._saving, self._nbytes = step, sum(x.nbytes for x in jax.tree.leaves(state))
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params), opt_state=ocp.args.StandardSave(state.opt_state)
        )
        self._attempt(lambda: self._manager.save(step, args=args))

    def restore(self, shapes: TrainState, shardings: TrainState, step: int | None = None) -> TrainState:
        """The newest step that is as its manifest says, or `step` where that is known to be it, as arrays
        of these shapes laid out by these shardings. Damaged steps that are newer are renamed to N.damaged:
        the run writes them anew.

        Raises ValueError, naming files or leaves, if all steps are damaged or if a leaf has another
        shape or dtype than asked for.
        """
        step = self.newest_whole() if step is None else step
        folder = self.folder / str(step)
        _check_leaves(folder / "params", shapes.params)
        _check_leaves(folder / "opt_state", shapes.opt_state)
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                opt_state=ocp.args.StandardRestore(target.opt_state),
            ),
        )
        number = jax.device_put(jax.numpy.int32(step), shardings.step)
        return TrainState(number, restored["params"], restored["opt_state"])

    def newest_whole(self) -> int:
        """The newest step that is whole, after damaged ones that are newer were renamed to N.damaged.

        Raises ValueError, and renames nothing, if there is none."""
        self.latest()  # complete
        step, damage = int(newest_step(self.folder.parent).name), {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            wrong = find_damage(self.folder / str(step))
            if not wrong:
                break
            damage[step] = wrong
        else:
            wrong = [f"step {step}: {file}" for step, files in damage.items() for file in files]
            refuse(wrong, f"no checkpoint in {self.folder} is whole; copy one there from elsewhere, or "
                   "choose another workdir to start anew")  # fmt: skip
        if not damage:
            return step
        for number, files in damage.items() if jax.process_index() == 0 else ():
            aside, again = self.folder / f"{number}.damaged", 1
            while aside.exists():
                aside, again = self.folder / f"{number}.damaged.{again}", again + 1
            (self.folder / str(number)).rename(aside)
            more = f" and {len(files) - 3} files more" if len(files) > 3 else ""
            print(
                f"warning: the checkpoint of step {number} is damaged ({'; '.join(files[:3])}{more}) and "
                f"now called {aside.name}; going on from step {step}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()
        return step

    def _attempt(self, write: Callable[[], Any]) -> None:
        """Calls `write`; if it fails, the reason is kept and what it has left removed."""
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:  # a full disk is any of them
            if self._problem:
                return  # what follows from it
            self._manager.reload()  # it takes steps for removed that still are there
            if self._saving in self._manager.all_steps():
                return  # what failed is the removal of an older one
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                self._manager.check_for_errors()  # or they are those of the next save
            self._clear()
            cause: BaseException = error
            while jax.process_count() > 1 and cause.__context__:
                cause = cause.__context__  # of the error that no other process came to the barrier
            reason = (str(cause).strip() or repr(cause)).splitlines()[0]
            free = shutil.disk_usage(self.folder).free
            self._problem = (
                f"the checkpoint of step {self._saving} could not be saved ({reason}); it needs "
                f"{self._nbytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
            )
            self.failed += 1

    def _clear(self) -> None:
        """Removes what failed saves have left, when no save is under way. A write that ends late makes
        its folder anew, so that once isn't enough."""
        if jax.process_index() == 0:
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def _warn(self) -> None:
        if self._problem and jax.process_index() == 0:
            print(f"warning: {self._problem}; going on without it", file=sys.stderr, flush=True)
        self._problem = ""

    def _unraisable(self, what: Any) -> None:
        # When a write fails, the event loop of that save is closed before all of its writes have ended,
        # and each of these finds that worth a traceback.
        if str(what.exc_value) != "Event loop is closed":
            self._hook(what)

    def _write_manifest(self) -> None:
        # Orbax calls this in the first process when all processes have written, before it renames the
        # temporary folder: a step is committed with its manifest or not at all.
        (folder,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        write_manifest(folder)


def newest_step(workdir: str | pathlib.Path) -> pathlib.Path:
    """The folder of the newest complete step of a workdir; its manifest covers all that is in it.

    Raises FileNotFoundError if there is none. Nothing is created or cleaned up.
    """
    folder = pathlib.Path(workdir).resolve() / "checkpoints"
    if not has_step(workdir):
        raise FileNotFoundError(f"no checkpoint in {folder}; train first, or name another workdir")
    return folder / str(max(int(p.name) for p in folder.iterdir() if p.name.isdigit()))


def has_step(workdir: str | pathlib.Path) -> bool:
    """Whether a workdir has a complete step. Orbax writes one under another name and renames it."""
    folder = pathlib.Path(workdir) / "checkpoints"
    return folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())


# ---- Params alone --------------------------------------------------------------------------------


def newest_params(workdir: str | pathlib.Path) -> tuple[dict[str, Any], int]:
    """The params of the newest step of a workdir, verified, as `open_params` gives them; and the step."""
    folder = newest_step(workdir)
    verify_manifest(folder, "params")
    return open_params(folder / "params"), int(folder.name)


def write_params(
    folder: str | pathlib.Path,
    params: Mapping[str, Any],
    axes: Any,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Streams a tree of Lazy arrays into an Orbax checkpoint with a manifest; `folder` must be new.

    `axes` is the tree of logical axis names (they decide how arrays are cut into chunks), or None.
    Holds a few pieces of arrays in memory, never all of one.
    """
    streams = _StreamHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (_Stream, streams)
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    names = {path: names for path, names in leaves(axes)} if axes else {}
    streamed = tree(
        (path, _Stream(array, _chunks(array, names.get(path)), progress)) for path, array in leaves(params)
    )
    folder = pathlib.Path(folder).resolve()
    # Data files are written when they reach this size, and held in memory before.
    args = ocp.args.PyTreeSave(streamed, ocdbt_target_data_file_size=32 << 20)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder, args=args)
    except Exception as error:
        raise streams.error or error from error
    if streams.error:
        shutil.rmtree(folder)
        raise streams.error
    write_manifest(folder)


def open_params(folder: str | pathlib.Path) -> dict[str, Any]:
    """The arrays of a checkpoint's params (or optimizer state) as a tree of Lazy arrays; nothing is read
    yet."""
    folder = pathlib.Path(folder).resolve()

    def open_one(path):
        # What Orbax writes: one zarr array for each leaf in one OCDBT store.
        base = {"driver": "file", "path": f"{folder}/"}
        store = {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}
        array = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
        return Lazy(array.shape, array.dtype.numpy_dtype, lambda index: array[index].read().result())

    return tree((path, open_one(path)) for path in _stored(folder))


class _Stream:
    """A Lazy array on its way into a checkpoint: what Orbax wants to know of a leaf, and the chunks."""

    def __init__(self, array: Any, chunks: tuple[int, ...], progress: Callable[[int], None]):
        self.array, self.chunks, self.progress = array, chunks, progress
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.size
        self.ndim, self.nbytes = len(array.shape), array.nbytes


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, which writes piece by piece, a few at a time.

    The first error ends the writing of all arrays and is kept: raised here, it would leave Orbax's
    event loop with the others half-way.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._few = asyncio.Semaphore(3)
        # Nothing waits for the disk: a checkpoint that a power cut left incomplete fails its manifest.
        self._context = tensorstore.Context(
            {"file_io_sync": False, "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}}
        )
        self.error: Exception | None = None

    async def _open_and_write(self, value: _Stream, tspec: dict[str, Any], ts_context: Any) -> None:
        tspec["metadata"]["chunks"] = list(value.chunks)
        try:
            store = await tensorstore.open(tspec, create=True, open=True, context=self._context)
        except Exception as error:
            self.error = self.error or error
            return

        async def write(index):
            async with self._few:
                if self.error:
                    return
                try:
                    part = await asyncio.to_thread(lambda: value.array[index])
                    await store[index].write(part, can_reference_source_data_indefinitely=True)
                    value.progress(part.nbytes)
                except Exception as error:
                    self.error = self.error or error

        step = value.chunks[0] if value.chunks else 1
        await asyncio.gather(*(write(index) for index in pieces(value.array, multiple=step)))


def _chunks(array: Any, names: tuple[str | None, ...] | None) -> tuple[int, ...]:
    names = names or (None,) * len(array.shape)
    return tuple(max(1, min(n, CHUNKS.get(name, n))) for n, name in zip(array.shape, names, strict=True))


def _stored(folder: pathlib.Path) -> dict[tuple[str, ...], Any]:
    """Path -> what Orbax recorded (shape, dtype) of every leaf of a checkpoint."""
    try:
        found = ocp.PyTreeCheckpointHandler().metadata(folder)
    except (ValueError, FileNotFoundError, KeyError) as error:
        raise ValueError(f"{folder} is no readable checkpoint: {error}") from error
    return ocp.tree.to_flat_dict(found.tree)


def _check_leaves(folder: pathlib.Path, shapes: Any) -> None:
    """Orbax would cast a leaf of another dtype without a word."""
    stored = _stored(folder)
    wrong = []
    for path, want in ocp.tree.to_flat_dict(shapes).items():
        have = stored.get(path)
        if have is None:
            wrong.append(f"missing {'.'.join(path)}")
        elif np.dtype(have.dtype) != np.dtype(want.dtype):
            wrong.append(f"{'.'.join(path)} is {have.dtype}, {want.dtype} is asked for")
        elif tuple(have.shape) != tuple(want.shape):
            wrong.append(f"{'.'.join(path)} has shape {tuple(have.shape)}, not {tuple(want.shape)}")
    refuse(wrong, f"the checkpoint in {folder} doesn't fit this run")


# ---- Manifests -----------------------------------------------------------------------------------


def write_manifest(folder: str | pathlib.Path) -> None:
    """Writes the size and the sha256 of every file below `folder` into its manifest."""
    folder = pathlib.Path(folder)
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in _hashes_below(folder).items()
    }
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"files": files}, indent=1))
    temporary.replace(folder / MANIFEST)


def verify_manifest(folder: str | pathlib.Path, part: str = "") -> None:
    """Raises ValueError, naming them, if files below `folder` are missing, cut or changed."""
    refuse(find_damage(folder, part), f"{folder} is damaged; use another copy (of a run: train again, it "
           "goes on from the step before)")  # fmt: skip


def find_damage(folder: str | pathlib.Path, part: str = "") -> list[str]:
    """What is wrong with the files below `folder`: which are missing, cut or changed, and how.

    `part` is the folder within it that matters, as "params"; by default all does.
    Each process hashes its share, and all find something if one does. A checkpoint without a
    manifest, as older versions wrote them, is accepted with a warning.
    """
    folder = pathlib.Path(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        if jax.process_index() == 0:
            print(f"warning: {folder} has no {MANIFEST}, its content can't be verified", file=sys.stderr)
        return []
    try:
        files = json.loads(manifest.read_text())["files"]
        mine = sorted(name for name in files if name.startswith(part))[
            jax.process_index() :: jax.process_count()
        ]
        with ThreadPoolExecutor(_threads()) as pool:
            found = pool.map(lambda name: _difference(folder / name, files[name]), mine)
            wrong = [f"{name} {what}" for name, what in zip(mine, found, strict=True) if what]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        wrong = [f"{MANIFEST} can't be read: {error!r}"]
    if jax.process_count() > 1:
        counts = multihost_utils.process_allgather(np.int32(len(wrong)))
        if not wrong and counts.any():
            wrong = [f"process {int(np.flatnonzero(counts)[0])} found damaged files"]
    return wrong


def fingerprint(folder: str | pathlib.Path) -> str:
    """A SHA-256 of what a folder of weights holds: of its manifest or, where there is none as in a folder
    from Hugging Face, of the hashes of all its files."""
    folder = pathlib.Path(folder)
    if (folder / MANIFEST).is_file():
        return _hash(folder / MANIFEST)
    return hashlib.sha256(json.dumps(_hashes_below(folder)).encode()).hexdigest()


def _hashes_below(folder: pathlib.Path) -> dict[str, str]:
    names = _files_below(folder)
    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(folder / name), names), strict=True))


def _files_below(folder: pathlib.Path) -> list[str]:
    skip = (MANIFEST, f"{MANIFEST}.tmp", "_CHECKPOINT_METADATA")  # the last: time stamps, set at the commit
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and str(path.relative_to(folder)) not in skip
    )


def _difference(path: pathlib.Path, want: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != want["size"]:
        return f"has {path.stat().st_size} bytes instead of {want['size']}"
    try:
        return None if _hash(path) == want["sha256"] else "has changed: its sha256 is another"
    except OSError as error:  # the disk itself has noticed
        return f"can't be read: {error.strerror}"


def _hash(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


# ---- Workdirs ------------------------------------------------------------------------------------


def read_config(workdir: str | pathlib.Path) -> dict[str, Any]:
    """config.json of a workdir."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no workdir of a training run: {path.name} is missing")
    return json.loads(path.read_text())


def check_workdir(
    workdir: str | pathlib.Path, config: dict[str, Any], fixed: tuple[str, ...], free: tuple[str, ...] = ()
) -> None:
    """Raises ValueError if the workdir is that of another model: the top-level groups in `fixed` must
    equal those of the run that made it, but for the keys in `free`; the others may change between
    resumes."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        return
    old, new = json.loads(path.read_text()), json.loads(json.dumps(config))
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


def claim_workdir(workdir: str | pathlib.Path, config: dict[str, Any]) -> None:
    """Makes the workdir and writes its config.json, whole or not at all; the first process does."""
    if jax.process_index():
        return
    path = pathlib.Path(workdir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(config, indent=1))


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several programs may write the same
    temporary.write_text(text)
    temporary.replace(path)


def differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, old value, new value) of all that differs between two trees of dicts."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(f"{path}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield path, old, new
