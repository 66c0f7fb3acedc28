"""Qwen2.5-0.5B turned into DTF, with its dense parent's distribution over the next token as a second target. Everything
else is config/dtf_05b.py; the parent costs a forward pass and the head once more.

    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b_distill.py
"""

from pathlib import Path
from runpy import run_path

globals().update(run_path(str(Path(__file__).with_name("dtf_05b.py"))))

out_dir = "out/dtf_05b_distill"
distill_from = "Qwen/Qwen2.5-0.5B"
distill_weight = 1.0
