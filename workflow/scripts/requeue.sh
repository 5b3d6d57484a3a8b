#!/bin/bash
# requeue.sh FILE: run this after a training that did not finish. FILE is its requeue marker. If the marker says that
# SLURM's warning (USR1, before the time limit) stopped the training after a checkpoint, requeue the job, so that it
# resumes; otherwise fail. The exit code is not enough: srun reports another one if it ended a rank itself.
set -euo pipefail
[[ -n ${SLURM_JOB_ID:-} ]] && grep -qs '"warned": true' "$1" || exit 1
echo "$1: saved ahead of the time limit; job $SLURM_JOB_ID goes back into the queue"
rm "$1" # otherwise a failure of the next start would requeue the job again, endlessly
scontrol requeue "$SLURM_JOB_ID"
sleep 600 # SLURM ends this shell before that
exit 1
