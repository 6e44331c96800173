"""What all programs share: the allocator's settings, and the platform that a user chose."""

import pathlib
import platform
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_what_a_step_frees_is_kept():
    code = """
import resource, numpy as np, launch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        np.ones(2**23)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without = faults()
launch.keep_memory()
np.ones(2**23)
print(without, faults())
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    without, kept = map(int, run.stdout.split())
    assert kept < without / 100, (without, kept)


def test_scripts_leave_the_platform_and_the_allocator_to_the_user():
    for path in (ROOT / "launch").glob("*.sh"):
        assert "JAX_PLATFORMS" not in path.read_text(), path
        assert "GLIBC_TUNABLES" not in path.read_text(), path
