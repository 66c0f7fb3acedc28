"""Qwen2.5-0.5B turned into a Mixture-of-Depths: twelve of its 24 blocks, those that it misses least, take half of the
tokens, those for which a line that is fitted to the parent foretells the most from skipping them; the others leave their keys
and values there.

    python prepare.py config/mixture.py
    torchrun --standalone --nproc_per_node=8 train.py config/mod_05b.py

About one pass over the mixture: 3600 steps of 1,048,576 tokens, 9.9 · 10^18 FLOPs. What was tried on the way to these
settings is in docs/LOG.md; the papers' own are config/paper.py. A GPU of less than 80 GB: halve batch_size and double
grad_accum_steps, the tokens of a step stay the same.
"""

init_from = "Qwen/Qwen2.5-0.5B"
architecture = "mod"
capacity = 0.5
capacity_choices = [0.5]  # calibrated to it at the end
routed_layers = "auto"
routed_share = 0.5
router = "fitted"
causal_decision = "threshold"  # what decides in training, and needs no causal router to foresee it
router_input = "normed"
kv = "all"
data_dir = "data/mixture"
out_dir = "out/mod_05b"

seq_len = 1024
batch_size = 16
grad_accum_steps = 64  # of the whole job: 8 for each of 8 ranks
max_steps = 3600
eval_interval = 200
eval_batches = 64
save_interval = 200

lr_base = 1e-5  # schedule, weight decay, clipping and seed: train.py's defaults
lr_prior = 1e-3
lr_router = 1e-2
lr_causal_router = 1e-3
