#!/usr/bin/env bash
# From nothing to a model that reads and draws handwritten digits, on a CPU.
#   bash launch/quickstart.sh [--workdir DIR] [--seed N] [--full | --fast]
# Running it again resumes, or says what is already done.
set -euo pipefail
args=()
while [ $# -gt 0 ]; do
  case "$1" in
    # Relative to where the user stands, not to the project.
    --workdir) args+=(--workdir "$(realpath -m "${2:?--workdir needs a folder}")"); shift ;;
    --workdir=*) args+=(--workdir "$(realpath -m "${1#*=}")") ;;
    *) args+=("$1") ;;
  esac
  shift
done
case " ${args[*]-} " in *" --help "* | *" -h "*) sed -n '2,4s/^# *//p' "$0"; exit ;; esac
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" digits
exec .venv/bin/python launch/quickstart.py ${args[@]+"${args[@]}"}
