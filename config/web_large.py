# python prepare.py config/web_large.py          23 billion tokens, 92 GB: config/web.py's sources, C4 and RedPajama
#
# RedPajama in SlimPajama's cleaned copy, a sample of 6 billion tokens; C4 has 1,024 files of some 150 million tokens each.
# On four machines: --shard=0/4 … --shard=3/4.

from config.web import sources, tokenizer, val_fraction  # noqa: F401, they are settings

out_dir = "data/web_large"

sources = [
    *sources,
    {"id": "allenai/c4", "subset": "en", "files": 25},
    {"id": "DKYoon/SlimPajama-6B"},
]
