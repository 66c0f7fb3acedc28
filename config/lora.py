"""The parent's own weights stay as they are, behind an architecture's config: adapters of rank 16 beside them, and the routed
parts, are all that is trained and saved.

    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b.py config/lora.py --out_dir=out/dtf_05b_lora

final_model opens with Transformer.from_pretrained, as long as the base is there; --lora_merge writes a plain model instead.
The parent's products are held in half precision where a run computes in it. By the estimate that the start prints, mod at 7B with
--gradient_checkpointing and --batch_size=4 takes 24 GB of a GPU, and 143 GB without LoRA; not yet run on one.
"""

lora = True
lora_r = 16
lora_alpha = 32
lora_dropout = 0.05
lr_lora = 1e-4
