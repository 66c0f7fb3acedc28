"""A million tokens for the best of config/study_seeds.py, which learns from its parent, and for what it is compared with.

    python study.py config/study_million.py --judge=held_out.txt --jobs=2

The model and the text are those that config/study_convert.py names. dense_distilled: how much of the gain is the teacher's.
"""

from pathlib import Path
from runpy import run_path

_shorter = run_path(str(Path(__file__).with_name("study_seeds.py")))

out_dir = "out/study_million"
axis = "inference"
checkpoints = False

common = _shorter["common"] | {"max_steps": 976}
judge_tokens = _shorter["judge_tokens"]
_names = ("dense", "dense_distilled", "drop_distilled", "mod_fitted_distilled")
arms = {name: _shorter["arms"][name] for name in _names}
seeds = [1, 2, 3]
reference = "dense"
