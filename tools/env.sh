#!/bin/sh
# Make the virtual environment with one of the package's extras: sh tools/env.sh EXTRA VENV
# Says what is missing instead of failing with a stack trace. A stamp in the environment makes the next call free.
extra=$1 venv=$2 python=${PYTHON:-python3} log=$venv/install-$1.log

die() { echo "paperbook: $1" >&2; exit 2; }

command -v "$python" >/dev/null 2>&1 || die "$python was not found; install Python 3.10 to 3.13 (Debian: apt install python3 python3-venv), or name one: make PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(not sys.version_info >= (3, 10))' 2>/dev/null ||
    die "$("$python" --version 2>&1) is too old; paperbook needs Python 3.10 or later. Name another one: make PYTHON=python3.12"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "this Python can't make virtual environments; on Debian: apt install python3-venv"

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    rm -rf "$venv"
    "$python" -m venv "$venv" || { rm -rf "$venv"; die "the virtual environment $venv could not be made"; }
fi

echo "Installing paperbook with the extra '$extra' into $venv (once; some minutes and up to 6 GB, most of it torch)."
echo "The log is $log"
"$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off -e ".[$extra]" >"$log" 2>&1 || {
    if grep -qiE 'NewConnectionError|Failed to establish|Temporary failure in name resolution|Network is unreachable|ConnectTimeout|ProxyError|getaddrinfo|from versions: none' "$log"
    then die "the package index could not be reached; the first installation needs a network (log: $log)"
    elif grep -qi 'No space left' "$log"; then die "the disk is full; about 8 GB are needed (log: $log)"
    fi
    tail -n 5 "$log" >&2
    die "the installation failed; the last lines are above, all of them in $log"
}
[ "$extra" = dev ] && touch "$venv/.course"
touch "$venv/.$extra"
