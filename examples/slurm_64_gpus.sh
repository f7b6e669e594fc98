#!/usr/bin/env bash
# CALM of ten billion parameters on 8 machines of 8 GPUs, weights in shards: sbatch examples/slurm_64_gpus.sh
# 64 GPUs x 1 sequence x 4 micro-batches = 256 sequences a step, as with 8 GPUs and 32 micro-batches.
# Before it, once, as in docs/scaling.md: `calm prepare` writes runs/pile, and runs/ae is trained.
# Requeued or submitted again, it goes on from the last good checkpoint. Not yet run on a cluster.
#SBATCH --job-name=calm-10b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=1

# One torchrun a machine. output_dir and runs/pile must be on a disk that all machines see.
srun torchrun --nnodes 8 --nproc_per_node 8 \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$HEAD:29500" \
    -m calm.training.train_calm --config calm-10b --fsdp \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 4 \
    --ae_name_or_path runs/ae --train_file runs/pile --validation_file held-out.jsonl \
    --output_dir runs/calm-10b
