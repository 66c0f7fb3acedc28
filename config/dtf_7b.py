"""Qwen2.5-7B turned into a DTF, sharded over 8 GPUs of 80 GB: weights, gradients and optimizer are divided (FSDP2).

    python prepare.py config/mixture.py
    torchrun --standalone --nproc_per_node=8 train.py config/dtf_7b.py

Several nodes: docs/slurm.sh. The start prints what a GPU will hold, 52 GB as an estimate; it was not yet run on GPUs.
Out of memory: half the batch_size and twice the grad_accum_steps (the tokens of a step stay the same), then offload.
Everything else is config/dtf_3b.py.
"""

from pathlib import Path
from runpy import run_path

globals().update(run_path(str(Path(__file__).with_name("dtf_3b.py"))))

init_from = "Qwen/Qwen2.5-7B"
out_dir = "out/dtf_7b"
gradient_checkpointing = True
