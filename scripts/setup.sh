# Functions for scripts/demo, scripts/test and scripts/bench, which source this file. They find missing
# system packages, install them with the package manager after asking, and make a virtual environment.
#
# They test for capabilities, not for package names: the user's own Python or compiler is as good as
# the distribution's, and a second run finds nothing to do without asking the package manager.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${HPCFS_VENV:-$PWD/.venv}"
assume_yes="${CI:+yes}"
missing=()

fail() {
    printf '%s: %s\n' "$0" "$*" >&2
    exit 1
}

say() {
    printf '==> %s\n' "$*" >&2
}

has() {
    command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]
}

# need TEST APT_PACKAGE DNF_PACKAGE: unless the command TEST succeeds, the package is missing.
need() {
    if $1 >/dev/null 2>&1; then return; fi
    case "$manager" in
        apt) missing+=("$2") ;;
        dnf) missing+=("$3") ;;
        none) missing+=("$2 (Fedora, RHEL: $3)") ;;
    esac
}

find_manager() {
    if has apt-get; then manager=apt; elif has dnf; then manager=dnf; else manager=none; fi
}

# --- Python -----------------------------------------------------------------------------------

# Sets $python to the first interpreter that is new enough, if there is one.
find_python() {
    local candidate
    python=
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python="$(command -v "$candidate")"
            return
        fi
    done
}

# The package of a Python that is new enough: the distribution's python3, else a newer one beside it.
python_package() {
    local version
    case "$manager" in
        apt) version="$(apt-cache policy python3 2>/dev/null | awk '/Candidate:/ {print $2}')" ;;
        dnf) version="$(dnf -q repoquery --latest-limit 1 --qf '%{version}' python3 2>/dev/null)" ;;
        none) fail "Python 3.11 or later is missing: install it, or set PYTHON to it" ;;
    esac
    if [ "$(printf '3.11\n%s\n' "${version%%-*}" | sort -V | head -1)" = 3.11 ]; then
        echo python3
        return
    fi
    for version in 3.13 3.12 3.11; do
        if [ "$manager" = apt ]; then
            # A name with dots is a pattern for apt-cache unless it is escaped.
            apt-cache policy "python$version" 2>/dev/null | grep -q 'Candidate: [0-9]' || continue
        else
            dnf -q info "python$version" >/dev/null 2>&1 || continue
        fi
        echo "python$version"
        return
    done
    fail "this system offers no Python 3.11 or later: install one (python.org, pyenv, uv), or set PYTHON to it"
}

can_make_venv() {
    "$python" -I -c 'import ensurepip, venv'
}

has_headers() {
    "$python" -I -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'
}

need_python() {
    local name
    find_python
    if [ -z "$python" ]; then
        if [ "$manager" = apt ] && ! package_lists_newer_than 1000000; then
            confirm "Python 3.11 or later; to see which, the package lists" "apt-get update"
            refresh_package_lists
        fi
        name="$(python_package)"
        case "$manager" in
            apt) missing+=("$name" "$name-venv" "$name-dev") ;;
            dnf) missing+=("$name" "$name-devel") ;;
        esac
        return
    fi
    name="$("$python" -I -c 'import sys; print("python%d.%d" % sys.version_info[:2])')"
    if [ "$(command -v python3)" = "$python" ]; then name=python3; fi
    need can_make_venv "$name-venv" "$name"
    need has_headers "$name-dev" "$name-devel"
}

# --- FUSE -------------------------------------------------------------------------------------

check_fuse_device() {
    if [ ! -e /dev/fuse ]; then
        if [ -e /.dockerenv ] || [ -e /run/.containerenv ]; then
            fail "there is no /dev/fuse in this container: start it with --device /dev/fuse --cap-add SYS_ADMIN"
        fi
        fail "there is no /dev/fuse: load the kernel's module with 'sudo modprobe fuse', then try again"
    fi
    if [ ! -r /dev/fuse ] || [ ! -w /dev/fuse ]; then
        fail "you may not use /dev/fuse: ask the administrator to let users read and write it (mode 0666)"
    fi
}

