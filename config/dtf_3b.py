"""Qwen2.5-3B turned into a DTF, sharded over 8 GPUs of 80 GB: weights, gradients and optimizer are divided (FSDP2).

    python prepare.py config/mixture.py
    torchrun --standalone --nproc_per_node=8 train.py config/dtf_3b.py

Several nodes: docs/slurm.sh. The start prints what a GPU will hold, 51 GB as an estimate; it was not yet run on GPUs.
Out of memory: gradient_checkpointing, then half the batch_size and twice the grad_accum_steps (the tokens of a step
stay the same), then offload.
Everything else is config/dtf_05b.py.
"""

from pathlib import Path
from runpy import run_path

globals().update(run_path(str(Path(__file__).with_name("dtf_05b.py"))))

init_from = "Qwen/Qwen2.5-3B"
out_dir = "out/dtf_3b"
parallel = "fsdp"
gradient_checkpointing = False
batch_size = 8
grad_accum_steps = 128  # of the whole job: 16 for each of 8 ranks
