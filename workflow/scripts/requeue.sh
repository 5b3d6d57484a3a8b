#!/bin/bash
# requeue.sh FILE: after a training that did not come to its end. Where SLURM's warning (USR1, ahead of the time limit)
# stopped it with all saved, FILE says so, and the job goes back into the queue to go on; anything else is a failure. An
# exit code could not tell: srun reports another one where it has ended a rank itself.
set -euo pipefail
[[ -n ${SLURM_JOB_ID:-} ]] && grep -qs '"warned": true' "$1" || exit 1
echo "$1: saved ahead of the time limit; job $SLURM_JOB_ID goes back into the queue"
rm "$1" # else a failure at the next start would ask again, without end
scontrol requeue "$SLURM_JOB_ID"
sleep 600 # SLURM ends this shell before that
exit 1
