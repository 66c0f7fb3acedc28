"""What config/study_convert.py found at one seed, asked again: the arms that matter at three seeds, judged on held-out texts.

    python study.py config/study_seeds.py --judge=held_out.txt --jobs=2

drop_taught learns from dense's own first run, which knows the text: run dense with seed 1 before it, and then
cp -r out/study_seeds/dense-1/final_model out/adapted.

A learned choice is brought to its capacity at the end (capacity_choices): the causal student of an eighth of the tokens
says yes to half as many, where no token is more likely than not to be among them.
"""

from pathlib import Path
from runpy import run_path

_screening = run_path(str(Path(__file__).with_name("study_convert.py")))

out_dir = "out/study_seeds"
axis = "inference"
checkpoints = False

common = _screening["common"] | {"dtype": "bfloat16"}  # twice as fast where a CPU multiplies it in hardware
judge_tokens = _screening["judge_tokens"]
_names = ("dense", "drop", "mod_eighth", "random_eighth", "positional_eighth")
arms = {name: _screening["arms"][name] for name in _names}
arms["mod_eighth"] |= {"capacity_choices": [0.125]}
arms |= {f"{name}_slow": keys | {"lr_base": 1e-4} for name, keys in arms.items()}
_taught = ("dense", "drop", "mod_eighth")
arms |= {f"{name}_distilled": arms[name] | {"distill_from": "out/smollm2"} for name in _taught}
arms["drop_taught"] = arms["drop"] | {"distill_from": "out/adapted"}
# More speeds, and what each means is worth to mod_eighth.
_mod = arms["mod_eighth"]
arms["drop_four"] = {"architecture": "dense", "keep_layers": [i for i in range(30) if i not in (4, 5, 14, 17)]}
arms["mod_eight_half"] = _mod | {"capacity": 0.5, "capacity_choices": [0.5]}
arms["mod_eight_many"] = _mod | {"capacity_choices": [0.125, 0.5, 1.0]}
arms["mod_half"] = _screening["arms"]["mod_half"] | {"capacity_choices": [0.5]}
arms["mod_eighth_raw"] = _mod | {"router_input": "raw"}
arms["mod_eighth_own_keys"] = _mod | {"kv": "selected"}
arms["mod_eighth_soft"] = _mod | {"gate": "soft"}
arms["mod_eighth_predict"] = _mod | {"skip": "predict"}
arms["mod_eighth_threshold"] = _mod | {"selection": "threshold", "causal_decision": "threshold"}
arms["mod_mlp"] = _screening["arms"]["mod_mlp"] | {"capacity_choices": [0.5]}
# The choice fitted to the parent, beside a random one; with a teacher; at half of the saving.
arms["mod_fitted"] = arms["mod_half"] | {"router": "fitted", "causal_decision": "threshold"}
# Held-out text has more tokens that pass, so that half of the tokens is 53 % there: with so many fewer inference takes what drop does.
arms["mod_fitted_equal"] = arms["mod_fitted"] | {"capacity": 0.47, "capacity_choices": [0.47]}
arms["random_half"] = _screening["arms"]["random_half"]
arms["mod_fitted_distilled"] = arms["mod_fitted"] | {"distill_from": "out/smollm2"}
arms["positional_half"] = arms["random_half"] | {"router": "positional"}
# What the other tokens' keys are worth to the fitted choice: with its own alone it has FLOPs for more tokens.
arms["mod_fitted_own_keys"] = arms["mod_fitted"] | {"kv": "selected", "capacity": 0.55, "capacity_choices": [0.55]}
arms["mod_fitted_most"] = arms["mod_fitted"] | {"capacity": 0.7, "capacity_choices": [0.7]}  # what drop_four takes
# Two blocks removed and the choice in twelve of the others, which are numbered anew: faster, at what drop takes.
_left = [i for i in range(30) if i not in (14, 17)]
_twelve = [_left.index(i) for i in (3, 4, 5, 7, 12, 13, 16, 18, 19, 22, 25, 26)]
arms["mod_fitted_removed"] = arms["mod_fitted"] | {"keep_layers": _left, "routed_layers": _twelve, "capacity": 0.53}
arms["mod_fitted_removed"] |= {"capacity_choices": [0.53]}
arms["random_most"] = arms["random_half"] | {"capacity": 0.7}
arms["mod_fitted_many"] = arms["mod_fitted"] | {"capacity_choices": [0.25, 0.5, 0.75]}
# The surprise's own choice, of an eighth.
for _name in ("dtf_eighth", "stt_eighth"):
    arms[_name] = _screening["arms"][_name] | {"capacity_choices": [0.125]}
arms["dtf_eighth_soft"] = arms["dtf_eighth"] | {"gate": "soft"}
arms["mod_fitted_eight"] = arms["mod_eight_half"] | {
    "router": "fitted",
    "causal_decision": "threshold",
    "capacity": 0.47,
}
arms["mod_fitted_eight"] |= {"capacity_choices": [0.47]}
# Cheap recipes: LoRA, in the fitted choice and in dense; a frozen base, whose routers alone learn.
arms["mod_fitted_lora"] = arms["mod_fitted"] | {"lora": True, "lr_lora": 1e-3}
arms["dense_lora"] = arms["dense"] | {"lora": True, "lr_lora": 1e-3}
arms["mod_eighth_frozen"] = _mod | {"lr_base": 0.0}
seeds = [1, 2, 3]
reference = "dense"
