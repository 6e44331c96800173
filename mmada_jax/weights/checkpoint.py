"""Checkpoints of a run through Orbax: asynchronous, atomic, verified before they are read.

WORKDIR/checkpoints/N        params and optimizer state after N steps, the newest few
FOLDER/params                params alone, streamed there by a conversion (arrays.py)

A run whose newest checkpoint is damaged, or holds numbers that aren't finite, goes on from the checkpoint
before. If a checkpoint can't be written, the run goes on without it. How arrays lie on the disk is in
arrays.py, what else a workdir holds in workdir.py.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mmada_jax import storage
from mmada_jax.bucket import Bucket
from mmada_jax.devices.distributed import is_lost, together
from mmada_jax.lease import Lease
from mmada_jax.outages import understood
from mmada_jax.weights.arrays import check_leaves, missing, open_params, orbax_path
from mmada_jax.weights.lazy import leaves, refuse
from mmada_jax.weights.manifest import (
    COMMITTED,
    MANIFEST,
    PARTS,
    find_damage,
    verify_manifest,
    write_manifest,
)
from mmada_jax.weights.state import TrainState, all_finite
from mmada_jax.weights.workdir import FILES, claimed, newest_step, record_files

NAMED = {"params": "params are", "opt_state": "numbers of the optimizer are"}


class Checkpoints:
    """The checkpoints of one workdir. Nobody else can write to the workdir as long as this lives.

    Use it in a `with`: leaving it waits for the last save, and raises OSError if the last save failed. A
    failure of an earlier save is reported on stderr and counted in `failed`.

    Raises ValueError if another run is writing to the workdir, or if Orbax can't write there."""

    def __init__(self, workdir: storage.Name, keep: int = 2):
        self.folder = storage.resolved(workdir) / "checkpoints"
        storage.refuse_place(self.folder)
        self.failed = 0
        self._lock: Any = None  # of the first process
        self._saving: TrainState | None = None  # shapes of the state that was saved last
        self._problem = ""  # why the last save failed, empty if it didn't
        after = ocp.options.AsyncOptions(
            post_finalization_callback=self._write_manifest,
            # If the folder can't be made, Orbax's writers would wait for it for minutes.
            create_directories_asynchronously=False,
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True, async_options=after
        )
        with contextlib.ExitStack() as stack:
            with together("taking the workdir"):
                if jax.process_index() == 0:
                    self._lock = stack.enter_context(claimed(self.folder.parent))
                    # Orbax removes what isn't marked as complete. A step that was copied from a disk may
                    # lack the mark, and so may one whose writer was killed just before it.
                    _commit([path for path in self.folder.glob("*") if path.name.isdigit()])
            with understood(self.folder):
                self._manager = ocp.CheckpointManager(orbax_path(self.folder), options=options)
            self._owned = stack.pop_all()

    def __enter__(self):
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, kind, error, _):
        if is_lost(error):
            return  # a save under way would wait for minutes for a process that has gone
        with self._owned:
            newest = self.latest()
            self._attempt(self._manager.close)
            self._clear()
        sys.unraisablehook = self._hook
        if self._problem and kind is None:
            remedy = f"make room in {self.folder}"
            if isinstance(self.folder, Bucket):
                remedy = "see that the bucket can be reached and written to"
            raise OSError(
                f"{self._problem}; the newest complete step is {newest or 'none'}: {remedy} and run again"
            )
        self._warn()

    def latest(self) -> int | None:
        """The newest complete step, None if there is none. Waits for the save that is under way."""
        self._attempt(self._manager.wait_until_finished)
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts saving `state` under its step; does nothing if that step is there already.

        Raises FloatingPointError, and saves nothing, if params or the optimizer's state aren't finite."""
        step = int(state.step)
        if isinstance(self._lock, Lease):
            self._lock.check()
            storage.refuse_lost(self.folder)
        if step == self.latest():  # waits too: there is one save at a time, described by `_saving`
            return
        for part in PARTS:
            if all_finite(getattr(state, part)):
                continue
            raise FloatingPointError(
                f"the {NAMED[part]} not finite after step {step} and weren't saved; the next run "
                f"{self._next_start()}. Lower optim.lr, or look at the data of these steps"
            )
        self._warn()
        self._clear()
        self._saving = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)._replace(
            step=step
        )
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params), opt_state=ocp.args.StandardSave(state.opt_state)
        )
        self._attempt(lambda: self._manager.save(step, args=args))

    def restore(self, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The newest step that is whole, as arrays of these shapes laid out by these shardings; see
        `restore_as`."""
        return self.restore_as(lambda step: (shapes, shardings))

    def restore_as(self, layout: Callable[[int], tuple[TrainState, TrainState]]) -> TrainState:
        """The state of the newest step that is as its manifest says, can be read and is finite.

        `layout` gives the shapes and shardings of a step. Newer steps are damaged then; they are renamed
        to N.damaged, and the run writes them anew. Raises ValueError, naming files or leaves, if all steps
        are damaged (nothing is renamed then), or if a leaf has another shape or dtype than asked for.
        """
        self.latest()  # waits for the save that is under way
        newest_step(self.folder.parent)  # raises if there is none
        state, damage = None, {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            wrong = find_damage(self.folder / str(step))
            wrong = wrong or [line for part in PARTS for line in missing(self.folder / str(step) / part)]
            if not wrong:
                state, wrong = self._read(step, *layout(step))
            if state:
                break
            damage[step] = wrong
        else:
            wrong = [f"step {step}: {file}" for step, files in damage.items() for file in files]
            refuse(wrong, f"no checkpoint in {self.folder} is whole; copy one there from elsewhere, or "
                   "choose another workdir to start anew")  # fmt: skip
        self._set_aside(damage, f"going on from step {step}")
        return state

    def give_up(self, accepted: int) -> str:
        """Says where the next run starts, when this run ends because no gradient can be used.

        `accepted` is the number of updates that this run has accepted in all. If the newest step has
        accepted as many, the run starts from that step again and fails again: its params are finite, but
        its gradients are not. So the step is set aside."""
        step = self.latest()
        if self.accepted() == accepted:
            self._set_aside({step: ["no gradient at its params could be used"]}, "it is not resumed again")
        return self._next_start()

    def accepted(self) -> int | None:
        """How many updates the newest step has accepted; None if there is none, or it doesn't say."""
        step = self.latest()
        if step is None:
            return None
        try:
            stored = open_params(self.folder / str(step) / "opt_state")
            return next((int(np.asarray(x)) for path, x in leaves(stored) if path[-1] == "accepted"), None)
        except ValueError:
            return None  # the step is damaged; the next start finds that and says so

    def _next_start(self) -> str:
        step = self.latest()
        return "starts from scratch" if step is None else f"resumes from step {step}"

    def _read(self, step, shapes, shardings) -> tuple[TrainState | None, list[str]]:
        """The state of a step, or what is wrong with it."""
        folder = self.folder / str(step)
        for part in PARTS:
            check_leaves(folder / part, getattr(shapes, part))
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        args = {part: ocp.args.StandardRestore(getattr(target, part)) for part in PARTS}
        wrong = []
        try:
            with understood(self.folder):
                restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            wrong = [f"its {NAMED[part]} not finite" for part in PARTS if not all_finite(restored[part])]
        except (ValueError, KeyError, FileNotFoundError) as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise  # memory or open files are exhausted; the step may be whole
            wrong = [f"it can't be read: {(str(error).strip() or repr(error)).splitlines()[0]}"]
        if _anywhere(bool(wrong)):
            return None, wrong or ["another process can't read it"]
        number = jax.device_put(jax.numpy.int32(step), shardings.step)
        return TrainState(number, restored["params"], restored["opt_state"]), []

    def _set_aside(self, damage: Mapping[int, list[str]], then: str) -> None:
        """Renames these steps to N.damaged and says why."""
        if not damage:
            return
        for number, files in damage.items() if jax.process_index() == 0 else ():
            aside, again = self.folder / f"{number}.damaged", 1
            while aside.exists():
                aside, again = self.folder / f"{number}.damaged.{again}", again + 1
            damaged = self.folder / str(number)
            if isinstance(damaged, Bucket):
                damaged.rename(aside, last=COMMITTED)
            else:
                damaged.rename(aside)
            more = f" and {len(files) - 3} files more" if len(files) > 3 else ""
            print(
                f"warning: the checkpoint of step {number} is damaged ({'; '.join(files[:3])}{more}) and "
                f"now called {aside.name}; {then}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def _attempt(self, write: Callable[[], Any]) -> None:
        """Calls `write`. If it fails, the reason is kept, and the files that it has left are removed."""
        try:
            write()
        except storage.failures() as error:  # Orbax raises any of them for a full disk
            if self._problem:
                return  # a consequence of the first failure, which is known
            # Orbax forgets an old step before it removes the files: reload() reads which steps there are.
            with contextlib.suppress(*storage.failures()):
                self._manager.reload()
            if self._saving is None or self._saving.step in self._manager.all_steps():
                return  # the step is saved; the removal of an older step has failed
            with contextlib.suppress(*storage.failures()):
                # Orbax raises an error once. What is left now would be raised by the next save.
                self._manager.check_for_errors()
            self._clear()
            cause: BaseException = error
            while jax.process_count() > 1 and cause.__context__:
                # The error says that the other processes didn't come to the barrier; this is the reason.
                cause = cause.__context__
            reason = (str(cause).strip() or repr(cause)).splitlines()[0].split(" [")[0]
            self._problem = f"the checkpoint of step {self._saving.step} could not be saved ({reason})"
            if (free := storage.free_bytes(self.folder)) is not None:
                arrays = jax.tree.leaves(self._saving[1:])
                nbytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
                self._problem += f"; it needs {nbytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free"
            self.failed += 1

    def _clear(self) -> None:
        """Removes the files of failed saves, when no save is under way. It is called again and again, since
        a write that ends late makes its folder anew."""
        if jax.process_index() > 0 or getattr(self._lock, "lost", False):
            return
        left = []
        if not isinstance(self.folder, Bucket):
            left = list(self.folder.glob("*.orbax-checkpoint-tmp*"))
        else:
            with contextlib.suppress(OSError):  # the network; the next start removes them
                there = [path for path in self.folder.iterdir() if path.name.isdigit()]
                left = [path for path in there if not (path / COMMITTED).is_file()]
        for path in left:
            storage.rmtree(path, ignore_errors=True)

    def _warn(self) -> None:
        if self._problem and jax.process_index() == 0:
            print(f"warning: {self._problem}; going on without it", file=sys.stderr, flush=True)
        self._problem = ""

    def _unraisable(self, what: Any) -> None:
        # When a write fails, Orbax closes the event loop of that save before its other writes have ended.
        # Each of these would print a traceback that the loop is closed.
        if str(what.exc_value) != "Event loop is closed":
            self._hook(what)

    def _write_manifest(self) -> None:
        # Orbax calls this in the first process when all processes have written, before it renames the
        # temporary folder, or marks that of a bucket: a step is committed with its manifest or not at all.
        if isinstance(self.folder, Bucket):
            folder = self.folder / str(self._saving.step)
        else:
            (folder,) = self.folder.glob(f"{self._saving.step}.orbax-checkpoint-tmp*")
        for part in PARTS:
            # The manifest lists the files as they are now. Files that were damaged or lost since they were
            # written must be found before.
            check_leaves(folder / part, getattr(self._saving, part))
            refuse(missing(folder / part), f"{folder / part} has lost arrays while it was written")
        write_manifest(folder)


def _anywhere(here: bool) -> bool:
    """Whether `here` is true in any process. All processes must call this."""
    return (
        here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(here)).any())
    )


