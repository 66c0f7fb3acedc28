"""The papers' own settings, behind any other config: every second block from 1, whole blocks, raw routers, soft gates.

    torchrun --standalone --nproc_per_node=8 train.py config/mod_05b.py config/paper.py --out_dir=out/mod_05b_paper

They are what a model has where nothing is set.
"""

capacity = 0.5
capacity_choices = []  # nothing is calibrated
routed_layers = None  # every second one, from 1
routed_part = "block"
kv = "selected"
router_input = "raw"
skip = "identity"
router = "learned"
selection = "topk"
causal_decision = "router"
gate = None  # soft; stt's straight-through
