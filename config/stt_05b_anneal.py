"""Qwen2.5-0.5B turned into STT step by step: capacity 1 with straight-through gates computes what Qwen computes, and comes
down to 0.5 in the first half of the run. Everything else is config/stt_05b.py.

    torchrun --standalone --nproc_per_node=8 train.py config/stt_05b_anneal.py
"""

from pathlib import Path
from runpy import run_path

globals().update(run_path(str(Path(__file__).with_name("stt_05b.py"))))

out_dir = "out/stt_05b_anneal"
gate = "straight_through"
capacity_start = 1.0
capacity_anneal_steps = 1800
