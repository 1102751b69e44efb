#!/usr/bin/env bash
# The commands. Each sets everything up on first use; a second run installs nothing.
#   ./reproduce.sh [options]            every notebook, headless, then results/<profile>/index.html (--help: options)
#   ./reproduce.sh test [pytest args]   the test suite
#   ./reproduce.sh peers [options]      other engines beside ours, each in an environment of its own (--help: options)
# The environment is .venv in this checkout, pinned by constraints.txt, or an active conda environment that was made
# from environment.yml. PYTHON=/path/to/python chooses the interpreter .venv is made with.
set -euo pipefail
unset CDPATH PYTHONHOME
cd "$(dirname "${BASH_SOURCE[0]}")"
export PYTHONNOUSERSITE=1

need_kb=$((3 * 1024 * 1024)) # a first set-up takes about 3 GB
unfinished=.venv.unfinished   # exists while .venv is being written: who finds it makes .venv anew

say() { printf 'reproduce.sh: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Prints the interpreter to make .venv with; never one that lives inside .venv.
find_python() {
    local name seen="" names=(python3.11 python3 python3.12 python3.13 python)
    if [[ -n ${PYTHON:-} ]]; then names=("$PYTHON"); fi
    for name in "${names[@]}"; do
        command -v "$name" >/dev/null 2>&1 || continue
        if is_new_enough "$name"; then
            "$name" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
            return
        fi
        seen="$("$name" --version 2>&1 | head -n 1) ($name)"
    done
    fail "Expected Python 3.11 or newer. Got ${seen:-none on PATH}. Install one, or name it: PYTHON=/path/to/python $0"
}

# Prints what the active conda environment lacks of pyproject.toml, one line; $1 is "test" when the test extra counts.
missing_in_conda() {
    "$CONDA_PREFIX/bin/python" - "$1" <<'PY'
import re, sys, tomllib
from importlib.metadata import PackageNotFoundError, version
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
missing = []
for line in project["dependencies"] + (project["optional-dependencies"]["test"] if sys.argv[1] == "test" else []):
    try:
        version(re.match(r"[\w.-]+", line)[0])
    except PackageNotFoundError:
        missing.append(line)
print(", ".join(missing))
PY
}

# What .venv was made of: $1 is "main" or "test". A changed list, or a moved checkout, makes it out of date.
stamp_of() { { cat pyproject.toml constraints.txt; printf '%s %s' "$PWD" "$1"; } | cksum; }
is_current() { [[ ! -e $unfinished && -x .venv/bin/python && "$(cat ".venv/.$1.stamp" 2>/dev/null)" == "$(stamp_of "$1")" ]]; }

set_up() {
    local extra="" free base log=.venv.log
    is_current "$1" && return
    free=$(df -Pk . | awk 'NR == 2 { print $4 }')
    if [[ -e $unfinished ]] || ! .venv/bin/python -c 'import pip' >/dev/null 2>&1; then
        base=$(find_python)
        [[ $free -ge $need_kb ]] || fail "Expected 3 GB free for the first set-up. Got $((free / 1024)) MB in $PWD."
        say "making .venv with $base (once; some minutes)"
        touch "$unfinished"
        "$base" -m venv --clear .venv >"$log" 2>&1 ||
            fail "could not make .venv (on Debian and Ubuntu: install python3-venv): $(tail -n 1 "$log")"
    fi
    [[ $1 == test ]] && extra="[test]"
    say "installing what pyproject.toml lists, pinned by constraints.txt"
    touch "$unfinished"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extra" >"$log" 2>&1 ||
        fail "installing failed, the next run starts over; $PWD/$log ends: $(grep -v '^ *$' "$log" | tail -n 1)"
    stamp_of main >.venv/.main.stamp
    [[ $1 == test ]] && stamp_of test >.venv/.test.stamp
    rm -f "$unfinished" "$log"
}

kind=main command=notebooks
if [[ ${1:-} == "test" || ${1:-} == "peers" ]]; then
    command=$1
    if [[ $1 == "test" ]]; then kind="test"; fi
    shift
fi
python=$PWD/.venv/bin/python
if [[ -n ${CONDA_PREFIX:-} ]] && is_new_enough "$CONDA_PREFIX/bin/python"; then
    missing=$(missing_in_conda "$kind")
    if [[ -z $missing ]]; then python=$CONDA_PREFIX/bin/python; else say "$CONDA_PREFIX lacks $missing: using .venv"; fi
fi
if [[ $python == "$PWD/.venv/bin/python" ]]; then
    ( # one set-up at a time; the lock goes with the subshell
        if command -v flock >/dev/null && ! flock -n 9; then
            say "waiting for another set-up of this checkout"
            flock 9
        fi
        set_up "$kind"
    ) 9>.venv.lock
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # a conda environment need not have nbs_lib installed
if [[ $command == peers ]]; then exec "$python" -m benchmarks.peers "$@"; fi
if [[ $command == test ]]; then exec "$python" -m pytest -q -n 2 --dist worksteal "$@"; fi # mostly compiling
exec "$python" notebooks/reproduce.py "$@"
