"""The processes of one run: how they meet, agree before anything is computed, and stop together."""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # its store of keys and values has no public name
from jax.sharding import NamedSharding, PartitionSpec

from mmada_jax.devices import sharding

_phases = itertools.count()
# Settings of jax that change programs or numbers.
_SETTINGS = (
    "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable", "jax_random_seed_offset",
    "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion",
    "jax_disable_jit", "jax_debug_nans", "jax_debug_infs", "jax_use_shardy_partitioner",
)  # fmt: skip
_PATIENCE = 10  # seconds for processes that are about to end together


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool | None = None,
    timeout: int = 300,
) -> None:
    """Connects the processes of one run to each other. Call it before anything else asks for devices.

    `coordinator`, HOST:PORT of process 0, and the two numbers say who is who, all three or none.
    Without them jax finds out by itself (Cloud TPU, Slurm, Open MPI): if `distributed`, or, where that
    is None, if the environment says that there are several. Otherwise nothing happens.
    Raises ValueError for what can't be meant, OSError if the port is taken, ConnectionError if the
    processes don't find each other within `timeout` seconds.
    """
    explicit = (coordinator, num_processes, process_id)
    if any(x is not None for x in explicit):
        _check_explicit(*explicit)
    elif not (several_processes(os.environ) if distributed is None else distributed):
        return
    # Its handler would swallow SIGTERM until training has its own, which saves at a step that all agree on.
    jax.config.update("jax_enable_preemption_service", False)
    me = "this process" if coordinator is None else f"process {process_id} of {num_processes}"
    at = "the coordinator" if coordinator is None else coordinator
    # Past its own timeout jax aborts with a stack trace.
    connect = functools.partial(jax.distributed.initialize, initialization_timeout=2 * timeout)
    try:
        _call_within(timeout, functools.partial(connect, *explicit))
    except TimeoutError as error:
        raise ConnectionError(
            f"{me} and the others didn't meet at {at} within {timeout} s; is that the address of "
            "process 0, and are all of them started?"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(f"{me} can't connect at {at}: {str(error).splitlines()[0]}") from error


def _call_within(seconds: float, f: Callable[[], None]) -> None:
    """Raises what `f` raises, or TimeoutError while `f` runs on; it doesn't keep Python from exiting."""
    done: Future[None] = Future()

    def call():
        try:
            done.set_result(f())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    done.result(seconds)


def _check_explicit(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if None in (coordinator, num_processes, process_id):
        raise ValueError("coordinator, num_processes and process_id belong together: give all or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator is {coordinator!r}; it must be HOST:PORT")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id is {process_id}; it must be from 0 to num_processes - 1")
    if process_id == 0:
        with socket.create_server(("", int(port))):  # raises OSError if it is taken, where jax would crash
            pass


def several_processes(environment: Mapping[str, str]) -> bool:
    """Whether Slurm's or the TPU's environment variables say that this process is one of several."""
    # In a Slurm job, only what srun starts is one of several; the batch script itself is alone.
    slurm = "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    # Off TPUs libtpu leaves a sentence there, which child processes inherit.
    tpu = "," in hosts and " " not in hosts
    return slurm or tpu or "MEGASCALE_COORDINATOR_ADDRESS" in environment


# ---- Agreeing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def together(phase: str, timeout: float = math.inf) -> Iterator[dict[str, Any]]:
    """A phase that all processes of a run complete with the same values, or that ends them all.

    Gives a dict: what a process puts there, of JSON's types, must be the same in all of them. It needs no
    devices and no collective, so that it also works where programs or numbers of devices differ. A
    process alone agrees with itself.

    Raises what is raised within. Raises ValueError in all processes, naming the first difference, if one
    has other values, is in another phase, has failed, or hasn't come `timeout` seconds after the first.
    """
    mine: dict[str, Any] = {}
    state = distributed.global_state
    if state.client is None:
        yield mine
        return
    talk = _Talk(state.client, f"mmada_jax/{next(_phases)}", state.process_id, state.num_processes)
    try:
        yield mine
    except BaseException as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        wrong = talk.settle({"failed": reason}, _PATIENCE)
        leave()
        if isinstance(error, RuntimeError) and f"process {state.process_id} " not in wrong:
            raise ValueError(wrong) from error  # what failed here follows from that
        raise
    values = {"processes": state.num_processes, "jax": jax.__version__, **mine, **_settings(os.environ)}
    wrong = talk.settle({"phase": phase, "values": values}, timeout)
    if wrong:
        leave()
        raise ValueError(wrong)


def _settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings of jax and the options of XLA. Beside the configuration they decide which programs a
    process compiles, and which numbers these give. Options that only make XLA write files are left out,
    and so is the number of devices, which is compared by itself."""
    apart = ("--xla_dump", "--xla_force_host_platform_device_count")
    options = {
        name: " ".join(sorted(x for x in environment.get(name, "").split() if not x.startswith(apart)))
        for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    }
    return {name: jax.config.values[name] for name in _SETTINGS if name in jax.config.values} | options


class _Talk(NamedTuple):
    """What processes say to each other in one phase, through the coordinator's store."""

    client: Any
    key: str
    me: int
    n: int

    def settle(self, said: dict[str, Any], timeout: float) -> str:
        """What is wrong with what this process and the others have said; empty if nothing is."""
        end = time.monotonic() + timeout
        try:
            self.client.key_value_set(f"{self.key}/{self.me}", json.dumps(said, default=str))
            if self.me:
                return self._wait(end + _PATIENCE)  # the patience of process 0 ends first
            wrong = self._judge(end)
            self.client.key_value_set(f"{self.key}.verdict", json.dumps(wrong))
            return wrong
        except jax.errors.JaxRuntimeError as error:
            return f"process 0, the coordinator, doesn't answer: {str(error).splitlines()[0]}"

    def _wait(self, end: float) -> str:
        """The verdict of process 0."""
        while True:
            try:
                return json.loads(self.client.blocking_key_value_get(f"{self.key}.verdict", 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if time.monotonic() > end:
                return "process 0 has not started its run; do all run the same program?"

    def _judge(self, end: float) -> str:
        """Waits until all have spoken, or until something is wrong."""
        while True:
            entries = self.client.key_value_dir_get(f"{self.key}/")
            said = {int(key.rpartition("/")[2]): json.loads(text) for key, text in sorted(entries)}
            for process in sorted(said):
                if "failed" in said[process]:
                    return f"process {process} has failed: {said[process]['failed']}"
            wrong = [_disagreement(said[0], said[process], process) for process in sorted(said)]
            if any(wrong):
                return next(filter(None, wrong))
            missing = sorted(set(range(self.n)) - set(said))
            if not missing:
                return ""
            if time.monotonic() > end:
                return f"process {missing[0]} has not started its run; do all run the same program?"
            time.sleep(0.1)


def _disagreement(first: dict[str, Any], other: dict[str, Any], process: int) -> str:
    if first["phase"] != other["phase"]:
        return (
            f"the processes of this run disagree: process 0 runs {first['phase']}, process {process} "
            f"{other['phase']}; start all with the same command"
        )
    one, two = _flat(first["values"]), _flat(other["values"])
    for name in (*one, *two):
        a, b = one.get(name, "missing"), two.get(name, "missing")
        if a != b:
            return (
                f"the processes of this run disagree: {name} is {a} in process 0 and {b} in process "
                f"{process}; start all with the same command, versions and files"
            )
    return ""


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Dotted name -> JSON of each leaf of a tree of dicts."""
    if not isinstance(value, dict):
        return {path: json.dumps(value)}
    return {
        name: leaf
        for key, of_key in value.items()
        for name, leaf in _flat(of_key, f"{path}.{key}" if path else key).items()
    }


def connect_axes(mesh: jax.sharding.Mesh) -> None:
    """Connects the processes of a run along each set of axes of its mesh; call it when they have just
    agreed on something.

    On CPUs Gloo connects processes when a program first needs it, and fails where one comes 30 s after
    the others, as with a slow disk. Once they are connected, they wait for each other."""
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    axes = [name for name, size in mesh.shape.items() if size > 1]
    sets = [some for n in range(len(axes)) for some in itertools.combinations(axes, n + 1)]
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    sums = jax.shard_map(
        lambda x: [jax.lax.psum(x, some) for some in sets],
        mesh=mesh, in_specs=each.spec, out_specs=each.spec, check_vma=False,
    )  # fmt: skip
    ones = jax.make_array_from_callback((mesh.size,), each, lambda _: np.ones(1, np.float32))
    jax.block_until_ready(jax.jit(sums, in_shardings=each, out_shardings=each)(ones))


def is_lost(error: BaseException | None) -> bool:
    """Whether an error of this run of several processes says that another one has ended, or can't be
    reached; collectives raise it as any of two types."""
    state = distributed.global_state
    if state.client is None or state.num_processes < 2 or not isinstance(error, RuntimeError | ValueError):
        return False
    signs = r"(\w+: )?(Gloo|NCCL) |(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): "
    return re.match(signs, str(error)) is not None


def leave() -> None:
    """Leaves the other processes in good order, and waits some seconds for them to leave too. A process
    that the coordinator has left without this ends with a stack trace."""
    with contextlib.suppress(TimeoutError, RuntimeError):
        _call_within(_PATIENCE, jax.distributed.shutdown)


# ---- Stopping ------------------------------------------------------------------------------------


@contextlib.contextmanager
def watch_signals(mesh: jax.sharding.Mesh) -> Iterator[Callable[[], int | jax.Array]]:
    """Gives a function that returns the number of the signal that has asked for an end, SIGTERM or
    SIGINT (Ctrl-C), and 0 if none has. A second SIGINT ends the process at once.

    Where there are several processes, all must call it at the same steps, and get the same answer: a
    signal that arrived at any. The answer is then an array, ready when the work queued before is done.
    """
    received: list[int] = []
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    anywhere = jax.jit(jnp.max, in_shardings=each, out_shardings=sharding.replicated(mesh))

    def ask():
        here = received[0] if received else 0
        if jax.process_count() == 1:
            return here
        of_each = jax.make_array_from_callback((mesh.size,), each, lambda _: np.array([here], np.int32))
        return anywhere(of_each)

    # Outside of the main thread the caller handles signals; what is ignored (nohup) stays so.
    watched = []
    if threading.current_thread() is threading.main_thread():
        watched = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) != signal.SIG_IGN]
    with _second_ends() if signal.SIGINT in watched else contextlib.nullcontext():
        before = {s: signal.signal(s, lambda number, _: received.append(number)) for s in watched}
        try:
            yield ask
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def _second_ends() -> Iterator[None]:
    """Ends the process at the second SIGINT, also while the main thread compiles or waits for others:
    Python calls a handler only when that is over, but writes the number of a signal at once."""
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)

    def watch():
        seen = 0
        while data := ours.recv(64):
            seen += data.count(signal.SIGINT)
            if seen > 1:
                os.write(2, b"stopped at once by a second Ctrl-C\n")
                os._exit(128 + signal.SIGINT)

    before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        pythons.close()
        thread.join()
        ours.close()
