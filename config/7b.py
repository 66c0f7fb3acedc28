"""Qwen2.5-7B, behind an architecture's config: weights, gradients and optimizer are divided over 8 GPUs of 80 GB (FSDP2).

    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b.py config/7b.py --out_dir=out/dtf_7b

Estimates of what a GPU will hold, which the start prints too: mod 54 GB, dtf 54 GB, stt 55 GB; not yet run on GPUs. Out of
memory: half the batch_size and twice the grad_accum_steps, then offload. Several nodes: docs/slurm.sh.
"""

init_from = "Qwen/Qwen2.5-7B"
parallel = "fsdp"
gradient_checkpointing = True
batch_size = 8
grad_accum_steps = 128  # of the whole job: 16 for each of 8 ranks
