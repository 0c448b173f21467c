# Shared by the scripts of this folder; sourced, never run.
# Sets: root (the checkout), and the environment that keeps tools quiet and inside the checkout and the cache.

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
unset PYTHONPATH PYTHONHOME
export PYTHONUNBUFFERED=1
# No usage reports to anyone, no version checks, and nothing written into the home folder for them.
export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$@"; }
complain() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { complain "$@"; exit 1; }
bad_usage() { complain "$@"; exit 2; }

# Prints tenths of seconds since the given $EPOCHREALTIME.
seconds_since() {
  local now=${EPOCHREALTIME/[.,]/} then=${1/[.,]/}
  printf '%d.%d' $(((now - then) / 1000000)) $(((now - then) / 100000 % 10))
}

# Sets `python`: LORASERVE_PYTHON (an environment that the caller keeps), else the checkout's own, made if need be.
use_environment() {
  if [ -n "${LORASERVE_PYTHON:-}" ]; then
    python=$(command -v "$LORASERVE_PYTHON") || bad_usage "LORASERVE_PYTHON=$LORASERVE_PYTHON is no program; unset it to use .venv"
  else
    "$root/scripts/setup" "$@" || exit $?
    python=$root/.venv/bin/python
  fi
  PATH=$(dirname "$python"):$PATH
  export PATH
}

# Prints the comment at the head of the calling script.
show_usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; }
