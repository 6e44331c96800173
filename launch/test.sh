#!/usr/bin/env bash
# Makes the environment with the test extras and runs ruff and all tests.
#   bash launch/test.sh [pytest options]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" aot,digits,rl,torch,test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
