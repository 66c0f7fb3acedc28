"""Does the distance to dense close with more text? Arms of config/study_seeds.py, adapted for 512,000 tokens, not 204,800.

    python study.py config/study_long.py --judge=held_out.txt --jobs=2

The model and the text are those that config/study_convert.py names.
"""

from pathlib import Path
from runpy import run_path

_shorter = run_path(str(Path(__file__).with_name("study_seeds.py")))

out_dir = "out/study_long"
axis = "inference"
checkpoints = False

common = _shorter["common"] | {"max_steps": 500}
judge_tokens = _shorter["judge_tokens"]
_names = ("dense", "drop", "mod_eighth", "mod_fitted", "drop_distilled", "mod_eighth_distilled", "mod_fitted_distilled")
arms = {name: _shorter["arms"][name] for name in _names}
seeds = [1]
reference = "dense"
