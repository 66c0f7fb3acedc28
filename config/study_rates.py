"""The rate of each kind of model for config/study_scratch.py: the same four for all, a fifth of the FLOPs, one seed.

    python study.py config/study_rates.py --jobs=2

lr_base and lr_prior are swept together; the other rates are the demo's. One seed shows what is far off, not which of two
neighbours is better.
"""

out_dir = "out/study_rates"
axis = "training"

configs = ["config/demo.py"]
common = {
    "flops": 2e13,
    "data_dir": "data/packages",
    "dtype": "float32",  # whatever machine the study goes on on
    "batch_size": 8,
    "eval_interval": 200,
    "eval_batches": 16,
    "log_interval": 50,
    "save_interval": 200,
    "keep_last": 1,
}
arms = {
    f"{architecture}_{rate:g}": {"architecture": architecture, "lr_base": rate, "lr_prior": rate}
    for architecture in ("dense", "mod", "dtf", "stt")
    for rate in (1e-3, 2e-3, 4e-3, 8e-3)
}
arms |= {  # fewer blocks, as in config/study_scratch.py
    f"dense_short_{rate:g}": arms[f"dense_{rate:g}"] | {"num_hidden_layers": 4, "intermediate_size": 402}
    for rate in (2e-3, 4e-3, 8e-3)
}
seeds = [1]
reference = "dense_0.002"
speed = False
