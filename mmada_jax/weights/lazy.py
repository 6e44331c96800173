"""PyTorch <-> JAX: tensors and params through one strict key table per model, piece by piece.

A table says where each PyTorch tensor lies in params. Both directions return `Lazy` arrays, and nothing
is in memory before a piece of an array is asked for. All keys, shapes and dtypes that don't fit the table
are one error, which lists the first ten of them and their count. Bits stay as they are, unless another
dtype is asked for. The tables are in llada_keys, magvit_keys and clip_keys; files are read elsewhere.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

Index = tuple[slice, ...]
Path = tuple[str, ...]

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Most bytes of params that are read at once, unless a single layer has more.
PIECE = 8 << 20
# Most rows of a PyTorch tensor that are read at once: more than the matrices of a layer have, less than
# embedding and head. A chunk of a checkpoint can only be read whole, so fewer rows would read the same
# chunk several times.
ROWS = 16384


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is read piece by piece: `read` takes a slice [start, stop) for every axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        """The piece at `index` (integers and slices of step 1, for the first axes or all)."""
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (len(self.shape) - len(index))
        ranges = [
            slice(*i.indices(n)[:2]) if isinstance(i, slice) else slice(i, i + 1)
            for i, n in zip(index, self.shape, strict=True)
        ]
        single = tuple(axis for axis, i in enumerate(index) if not isinstance(i, slice))
        return self.read(tuple(ranges)).squeeze(single)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """The whole array in memory."""
        return np.asarray(self[()], dtype)


def lazy(params: Any) -> Any:
    """A tree of arrays in memory -> a tree of Lazy arrays."""
    return jax.tree.map(lambda x: Lazy(x.shape, x.dtype, x.__getitem__), params)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one PyTorch tensor lies in params.

    shape   the shape of our array, without the axis of layers
    merged  the same with those axes joined that are one axis in PyTorch, as heads and head width
    order   the permutation of the axes of `merged` that gives PyTorch's tensor
    layer   the index in the array that stacks all layers
    """

    path: Path
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    merged: tuple[int, ...] | None = None
    layer: int | None = None

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of PyTorch's tensor."""
        merged = self.merged or self.shape
        return tuple(merged[i] for i in self.order) if self.order else merged

    def from_torch(self, theirs: np.ndarray, index: Index | None = None) -> np.ndarray:
        """PyTorch's tensor -> ours, or the piece of it at `index`."""
        if self.order:
            theirs = theirs.transpose(np.argsort(self.order))
        if index is None or whole(index, self.shape):
            return _contiguous(theirs).reshape(self.shape)
        return _contiguous(theirs.reshape(self.shape)[index])

    def to_torch(self, ours: np.ndarray) -> np.ndarray:
        """Our array, or a piece of it that `rows` gave, -> PyTorch's."""
        if self.merged:
            ours = ours.reshape(self.merged)
        return _contiguous(ours.transpose(self.order) if self.order else ours)

    def rows(self, first: int, last: int) -> Index | None:
        """The piece of our array that holds PyTorch's rows [first, last); None if they aren't one piece."""
        axis = self.order[0] if self.order else 0
        if self.merged:
            return None
        index = [slice(0, n) for n in self.shape]
        index[axis] = slice(first, last)
        return tuple(index)


Table = Mapping[str, Rule]


