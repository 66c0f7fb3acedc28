# python prepare.py config/web.py                13 billion tokens, 53 GB: Wikipedia, web pages, the Pile
#
# wikitext, openwebtext and a fiftieth of the Pile, which EleutherAI's deduplicated copy keeps. `files` says how much of a
# data set is read: the Pile has 1,650 files of some 125 million tokens each.

out_dir = "data/web"
tokenizer = "Qwen/Qwen2.5-0.5B"
val_fraction = 0.0005

_title = r" = [^=]+ = \n?$"  # a row of wikitext is a line; an article begins with " = Its title = "

sources = [
    {"id": "Salesforce/wikitext", "subset": "wikitext-103-raw-v1", "val_split": "validation", "join": _title},
    {"id": "Skylion007/openwebtext"},
    {"id": "EleutherAI/the_pile_deduplicated", "files": 33},
]
