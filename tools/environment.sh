#!/bin/sh
# Make .venv with exactly the pinned packages. `make` calls this when requirements.lock is newer than
# the environment. Needs Python 3.11 or 3.12 with venv, and the interpreter's shared library (the
# server's Python backend loads it). On Debian and Ubuntu a missing package is installed with apt if
# that is allowed, and named if not.
set -eu
cd "$(dirname "$0")/.."

for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    print='import sys; print("%d.%d" % sys.version_info[:2])'
    version=$("$candidate" -c "$print" 2>/dev/null || true)
    case $version in 3.11 | 3.12) python=$candidate; break ;; esac
done
if [ -z "${python:-}" ]; then
    echo "error: no Python 3.11 or 3.12 found; install one (Debian 12: python3, Ubuntu 24.04:" \
        "python3) or name it: make PYTHON=/path/to/python3.12" >&2
    exit 1
fi

need() { # need PACKAGE WHY: install a system package, or report that it is missing
    echo "installing $1: $2"
    if [ "$(id -u)" = 0 ]; then
        apt-get install -y -q "$1" || { apt-get update -q && apt-get install -y -q "$1"; }
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo apt-get update -q && sudo apt-get install -y -q "$1"
    else
        echo "error: $1 is missing ($2); install it: sudo apt-get install $1" >&2
        exit 1
    fi
}
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    need "python$version-venv" "makes the environment"
"$python" - <<'P' || need "libpython$version" "Triton's Python backend loads it"
import ctypes, sys, sysconfig
name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
for path in (name, "%s/%s" % (sysconfig.get_config_var("LIBDIR"), name)):
    try:
        ctypes.CDLL(path)
        sys.exit(0)
    except OSError:
        pass
sys.exit(1)
P

[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --disable-pip-version-check --no-deps -q -r requirements.lock
.venv/bin/python -m pip install --disable-pip-version-check --no-deps -q -e .
touch .venv/installed