def params_of(
    state: Mapping[str, Any], table: Table, dtype: np.dtype | None = None, wrong: Sequence[str] = ()
) -> dict[str, Any]:
    """State dict -> params, as a tree of Lazy arrays. Tensors need `shape`, `dtype` and `__array__`.

    All tensors must have the same dtype, float32, bfloat16 or float16; with `dtype` they may differ, and
    are cast. Raises ValueError for everything in `state` that doesn't fit; the text begins with the
    problems in `wrong`, which the caller has found.
    """
    missing, unexpected = [k for k in table if k not in state], [k for k in state if k not in table]
    # Missing and unexpected keys take turns, since only ten lines are shown.
    pairs = itertools.zip_longest(
        (f"missing {key}" for key in missing), (f"unexpected {key}" for key in unexpected)
    )
    wrong = [*wrong, *(text for pair in pairs for text in pair if text)]
    kinds = [np.dtype(state[key].dtype) for key in table if key in state]
    usual = max(kinds, key=kinds.count, default=None)
    for key in table:
        if key not in state:
            continue
        shape, kind = tuple(state[key].shape), np.dtype(state[key].dtype)
        if shape != table[key].torch_shape:
            wrong.append(f"{key} has shape {shape}, expected {table[key].torch_shape}")
        if kind not in DTYPES.values():
            wrong.append(f"{key} has dtype {kind}, expected one of {', '.join(DTYPES)}")
        elif dtype is None and kind != usual:
            wrong.append(f"{key} has dtype {kind}, the others {usual} (a target dtype casts them all)")
    hint = renamed(missing, unexpected)
    refuse(wrong, f"the tensors don't fit the configuration{hint and ', '}{hint}")
    dtype = dtype or usual

    stacks: dict[Path, list[str]] = {}
    for key, rule in table.items():
        stacks.setdefault(rule.path, []).append(key)

    def read(keys: list[str], index: Index) -> np.ndarray:
        rule = table[keys[0]]
        if rule.layer is None:
            return _cast(rule.from_torch(np.asarray(state[keys[0]]), index), dtype, keys[0])
        layers = keys[index[0]]
        shape = [s.stop - s.start for s in index[1:]]
        out = np.empty((len(layers), *shape), dtype)
        for i, key in enumerate(layers):
            out[i] = _cast(table[key].from_torch(np.asarray(state[key]), index[1:]), dtype, key)
        return out

    def leaf(keys: list[str]) -> Lazy:
        rule = table[keys[0]]
        shape = rule.shape if rule.layer is None else (len(keys), *rule.shape)
        return Lazy(shape, dtype, functools.partial(read, keys))

    return tree((path, leaf(keys)) for path, keys in stacks.items())


def tensors_of(params: Mapping[str, Any], table: Table, dtype: np.dtype | None = None) -> dict[str, Lazy]:
    """Params -> state dict, as Lazy arrays. They can be read by ranges of rows; other axes are read whole.

    Leaves need `shape`, `dtype` and indexing by slices. Raises ValueError for everything that doesn't fit.
    """
    arrays = dict(leaves(params))
    paths = {rule.path for rule in table.values()}
    wrong = [f"missing {'.'.join(path)}" for path in sorted(paths - set(arrays))]
    wrong += [f"unexpected {'.'.join(path)}" for path in sorted(set(arrays) - paths)]
    layers: dict[Path, int] = {}
    for rule in table.values():
        layers[rule.path] = layers.get(rule.path, 0) + 1
    for path, rule in {rule.path: rule for rule in table.values()}.items():
        want = rule.shape if rule.layer is None else (layers[path], *rule.shape)
        if path in arrays and tuple(arrays[path].shape) != want:
            wrong.append(f"{'.'.join(path)} has shape {tuple(arrays[path].shape)}, not {want}")
    kinds = {path: np.dtype(array.dtype) for path, array in arrays.items()}
    usual = max(kinds.values(), key=list(kinds.values()).count, default=None)
    for path, kind in kinds.items():
        if kind not in DTYPES.values() or (kind != usual and dtype is None):
            wrong.append(f"{'.'.join(path)} has dtype {kind}, expected one of {', '.join(DTYPES)} for all")
    refuse(wrong, "the params don't fit the configuration")

    def read(key: str, index: Index) -> np.ndarray:
        rule = table[key]
        rows = rule.rows(index[0].start, index[0].stop)
        ours = rows or tuple(slice(0, n) for n in rule.shape)
        array = arrays[rule.path][ours if rule.layer is None else (rule.layer, *ours)]
        part = rule.to_torch(np.asarray(array))
        return _cast(part if rows else part[index[0]], dtype or part.dtype, key)

    return {
        key: Lazy(
            rule.torch_shape,
            np.dtype(dtype or arrays[rule.path].dtype),
            functools.partial(read, key),
        )
        for key, rule in table.items()
    }


