# python prepare.py config/web_large.py         22 billion tokens, 90 GB: config/web.py's sources, C4 and RedPajama
#
# RedPajama in SlimPajama's cleaned copy, a sample of 6 billion tokens; C4 has 1,024 files of some 150 million tokens each.
# On four machines: --shard=0/4 … --shard=3/4.

out_dir = "data/web_large"
tokenizer = "Qwen/Qwen2.5-0.5B"
val_fraction = 0.0005

_title = r" = [^=]+ = \n?$"  # a row of wikitext is a line; an article begins with " = Its title = "

sources = [
    {"id": "Salesforce/wikitext", "subset": "wikitext-103-raw-v1", "val_split": "validation", "join": _title},
    {"id": "Skylion007/openwebtext"},
    {"id": "EleutherAI/the_pile_deduplicated", "files": 25},
    {"id": "allenai/c4", "subset": "en", "files": 25},
    {"id": "DKYoon/SlimPajama-6B"},
]
