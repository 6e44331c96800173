"""PyTorch <-> JAX: state dicts and params through one strict key table per model.

Whatever doesn't fit the table (a key too many or too few, a wrong shape) is one error that lists the
first ten offenders and their count. Arrays keep their dtype and their bits.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one PyTorch array lies in params.

    `shape` is ours; `merged` the same with the axes joined that PyTorch has as one; `order` permutes
    `merged` into PyTorch's; `layer` is the index in the stacked array.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    merged: tuple[int, ...] | None = None
    layer: int | None = None

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape that PyTorch has."""
        merged = self.merged or self.shape
        return tuple(merged[i] for i in self.order) if self.order else merged

    def to_torch(self, ours: np.ndarray) -> np.ndarray:
        """Our array -> PyTorch's."""
        ours = ours.reshape(self.merged or self.shape)
        return np.ascontiguousarray(ours.transpose(self.order) if self.order else ours)

    def from_torch(self, theirs: np.ndarray) -> np.ndarray:
        """PyTorch's array -> ours."""
        if self.order:
            theirs = theirs.transpose(np.argsort(self.order))
        return theirs.reshape(self.shape)


def from_torch(state: Mapping[str, np.ndarray], table: Mapping[str, Rule]) -> dict[str, Any]:
    """State dict -> params."""
    wrong = [f"missing {key}" for key in table if key not in state]
    wrong += [f"unexpected {key}" for key in state if key not in table]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, expected {rule.torch_shape}"
        for key, rule in table.items()
        if key in state and tuple(state[key].shape) != rule.torch_shape
    ]
    _raise(wrong, "the state dict doesn't fit the configuration")
    params: dict[str, Any] = {}
    stacks: dict[tuple[str, ...], list[np.ndarray]] = {}
    for key, rule in table.items():
        array = rule.from_torch(np.asarray(state[key]))
        if rule.layer is None:
            _put(params, rule.path, array)
        else:
            stacks.setdefault(rule.path, []).append(array)
    for path, arrays in stacks.items():
        _put(params, path, np.stack(arrays))
    return params


def to_torch(params: Mapping[str, Any], table: Mapping[str, Rule]) -> dict[str, np.ndarray]:
    """Params -> state dict."""
    arrays = dict(_leaves(params))
    paths = {rule.path for rule in table.values()}
    wrong = [f"missing {'.'.join(path)}" for path in sorted(paths - set(arrays))]
    wrong += [f"unexpected {'.'.join(path)}" for path in sorted(set(arrays) - paths)]
    _raise(wrong, "the params don't fit the configuration")
    layers = {path: sum(r.path == path for r in table.values()) for path in paths}
    for rule in table.values():
        want = rule.shape if rule.layer is None else (layers[rule.path], *rule.shape)
        if tuple(arrays[rule.path].shape) != want:
            wrong.append(f"{'.'.join(rule.path)} has shape {arrays[rule.path].shape}, not {want}")
    _raise(list(dict.fromkeys(wrong)), "the params don't fit the configuration")
    return {
        key: rule.to_torch(np.asarray(
            arrays[rule.path] if rule.layer is None else arrays[rule.path][rule.layer]))
        for key, rule in table.items()
    }  # fmt: skip


def _raise(wrong: list[str], what: str) -> None:
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"{what} ({len(wrong)} problems): {'; '.join(wrong[:10])}{more}")


def _put(tree: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()):
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value
