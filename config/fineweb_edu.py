# python prepare.py config/fineweb_edu.py        10 billion tokens of educational web pages, 40 GB
# Less of it: "share": 0.1. On four machines: --shard=0/4 … --shard=3/4.

out_dir = "data/fineweb_edu"
tokenizer = "Qwen/Qwen2.5-0.5B"
val_fraction = 0.0005  # 5 million tokens

sources = [
    {"id": "HuggingFaceFW/fineweb-edu", "subset": "sample-10BT"},
]
