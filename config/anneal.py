"""From dense to routed step by step, behind an architecture's config: capacity 1 with straight-through gates computes what
the parent computes, and comes down to the config's capacity in the first half of the run.

    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b.py config/anneal.py --out_dir=out/dtf_05b_anneal
"""

gate = "straight_through"
capacity_start = 1.0
capacity_anneal_steps = 1800
