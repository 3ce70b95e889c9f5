#!/bin/sh
# The command `hpcfs`: starts hpcfs-main, the Python program beside it, once PYTHONPATH is clean.
# An entry that is empty or relative means the current directory, and `PYTHONPATH=/opt/lib:$PYTHONPATH`
# leaves an empty one. Python would run what lies there under the name of any module, before a line
# of ours: in a directory that others can write to, theirs. HPCFS_PYTHONPATH is what was given.
self=$0
if [ -L "$self" ]; then self=$(readlink -f -- "$self"); fi
case $self in */*) ;; *) self=./$self ;; esac
if [ -n "${PYTHONPATH-}" ]; then
    HPCFS_PYTHONPATH=$PYTHONPATH
    PYTHONPATH=
    IFS=:
    set -f
    for entry in $HPCFS_PYTHONPATH; do
        case $entry in /*) PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$entry ;; esac
    done
    unset IFS
    export PYTHONPATH HPCFS_PYTHONPATH
fi
exec "${self%/*}/hpcfs-main" "$@"
