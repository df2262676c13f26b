#!/bin/sh
# Print the newest of Python 3.13, 3.12 and 3.11 that really runs and can make a virtual environment.
#
#     scripts/find_python.sh [VERSION...]      of these versions only, in this order
#
# A candidate must start, be the version that it is looked for as, and have venv and ensurepip. So a pyenv shim that only
# prints an error does not count; the interpreters behind it, in pyenv's own folder, do.
set -u
[ $# -gt 0 ] || set -- 3.13 3.12 3.11
check='import ensurepip, sys, venv; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])'

on_path() { printf '%s\n' "$PATH" | tr ':' '\n' | sed "s|\$|/$1|"; }

candidates() {
    on_path "python$1"
    printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python
    on_path python3
}

for version in "$@"; do
    found=$(candidates "$version" | while read -r python; do
        if "$python" -c "$check" "$version" </dev/null >/dev/null 2>&1; then
            "$python" -c 'import sys; print(sys.executable)'
            break
        fi
    done)
    if [ -n "$found" ]; then
        echo "$found"
        exit 0
    fi
done
echo "No working Python of $* that has venv: install one (on Debian also python3-venv), or say PYTHON=/path/to/python" >&2
exit 1
