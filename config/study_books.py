"""config/study_scratch.py on another kind of text: books, of which there are fewer, so that a run is a fifth as long.

python prepare.py --input=books/,news.txt --out_dir=data/books             text of yours, 2.5 million tokens or more
python study.py config/study_books.py --jobs=2
"""

from pathlib import Path
from runpy import run_path

_packages = run_path(str(Path(__file__).with_name("study_scratch.py")))

out_dir = "out/study_books"
axis = "training"

configs = _packages["configs"]
common = _packages["common"] | {"flops": 2e13, "data_dir": "data/books"}
judge, judge_tokens = ["data/books"], 100_000
arms = _packages["arms"]
seeds = [1, 2, 3]
reference = "dense"
