#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 with jax 0.10.2: a checkpoint below a folder whose name has brackets is committed without
# its arrays.
#
# When a save ends, Orbax merges what each process wrote, and looks for those parts with a glob pattern made of the
# whole path. In `runs/lr[1]/step` the brackets are taken for a set of characters, nothing is found, and the merge
# is left out with a line in the log. The save succeeds, the step has its mark of success, and its size on the disk
# looks right. Only the restore says that `w/.zarray` doesn't exist. Sweeps and shells name folders so. (We refuse
# such a workdir at the start.)
#
# Output seen:
#   lr_1   saved, committed True, restored [0.0, 1.0, 2.0, 3.0]
#   lr[1]  saved, committed True, restored nothing: NOT_FOUND
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import pathlib
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

found = []
for name in ("lr_1", "lr[1]"):
    step = pathlib.Path(sys.argv[1]) / name / "step"
    step.parent.mkdir()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step, {"w": jnp.arange(4.0)})
    committed = (step / "commit_success.txt").is_file()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            got = str(checkpointer.restore(step)["w"].tolist())
    except ValueError as error:
        got = f"nothing: {str(error).partition(':')[0]}"
    found.append((committed, got))
    print(f"{name:6} saved, committed {committed}, restored {got}")
sys.exit(found != [(True, "[0.0, 1.0, 2.0, 3.0]"), (True, "nothing: NOT_FOUND")])
PYTHON
