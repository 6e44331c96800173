"""The programs, and how they end when something is wrong."""

import ctypes
import hashlib
import os
import pathlib
import platform
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a program with absl's flags and a --config, and ends it as `fail` does."""
    from absl import app

    from mmada_jax.config import parse_flags

    try:
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:
        os.write(2, b"stopped by Ctrl-C before there was anything to save\n")
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        fail(error)


def keep_memory() -> None:
    """Makes glibc keep what this process frees, on machines that compute on their CPUs.

    XLA asks for its buffers anew in every step. Handed back to the kernel each time, their pages cost
    about a sixth of a training step of the digits (system time; mallopt(3) names the settings)."""
    import jax

    if jax.default_backend() == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
        for setting, value in (
            (mmap_max, 0),
            (trim_threshold, 2**31 - 1),
            (top_pad, 2**28),
            (arena_max, 1),
        ):
            libc.mallopt(setting, value)


def keep_programs() -> None:
    """Makes jax keep the programs that it compiles: a later stage or run need not compile them again.

    They lie in ~/.cache/mmada_jax, in a folder for each kind of processor. A folder has at most 256 MiB;
    the programs that were not used for longest go first. JAX_COMPILATION_CACHE_DIR names another place.
    Where nothing can be written, nothing is kept. Call it before anything is compiled."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    # A program has the instructions of the processor that it was compiled on, and homes are shared.
    known = pathlib.Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    kind = [platform.machine(), platform.processor(), *sorted({x for x in lines if "flags" in x})]
    name = hashlib.sha256("".join(kind).encode()).hexdigest()[:16]
    try:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = cache / "mmada_jax" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 2**28)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def fail(error: Exception) -> NoReturn:
    """Ends with one line for errors that users can mend, with a traceback for others."""
    import jax

    expected = isinstance(error, ValueError | OSError | ImportError | FloatingPointError)
    in_short = expected and not os.environ.get("MMADA_TRACEBACK")
    if jax.distributed.is_initialized():
        try:
            if in_short:
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:
                traceback.print_exception(error)
        finally:
            # Python's own exit waits minutes for the other processes, which wait for this one.
            os._exit(1)
    if in_short:
        sys.exit(f"error: {error}")
    raise error
