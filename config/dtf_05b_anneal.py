"""Qwen2.5-0.5B turned into DTF step by step: capacity 1 with straight-through gates computes what Qwen computes, and comes
down to 0.5 in the first half of the run. Everything else is config/dtf_05b.py.

    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b_anneal.py
"""

from pathlib import Path
from runpy import run_path

globals().update(run_path(str(Path(__file__).with_name("dtf_05b.py"))))

out_dir = "out/dtf_05b_anneal"
gate = "straight_through"
capacity_start = 1.0
capacity_anneal_steps = 1800
