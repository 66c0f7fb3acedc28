"""Qwen2.5-0.5B turned into an STT: seven of its 24 blocks, those that it misses least, take the eighth of the tokens whose
update a transition network foresees worst; the others leave their keys and values there. Training runs these blocks
densely too, inference does not.

    python prepare.py config/mixture.py
    torchrun --standalone --nproc_per_node=8 train.py config/stt_05b.py

About one pass over the mixture: 3600 steps of 1,048,576 tokens, 12.6 · 10^18 FLOPs. What was tried on the way to these
settings is in docs/LOG.md; the papers' own are config/paper.py. A GPU of less than 80 GB: halve batch_size and double
grad_accum_steps, the tokens of a step stay the same.
"""

init_from = "Qwen/Qwen2.5-0.5B"
architecture = "stt"
capacity = 0.125
capacity_choices = [0.125]  # its causal decision is calibrated to it at the end
routed_layers = "auto"
routed_share = 0.29
router_input = "normed"
kv = "all"
prior_factor = 0.0625
data_dir = "data/mixture"
out_dir = "out/stt_05b"

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
