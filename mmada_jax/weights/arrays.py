"""Folders of arrays as Orbax lays them out: opened and streamed piece by piece, and compared with shapes.

When a run saves, and which step it restores, is in checkpoint.py.
"""

import asyncio
import collections
import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from mmada_jax import storage
from mmada_jax.bucket import Bucket
from mmada_jax.outages import understood
from mmada_jax.weights.lazy import Lazy, leaves, pieces, refuse, tree
from mmada_jax.weights.manifest import write_manifest

# Axes of params are stored in chunks of these lengths, so that a process of a sharded restore reads
# little more than its own part, and a conversion can read a matrix by rows and by columns.
CHUNKS = {"layers": 1, "embed": 256, "vocab": 8192}
# A bucket that doesn't answer is an error after half a minute; TensorStore's default is a quarter of an
# hour.
_RETRIES = {"gcs_request_retries": {"max_retries": 5, "initial_delay": "1s", "max_delay": "16s"}}
_READING = tensorstore.Context(_RETRIES)


def write_params(
    folder: storage.Name,
    params: Mapping[str, Any],
    axes: Any,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Streams a tree of Lazy arrays into an Orbax checkpoint with a manifest; `folder` must be new.

    `axes` is the tree of logical axis names, which decide how arrays are cut into chunks, or None. Only a
    few pieces of arrays are in memory at a time, never a whole array.
    """
    streams = _StreamHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (_Stream, streams)
    )
    # This process writes alone. Orbax's default would wait at barriers for all processes of the run.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=False, multiprocessing_options=alone
    )
    names = {path: names for path, names in leaves(axes)} if axes else {}
    streamed = tree(
        (path, _Stream(array, _chunks(array, names.get(path)), progress)) for path, array in leaves(params)
    )
    folder = storage.resolved(folder)
    storage.refuse_place(folder)
    # A data file is held in memory until it has this size, in bytes; then it is written.
    args = ocp.args.PyTreeSave(streamed, ocdbt_target_data_file_size=32 << 20)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(orbax_path(folder), args=args)
    except Exception as error:
        raise streams.error or error from error
    if streams.error:
        storage.rmtree(folder)
        raise streams.error
    write_manifest(folder)


def orbax_path(folder: storage.Path) -> epath.Path:
    """A folder as Orbax takes it. Saves into a bucket that doesn't answer then fail soon."""
    if isinstance(folder, Bucket):
        # Orbax has no setting for this, and the default would hold a run up for a quarter of an hour.
        with contextlib.suppress(ImportError):
            from orbax.checkpoint._src.serialization import tensorstore_utils

            for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
                getattr(tensorstore_utils, name, {}).update(_RETRIES)
    return epath.Path(os.fspath(folder))


def open_params(folder: storage.Name) -> dict[str, Any]:
    """The arrays of a checkpoint's params (or optimizer state) as a tree of Lazy arrays; nothing is read
    yet."""
    folder = storage.resolved(folder)

    def open_one(path):
        # Orbax writes each leaf as a zarr array, all of them into one OCDBT store.
        store = {"driver": "ocdbt", "base": storage.kvstore(folder), "path": ".".join(path) + "/"}
        # Orbax writes zeros like other numbers. So a chunk that isn't there is lost, and not zero.
        spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
        array = tensorstore.open(spec, read=True, context=_READING).result()
        return Lazy(array.shape, array.dtype.numpy_dtype, lambda index: array[index].read().result())

    return tree((path, open_one(path)) for path in _stored(folder))


class _Stream:
    """A Lazy array on its way into a checkpoint, with the attributes that Orbax reads of a leaf."""

    def __init__(self, array: Any, chunks: tuple[int, ...], progress: Callable[[int], None]):
        self.array, self.chunks, self.progress = array, chunks, progress
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.size
        self.ndim, self.nbytes = len(array.shape), array.nbytes


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, which writes piece by piece, a few at a time.

    The first error ends the writing of all arrays, and is kept in `error`. If it were raised here, Orbax's
    event loop would end while other arrays are half written.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._few = asyncio.Semaphore(3)
        # No write waits until the disk has it. After a power cut the manifest shows what is missing.
        self._context = tensorstore.Context(
            {
                "file_io_sync": False,
                "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},
                # Each request to a bucket holds a data file in memory.
                "gcs_request_concurrency": {"limit": 4},
            }
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


def _stored(folder: storage.Path) -> dict[tuple[str, ...], Any]:
    """Path -> what Orbax recorded (shape, dtype) of every leaf of a checkpoint."""
    try:
        with understood(folder):
            found = ocp.PyTreeCheckpointHandler().metadata(orbax_path(folder))
    except (ValueError, FileNotFoundError, KeyError) as error:
        raise ValueError(f"{folder} is no readable checkpoint: {error}") from error
    return ocp.tree.to_flat_dict(found.tree)


def missing(folder: storage.Path) -> list[str]:
    """Compares the arrays of a checkpoint's params (or optimizer state) with Orbax's own description of
    them; one line for each that is not there, or not all of it."""
    try:
        spec = {"driver": "ocdbt", "base": storage.kvstore(folder)}
        with understood(folder):
            store = tensorstore.KvStore.open(spec, context=_READING).result()
            keys = store.list().result()
            stored = list(_stored(folder))
            # All are asked for before the first answer is waited for.
            waiting = [store.read(f"{'.'.join(path)}/.zarray") for path in stored]
            described = [json.loads(each.result().value or "{}") for each in waiting]
        pieces_of = collections.Counter(key.rpartition(b"/")[0].decode() for key in keys)
        wrong = []
        for path, about in zip(stored, described, strict=True):
            name = ".".join(path)
            sizes = zip(about.get("shape", ()), about.get("chunks", ()), strict=True)
            want = math.prod(-(-n // chunk) for n, chunk in sizes)
            if not about or pieces_of[name] != want + 1:  # its chunks, and .zarray, which describes it
                wrong.append(f"{folder.name}: {name} is not there, or not all of it")
    except ValueError as error:
        return [f"{folder.name} can't be read: {(str(error).strip() or repr(error)).splitlines()[0]}"]
    return wrong


def check_leaves(folder: storage.Path, shapes: Any) -> None:
    """Raises ValueError, naming them, if leaves of a checkpoint's params (or optimizer state) are missing
    or have another shape or dtype than `shapes`. Orbax would cast them without a word."""
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
