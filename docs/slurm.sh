#!/bin/bash
# Several nodes under SLURM:
#
#     sbatch --nodes=4 docs/slurm.sh out/dtf_7b config/dtf_05b.py config/7b.py          out_dir, then what train.py takes
#
# One torchrun a node, one rank a GPU; out_dir and the data lie on a file system that all nodes see. Ten minutes before the
# time is up SLURM sends USR1 to every process: the ranks end their step, save and stop, and the job goes back into the
# queue until final_model is there. A rank that dies is started again with all the others, from the newest intact
# checkpoint, up to three times. Not yet run on a cluster.
#SBATCH --job-name=nanodtf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

export OUT_DIR=$1 HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
shift

# USR1 would end torchrun itself: it is ignored there, and train.py, which inherits that, sets a handler of its own.
srun --kill-on-bad-exit=1 bash -c '
    trap "" USR1
    exec .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
        --rdzv_backend=c10d --rdzv_endpoint="$HEAD:29500" --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
        train.py "$@" --out_dir="$OUT_DIR" --resume=auto' train "$@"

[ -e "$OUT_DIR/final_model" ] || scontrol requeue "$SLURM_JOB_ID"
