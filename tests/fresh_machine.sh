#!/usr/bin/env bash
# Runs both commands of the README on a machine that has Python and nothing else, made for that.
#   bash tests/fresh_machine.sh SUITE [FOLDER [COMMAND]]
# SUITE is bookworm (Debian 12, Python 3.11), trixie (Debian 13, Python 3.13) or noble (Ubuntu 24.04, Python
# 3.12). FOLDER, new or made by this script before, becomes the machine's root file system; default: a temporary
# one, which is removed. COMMAND runs there in a copy of the last commit; default: the quickstart in its fast
# form, then the tests. Of an earlier copy in FOLDER only the environment is kept. Needs root and debootstrap.
# Debian's mirror is the one that apt uses here, Ubuntu's is its own; MIRROR names another. What pip is told on
# this machine (variables PIP_* and files) goes along.
set -euo pipefail
suite=${1:?name a suite: bookworm, trixie or noble}
root=${2-}
command=${3-bash launch/quickstart.sh --fast && bash launch/test.sh}
cd "$(dirname "$0")/.."
fail() { echo "error: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "a root file system can only be made and entered by root"
command -v debootstrap >/dev/null || fail "debootstrap is missing; apt-get install debootstrap"

remove=
[ -n "$root" ] || { root=$(mktemp -d); remove=yes; }
root=$(realpath -m "$root")
mounts=()
leave() {
  for at in ${mounts[@]+"${mounts[@]}"}; do umount "$at"; done
  # Never into what is mounted still.
  [ -z "$remove" ] || rm -rf --one-file-system "$root"
}
trap leave EXIT
mounted() { # mounted POINT OPTIONS...: mounts there until the end, unless a run that was killed has left it
  mkdir -p "$1"
  ! mountpoint -q "$1" || return 0
  mount "${@:2}" "$1"
  mounts=("$1" ${mounts[@]+"${mounts[@]}"})
}

if [ ! -x "$root/usr/bin/python3" ]; then
  components=main script= unchecked= mirror=${MIRROR-}
  if [ "$suite" = noble ]; then
    components=main,universe # Ubuntu has python3.12-venv there
    script=gutsy             # one for all of Ubuntu; debootstrap may be older than the suite
    [ -f /usr/share/keyrings/ubuntu-archive-keyring.gpg ] || {
      echo "warning: Ubuntu's keyring isn't installed (package ubuntu-keyring, which Debian 12 doesn't have but 13" \
        "does); its packages are taken unchecked" >&2
      unchecked=--no-check-gpg
    }
  elif [ -z "$mirror" ]; then
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' |
      awk '$1 == "Debian" && $2 !~ /security/ && !found { print $2; found = 1 }')
  fi
  echo "making $suite in $root ..."
  debootstrap $unchecked --variant=minbase --components="$components" --include=ca-certificates,python3 \
    "$suite" "$root" "$mirror" $script >"$root.log" 2>&1 || { tail -3 "$root.log" >&2; exit 1; }
  rm "$root.log"
fi
mounted "$root/proc" -t proc proc
mounted "$root/sys" -t sysfs -o ro sysfs # where libraries count the cores
mounted "$root/dev/shm" -t tmpfs tmpfs

# The network's names and certificates, pip's variables and files, and the paths that these name.
for file in /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt; do
  cp -L "$file" "$root$file"
done
# As an installer does: processes of one run find each other by the machine's name.
grep -q "$(hostname)" "$root/etc/hosts" || echo "127.0.1.1 $(hostname)" >>"$root/etc/hosts"
pip=(/etc/pip.conf /etc/xdg/pip/pip.conf ~/.config/pip/pip.conf ~/.pip/pip.conf)
for i in "${!pip[@]}"; do
  [ -f "${pip[i]}" ] || { unset "pip[i]"; continue; }
  install -D "${pip[i]}" "$root${pip[i]}"
done
mapfile -t variables < <(env | grep '^PIP_' || true)
named=$(printf '%s\n' ${variables[@]+"${variables[@]}"} | cat - ${pip[@]+"${pip[@]}"} |
  grep -oE '/[A-Za-z0-9._/-]+' || true)
for path in $(realpath -m $named | sort -u); do
  if [ -f "$path" ]; then
    install -D "$path" "$root$path"
  elif [ -d "$path" ] && [[ $path == /*/* ]]; then
    path=${path%/simple} # an index names files beside it
    mounted "$root$path" --bind -o ro "$path"
  fi
done

mkdir -p "$root/mmada_jax"
find "$root/mmada_jax" -mindepth 1 -maxdepth 1 ! -name .venv ! -name '*.egg-info' -exec rm -rf {} +
git archive HEAD | tar -x -C "$root/mmada_jax"
chroot "$root" env -i HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin \
  ${variables[@]+"${variables[@]}"} bash -c "cd /mmada_jax && $command"
echo "fresh $suite: passed"
