"""A real pretrained model made to compute less: which blocks, how many tokens, what the skipped ones leave; with controls.

    python prepare.py --input=books/,news.txt --tokenizer=out/smollm2 --out_dir=data/convert         text of yours
    python study.py config/study_convert.py --judge=held_out.txt --seeds=1,2,3 --only=dense,drop,mod_eighth --jobs=2

The texts of docs/RESULTS.md were seven books (American Adventures, the Debian guide, Great Expectations, Middlemarch, Moby
Dick, News from Nowhere, Pride and Prejudice) and WikiText-2's validation part, 1.7 million tokens; judged were A Tale of Two
Cities and WikiText-2's test part.

The parent in out/smollm2 is a dense checkpoint as transformers writes it: SmolLM2-135M here, 30 blocks. Each run adapts it for
204,800 tokens, and every arm but dense saves about a quarter of the blocks' FLOPs; dense, adapted as long, is what all are
measured against. One seed screens; --seeds=1,2,3 for what is to be believed.
"""

out_dir = "out/study_convert"
axis = "inference"
checkpoints = False  # 1.6 GB each

common = {
    "init_from": "out/smollm2",
    "data_dir": "data/convert",
    "dtype": "float32",  # whatever machine the study goes on on
    "seq_len": 256,
    "batch_size": 4,
    "max_steps": 200,
    "eval_interval": 100,
    "eval_batches": 16,
    "log_interval": 10,
    "save_interval": 50,
    "keep_last": 1,
    "lr_base": 3e-4,
    "warmup_ratio": 0.05,
}
judge_tokens = 4_096

# What removing each block costs on training text orders them: 17, 14, 4, 5, 12, 13, 3, 25, 18, 19, 7, 16, 26, 22, 15, …
_eighth = [3, 4, 5, 12, 13, 14, 17, 25]  # the 8 cheapest: at 0.125 a quarter of the blocks' FLOPs
_half = [3, 4, 5, 7, 12, 13, 14, 15, 16, 17, 18, 19, 22, 25, 26]  # the 15 cheapest: at 0.5
_alternate = [3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27]  # as the papers, but for the first and the last: at 0.4
_mlp = [3, 4, 5, 6, 7, 9, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 25, 26]  # the 20 cheapest: their MLPs at 0.5

_real = {"architecture": "mod", "gate": "straight_through", "router_input": "normed", "kv": "all"}
_at_half = _real | {"routed_layers": _half, "capacity": 0.5}
_at_eighth = _real | {"routed_layers": _eighth, "capacity": 0.125}
# dtf decides in the block below: the cheapest that stand apart.
_apart = {"routed_layers": [4, 7, 12, 14, 17, 19, 22, 25]}
_without = [i for i in range(30) if i not in (3, 4, 5, 12, 13, 14, 17)]  # the 7 cheapest are gone
_dtf = {"architecture": "dtf", "routed_layers": _alternate, "capacity": 0.4}
arms = {
    "dense": {"architecture": "dense"},
    "drop": {"architecture": "dense", "keep_layers": _without},
    "mod_alternate": _real | {"routed_layers": _alternate, "capacity": 0.4},
    "mod_half": _at_half,
    "mod_eighth": _at_eighth,
    "random_eighth": _at_eighth | {"router": "random"},
    "positional_eighth": _at_eighth | {"router": "positional"},
    "random_half": _at_half | {"router": "random"},
    "mod_half_predict": _at_half | {"skip": "predict"},
    "mod_half_distilled": _at_half | {"distill_from": "out/smollm2"},
    "mod_mlp": _real | {"routed_layers": _mlp, "capacity": 0.5, "routed_part": "mlp", "kv": "selected"},
    "stt_half": _at_half | {"architecture": "stt"},
    "dtf_alternate": _real | _dtf,
    "dtf_eighth": _at_eighth | _apart | {"architecture": "dtf"},
    "stt_eighth": _at_eighth | {"architecture": "stt"},
    "dense_fast": {"architecture": "dense", "lr_base": 1e-3},
    "drop_fast": {"architecture": "dense", "keep_layers": _without, "lr_base": 1e-3},
    "mod_eighth_fast": _at_eighth | {"lr_base": 1e-3},
    "mod_eighth_frozen": _at_eighth | {"lr_base": 0.0},
    "mod_eighth_lora": _at_eighth | {"lora": True, "lr_lora": 1e-3},
    "mod_eighth_threshold": _at_eighth | {"causal_decision": "threshold"},
    "drop_distilled": {"architecture": "dense", "keep_layers": _without, "distill_from": "out/smollm2"},
    "mod_many": _at_half | {"capacity_choices": [0.25, 0.5, 0.75]},
}
seeds = [1]
reference = "dense"
