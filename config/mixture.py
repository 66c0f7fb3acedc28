# python prepare.py config/mixture.py            several machines: --shard=0/4 … --shard=3/4, then put the folders together
#
# The corpus of the DTF paper: seven sources, about 3.8 billion tokens of Qwen2.5's tokenizer in 4 bytes each, 16 GB.
# `weight` and a line more or less change the mixture; only what is new is tokenised when this runs again.

out_dir = "data/mixture"
tokenizer = "Qwen/Qwen2.5-0.5B"
val_fraction = 0.002  # of the sources without a validation split: their 3.2 billion tokens leave 6 million

_cosmopedia = ["auto_math_text", "khanacademy", "openstax", "stanford", "stories"]
_cosmopedia += ["web_samples_v1", "web_samples_v2", "wikihow"]
_question = "Question: {question}\n{support}\nAnswer: {correct_answer}"
_title = r" = [^=]+ = \n?$"  # a row of wikitext is a line; an article begins with " = Its title = "

sources = [
    {"id": "Salesforce/wikitext", "subset": "wikitext-103-raw-v1", "val_split": "validation", "join": _title},
    {"id": "abisee/cnn_dailymail", "subset": "3.0.0", "text": "article", "share": 0.2, "val_split": "validation"},
    # storytracer/US-PD-Books in the paper, whose texts are gone from the hub
    {"id": "sedthh/gutenberg_english", "text": "TEXT", "name": "US-PD-Books", "share": 0.5},
    *[{"id": "HuggingFaceTB/cosmopedia", "subset": _subset, "share": 0.1} for _subset in _cosmopedia],
    {"id": "allenai/sciq", "text": _question, "val_split": "validation"},
    {"id": "codeparrot/codeparrot-clean-valid", "text": "content"},
    {"id": "roneneldan/TinyStories", "val_split": "validation"},
]
