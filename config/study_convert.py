"""A real pretrained model becomes a routed one: the papers' conversion, straight-through gates, a distilled parent.

    python prepare.py --input=book.txt,news.txt --tokenizer=out/smollm2 --out_dir=data/convert      text of yours
    python study.py config/study_convert.py --judge=held_out.txt --jobs=2

The parent in out/smollm2 is a dense checkpoint as transformers writes it, SmolLM2-135M here. Each run adapts it for 204,800
tokens; dense, adapted as long, is what all are measured against.
"""

out_dir = "out/study_convert"
results = "docs/results/study_convert.json"
picture = "docs/images/study_convert.png"
axis = "inference"
checkpoints = False  # 1.6 GB each

common = {
    "init_from": "out/smollm2",
    "data_dir": "data/convert",
    "seq_len": 256,
    "batch_size": 4,
    "max_steps": 200,
    "eval_interval": 50,
    "eval_batches": 16,
    "log_interval": 10,
    "save_interval": 50,
    "keep_last": 1,
    "lr_base": 1e-4,
    "warmup_ratio": 0.05,
}
judge_tokens = 20_000

_straight = {"gate": "straight_through"}
_distilled = {"distill_from": "out/smollm2"}
arms = {
    "dense": {"architecture": "dense"},
    "mod": {"architecture": "mod"},
    "dtf": {"architecture": "dtf"},
    "stt": {"architecture": "stt"},  # straight-through by itself
    "mod_straight": {"architecture": "mod"} | _straight,
    "dtf_straight": {"architecture": "dtf"} | _straight,
    "stt_soft": {"architecture": "stt", "gate": "soft"},
    "mod_distilled": {"architecture": "mod"} | _straight | _distilled,
    "dtf_distilled": {"architecture": "dtf"} | _straight | _distilled,
    "stt_distilled": {"architecture": "stt"} | _distilled,
}
seeds = [1, 2, 3]
reference = "dense"