def in_memory(tree: Any) -> Any:
    """A tree of Lazy arrays -> a tree of numpy arrays."""
    if isinstance(tree, Mapping):
        return {name: in_memory(value) for name, value in tree.items()}
    return np.asarray(tree)


def pieces(array: Any, axis: int = 0, multiple: int = 1) -> Iterator[Index]:
    """Indices that cover `array` in order along `axis`. Each takes the largest multiple of `multiple` rows
    that has at most PIECE bytes, or `multiple` rows if they have more."""
    full = [slice(0, n) for n in array.shape]
    if not full:
        yield ()
        return
    rows = PIECE * array.shape[axis] // max(1, array.nbytes)
    rows = max(1, rows // multiple) * multiple
    for first in range(0, array.shape[axis], rows):
        full[axis] = slice(first, min(first + rows, array.shape[axis]))
        yield tuple(full)


def sha256(tensors: Mapping[str, Lazy], progress: Callable[[int], None] = lambda n: None) -> str:
    """Hash of the bytes of all tensors, as PyTorch lays them out, in the order of their keys."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        for index in pieces(tensors[key], multiple=ROWS):
            part = np.ascontiguousarray(tensors[key].read(index))
            digest.update(part.reshape(-1).view(np.uint8))
            progress(part.nbytes)
    return digest.hexdigest()


def leaves(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of a nested dict."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def tree(items: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """The inverse of `leaves`."""
    out: dict[str, Any] = {}
    for path, value in items:
        at = out
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = value
    return out


def refuse(wrong: list[str], what: str) -> None:
    """Raises ValueError with the first ten problems in `wrong` and their count, if there are any."""
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"{what} ({len(wrong)} problems): {'; '.join(wrong[:10])}{more}")


def renamed(missing: Iterable[str], there: Iterable[str]) -> str:
    """How the keys that are there were renamed, with an example; empty if nothing suggests that.

    Wrappers of PyTorch add names before the keys of a model, or within them: `module.`, `_orig_mod.`,
    `base_model.model.`, `base_layer.`
    """
    ends: dict[str, list[str]] = {}
    for key in there:
        ends.setdefault(key.rpartition(".")[2], []).append(key)
    pairs = []
    for key in missing:
        parts = key.split(".")
        longer = [k for k in ends.get(parts[-1], ()) if _within(parts, k.split("."))]
        shorter = [k for k in ends.get(parts[-1], ()) if key.endswith(f".{k}")]
        if longer or shorter:
            pairs.append((key, min(longer or shorter, key=len)))
    if not pairs:
        return ""
    key, like = pairs[0]
    if like.endswith(key):
        what = f"have {like.removesuffix(key)!r} before their names"
    elif key.endswith(like):
        what = f"lack {key.removesuffix(like)!r} before their names"
    else:
        what = "have more in their names"
    return f"{len(pairs)} keys {what} ({like!r} for {key!r}; save the model's own state_dict)"


def _within(parts: list[str], longer: list[str]) -> bool:
    rest = iter(longer)
    return all(part in rest for part in parts)


def whole(index: Index, shape: tuple[int, ...]) -> bool:
    """Whether `index` takes all of an array."""
    return all(s == slice(0, n) for s, n in zip(index, shape, strict=True))


def _contiguous(x: np.ndarray) -> np.ndarray:
    # numpy copies a transposed matrix with one cache miss for each element. JAX's transposition on the
    # host is 5 times as fast.
    if x.ndim != 2 or x.flags.c_contiguous or not _cpu():
        return np.ascontiguousarray(x)
    return np.asarray(jax.device_put(x, _cpu()))


@functools.cache
def _cpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to leave it out
        return None


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if dtype == np.float16 and not np.array_equal(np.isinf(cast), np.isinf(array)):
        raise ValueError(f"{name} has values beyond the range of float16 (65504); choose bfloat16")
    return cast
