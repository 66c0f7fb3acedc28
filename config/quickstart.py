"""The first look: a small DTF model on the standard library's code, about a minute on two CPU cores.

python prepare.py
python train.py config/quickstart.py
python sample.py --model_path=out/quickstart/final_model --prompt="def main(" --show_routing
"""

data_dir = "data/stdlib"
out_dir = "out/quickstart"
architecture = "dtf"
size = "demo"

seq_len = 128
batch_size = 8
max_steps = 200
eval_interval = 50
eval_batches = 8
save_interval = 100

lr_base = 3e-3
lr_prior = 3e-3
lr_causal_router = 5e-3
warmup_ratio = 0.05
