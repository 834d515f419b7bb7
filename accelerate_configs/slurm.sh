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

# the run's summary.json, which says how the run ended; train.py replaces the file of an earlier job only when its run ends
summary=$(python -c "import sys; from pipeline.settings.parser import parse_config; print(parse_config(sys.argv[1:]).run_dir)" \
    --run_name "$run_name" "$@")/summary.json || exit
earlier=$(cat "$summary" 2> /dev/null)

# SLURM signals the tasks directly (--signal without B:), so there is no launcher between SLURM and train.py.
# If a task fails, srun kills the others, and the job ends with the status of the failed task.
# shellcheck disable=SC2016 # each task expands the variables
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python train.py "$@"' task --run_name "$run_name" "$@"
status=$?

# "interrupted" is the status of a run that a signal stopped and whose state is saved. The status of srun does not decide: it may be
# 143, because the tasks end one after another and srun kills the rest. scancel ends this script, too, so the job is not requeued.
if [ "$(cat "$summary" 2> /dev/null)" != "$earlier" ] && grep -q '"status": "interrupted"' "$summary"; then
    echo "The run was stopped by a signal; job $SLURM_JOB_ID is requeued and resumes run $run_name."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
