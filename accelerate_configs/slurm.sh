#!/bin/bash
# sbatch accelerate_configs/slurm.sh --dataset cifar10 --model_name resnet50
# A run of any length in jobs of limited time: 90 s before its end a job saves, requeues itself and later goes on from there.
# One task is one process on one GPU. output_dir must lie on a file system that all machines share. Adjust what follows:
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
# the name stays with the job when it is requeued, and so does the run
run_name="${SLURM_JOB_NAME:?Start this with sbatch.}-${SLURM_JOB_ID}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# SLURM signals the tasks themselves (--signal without B:): no launcher stands between it and train.py.
# A task that dies takes the others along, and the job ends with its status.
# shellcheck disable=SC2016 # the variables are each task's own
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python train.py "$@"' task --run_name "$run_name" "$@"
status=$?

# 138 is 128 + SIGUSR1: the time was up and the state is saved
if [ "$status" -eq 138 ]; then
    echo "The time is up; job $SLURM_JOB_ID queues again and goes on with run $run_name."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
