"""Checkpoints of a workdir through Orbax: asynchronous, atomic, the newest few kept.

WORKDIR/config.json      the configuration of the run
WORKDIR/checkpoints/N    params and optimizer state after N steps
"""

import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from mmada_jax.state import TrainState


class Checkpoints:
    """The checkpoints of one workdir. Use as a context manager: leaving it finishes the last save."""

    def __init__(self, workdir: str | pathlib.Path, keep: int = 2):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, cleanup_tmp_directories=True
            ),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts saving `state` under its step; does nothing if that step is there already."""
        step = int(state.step)
        if step == self.latest():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
            ),
        )

    def restore(self, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The newest step, as arrays of these shapes laid out by these shardings."""
        step = self._require()
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

    def restore_params(self, shapes: Any, shardings: Any) -> Any:
        """The params alone of the newest step."""
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        args = ocp.args.Composite(params=ocp.args.StandardRestore(target))
        return self._manager.restore(self._require(), args=args)["params"]

    def _require(self) -> int:
        step = self.latest()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder}; train first, or name another workdir")
        return step


def read_config(workdir: str | pathlib.Path) -> dict[str, Any]:
    """config.json of a workdir."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no workdir of a training run: {path.name} is missing")
    return json.loads(path.read_text())


def check_workdir(workdir: str | pathlib.Path, config: dict[str, Any], fixed: tuple[str, ...]) -> None:
    """Raises ValueError if the workdir is that of another model: the top-level groups in `fixed` must
    equal those of the run that made it; the others may change between resumes."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        return
    old, new = json.loads(path.read_text()), json.loads(json.dumps(config))
    different = [
        f"{key} is {a!r} there and {b!r} now"
        for group in fixed
        for key, a, b in _differences(group, old.get(group), new.get(group))
    ]
    if different:
        raise ValueError(
            f"{workdir} holds another model ({different[0]}); choose an empty workdir or the "
            "configuration that it was made with"
        )


def claim_workdir(workdir: str | pathlib.Path, config: dict[str, Any]) -> None:
    """Makes the workdir and writes its config.json, whole or not at all."""
    path = pathlib.Path(workdir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config, indent=1))
    temporary.replace(path)


def _differences(path: str, old: Any, new: Any):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{path}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield path, old, new
