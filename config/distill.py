"""The dense parent's distribution over the next token as a second target, behind an architecture's config; the parent costs
a forward pass and the head once more. A larger one with the same vocabulary: --distill_from=Qwen/Qwen2.5-3B.

    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b.py config/distill.py --out_dir=out/dtf_05b_distill
"""

distill_from = "init_from"  # the model that this one starts as
distill_weight = 1.0
