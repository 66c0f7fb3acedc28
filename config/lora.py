"""The parent's own weights stay as they are, behind an architecture's config: adapters of rank 16 beside them, and the routed
parts, are all that is trained and saved.

    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b.py config/lora.py --out_dir=out/dtf_05b_lora

final_model opens with Transformer.from_pretrained, as long as the base is there; --lora_merge writes a plain model instead.
"""

lora = True
lora_r = 16
lora_alpha = 32
lora_dropout = 0.05
lr_lora = 1e-4
