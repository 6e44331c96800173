"""launch/tpu/tpu.py as a user runs it, with stubs of the programs that it calls."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
TPU = ROOT / "launch/tpu/tpu.py"
# Records its argv and what comes on stdin, and answers what it was told to.
STUB = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\036'; } >>"$STUBS/calls"
[ "$1" != apply ] || cat >"$STUBS/stdin"
if [ -f "$STUBS/answers" ] && [[ " $* " == *" describe "* ]]; then
  head -n 1 "$STUBS/answers"
  sed -i 1d "$STUBS/answers"
fi
if [ -f "$STUBS/workers" ] && [[ " $* " == *"worker.sh status"* ]]; then
  head -n 1 "$STUBS/workers" | tr ';' '\n'
  sed -i 1d "$STUBS/workers"
fi
[ ! -f "$STUBS/message" ] || cat "$STUBS/message" >&2
exit "$(cat "$STUBS/status" 2>/dev/null || echo 0)"
"""


def write_script(path, text):
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """A PATH that begins with stubs, and what they were called with."""

    def __init__(self, folder, programs):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for program in programs:
            write_script(folder / "bin" / program, STUB)
        self.path = f"{folder}/bin:{os.environ['PATH']}"

    def tell(self, **files):
        for name, text in files.items():
            (self.folder / name).write_text(str(text) + "\n")

    def run(self, *argv):
        env = os.environ | {"PATH": self.path, "STUBS": str(self.folder), "TMPDIR": str(self.folder)}
        return subprocess.run(
            [sys.executable, TPU, *argv], env=env, capture_output=True, text=True, timeout=60
        )

    def calls(self):
        record = self.folder / "calls"
        calls = record.read_text().split("\x1e")[:-1] if record.exists() else []
        return [call.split("\0")[:-1] for call in calls]
