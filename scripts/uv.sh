#!/usr/bin/env bash
# Runs uv, installing it into .cache/uv-tool first where the machine has none: `scripts/uv.sh lock --check`.
# Needs nothing but a Python 3 and a package registry that pip reaches; changes nothing outside this folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TOOL="$PWD/.cache/uv-tool"
readonly WANTED='uv>=0.9,<1'
export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}" # torch is large, and uv's own 30 s are short on a slow line

say() { printf '%s\n' "setup: $*" >&2; }

found() {
    local candidate
    for candidate in "$TOOL/bin/uv" "$TOOL/target/bin/uv"; do
        if [[ -x "$candidate" ]] && "$candidate" --version >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return 0
        fi
    done
    return 1
}

# --only-binary: without a matching wheel pip would compile uv from source, for half an hour.
with_venv() {
    rm -rf "$TOOL" && "$1" -m venv "$TOOL" && "$TOOL/bin/python" -m pip install --quiet --only-binary :all: "$WANTED"
}
with_target() {
    rm -rf "$TOOL" && "$1" -m pip install --quiet --only-binary :all: --target "$TOOL/target" "$WANTED"
}
with_apt() { # Debian ships Python without pip and venv; root can add them
    [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null || return 1
    DEBIAN_FRONTEND=noninteractive
    export DEBIAN_FRONTEND
    apt-get install -y -q python3-venv || { apt-get update -q && apt-get install -y -q python3-venv; }
}

install_uv() {
    local python attempt
    mkdir -p .cache
    : >.cache/uv-install.log
    python="$(command -v python3 || command -v python || true)"
    if [[ -z "$python" ]]; then
        say 'no python3 found: install Python 3.11 or newer, or put uv on the PATH, and try again'
        return 1
    fi
    say 'uv is missing; installing it into .cache/uv-tool'
    for attempt in with_venv with_target with_apt with_venv; do
        "$attempt" "$python" </dev/null >>.cache/uv-install.log 2>&1 || continue
        if found >/dev/null; then return 0; fi
    done
    say "uv could not be installed with $python; the reason is in .cache/uv-install.log, its last lines:"
    tail -n 5 .cache/uv-install.log >&2
    say "next: install Python's venv module (Debian: apt-get install python3-venv), or put uv on the PATH"
    return 1
}

if uv --version >/dev/null 2>&1; then # a version manager may have put an empty shim there
    exec uv "$@"
fi
found >/dev/null || install_uv || exit 1
exec "$(found)" "$@"
