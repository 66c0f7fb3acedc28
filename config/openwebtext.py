# python prepare.py config/openwebtext.py        the open copy of GPT-2's training text: 9 billion tokens, 18 GB
# Tokenizer and held-out share are nanoGPT's.

out_dir = "data/openwebtext"
tokenizer = "openai-community/gpt2"
val_fraction = 0.0005

sources = [
    {"id": "Skylion007/openwebtext"},
]
