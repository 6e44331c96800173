"""What all programs share: reading options, and how a process starts and ends.

Only the standard library is imported in the head: jax only where it is used.
"""

import argparse
import contextlib
import ctypes
import difflib
import hashlib
import os
import pathlib
import platform
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, with the docstring of the program as its help, and one line for what is wrong."""

    def __init__(self, description: str | None = None, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        """Ends for an unknown option, naming the one that looks most like it, before argparse misses
        others. Raises ValueError for a word that means nothing."""
        known, args = self.known_options(), self._join(sys.argv[1:] if args is None else args)
        for word in args:
            name = word.partition("=")[0]
            if word == "--":
                break
            if name.startswith("--") and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                self.error(f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else ""))
        parsed, left = self.parse_known_args(args, namespace)
        if left:
            raise ValueError(f"unexpected argument {left[0]!r}; options begin with --")
        return parsed

    def _join(self, args: Sequence[str]) -> list[str]:
        """Joins an option and its value where that begins with one -, which argparse takes for an option:
        `--metric -loss` -> `--metric=-loss`."""
        joined: list[str] = []
        for word in args:
            takes = self._option_string_actions.get(joined[-1]) if joined else None
            if takes and takes.nargs is None and re.match("-[^-]", word):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return joined

    def known_options(self) -> list[str]:
        """Lists all options, also the options of its commands."""
        found = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [option for sub in action.choices.values() for option in sub.known_options()]
        return found

    def error(self, message: str) -> NoReturn:
        """Ends with one line and status 2."""
        print(f"error: {message} ({self.prog} --help)", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Ends the process as `fail` does for an error of the block, with one line for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        os.write(2, b"stopped by Ctrl-C before there was anything to save\n")
        os._exit(128 + signal.SIGINT)
    except Exception as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Ends with one line for errors that users can mend, with a traceback for others."""
    from mmada_jax.storage import FULL

    jax = sys.modules.get("jax")
    several = jax and jax.distributed.is_initialized()
    if several:
        from mmada_jax.devices.distributed import is_lost

        error = _lost(error) if is_lost(error) else error
    expected = isinstance(error, ValueError | OSError | ImportError | FloatingPointError)
    line = f"error: {error}"
    if isinstance(error, OSError) and error.errno in FULL:
        line += "; make room, and run it again"
    in_short = expected and not os.environ.get("MMADA_TRACEBACK")
    if several:
        try:
            if in_short:
                print(line, file=sys.stderr, flush=True)
            else:
                traceback.print_exception(error)
        finally:
            # Python's own exit waits minutes for the other processes, which wait for this one.
            os._exit(1)
    if in_short:
        sys.exit(line)
    raise error


def _lost(error: Exception) -> ConnectionError:
    """What an error of a collective means to those who started the processes."""
    reason = str(error).splitlines()[0]
    lost = ConnectionError(
        f"another process of this run has ended or can't be reached ({reason}); look at what it "
        "printed, and start all of them again: the run resumes"
    )
    lost.__cause__ = error
    return lost


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound. Raises OSError, which says what to do, if it can't be."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise OSError(error.errno, f"--host {host} can't be used: {error.strerror}") from error
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError as error:
            raise OSError(
                error.errno,
                f"port {port} of {host} can't be bound: {error.strerror}; choose another --port",
            ) from error
        yield sock


def quiet() -> None:
    """Silences what libraries log of an error: it stands in the error that is raised."""
    from absl import flags, logging

    flags.FLAGS.mark_as_parsed()  # Grain reads its own flags, which have their defaults here
    logging.use_absl_handler()
    logging.set_verbosity(logging.FATAL)


def start_jax(connect: Callable[[], None] = lambda: None) -> None:
    """Starts jax in a process that keeps the memory that it frees, if jax computes on CPUs.

    XLA asks for its buffers anew in every step. Handed back to the kernel each time, their pages, which the
    kernel clears, cost more than a quarter of a training step of the digits (system time). glibc is told to
    keep them before jax has threads, since a thread keeps the pool of memory that it began with. A host of
    accelerators has many threads, which need pools of their own: it gets glibc's defaults back as soon as
    jax knows its devices.

    Programs that compute call this when they have read their options; nothing may ask jax for its devices
    before. `connect` meets the other processes of a run, which comes before the devices too.
    """
    import jax

    _tell_malloc({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**28, _ARENA_MAX: 1})
    connect()
    if jax.default_backend() != "cpu":
        _tell_malloc({_MMAP_MAX: 2**16, _TRIM_THRESHOLD: 2**17, _TOP_PAD: 2**17, _ARENA_MAX: 0})


def share_memory() -> None:
    """Makes the threads of this process take memory from two pools of glibc's instead of one for each
    thread. What a thread frees stays in its pool, where threads of other pools can't use it: a conversion
    held twice as much on a busy machine. Call it before threads are started."""
    _tell_malloc({_ARENA_MAX: 2})


# Settings of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def _tell_malloc(settings: Mapping[int, int]) -> None:
    """Other C libraries than glibc may lack mallopt; then nothing happens."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for setting, value in settings.items():
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
