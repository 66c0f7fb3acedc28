"""Qwen2.5-7B turned into a DTF, sharded over 8 GPUs of 80 GB: weights, gradients and optimizer are divided (FSDP2).

    python prepare.py config/mixture.py
    torchrun --standalone --nproc_per_node=8 train.py config/dtf_7b.py

Several nodes: docs/slurm.sh. The start prints what a GPU will hold, 53 GB as an estimate; it was not yet run on GPUs.
Out of memory: half the batch_size and twice the grad_accum_steps (the tokens of a step stay the same), then offload.
"""

init_from = "Qwen/Qwen2.5-7B"
architecture = "dtf"
capacity = 0.5
prior_factor = 0.0625
data_dir = "data/mixture"
out_dir = "out/dtf_7b"

parallel = "fsdp"
gradient_checkpointing = True
seq_len = 1024
batch_size = 8
grad_accum_steps = 128  # of the whole job: 16 for each of 8 ranks
max_steps = 3600
eval_interval = 200
eval_batches = 64
save_interval = 200

lr_base = 1e-5
lr_prior = 1e-3
lr_router = 1e-2
lr_causal_router = 1e-3
min_lr_ratio = 0.1
warmup_ratio = 0.01
weight_decay = 0.01
grad_clip = 1.0
seed = 42
