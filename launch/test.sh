#!/usr/bin/env bash
# Makes the environment and runs ruff and the tests.
#   bash launch/test.sh [pytest options]         what is quick, without PyTorch, libtpu and a compiler
#   bash launch/test.sh --all [pytest options]   everything; PyTorch is large, pycosat may want a compiler
set -euo pipefail
extras=digits,rl,test
which=(-m "not slow")
ray=
if [ "${1-}" = --all ]; then
  extras=aot,bucket,cluster,digits,eval,gcp,gym,rl,serve,torch,test
  which=()
  shift
  # Tests of Ray kill processes and wait for others: they have the machine for themselves, after all the others.
  [ $# -gt 0 ] || { which=(-m "not cluster"); ray=yes; }
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
tests() { .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"; }
tests ${which[@]+"${which[@]}"} "$@"
[ -z "$ray" ] || tests -m cluster
