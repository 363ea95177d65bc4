# shellcheck shell=bash
#
# What scripts/quickstart and scripts/test share: a private Python environment, and packages from Debian where needed.
# Sourced, never run. Expects ROOT, the checkout.

# Where Python may not keep bytecode, every process compiles all of livedisk anew: half a second of each start.
unset PYTHONDONTWRITEBYTECODE

say() { printf '\033[1m%s\033[0m\n' "scripts/${0##*/}: $*"; }
die() { printf 'scripts/%s: error: %s\n' "${0##*/}" "$*" >&2; exit 1; }

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "packages must be installed ($*): run as root or install sudo"
    fi
}

APT=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
INSTALL=(install -y --no-install-recommends)

# Prints the newest Python that can make an environment; a version manager's shim may exist without working.
find_python() {
    local minor python
    for minor in 14 13 12 11; do
        for python in "python3.$minor" "/usr/bin/python3.$minor"; do
            if "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
                command -v "$python"
                return 0
            fi
        done
    done
    return 1
}

# Debian ships Python without what makes environments; that is a package of its own.
ensure_python() {
    find_python >/dev/null && return
    command -v apt-get >/dev/null || die "needs Python 3.11 or later with its venv module"
    say "installing from Debian: python3-venv"
    as_root "${APT[@]}" update
    as_root "${APT[@]}" "${INSTALL[@]}" python3-venv
    find_python >/dev/null || die "needs Python 3.11 or later; Debian's python3-venv here is $(python3 -V)"
}

# make_environment FOLDER PYTHON PIP-ARGUMENT...: installs only when the project's metadata or the Python changed.
make_environment() {
    local folder=$1 python=$2 stamp
    shift 2
    stamp=$({ "$python" -VV; echo "$ROOT" "$@"; cat "$ROOT/pyproject.toml"; } | sha256sum | cut -d' ' -f1)
    [[ -x $folder/bin/python && -e $folder/livedisk-$stamp ]] && return
    say "making the environment $folder with $("$python" -V)"
    rm -rf "$folder"
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install -q --disable-pip-version-check "$@"
    touch "$folder/livedisk-$stamp"
}
