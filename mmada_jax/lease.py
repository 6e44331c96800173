"""Leases: objects in a bucket that say which process owns a folder there.

The kernel releases a lock when its process ends, and a bucket has no such lock. The owner of a lease writes
it anew every RENEW seconds instead. A lease that hasn't changed for EXPIRE seconds has no owner any more;
the clocks of the machines don't matter for that. If the owner was a process of this machine and has ended,
the lease is free at once.
"""

import contextlib
import functools
import json
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mmada_jax.bucket import Bucket

RENEW, EXPIRE = 10.0, 60.0
_seen: dict[Bucket, tuple[int, float]] = {}  # the generation of a lease, and when it was seen first


class Lease:
    """A lease of this process, which a thread renews until `release`. `lost` says that it is another's,
    `is_new` that there was none before, also none of a process that has gone."""

    def __init__(self, path: Bucket, about: str, busy: str, tell: Callable[[str], None]):
        """Takes the lease, or raises ValueError with the text `busy` and the owner. `about` describes this
        process to others. `tell` is told why taking it lasts."""
        self.path, self.lost, self.is_new = path, False, False
        # The token tells this lease from others of the same process.
        told = {"owner": about, "process": _process(os.getpid()), "token": secrets.token_hex(8)}
        self._text = json.dumps(told).encode()
        self._generation = self._take(busy, tell)
        self._ended, self._renewing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _take(self, busy: str, tell: Callable[[str], None]) -> int:
        first = None
        while True:
            now = look(self.path)
            if now is None or now.left <= 0:
                # Of several processes that see a free lease, the storage lets one write it.
                if taken := self._write(now.generation if now else 0):
                    self.is_new = now is None
                    return taken
                continue
            if now.lives or first not in (None, now.generation):
                raise ValueError(f"{busy} (taken by {now.owner}); wait or end it")
            if first is None:
                tell(
                    f"{self.path} was taken by {now.owner}, on another machine; waiting {now.left:.0f} s "
                    "to see whether that process lives"
                )
            first = now.generation
            time.sleep(min(2.0, now.left))

    def _write(self, generation: int) -> int | None:
        """Writes the lease in the place of this generation, 0: of none. Returns the new generation, or None
        if another process has written."""
        if written := self.path.write_if(self._text, generation):
            return written
        # A request that is repeated, since its answer was lost, finds what it has written itself.
        with contextlib.suppress(FileNotFoundError):
            found = int(self.path.info()["generation"])
            return found if self.path.read_bytes() == self._text else None
        return None

    def _renew(self) -> None:
        while not self._ended.wait(RENEW) and not self.lost:
            self.check()

    def check(self) -> None:
        """Renews the lease now, and sees whether it was lost. Where the storage can't be reached that isn't
        known: after EXPIRE seconds another process may take the lease."""
        with self._renewing, contextlib.suppress(OSError):
            generation = self._write(self._generation)
            self.lost = generation is None
            self._generation = generation or self._generation

    def release(self) -> None:
        """Gives the lease back. If the network fails, the lease ends by itself."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if int(self.path.info()["generation"]) == self._generation:
                self.path.unlink(missing_ok=True, generation=self._generation)


class Seen(NamedTuple):
    """A lease as it is seen now. `left` is the time in seconds until it is free, if nobody renews it."""

    owner: str
    generation: int
    lives: bool  # whether its owner is a process of this machine that is there
    left: float


def look(path: Bucket) -> Seen | None:
    """What a lease says now; None if there is none."""
    try:
        generation, data = int(path.info()["generation"]), path.read_bytes()
    except FileNotFoundError:
        _seen.pop(path, None)
        return None
    try:
        told = json.loads(data)
        owner, (*machine, pid, began) = str(told["owner"]), told["process"]
    except (ValueError, KeyError, TypeError):
        # It is no lease, as the lock file of a workdir that was copied from a disk.
        return Seen("nobody", generation, False, 0.0)
    if _seen.get(path, (0, 0.0))[0] != generation:
        _seen[path] = generation, time.monotonic()
    left = EXPIRE - (time.monotonic() - _seen[path][1])
    if tuple(machine) == _machine():
        lives = _began(pid) == began != ""
        return Seen(owner, generation, lives, left if lives else 0.0)
    return Seen(owner, generation, False, left)


@functools.cache
def _machine() -> tuple[str, str, str]:
    """What tells the numbers of processes here from those of other machines and containers."""
    boot, space = "", ""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return os.uname().nodename, boot, space


def _process(pid: int) -> list[Any]:
    return [*_machine(), pid, _began(pid)]


def _began(pid: Any) -> str:
    """When a process of this machine began, in ticks; empty if it isn't there, or has ended."""
    try:
        state, *fields = pathlib.Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except (OSError, ValueError, TypeError, IndexError):
        return ""
