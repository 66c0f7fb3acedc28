"""Qwen2.5-0.5B, trained on as it is: the baseline for mod_05b, dtf_05b and stt_05b.

    python prepare.py config/mixture.py
    torchrun --standalone --nproc_per_node=8 train.py config/dense_05b.py

About one pass over the mixture: 3600 steps of 1,048,576 tokens, 12.2 · 10^18 FLOPs. A GPU of less than
80 GB: halve batch_size and double grad_accum_steps, the tokens of a step stay the same.
"""

init_from = "Qwen/Qwen2.5-0.5B"
architecture = "dense"
data_dir = "data/mixture"
out_dir = "out/dense_05b"

seq_len = 1024
batch_size = 16
grad_accum_steps = 64  # of the whole job: 8 for each of 8 ranks
max_steps = 3600
eval_interval = 200
eval_batches = 64
save_interval = 200

lr_base = 1e-5  # schedule, weight decay, clipping and seed: train.py's defaults
