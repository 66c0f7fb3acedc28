"""Qwen2.5-0.5B turned into a DTF whose own weights stay as they are: adapters of rank 16 beside them, and the routed parts,
are all that is trained and saved.

    python prepare.py config/mixture.py
    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b_lora.py

out/dtf_05b_lora/final_model opens with Transformer.from_pretrained, as long as the base is there; --lora_merge writes a
plain model instead.
"""

from pathlib import Path
from runpy import run_path

globals().update(run_path(str(Path(__file__).with_name("dtf_05b.py"))))

out_dir = "out/dtf_05b_lora"
lora = True
lora_r = 16
lora_alpha = 32
lora_dropout = 0.05
lr_lora = 1e-4
