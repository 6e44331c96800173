#!/usr/bin/env bash
# Makes the environment and runs ruff and the tests.
#   bash launch/test.sh [pytest options]         what is quick, without PyTorch, libtpu and a compiler
#   bash launch/test.sh --all [pytest options]   everything; PyTorch is large, pycosat may want a compiler
set -euo pipefail
extras=digits,rl,test
which=(-m "not slow")
if [ "${1-}" = --all ]; then
  # Without the extra cluster: tests of Ray kill processes and wait for others, and want a quiet machine of their
  # own: pip install -e ".[cluster]" and pytest tests/test_prepare_ray.py tests/test_sweep_ray.py
  extras=aot,bucket,digits,eval,gcp,gym,rl,serve,torch,test
  which=()
  shift
fi
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "$extras"
.venv/bin/python - <<'END'
import importlib.metadata as m, sys
found = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
names = ("jax", "flax", "numpy", "libtpu", "torch", "reasoning-gym")
print("Python", sys.version.split()[0], *(f"{name} {found.get(name, '-')}" for name in names), sep=", ")
END
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder ${which[@]+"${which[@]}"} "$@"
