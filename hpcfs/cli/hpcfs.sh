#!/bin/sh
# The command `hpcfs`: starts hpcfs-main, the Python program beside it, once PATH and PYTHONPATH are
# clean. An entry that is empty or relative means the current directory, and
# `PYTHONPATH=/opt/lib:$PYTHONPATH` leaves an empty one. Python would run what lies there under the
# name of any module, before a line of ours, and we would run the `fusermount3` that lies there: in a
# directory that others can write to, theirs. HPCFS_PATH and HPCFS_PYTHONPATH are what was given:
# `hpcfs run` gives them on.
absolute() {
    kept=
    IFS=:
    set -f
    for entry in $1; do
        case $entry in /*) kept=${kept:+$kept:}$entry ;; esac
    done
    unset IFS
    printf %s "$kept"
}
{ true 9<&0; } 2>/dev/null || exec </dev/null # what is closed would become another file's number
{ true 9>&1; } 2>/dev/null || exec >/dev/null
{ true 9>&2; } || exec 2>/dev/null
self=$0
HPCFS_PATH=${PATH-/usr/bin:/bin}
PATH=$(absolute "$HPCFS_PATH")
PATH=${PATH:-/usr/bin:/bin}
export PATH HPCFS_PATH
if [ -L "$self" ]; then self=$(readlink -f -- "$self"); fi
case $self in */*) ;; *) self=./$self ;; esac
if [ -n "${PYTHONPATH-}" ]; then
    HPCFS_PYTHONPATH=$PYTHONPATH
    PYTHONPATH=$(absolute "$PYTHONPATH")
    export PYTHONPATH HPCFS_PYTHONPATH
fi
exec "${self%/*}/hpcfs-main" "$@"
