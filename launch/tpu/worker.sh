#!/usr/bin/env bash
# Runs on every worker of a TPU slice, where tpu.py puts it; runs on any Linux.
#
#   bash worker.sh unpack ARCHIVE     the code, over what an earlier archive left
#   bash worker.sh install            a virtual environment with the project and jax[tpu]
#   bash worker.sh mount BUCKET       a Cloud Storage bucket at /mnt/BUCKET
#   bash worker.sh start COMMAND...   in the background, from the code's folder
#   bash worker.sh status             running, or how it ended
#   bash worker.sh logs [LINES]       the last lines, and what follows while it runs
#   bash worker.sh stop [SECONDS]     SIGTERM, and SIGKILL if it still runs that much later
#
# Everything lies in $MMADA_ROOT (default: ~/mmada_jax): code, venv, run.log, run.pid, run.status.
set -euo pipefail

root=${MMADA_ROOT:-$HOME/mmada_jax}
code=$root/code
venv=$root/venv
log=$root/run.log
pid_file=$root/run.pid
status_file=$root/run.status
# Held by a run and all that it starts, and let go by the kernel when the last of them ends. A number in
# a file can't tell that: after a reboot it belongs to another process.
lock=$root/run.lock

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

is_running() { ! flock --shared --nonblock "$lock" true; }

unpack() {
  local archive=${1:?unpack needs an archive}
  [ -f "$archive" ] || fail "no archive $archive"
  is_running && fail "a run is going on in $code; stop it before its code changes"
  mkdir -p "$code"
  # A file that the last archive had and this one hasn't could still be imported. Others stay: a run's
  # folder may be among them.
  [ ! -f "$root/files" ] || (cd "$code" && xargs -d '\n' rm -f) <"$root/files"
  tar -xzf "$archive" -C "$code"
  tar -tzf "$archive" >"$root/files"
  rm "$archive"
}

find_python() {
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

make_venv() {
  local python
  python=$(find_python) || python=python3.11
  if command -v "$python" >/dev/null && "$python" -m venv "$venv" >/dev/null 2>&1; then
    return
  fi
  # The images have an older Python, or one without venv.
  rm -rf "$venv"
  apt_install "$python" "$python-venv"
  "$python" -m venv "$venv"
}

apt_install() {
  # A new machine is busy with its own updates for its first minutes.
  sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
  sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq "$@" >/dev/null
}

install() {
  [ -d "$code" ] || fail "no code in $code; copy it first"
  [ -x "$venv/bin/python" ] || make_venv
  "$venv/bin/python" -m pip install -q --upgrade pip
  "$venv/bin/python" -m pip install -q -e "$code[gcp]" "jax[tpu]"
  echo "$(hostname): installed"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
  curl -fsSL "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  apt_install gcsfuse
}

mount_bucket() {
  local bucket=${1:?mount needs a bucket}
  local folder=/mnt/$bucket
  if ! mountpoint -q "$folder"; then
    command -v gcsfuse >/dev/null || install_gcsfuse
    sudo mkdir -p "$folder"
    sudo chown "$(id -un)" "$folder"
    # A checkpoint is written as a folder and then renamed, and all workers must see that at once.
    gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 \
      --metadata-cache-negative-ttl-secs=0 "$bucket" "$folder"
  fi
  echo "$(hostname): $folder"
}

start() {
  [ $# -gt 0 ] || fail "start needs a command, as: start python launch/train.py --help"
  [ -d "$code" ] || fail "no code in $code; copy it first"
  exec 9>"$lock"
  # Not at once: whoever asks whether it is held holds it for a moment.
  flock --timeout 1 9 || fail "a run is going on (process $(cat "$pid_file")); stop it first"
  rm -f "$status_file" "$pid_file"
  echo "=== $(date -u +%FT%TZ) $(hostname) starts: $*" >>"$log"
  # A session of its own survives the ssh connection, and is one group to signal.
  setsid bash "$0" supervise "$@" </dev/null >>"$log" 2>&1 &
  echo $! >"$pid_file"
  echo "$(hostname): started"
}

supervise() {
  # The signal is for the command. An ignored signal would be inherited, one with a handler isn't.
  # A run that saved after it ends with 0, and hasn't done what it was to do.
  local ended=0 stopped=
  trap 'stopped=", stopped by SIGTERM"' TERM
  cd "$code"
  PATH=$venv/bin:$PATH PYTHONUNBUFFERED=1 "$@" || ended=$?
  record "$ended$stopped"
}

record() {
  echo "$1" >"$status_file"
  echo "=== $(date -u +%FT%TZ) $(hostname) ended with status $1" >>"$log"
}

status() {
  if is_running; then
    echo "$(hostname): running (process $(cat "$pid_file"))"
  elif [ -f "$status_file" ]; then
    echo "$(hostname): ended with status $(cat "$status_file")"
  elif [ -f "$pid_file" ]; then
    echo "$(hostname): ended without a status (killed, or the machine went down)"
  else
    echo "$(hostname): nothing was started"
  fi
}

logs() {
  [ -f "$log" ] || fail "no $log; nothing was started"
  if is_running; then
    tail -n "${1:-100}" --pid="$(cat "$pid_file")" -F "$log"
  else
    tail -n "${1:-100}" "$log"
  fi
}

stop() {
  if is_running; then
    local group
    group=$(cat "$pid_file")
    kill -TERM -- "-$group" 2>/dev/null || true
    wait_for_end "${1:-600}" || kill -KILL -- "-$group" 2>/dev/null || true
    wait_for_end 10 || fail "process $group is still there after SIGKILL"
    [ -f "$status_file" ] || record 137
  fi
  status
}

wait_for_end() {
  local end=$((SECONDS + $1))
  while is_running; do
    [ "$SECONDS" -le "$end" ] || return 1  # whole seconds: rather one too many
    sleep 0.2
  done
}

mkdir -p "$root"
case "${1:-}" in
  unpack | install | start | supervise | status | logs | stop) "$@" ;;
  mount) mount_bucket "${@:2}" ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
