"""A DTF from scratch, 48 million parameters in its blocks, on a billion tokens of educational web pages.

    python prepare.py config/fineweb_edu.py
    torchrun --standalone --nproc_per_node=8 train.py config/scratch_50m.py

The other three: --architecture=dense --out_dir=out/dense_50m, and so on. 2000 steps of 524,288 tokens.
"""

init_from = "scratch"
size = "50M"
architecture = "dtf"
capacity = 0.5
prior_factor = 0.0625
data_dir = "data/fineweb_edu"
out_dir = "out/dtf_50m"

seq_len = 1024
batch_size = 16
grad_accum_steps = 32  # of the whole job: 4 for each of 8 ranks
max_steps = 2000
eval_interval = 100
eval_batches = 64
save_interval = 200

lr_base = 6e-4  # schedule, weight decay, clipping and seed: train.py's defaults
lr_prior = 1e-3
lr_router = 1e-2
lr_causal_router = 1e-3
