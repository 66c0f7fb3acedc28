"""Does routing pay from scratch? Kinds of model of the demo's size at equal FLOPs, three seeds each.

    python prepare.py --input='.venv/lib/**/*.py' --out_dir=data/packages     Python packages that are installed anyway
    python study.py config/study_rates.py --jobs=2                     the rates below: the best of each architecture
    python study.py config/study_scratch.py --jobs=2

10^14 FLOPs a run: 4 000 steps of 2,048 tokens for dense, some 6 000 where half as many FLOPs are spent on a token.
"""

out_dir = "out/study_scratch"
axis = "training"

configs = ["config/demo.py"]
common = {
    "flops": 1e14,
    "data_dir": "data/packages",
    "dtype": "float32",  # whatever machine the study goes on on
    "batch_size": 8,
    "eval_interval": 250,
    "eval_batches": 16,
    "log_interval": 50,
    "save_interval": 500,
    "keep_last": 1,
}
judge = ["data/packages"]  # its validation split: files that no run was trained on
judge_tokens = 100_000

# lr_base and lr_prior of each architecture: the best that config/study_rates.py found, of shorter dense models 2e-3. At twice
# as much each is worse, dtf and stt fail. The sweep has a fifth of the FLOPs: dense is asked at both its best rates.
_dense, _mod, _dtf, _stt = ({"lr_base": rate, "lr_prior": rate} for rate in (4e-3, 2e-3, 2e-3, 2e-3))
_dense |= {"architecture": "dense"}
_mod |= {"architecture": "mod"}
_dtf |= {"architecture": "dtf"}
_stt |= {"architecture": "stt"}

arms = {
    "dense": _dense,
    # 9.6 MFLOPs a token in training, 3.2 at inference: what mod at capacity 0.5 takes
    "dense_short": _dense | {"num_hidden_layers": 4, "intermediate_size": 402},
    "dense_shorter": _dense | {"num_hidden_layers": 3, "intermediate_size": 416},  # 8.1 and 2.7: mod at capacity 0.125
    "mod_0.125": _mod | {"capacity": 0.125, "capacity_choices": [0.125]},  # calibrated to it at the end
    "mod_0.5": _mod | {"capacity": 0.5},
    "mod_gate": _mod | {"capacity": 1.0},  # every token enters every block: what the gate alone is worth
    "dtf_0.5": _dtf | {"capacity": 0.5},
    "stt_0.5": _stt | {"capacity": 0.5},
    "stt_dense_output": _stt | {"capacity": 0.5, "stt_output": "dense"},
    "random_0.125": _mod | {"capacity": 0.125, "router": "random"},
    "random": _mod | {"capacity": 0.5, "router": "random"},
    "positional": _mod | {"capacity": 0.5, "router": "positional"},
}
# Each at the other's rate.
arms |= {f"{name}_slow": arms[name] | {"lr_base": 2e-3, "lr_prior": 2e-3} for name in arms if name.startswith("dense")}
_fast = ("mod_0.125", "mod_0.5", "random")
arms |= {f"{name}_fast": arms[name] | {"lr_base": 4e-3, "lr_prior": 4e-3} for name in _fast}
seeds = [1, 2, 3]
reference = "dense"