def newest_params(workdir: storage.Name, step: int | None = None) -> tuple[dict[str, Any], int]:
    """The verified params of the newest step of a workdir, or of `step`, as `open_params` gives them, and
    the number of the step."""
    folder = newest_step(workdir, step)
    verify_manifest(folder, "params")
    return open_params(folder / "params"), int(folder.name)


def trust(folder: storage.Name) -> list[storage.Path]:
    """Accepts the files of a workdir or a checkpoint as they are now, and returns the files it has written.

    The hashes of the small files are written anew, and a manifest for arrays that have none; a manifest
    that is there stays, so that damaged arrays stay damaged. Raises ValueError if `folder` holds no
    arrays, or if arrays without a manifest are not whole.
    """
    folder = storage.path(folder)
    found = [path for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    arrays = dict.fromkeys(found, PARTS)
    if (folder / "params").is_dir():
        arrays[folder / "params"] = ("",)
    if not arrays:
        raise ValueError(f"{folder} is no workdir of a training run and no checkpoint: it has no arrays")
    bare = {path: parts for path, parts in arrays.items() if not (path / MANIFEST).is_file()}
    refuse(
        [
            f"{path}: {line}"
            for path, parts in bare.items()
            for part in parts
            for line in missing(path / part)
        ],
        f"{folder} can't be trusted",
    )
    for path in bare:
        write_manifest(path)
    record_files(folder)
    return [*(path / MANIFEST for path in bare), *_commit(found), folder / FILES]


def _commit(found: list[storage.Path]) -> list[storage.Path]:
    """Marks steps in a bucket as complete that were copied there from a disk, where Orbax has no such mark.
    Returns the marks that were written."""
    marks = []
    for step in found if found and isinstance(found[0], Bucket) else ():
        if not (step / COMMITTED).is_file() and not find_damage(step):
            # The mark of the step comes last.
            places = [*(step / part for part in PARTS), step]
            marks += [mark for place in places if not (mark := place / COMMITTED).is_file()]
    for mark in marks:
        mark.write_text(f"Checkpoint commit was successful to {mark.parent}")
    return marks
