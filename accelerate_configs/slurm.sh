#!/bin/bash
# sbatch accelerate_configs/slurm.sh --dataset cifar10 --model_name resnet50
# A long run in jobs with a time limit: 90 s before the limit, a job saves a checkpoint and requeues itself; the next job resumes.
# One task is one process on one GPU. output_dir must be on a shared file system. Adjust these options:
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
# a requeued job keeps its name and id, and therefore its run
run_name="${SLURM_JOB_NAME:?Start this with sbatch.}-${SLURM_JOB_ID}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# SLURM signals the tasks directly (--signal without B:), so there is no launcher between SLURM and train.py.
# If a task fails, srun kills the others, and the job ends with the status of the failed task.
# shellcheck disable=SC2016 # each task expands the variables
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python train.py "$@"' task --run_name "$run_name" "$@"
status=$?

# 138 is 128 + SIGUSR1: the time limit was reached and the state is saved
if [ "$status" -eq 138 ]; then
    echo "The time limit is reached; job $SLURM_JOB_ID is requeued and resumes run $run_name."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
