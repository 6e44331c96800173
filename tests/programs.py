"""Programs under test, as users run them but for their imports, which take longer than most of them
do: they are forks of a process that has imported what all import.

Two such processes take turns, so that programs that meet, or one after the other, hash texts with different
seeds, as programs do. And what finds and ends the processes that a program leaves. Nothing else belongs
here.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import time

_LONGEST = 1 << 17  # bytes of a message
IMPORTED = ("absl.flags", "mmada_jax.train.supervised", "mmada_jax.train.rl.loop")


class Program:
    """What subprocess.Popen is for a program in Python, `command` without the interpreter.

    What it prints, errors too, is text in `stdout`. `environment` is what it has beside that of the tests.
    """

    def __init__(self, command, environment=None, new_session=False):
        self._parent = next(_turns())
        read, write = os.pipe()
        self.pid = self._parent.fork({
            "argv": list(map(str, command)), "environment": os.environ | (environment or {}),
            "new_session": new_session, "folder": os.getcwd(),
        }, write)  # fmt: skip
        os.close(write)
        self.stdout, self.returncode = os.fdopen(read), None

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error:
            self.kill()
        self.stdout.close()
        self.wait()

    def wait(self, timeout=None):
        """Its exit status; -N where signal N ended it."""
        if self.returncode is None:
            self.returncode = self._parent.status(self.pid, timeout)
        return self.returncode

    def poll(self):
        """The exit status, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout=None):
        """What it prints until it ends, and None."""
        with self.stdout:
            out = self.stdout.read()
        self.wait(timeout)
        return out, None

    def send_signal(self, number):
        """Nothing happens to one that has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def heirs(variable):
    """Numbers of the processes that were started with a variable in their environment, "NAME=value"."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def end_heirs(variable):
    """Kills them. Until none is left they may start others, and write."""
    deadline = time.monotonic() + 60
    while found := heirs(variable):
        assert time.monotonic() < deadline, f"processes {found} outlive a SIGKILL"
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


class _Parent:
    """The process that forks."""

    def __init__(self):
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ended = {}
        command = [sys.executable, __file__, str(other.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
        )
        other.close()

    def fork(self, what, stdout):
        """The number of the new process."""
        socket.send_fds(self._socket, [json.dumps(what).encode()], [stdout])
        while True:
            pid, status = json.loads(self._socket.recv(_LONGEST))
            if status is None:
                return pid
            self._ended[pid] = status

    def status(self, pid, timeout):
        """The exit status of a process, when it has one."""
        while pid not in self._ended:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {pid}", timeout)
            other, status = json.loads(self._socket.recv(_LONGEST))
            self._ended[other] = status
        return self._ended.pop(pid)


@functools.cache
def _turns():
    return itertools.cycle([_Parent(), _Parent()])


def _serve(connection):
    """Forks as asked. Returns in each fork: the program's arguments, everything else as it wants it."""
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        ready, _, _ = select.select([connection, ended], [], [])
        if ended in ready:
            os.read(ended, 1 << 10)
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if not pid:
                    break
                connection.send(json.dumps((pid, os.waitstatus_to_exitcode(status))).encode())
        if connection not in ready:
            continue
        asked, fds, _, _ = socket.recv_fds(connection, _LONGEST, 1)
        if not asked:
            os._exit(0)
        what, (stdout,) = json.loads(asked), fds
        pid = os.fork()
        if pid:
            os.close(stdout)
            connection.send(json.dumps((pid, None)).encode())
            continue
        connection.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in (ended, wake):
            os.close(fd)
        if what["new_session"]:
            os.setsid()
        for fd in (1, 2):
            os.dup2(stdout, fd)
        os.close(stdout)
        os.environ.clear()
        os.environ.update(what["environment"])
        os.chdir(what["folder"])
        return what["argv"]


if __name__ == "__main__":
    import importlib
    import runpy

    for name in IMPORTED:
        importlib.import_module(name)
    sys.argv = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
