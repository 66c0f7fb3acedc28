# python prepare.py config/wikitext.py           wikitext-103: 103 million words of Wikipedia
# python prepare.py config/wikitext.py --tokenizer=none --vocab_size=16384         with a tokenizer of its own

out_dir = "data/wikitext"
tokenizer = "Qwen/Qwen2.5-0.5B"

_title = r" = [^=]+ = \n?$"  # a row is a line; an article begins with " = Its title = "

sources = [
    {"id": "Salesforce/wikitext", "subset": "wikitext-103-raw-v1", "val_split": "validation", "join": _title},
]