has_libfuse() {
    pkg-config --exists fuse3
}

need_fuse() {
    need "has fusermount3" fuse3 fuse3
    need "has pkg-config" pkg-config pkgconf-pkg-config
    need has_libfuse libfuse3-dev fuse3-devel
    need "has gcc" gcc gcc
    if [ "$manager" = apt ]; then need "[ -e /usr/include/stdio.h ]" libc6-dev glibc-devel; fi
}

# --- installing -------------------------------------------------------------------------------

as_root() {
    say "$*"
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

check_root() {
    if [ "$(id -u)" != 0 ] && ! has sudo; then
        fail "$1 must be installed, and there is neither root nor sudo: ask an administrator to install it"
    fi
}

package_lists_newer_than() {
    [ -n "$(find /var/lib/apt/lists -name '*_Packages*' -mmin "-$1" 2>/dev/null)" ]
}

# Updates apt's package lists when they are a day old; dnf does so by itself.
refresh_package_lists() {
    if [ "$manager" = apt ] && ! package_lists_newer_than 1440; then as_root apt-get -qq update >&2; fi
}

# Installs the missing packages: names all of them with the command, and asks once.
install_missing() {
    if [ ${#missing[@]} = 0 ]; then return; fi
    local names="${missing[*]}" command=()
    case "$manager" in
        apt) command=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}") ;;
        dnf) command=(dnf install -y -q "${missing[@]}") ;;
        none) fail "please install: $names" ;;
    esac
    check_root "$names"
    confirm "$names" "${command[*]}"
    refresh_package_lists
    as_root "${command[@]}" >&2 || fail "installing $names failed; the reason is above"
    missing=()
}

confirm() {
    if [ -n "$assume_yes" ]; then return; fi
    local answer=
    if [ ! -t 0 ]; then
        fail "these packages are missing: $1. Run '$0 --yes' to install them ($2)"
    fi
    printf 'These packages are missing: %s\nThis will run%s: %s\nGo on? [y/N] ' \
        "$1" "$([ "$(id -u)" = 0 ] || echo ', with sudo')" "$2" >&2
    read -r answer || true
    case "$answer" in
        [yY]*) ;;
        *) fail "nothing was installed" ;;
    esac
}

make_venv() {
    if "$venv/bin/python" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then return; fi
    find_python
    [ -n "$python" ] || fail "no Python 3.11 or later was found after the installation: set PYTHON to one"
    say "making a virtual environment in $venv"
    "$python" -I -m venv --clear "$venv" || fail "the virtual environment $venv could not be made"
}

# digest PATH...: one line for the contents of these files and directories.
digest() {
    find "$@" -type f -not -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16
}

# install STAMP NAME ARGUMENT...: installs hpcfs, unless the same was installed before. Its dependencies
# are in scripts/locked/NAME.txt, with versions and hashes (scripts/lock), and those that build it in
# scripts/locked/build.txt. The arguments are those of pip for hpcfs itself.
install() {
    local stamp="$1" name="$2"
    shift 2
    if [ "$(cat "$venv/hpcfs-installed" 2>/dev/null)" = "$stamp" ]; then return; fi
    say "pip install $* (with scripts/locked/$name.txt)"
    rm -f "$venv/hpcfs-installed"
    pip_install --require-hashes --requirement scripts/locked/build.txt
    pip_install --require-hashes --no-build-isolation --requirement "scripts/locked/$name.txt"
    pip_install --no-deps --no-build-isolation "$@"
    echo "$stamp" >"$venv/hpcfs-installed"
}

# install_newest ARGUMENT...: installs hpcfs with the newest version of each dependency, not the locked one.
install_newest() {
    say "pip install --upgrade $*"
    rm -f "$venv/hpcfs-installed"
    pip_install --upgrade --upgrade-strategy eager "$@"
}

pip_install() {
    "$venv/bin/python" -I -m pip install --quiet --disable-pip-version-check "$@" ||
        fail "pip could not install hpcfs; the reason is above"
}

editable_stamp() {
    echo "editable $(digest pyproject.toml hpcfs/cli/hpcfs.sh scripts/locked) $PWD"
}
