"""Ray: a cluster that runs already is joined, or one of this machine alone is started, and ended after it.

Ray is the extra `cluster`. It is imported here when it is asked for, since it reads the environment then.
"""

import contextlib
import fcntl
import functools
import importlib.util
import os
import pathlib
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

MISSING = "{} needs Ray: pip install 'mmada_jax[cluster]'"
# Folders of Ray's session begin so. Unix sockets lie in them, whose paths have 107 characters at most; Ray
# needs 72 of them.
PREFIX, LONGEST = "mmada_ray_", 107 - 72
# Ray keeps what tasks return in shared memory. We return counts.
OBJECT_STORE = 100 * 2**20
# Seconds within which a cluster takes a connection.
REACH = 10


def require(what: str) -> None:
    """Raises ImportError, which says what to install for `what`, if Ray isn't there."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError(MISSING.format(what))


@contextlib.contextmanager
def connected(address: str | None = None) -> Iterator[bool]:
    """Connects to the cluster at `address` (by default at RAY_ADDRESS), or to one that is started for the
    block. Yields whether it was started. A connection that this process has already is used as it is.

    Raises ConnectionError if there is no cluster, or if it doesn't take our token.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield False
    elif address == "local":
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(_session_folder())
            stack.enter_context(_environment(_alone()))
            stack.enter_context(_quiet())
            stack.enter_context(_connection("local", _temp_dir=folder, include_dashboard=False,
                                            object_store_memory=OBJECT_STORE))  # fmt: skip
            yield True
    elif address.startswith("ray://"):
        raise ValueError(f"--address {address} is of Ray's client; give the command on a host of the "
                         "cluster, with --address auto")  # fmt: skip
    else:
        if address != "auto":
            _reach(address)
        with _quiet(), _connection(address):
            yield False


def _reach(address: str) -> None:
    """Raises ConnectionError if nothing listens at HOST:PORT: Ray itself would try for two minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster answers at {address} ({error}); --address is HOST:PORT, as "
                              "`ray start --head` tells it")  from error  # fmt: skip


@contextlib.contextmanager
def _connection(address: str, **settings) -> Iterator[None]:
    import ray

    on_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR", **settings)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())
            raise ConnectionError(
                f"no Ray cluster can be used at {address}: {reason}; a cluster with a token needs "
                "RAY_AUTH_MODE=token, and the same token on all hosts (docs/cluster.md)"
            ) from error
        except SystemExit as stop:  # Ray's handler of SIGTERM
            raise KeyboardInterrupt from stop
        finally:
            # Ray's handler would end the process without a word.
            if on_main and before is not None:
                signal.signal(signal.SIGTERM, before)
        yield
    finally:
        ray.shutdown(wait_for_processes=True)


def _alone() -> dict[str, str]:
    """What makes Ray start a cluster for nobody else."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would write a token into the home, readable by all.
        "RAY_AUTH_TOKEN": _token(),
        # On Linux Ray takes the machine's outer address for 127.0.0.1, and listens on all addresses. This
        # makes it stay on loopback, as on macOS and Windows; it is read when ray is imported.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Without a number of GPUs a worker sees all of them, as a program without Ray does.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


@functools.cache
def _token() -> str:
    """One for each process, since Ray reads it once."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*values, "RAY_AUTH_MODE")}  # which Ray sets
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray prints on stdout what its daemons say of lost workers, also with log_to_driver=False. Who leads
    the workers tells of them in one line."""
    import ray

    worker = ray._private.worker
    before = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *args, **named: None
    try:
        yield
    finally:
        worker.print_to_stdstream = before


@contextlib.contextmanager
def _session_folder() -> Iterator[str]:
    """A new folder for what Ray writes, removed at the end. Those of processes that were killed are removed
    first: a folder in use is locked by its process."""
    parent = pathlib.Path(tempfile.gettempdir())
    if len(str(parent / f"{PREFIX}12345678")) > LONGEST:
        parent = pathlib.Path("/tmp")
    for left in parent.glob(f"{PREFIX}*"):
        # OSError: it is in use, of another user, or removed by now.
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with _locked(folder):
            # Below ours, which nobody else can enter: Ray makes its own writable for everybody.
            yield str(folder / "r")
    finally:
        _remove(folder)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Locks a folder. Raises OSError if a process has it."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove(folder: pathlib.Path) -> None:
    """Ray's last processes may still write there for a moment."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
