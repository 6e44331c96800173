"""Folders of PyTorch tensors, as Hugging Face lays them out: safetensors or pytorch_model*.bin, as a
single file or as shards with an index. Reading maps files into memory and copies nothing; writing streams.
Which model the tensors are of is known in folder.py.

Nothing is executed: .bin files are unpickled by torch's weights-only loader, or not at all.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import math
import pathlib
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from mmada_jax import storage
from mmada_jax.bucket import Bucket
from mmada_jax.files import read_json, refuse_pointer
from mmada_jax.weights.lazy import ROWS, Lazy, pieces, refuse

# A file of these names holds a whole model. Files beside it belong to something else, if there is no index.
_ALONE = ("model.safetensors", "pytorch_model.bin")
# Hugging Face's own limit of a shard, in bytes.
SHARD = 5_000_000_000
_MAX_HEADER = 100_000_000  # bytes, as in the library

_SAFETENSORS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def holds_tensors(folder: storage.Path) -> bool:
    """Whether `read_tensors` finds anything to read there."""
    return any(_find(folder))


def read_tensors(folder: storage.Name) -> dict[str, np.ndarray]:
    """All tensors of a folder as read-only arrays over its files.

    Without an index `model.safetensors` is the model, and files whose tensors have other names are left
    out with a warning. Raises FileNotFoundError if a file is missing, and ValueError for a damaged or
    truncated file, a pointer of git LFS, an index that doesn't fit the files, a doubled key, or a pickle
    that holds more than tensors.
    """
    folder = storage.path(folder)
    index, files = _find(folder)
    where: dict[str, str] | None = None
    if index:
        try:
            where = dict(read_json(index, dict)["weight_map"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{index} is no index of tensors: {error}") from error
        outside = [
            n for n in where.values() if not isinstance(n, str) or not n or storage.path(n).name != n
        ]
        refuse([f"{name!r} is no plain file name" for name in outside], f"{index} can't be followed")
        names = list(dict.fromkeys(where.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{index} names {', '.join(missing[:10])} ({len(missing)} of {len(names)} files), which "
                "is not there; download the folder again"
            )
        files = [folder / name for name in sorted(names)]
    elif not files:
        raise FileNotFoundError(f"{folder} holds neither *.safetensors nor pytorch_model*.bin")
    tensors: dict[str, np.ndarray] = {}
    home: dict[str, str] = {}
    wrong, aside = [], []
    alone = None if index else next((file for file in files if file.name in _ALONE), None)
    for file in sorted(files, key=lambda file: file != alone):
        try:
            found = read_tensors_of(file)
        except (ValueError, ImportError):
            if alone in (None, file):
                raise
            found = {}
        if alone not in (None, file) and not found.keys() & tensors.keys():
            aside.append(file.name)
            continue
        for key, tensor in found.items():
            if key in tensors:
                wrong.append(f"{key} is doubled: in {home[key]} and in {file.name}")
            elif where is not None and where.get(key) != file.name:
                says = f"the index says {where[key]}" if key in where else "the index doesn't name it"
                wrong.append(f"{key} is in {file.name}, {says}")
            tensors[key], home[key] = tensor, file.name
    wrong += [f"{key} is missing from {name}" for key, name in (where or {}).items() if key not in tensors]
    refuse(wrong, f"the files of {folder} contradict each other")
    if aside:
        print(
            f"warning: {folder} holds {', '.join(aside)} beside {alone.name}, of other names and not in an "
            "index; left aside",
            file=sys.stderr,
        )
    return tensors


def write_tensors(
    folder: storage.Path,
    tensors: Mapping[str, Lazy],
    progress: Callable[[int], None] = lambda n: None,
    shard: int = SHARD,
) -> dict[str, str]:
    """Writes safetensors into `folder`, in shards of at most `shard` bytes (a tensor is never split), and
    returns the sha256 of each file by its name.

    Holds a few pieces of tensors in memory, never a whole file.
    """
    shards: list[dict[str, Lazy]] = [{}]
    for key, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard:
            shards.append({})
        shards[-1][key] = tensor
    if len(shards) == 1:
        name = "model.safetensors"
        return {name: _write_safetensors(folder / name, shards[0], progress)}
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    parts = zip(names, shards, strict=True)
    hashes = {name: _write_safetensors(folder / name, part, progress) for name, part in parts}
    where = {key: name for name, part in zip(names, shards, strict=True) for key in part}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    storage.write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return hashes


def ahead(thunks: Iterable[Callable[[], Any]], workers: int = 3) -> Iterator[Any]:
    """The results of `thunks`, in order, while the next ones are computed in threads."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = []
        for thunk in thunks:
            waiting.append(pool.submit(thunk))
            if len(waiting) > workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


