#!/bin/bash
# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
#
# A training on SLURM that continues after its time limit, a preemption, or the failure of a node:
#
#   sbatch examples/launchers/slurm.sh --config train.yaml
#
# All options are those of `trl-marble train`, without those of `accelerate launch`. `output_dir` has to be on a file
# system that all nodes share. Change the lines below to fit your cluster; what is installed is activated before
# `sbatch`, which passes the environment on.
#
#SBATCH --job-name=trl-marble
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8        # one process per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120          # to the processes, 120 seconds before the time limit: they save and end
#SBATCH --requeue
#SBATCH --open-mode=append         # one log for all parts of the run
#SBATCH --output=%x-%j.log

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# SLURM starts every process itself: a launcher in between would kill them 30 seconds after the signal.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec trl-marble train "$@"
' trl-marble "$@" --resume_from_checkpoint auto
status=$?

# 143: ended by SIGTERM. Other failures would only repeat themselves. (`scancel` ends this script too.)
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
