"""config/study_scratch.py once more, with some six million parameters in blocks instead of one.

    python study.py config/study_5m.py --jobs=2

As many FLOPs a run: some 1,050 steps of 2,048 tokens for dense. Rates: those of the smaller models, divided by the width.
"""

from pathlib import Path
from runpy import run_path

_smaller = run_path(str(Path(__file__).with_name("study_scratch.py")))

out_dir = "out/study_5m"
axis = "training"

configs = _smaller["configs"]
common = _smaller["common"] | {"size": "10M", "num_hidden_layers": 6, "eval_interval": 100}
judge, judge_tokens = _smaller["judge"], _smaller["judge_tokens"]


def _at_this_width(keys: dict) -> dict:
    return keys | {name: keys[name] / 2 for name in ("lr_base", "lr_prior")}  # 256 and 128 wide


arms = {name: _at_this_width(keys) for name, keys in _smaller["arms"].items()}
# 35.8 MFLOPs a token in training, 11.9 at inference: what mod at capacity 0.5 takes
for _name in ("dense_short", "dense_short_slow"):
    arms[_name] |= {"num_hidden_layers": 5, "intermediate_size": 854}
for _name in ("dense_shorter", "dense_shorter_slow"):
    arms[_name] |= {"num_hidden_layers": 4, "intermediate_size": 784}  # 28.6 and 9.5: mod at capacity 0.125
seeds = [1, 2, 3]
reference = "dense"
