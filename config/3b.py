"""Qwen2.5-3B, behind an architecture's config: weights, gradients and optimizer are divided over 8 GPUs of 80 GB (FSDP2).

    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b.py config/3b.py --out_dir=out/dtf_3b

Estimates of what a GPU will hold, which the start prints too: mod 53 GB, dtf 52 GB, stt 24 GB with --gradient_checkpointing
behind it and 62 GB without; not yet run on GPUs. Out of memory: gradient_checkpointing, then half the batch_size and twice
the grad_accum_steps (the tokens of a step stay the same), then offload. Several nodes: docs/slurm.sh.
"""

init_from = "Qwen/Qwen2.5-3B"
parallel = "fsdp"
gradient_checkpointing = False
batch_size = 8
grad_accum_steps = 128  # of the whole job: 16 for each of 8 ranks
