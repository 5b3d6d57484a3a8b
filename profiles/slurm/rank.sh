#!/bin/bash
# rank.sh PYTHON SCRIPT ARGUMENT…: one rank of an srun step.
trap "" USR1 # until Python installs its handler: SLURM's warning must not end a rank that is still importing
command -v "$1" >/dev/null || { echo "error: $(hostname): $1 is not on this node; its environment must be on a disk that all nodes share" >&2; exit 127; }
exec "$1" -u "${@:2}"
