#!/usr/bin/env bash
# Builds the project's environment in .venv: Python 3.12, the pinned requirements, the package itself (editable).
#
#   tools/setup_environment.sh [EXTRA[,EXTRA...]]      an EXTRA is the stem of a file requirements/<EXTRA>.txt
#
# Nothing outside the checkout is changed. Python 3.12 is looked for on the PATH, among pyenv's versions and through
# uv, and downloaded by uv as the last try. uv itself is taken from the PATH or installed privately into .tools/.
# The stamp .venv/setup-stamp is written last and says what is installed: while it still holds, a run ends at once.
# .venv/setup-unfinished marks a run in progress: an environment that an interrupted run left behind is built anew.
# Extras stay: a later run without them keeps what is there. Where there is requirements/<EXTRA>-cpu.txt, a machine
# without an NVIDIA GPU gets that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON_VERSION=3.12
readonly UV_REQUIREMENT='uv>=0.8,<1'
readonly VENV=.venv TOOLS=.tools
readonly STAMP=$VENV/setup-stamp UNFINISHED=$VENV/setup-unfinished EXTRAS_FILE=$VENV/setup-extras

fail() {
    echo "setup: $*" >&2
    exit 2
}

# True when the command $1 runs and is the Python we want: a pyenv shim may exist and still refuse to run.
is_wanted_python() {
    [ "$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$PYTHON_VERSION" ]
}

# Prints the first Python 3.12 on the PATH or among pyenv's versions, which are not on the PATH. The .venv of this
# checkout does not count, although it may be active: it is what gets replaced.
find_local_python() {
    local candidate
    while read -r candidate; do
        if [ "${candidate#"$PWD/$VENV/"}" = "$candidate" ] && [ -x "$candidate" ] && is_wanted_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done < <(
        type -aP "python$PYTHON_VERSION" python3 python || true
        printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$PYTHON_VERSION".*/bin/python3
    )
    return 1
}

# Prints a uv that knows the options used here; installs one into .tools/uv with the Python $1 when there is none.
find_uv() {
    local candidate
    for candidate in "$(type -P uv)" "$TOOLS/uv/bin/uv"; do
        if "$candidate" venv --help 2>/dev/null | grep -- --clear >/dev/null; then
            echo "$candidate"
            return
        fi
    done
    [ -n "$1" ] || return 1
    echo "setup: installing uv into $TOOLS/uv" >&2
    rm -rf "$TOOLS/uv"
    # Debian's python3 may come without venv; pip --target then does the same.
    { "$1" -m venv "$TOOLS/uv" && "$TOOLS/uv/bin/python" -m pip install --quiet "$UV_REQUIREMENT"; } >&2 \
        || "$1" -m pip install --quiet --target "$TOOLS/uv" "$UV_REQUIREMENT" >&2 \
        || return 1
    echo "$TOOLS/uv/bin/uv"
}

