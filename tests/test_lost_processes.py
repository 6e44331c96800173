"""A process of several that dies ends the others within seconds."""

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LOST = "error: another process of this run has ended or can't be reached (UNKNOWN: Gloo"

# What a process of two does over and over.
MEETS = """
import sys
from mmada_jax.programs.process import fail
from mmada_jax.devices import distributed, sharding

distributed.initialize_distributed(sys.argv[1], 2, int(sys.argv[2]))
try:
    mesh = sharding.make_mesh()
    distributed.connect_axes(mesh)
    with distributed.watch_signals(mesh) as signalled:
        while int(signalled()) == 0:
            print("met", flush=True)
except Exception as error:
    fail(error)
"""


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_other(dies, free_port):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    commands = [[sys.executable, "-c", MEETS, f"127.0.0.1:{free_port}", str(i)] for i in (0, 1)]
    with contextlib.ExitStack() as stack:
        two = [
            stack.enter_context(subprocess.Popen(
                command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            ))
            for command in commands
        ]  # fmt: skip
        for process in two:
            stack.callback(process.kill)
        other = two[1 - dies]
        for line in other.stdout:
            if line == "met\n":
                two[dies].kill()
                break
        out = other.communicate(timeout=30)[0]
    said = [line for line in out.splitlines() if line != "met"]
    # Where process 0 dies, jax's client may notice it before a sum fails. It ends the process itself then,
    # with a stack trace of its own.
    if dies == 1 or "another task died" not in out:
        assert other.returncode == 1 and len(said) == 1 and said[0].startswith(LOST), out
    else:
        assert other.returncode != 0, out
        assert "Fatal Python error" not in out and len(said) < 40, out
