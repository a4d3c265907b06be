#!/bin/bash
# Train on several nodes under Slurm: one torchrun a node, one process a GPU.
#
#   sbatch --nodes=4 --gpus-per-node=8 scripts/launch_slurm.sh -c configs/hnet_2stage_XL.json --data /shared/data \
#       --save-dir /shared/runs/xl --global-slices 256 --replicate 4 ...
#
# All arguments go to train.py. --save-dir and --data must be on a file system that all nodes see. A job that is
# preempted or near its time limit gets SIGTERM two minutes before the end, saves and ends well; put back in the queue (by
# Slurm after preemption, by `scontrol requeue` or another sbatch after the time limit) it goes on where it stopped. A
# process that fails makes torchrun start all of them again, up to RESTARTS times, from the newest complete checkpoint.
#
# PYTHON  the interpreter (default: .venv/bin/python)       RESTARTS  default 3       PORT  rendezvous, default 29500
#SBATCH --job-name=hnet
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

case " $* " in
  *" --save-dir "*) ;;
  *) echo "launch_slurm.sh: name a --save-dir that all nodes see; a job that is started again must find it" >&2; exit 2 ;;
esac
[ -n "${SLURM_JOB_ID:-}" ] || { echo "launch_slurm.sh: not inside a Slurm job; use sbatch" >&2; exit 2; }

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 # seconds that torchrun leaves train.py to save; 30 by default

# --signal reaches the job's steps, not this script: torchrun hands SIGTERM on to train.py and waits for it
exec srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
  --nnodes="$SLURM_NNODES" --nproc-per-node="$gpus" --max-restarts="${RESTARTS:-3}" \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head_node:${PORT:-29500}" \
  train.py --resume auto "$@"