def _find(folder: storage.Path) -> tuple[storage.Path | None, list[storage.Path]]:
    """The index of a folder, or else its files; safetensors come first."""
    for kind in ("*.safetensors", "pytorch_model*.bin"):
        indices = sorted(folder.glob(f"{kind}.index.json"))
        if len(indices) > 1:
            raise ValueError(
                f"{folder} has several indices: {', '.join(f.name for f in indices)}; keep one"
            )
        if indices:
            return indices[0], []
        if files := sorted(folder.glob(kind)):
            return None, files
    return None, []


def read_tensors_of(file: storage.Path) -> dict[str, np.ndarray]:
    """The tensors of one file, as `read_tensors` gives those of a folder. Raises as that does."""
    refuse_pointer(file)
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_bin(file)


def _read_safetensors(path: storage.Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    head = storage.read_range(path, 0, 8)
    length = int.from_bytes(head, "little")
    text = storage.read_range(path, 8, min(length, _MAX_HEADER))
    try:
        # It checks the header, every offset, and the length of the file.
        with _of_this_machine(path, head + text) as file, safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    header = json.loads(text)
    header.pop("__metadata__", None)
    unknown = [f"{k} has dtype {t['dtype']}" for k, t in header.items() if t["dtype"] not in _SAFETENSORS]
    refuse(unknown, f"{path} holds tensors of dtypes that are not read here")
    if isinstance(path, Bucket):
        return {
            key: _ranged(path, 8 + length + t["data_offsets"][0], tuple(t["shape"]), t["dtype"])
            for key, t in header.items()
        }
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if any(
        np.prod(t["shape"]) for t in header.values()
    ) else np.empty(0, np.uint8)  # fmt: skip
    return {
        key: data[slice(*t["data_offsets"])].view(_SAFETENSORS[t["dtype"]]).reshape(t["shape"])
        for key, t in header.items()
    }


@contextlib.contextmanager
def _of_this_machine(path: storage.Path, start: bytes) -> Iterator[storage.Path]:
    """A file itself; of an object of a bucket a file of its size with its first bytes and nothing else,
    which takes no room on the disk."""
    if not isinstance(path, Bucket):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=path.suffix) as file:
        file.write(start)
        file.truncate(path.stat().st_size)
        file.flush()
        yield pathlib.Path(file.name)


def _ranged(path: Bucket, start: int, shape: tuple[int, ...], kind: str) -> Lazy:
    """A tensor in an object, of which those rows are fetched that are asked for."""
    dtype = np.dtype(_SAFETENSORS[kind])

    def read(index):
        if not shape:
            return np.frombuffer(path.read_range(start, dtype.itemsize), dtype)[0:1].reshape(())
        rows, row = index[0], math.prod(shape[1:]) * dtype.itemsize
        data = path.read_range(start + rows.start * row, (rows.stop - rows.start) * row)
        of_rows = np.frombuffer(data, dtype).reshape(rows.stop - rows.start, *shape[1:])
        return of_rows[(slice(None), *index[1:])]

    return Lazy(shape, dtype, read)


@functools.cache
def _fetched(path: Bucket) -> pathlib.Path:
    """An object as a file of this machine, which is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="mmada_jax-")
    atexit.register(folder.cleanup)
    file = pathlib.Path(folder.name) / path.name
    with storage.open_file(path, 32 << 20) as source, file.open("wb") as target:
        shutil.copyfileobj(source, target, 32 << 20)
    return file


def _read_bin(path: storage.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"reading {path} needs PyTorch: pip install 'mmada_jax[torch]'") from error
    if isinstance(path, Bucket):
        path = _fetched(path)  # PyTorch reads files of this machine alone
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is damaged or truncated, or was saved before PyTorch 1.6: it is no zip archive"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: its pickle holds more than tensors and could run code "
            f"({_first_line(error)}); save the weights as safetensors"
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is damaged or truncated: {_first_line(error)}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not tensors by name")

    arrays, wrong = {}, []
    for key, tensor in state.items():
        try:
            if tensor.dtype == torch.bfloat16:
                arrays[key] = tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            else:
                arrays[key] = tensor.detach().numpy()
        except AttributeError:
            wrong.append(f"{key!r} is a {type(tensor).__name__}")
        except (TypeError, RuntimeError) as error:  # sparse, quantised, float8, without storage
            wrong.append(f"{key!r} is a tensor that can't be read: {_first_line(error)}")
    refuse(wrong, f"{path} holds more than dense tensors by name")
    return arrays


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _write_safetensors(
    path: storage.Path, tensors: Mapping[str, Lazy], progress: Callable[[int], None]
) -> str:
    """Writes a file and returns its sha256."""
    names = {np.dtype(kind): name for name, kind in _SAFETENSORS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, tensor in tensors.items():
        header[key] = {
            "dtype": names[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(text)
    with storage.writing(path) as file:
        file.write(text)
        reads = (
            lambda tensor=tensor, index=index: np.ascontiguousarray(tensor[index])
            for tensor in tensors.values()
            for index in pieces(tensor, multiple=ROWS)
        )
        for part in ahead(reads):
            data = part.reshape(-1).view(np.uint8).data
            file.write(data)
            digest.update(data)
            progress(part.nbytes)
    return digest.hexdigest()
