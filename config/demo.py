"""One of the four architectures of `make demo`, which trains each on the same tokens with this file:

python train.py config/demo.py --architecture=mod --out_dir=out/demo/mod
"""

data_dir = "data/stdlib"
out_dir = "out/demo/dtf"
architecture = "dtf"
size = "demo"

seq_len = 256
batch_size = 8
max_steps = 450
eval_interval = 90
eval_batches = 12
save_interval = 0

lr_base = 2e-3
lr_prior = 2e-3
lr_causal_router = 5e-3
warmup_ratio = 0.05
