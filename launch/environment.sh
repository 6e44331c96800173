# Sourced by quickstart.sh and test.sh: makes .venv and installs this project with the given extras.
# Usage: . launch/environment.sh digits,test

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer found; install one (apt-get install python3 python3-venv)" >&2
  return 1
}

make_venv() {
  local python
  python=$(find_python) || return 1
  if ! "$python" -m venv .venv >/dev/null 2>&1; then
    # Debian and Ubuntu ship venv as a package of its own.
    rm -rf .venv
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "installing python$version-venv ..."
    local sudo=""
    [ "$(id -u)" = 0 ] || sudo=sudo
    { $sudo apt-get update -qq &&
      $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "python$version-venv"; } >/dev/null || {
      echo "error: $python can't make a virtual environment; install python$version-venv and try again" >&2
      return 1
    }
    "$python" -m venv .venv
  fi
}

install_extras() {
  # The stamp holds what was installed from which setup.py, so that a second run starts at once.
  local stamp
  stamp="$1 $(cksum <setup.py)"
  if [ -x .venv/bin/python ] && [ "$(cat .venv/installed-"$1" 2>/dev/null)" = "$stamp" ]; then
    return
  fi
  # One that was killed half-way has no pip yet.
  .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv || return 1
  echo "installing mmada_jax[$1] into .venv ..."
  # A CPU build of torch by its exact version, before anything asks for torch at large.
  case ",$1," in *,torch,*) pip_install "torch==2.13.0" || return 1 ;; esac
  pip_install -e ".[$1]" || return 1
  .venv/bin/python -c 'import jax, mmada_jax' || return 1
  echo "$stamp" >.venv/installed-"$1"
}

pip_install() {
  .venv/bin/python -m pip install -q "$@" 2>&1 | { grep -v -e '^WARNING: Location' -e '^\[notice\]' -e '^$' || true; }
  [ "${PIPESTATUS[0]}" = 0 ] || {
    echo "error: pip couldn't install $*; what it says is above" >&2
    return 1
  }
}

install_extras "$1" || exit 1
