"""What config/study_convert.py found at one seed, asked again: the arms that matter at three seeds, judged on held-out texts.

    python study.py config/study_seeds.py --judge=held_out.txt --jobs=2

A learned choice is brought to its capacity at the end (capacity_choices): the causal student of an eighth of the tokens
says yes to half as many, where no token is more likely than not to be among them.
"""

from pathlib import Path
from runpy import run_path

_screening = run_path(str(Path(__file__).with_name("study_convert.py")))

out_dir = "out/study_seeds"
results = "docs/results/study_seeds.json"
picture = "docs/images/study_seeds.png"
axis = "inference"
checkpoints = False

common = _screening["common"] | {"dtype": "bfloat16"}  # twice as fast where a CPU multiplies it in hardware (AMX)
judge_tokens = _screening["judge_tokens"]
_names = ("dense", "drop", "mod_eighth", "random_eighth", "positional_eighth", "drop_linear", "mod_eighth_linear")
arms = {name: _screening["arms"][name] for name in _names}
arms |= {name: arms[name] | {"capacity_choices": [0.125]} for name in ("mod_eighth", "mod_eighth_linear")}
_slow, _taught = {"lr_base": 1e-4}, {"distill_from": "out/smollm2"}
arms |= {f"{name}_slow": keys | _slow for name, keys in arms.items()}
arms |= {f"{name}_distilled": arms[name] | _taught for name in ("dense", "drop", "mod_eighth")}
seeds = [1, 2, 3]
reference = "dense"