# Prints a Python 3.12 that uv knows of, else one that uv downloads into .tools/python.
find_python_with_uv() {
    local find=("$UV" python find --no-project --system "$PYTHON_VERSION") found
    export UV_PYTHON_DOWNLOADS=never
    if found=$("${find[@]}" 2>/dev/null) && is_wanted_python "$found"; then
        echo "$found"
        return
    fi
    export UV_PYTHON_INSTALL_DIR=$PWD/$TOOLS/python
    echo "setup: asking uv to download Python $PYTHON_VERSION into $TOOLS/python" >&2
    UV_PYTHON_DOWNLOADS=automatic "$UV" python install --no-bin "$PYTHON_VERSION" &>/dev/null || return 1
    # By its place: a broken shim on the PATH makes `uv python find` give up.
    found=$(printf '%s\n' "$UV_PYTHON_INSTALL_DIR"/*/bin/"python$PYTHON_VERSION" | head -n 1)
    is_wanted_python "$found" && echo "$found"
}

# Prints the stem of the requirement files that serve the extra $1 on this machine.
requirements_of() {
    if [ -f "requirements/$1-cpu.txt" ] && ! nvidia-smi -L &>/dev/null; then
        echo "$1-cpu"
    else
        echo "$1"
    fi
}

# What the stamp has to say: place (scripts and the editable install hold absolute paths), Python, inputs, extras.
fingerprint() {
    local inputs=(tools/setup_environment.sh setup.py pyproject.toml requirements/base.txt requirements/dev.txt) extra
    for extra in "${EXTRAS[@]}"; do
        extra=$(requirements_of "$extra")
        inputs+=("requirements/$extra.txt")
        [ ! -f "requirements/$extra.overrides" ] || inputs+=("requirements/$extra.overrides")
    done
    echo "place $PWD"
    "$VENV/bin/python" --version 2>/dev/null || echo "no Python"
    sha256sum "${inputs[@]}"
}

is_up_to_date() {
    [ ! -e "$UNFINISHED" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint)" ]
}

# Sets EXTRAS: those asked for in $1 and those that an earlier run installed.
read_extras() {
    local extra known
    EXTRAS=()
    for extra in ${1//,/ }; do
        known=$(cd requirements && echo *.txt)
        [ -f "requirements/$extra.txt" ] || fail "EXTRAS: no extra is called '$extra'; there are: ${known//.txt/}"
        EXTRAS+=("$extra")
    done
    while read -r extra; do
        [ ! -f "requirements/$extra.txt" ] || EXTRAS+=("$extra")
    done < <(cat "$EXTRAS_FILE" 2>/dev/null || true)
    mapfile -t EXTRAS < <(printf '%s\n' "${EXTRAS[@]}" | sort -u | sed '/^$/d')
}

install_all() {
    local extra override
    "$UV" pip install --compile-bytecode -p "$VENV/bin/python" -r requirements/base.txt -r requirements/dev.txt
    for extra in "${EXTRAS[@]}"; do
        extra=$(requirements_of "$extra")
        # A step of its own: an extra may hold a package of base.txt at another version.
        override=()
        [ ! -f "requirements/$extra.overrides" ] || override=(--override "requirements/$extra.overrides")
        "$UV" pip install --compile-bytecode -p "$VENV/bin/python" "${override[@]}" -r "requirements/$extra.txt"
    done
    # setuptools is one of torch's requirements, so the build needs nothing else and no isolation.
    "$UV" pip install --no-deps --no-build-isolation -p "$VENV/bin/python" -e .
}

main() {
    local python installer
    read_extras "${1:-}"
    ! is_up_to_date || return 0

    mkdir -p "$TOOLS"
    exec 9>"$TOOLS/setup.lock"
    ! type -P flock >/dev/null || flock 9 # one set-up at a time in this checkout
    ! is_up_to_date || return 0           # another run finished it meanwhile

    # Behind a mirror that only pip was told about, uv needs to hear of it too.
    if [ -n "${PIP_INDEX_URL:-}" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        export UV_DEFAULT_INDEX=$PIP_INDEX_URL
    fi

    python=$(find_local_python) || python=
    installer=${python:-$(type -P python3 || true)}
    UV=$(find_uv "$installer") \
        || fail "uv is neither on the PATH nor installable with pip: install uv, then run make setup again"
    echo "$UV" >"$TOOLS/uv-path" # for `make requirements`

    if [ -e "$UNFINISHED" ] || ! is_wanted_python "$VENV/bin/python" \
        || { [ -f "$STAMP" ] && ! grep -qxF "place $PWD" "$STAMP"; }; then
        [ -n "$python" ] || python=$(find_python_with_uv) \
            || fail "Python $PYTHON_VERSION is not on the PATH, not in pyenv, and uv cannot download it:" \
                "install Python $PYTHON_VERSION, then run make setup again"
        "$UV" venv --clear --python "$python" "$VENV"
    fi

    rm -f "$STAMP"
    touch "$UNFINISHED"
    install_all
    printf '%s\n' "${EXTRAS[@]}" >"$EXTRAS_FILE"
    fingerprint >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    rm "$UNFINISHED"
    echo "setup: $VENV is ready ($("$VENV/bin/python" --version)${EXTRAS[*]:+, extras: ${EXTRAS[*]}})"
}

main "$@"
