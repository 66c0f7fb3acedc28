"""An architecture is one class and one entry: a fifth one, in 30 lines, goes through everything the project does.

tests/new_architecture.py is what a researcher writes. No other file knows it: each command below runs in a process that
imports it first.
"""

import ast
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_ranks

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "tests" / "new_architecture.py").read_text()
TEXTS = ",".join(str(ROOT / name) for name in ("routers.py", "model.py", "train.py", "data.py", "checkpoint.py"))
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
JOBS = """
import importlib, json, sys
import new_architecture
for script, arguments in json.loads(sys.argv[1]):
    print("===", script, flush=True)
    importlib.import_module(script).main(arguments)
"""
OUTSIDE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.arange(30)[None]).logits, sys.argv[2])
"""
OURS = """
import sys, torch, new_architecture
from model import Transformer
model, ids = Transformer.from_pretrained(sys.argv[1]), torch.arange(30)[None]
assert torch.equal(model(ids, routing="causal").logits, torch.load(sys.argv[2]))
"""
TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
num_fewshot: 0
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def run(command, **options):
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def run_jobs(*jobs):
    """[script, its arguments] one after another, in one process."""
    command = [sys.executable, "-c", JOBS, json.dumps([[script, [str(a) for a in given]] for script, given in jobs])]
    return run(command, cwd=ROOT)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    clock = {"tokens_per_s", "data_wait"}
    return [{name: value for name, value in line.items() if name not in clock} for line in metrics(folder)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("norm")


@pytest.fixture(scope="module")
def keys(folder):
    shape = ["--hidden_size=32", "--intermediate_size=64", "--num_attention_heads=2", "--num_hidden_layers=4"]
    run_jobs(
        (
            "prepare",
            [
                f"--input={TEXTS}",
                "--val_fraction=0.3",
                "--vocab_size=300",
                "--num_proc=1",
                f"--out_dir={folder / 'data'}",
            ],
        )
    )
    steps = ["--max_steps=8", "--log_interval=2", "--eval_interval=4", "--eval_batches=2", "--save_interval=3"]
    size = ["--seq_len=32", "--batch_size=2", "--grad_accum_steps=2", "--device=cpu"]
    return [f"--data_dir={folder / 'data'}", "--architecture=norm", *shape, *steps, *size]


@pytest.fixture(scope="module")
def trained(folder, keys):
    """A run; one that was stopped after its first step and went on; adapters on the first."""
    of_base = ("--data_dir", "--max_steps", "--seq_len", "--batch_size", "--device", "--log_interval", "--eval")
    given = [key for key in keys if key.startswith(of_base)]
    adapters = [f"--init_from={folder / 'run' / 'final_model'}", "--lora", "--lora_r=2"]
    said = run_jobs(
        ("train", [*keys, f"--out_dir={folder / 'run'}"]),
        ("train", [*keys, f"--out_dir={folder / 'stopped'}", "--max_seconds=1e-3"]),
        ("train", ["--resume=auto", f"--out_dir={folder / 'stopped'}", "--max_seconds=0"]),
        ("train", [*given, *adapters, f"--out_dir={folder / 'lora'}"]),
        ("train", [*given, *adapters, f"--out_dir={folder / 'merged'}", "--lora_merge"]),
    )
    assert "max_seconds=0.001: stopped and saved in" in said and "step_0000001; --resume=auto goes on" in said
    return folder / "run"


def test_it_is_one_class_of_thirty_lines():
    tree = ast.parse(SOURCE)
    lines = [line for node in tree.body for line in range(node.lineno, node.end_lineno + 1)]
    code = [line for line in SOURCE.splitlines()[lines[0] - 1 :] if line.strip()]
    assert len(code) - 1 <= 35  # with its imports
    assert sum(n.end_lineno - n.lineno + 1 for n in tree.body if isinstance(n, ast.ClassDef)) <= 30
    assert SOURCE.partition('"""\n\n')[2].strip() in (ROOT / "README.md").read_text()


PROPERTIES = (
    "test_causal_routing_never_looks_ahead",
    "test_rows_are_independent",
    "test_padding_changes_nothing",
    "test_generate_equals_the_uncached_causal_forward",
    "test_decoding_in_bfloat16_routes_as_in_float32",
    "test_a_compiled_step_equals_the_uncached_causal_forward",
    "test_a_step_that_selects_no_row_runs_no_matmul_of_the_block",
    "test_causal_router_never_moves_the_trunk",
    "test_every_parameter_gets_a_gradient",
    "test_gradients_equal_finite_differences",
    "test_gradient_checkpointing_changes_no_gradient",
    "test_the_trunk_is_one_graph_with_the_same_gradients",
    "test_flops_equal_the_flop_counter",
    "test_bfloat16_autocast_stays_close_to_float32",
    "test_converted_at_capacity_one_with_straight_through_gates_equals_dense",
    "test_saved_models_come_back_whole",
    "test_conversion_starts_the_routed_parts_anew",
    "test_09_15_16_22_the_routed_block_by_brute_force",
    "test_11_21_skipped_tokens_cost_nothing",
    "test_12_causal_mode_has_no_quota",
    "test_saved_loaded_and_merged_logits_are_equal",
)


def test_it_has_every_property_of_the_others():
    """The tests of the four, on the fifth: causal, cached, compiled steps, batches, gradients, FLOPs, files, adapters."""
    command = [sys.executable, "-m", "pytest", "-n0", "-vv", "-p", "new_architecture"]
    files = ["tests/test_model.py", "tests/test_known_faults.py", "tests/test_lora.py"]
    lines = run([*command, "-k", f"norm and ({' or '.join(PROPERTIES)})", *files], cwd=ROOT).splitlines()
    for name in PROPERTIES:
        assert any(f"::{name}[" in line and "PASSED" in line for line in lines), name


def test_training_logs_what_it_says_of_itself(trained):
    lines = metrics(trained)
    assert [line["step"] for line in lines] == [0, 1, 2, 4, 6, 8]
    last = lines[-1]
    named = {
        "norm_z_loss",
        "causal_loss",
        "causal_accuracy",
        "causal_capacity",
        "lr/base",
        "lr/router",
        "lr/causal_router",
    }
    named |= {
        "train/loss",
        "train/perplexity",
        "val/loss",
        "val/loss_causal",
        "val/perplexity",
        "val/perplexity_causal",
    }
    assert named | {"tokens", "flops", "tokens_per_s", "grad_norm", "bad_steps"} <= last.keys()
    assert all(math.isfinite(value) for value in last.values()) and last["tokens"] == 8 * 2 * 2 * 32
    assert last["val/loss"] < lines[0]["val/loss"] and "lr/prior" not in last and last["lr/router"] > last["lr/base"]
    card = (trained / "final_model" / "README.md").read_text()
    assert "Norm routing: a token enters a block where the block below has just changed it a lot." in card
    config = json.loads((trained / "final_model" / "config.json").read_text())
    assert config["architecture"] == "norm" and config["norm_z_weight"] == 1e-4


def test_its_loss_has_the_weight_that_is_set(folder, keys):
    one_step = [*keys, "--max_steps=1", "--save_interval=0"]
    heavy = [*one_step, "--norm_z_weight=10", f"--out_dir={folder / 'heavy'}"]
    said = run_jobs(("train", [*one_step, f"--out_dir={folder / 'light'}"]), ("train", heavy))
    assert "unknown key" not in said
    norms = [metrics(folder / name)[-1]["grad_norm"] for name in ("light", "heavy")]
    assert norms[1] > 2 * norms[0]
    assert "weight of mean(r²)" in run([sys.executable, "-c", JOBS, '[["train", ["--help"]]]'], cwd=ROOT)


def test_adapters_learn_beside_a_frozen_base(trained, folder):
    from safetensors.torch import load_file

    assert metrics(folder / "lora")[-1]["lr/lora"] > 0
    adapter = folder / "lora" / "final_model"
    assert (adapter / "adapter_model.safetensors").exists()
    routed = load_file(adapter / "routed.safetensors")
    assert {name.split(".")[3] for name in routed} == {"router", "causal_router"}
    base, merged = (load_file(folder / name / "final_model" / "model.safetensors") for name in ("run", "merged"))
    assert base.keys() == merged.keys()
    changed = {name for name in base if not base[name].equal(merged[name])}
    assert any("q_proj.weight" in name for name in changed) and any("router" in name for name in changed)
    assert not any("norm" in name or "embed" in name for name in changed)


def test_a_resumed_run_and_many_ranks_are_the_same_run(trained, folder, keys):
    """From step 1 on, to the bit; and on two ranks, DDP and FSDP2, to 1e-4."""
    assert losses(folder / "stopped") == losses(trained)
    final = "final_model/model.safetensors"
    assert (folder / "stopped" / final).read_bytes() == (trained / final).read_bytes()
    jobs = [[*keys, f"--out_dir={folder / 'ddp'}"], [*keys, "--parallel=fsdp", f"--out_dir={folder / 'fsdp'}"]]
    run_ranks(2, *jobs, imports="import new_architecture")
    for kind in ("ddp", "fsdp"):
        step = folder / kind / "step_0000008"
        assert json.loads((step / "state.json").read_text())["world_size"] == 2
        assert len(list(step.glob("shard-*.safetensors"))) == (2 if kind == "fsdp" else 0)
        for one, other in zip(losses(trained), losses(folder / kind), strict=True):
            assert other == pytest.approx(one, rel=1e-4, abs=1e-6), kind


def test_its_code_travels_with_its_weights(trained, tmp_path):
    """transformers opens it where neither the project nor the new file is to be found."""
    files, logits = trained / "final_model", tmp_path / "logits.pt"
    env = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    command, how = [sys.executable, "-P", "-c", OUTSIDE, files, logits], {"capture_output": True, "text": True}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, check=False, **how)
    assert done.returncode == 0, done.stderr
    assert (files / "new_architecture.py").exists()
    run([sys.executable, "-c", OURS, str(files), str(logits)], cwd=ROOT)


@pytest.mark.skipif(not os.environ.get("COMPILE"), reason="COMPILE=1: a minute on two cores")
def test_it_compiles(trained, folder, keys):
    run_jobs(("train", [*keys, "--compile", f"--out_dir={folder / 'compiled'}"]))
    assert metrics(folder / "compiled")[-1]["train/loss"] == pytest.approx(metrics(trained)[-1]["train/loss"], rel=1e-3)


def test_every_script_takes_it(trained, folder):
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "words.jsonl").write_text('{"question": "def "}\n{"question": "return "}\n')
    (tasks / "words.yaml").write_text(TASK.replace("FILE", str(tasks / "words.jsonl")))
    model = f"--model_path={trained}"
    speed = ["--measure=train,causal,decode1", "--seq_len=32", "--batch_size=1", "--repeats=1", "--decode_steps=2"]
    shape = ["--hidden_size=32", "--num_hidden_layers=4", "--num_attention_heads=2", "--vocab_size=300"]
    sweep = ["--capacities=0.5,1", "--repeats=1", "--decode_steps=2"]
    read = [f"--text={ROOT / 'routers.py'}", "--seq_len=32", "--limit=4", "--batch_size=2"]
    out = run_jobs(
        ("sample", [model, "--prompt=def ", "--max_new_tokens=9", "--show_routing", f"--png={folder / 'map.png'}"]),
        ("sample", [model, f"--text={ROOT / 'errors.py'}", f"--html={folder / 'page.html'}"]),
        ("plot", ["report", str(trained), "--sequences=4", f"--out={folder / 'report'}"]),
        ("plot", ["routing", str(trained), "--sequences=4", f"--out={folder / 'report'}"]),
        ("bench", [*speed, *shape, "--architecture=norm", f"--output_path={folder / 'speed.json'}"]),
        ("bench", ["--tasks=flops", *shape, "--seq_len=32", f"--output_path={folder / 'flops.json'}"]),
        ("bench", ["--tasks=perplexity,capacity", model, *read, *sweep, f"--output_path={folder / 'scores.json'}"]),
        ("bench", [f"--tasks={tasks}", model]),
    )
    assert "decided by the causal router" in out and "routed blocks entered, of 2" in out
    page = (folder / "page.html").read_text()
    layers = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["layers"]
    assert [layer["index"] for layer in layers] == [1, 3]
    for layer in layers:
        pairs = [
            pair for pair in zip(layer["margin"], layer["mask"], strict=True) if pair[0]
        ]  # 0: too small for the page
        assert len(pairs) > 50 and all((margin > 0) == (entered == "1") for margin, entered in pairs)
    for picture in ("map.png", "report/routing.png", "report/routed_tokens.png", "report/curves.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG"), picture
    assert (folder / "report" / "report.md").read_text().startswith(f"# Report: {trained.name}")
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("speed", "flops", "scores")}
    rows = {(row["measure"], row["variant"]): row for row in results["speed"]["speed"]["rows"]}
    for measure in ("train", "causal", "decode1"):
        assert rows[measure, "norm"]["promised"] < 1 and rows[measure, "norm"]["efficiency"] > 0
    counted = results["flops"]["flops"]["norm"]
    assert counted["training step, flops_per_token"] == pytest.approx(counted["training step, counted"], rel=0.01)
    assert counted["routers"] > 0 and counted["priors"] == 0
    assert [row["routing"] for row in results["scores"]["perplexity"]] == ["causal", "topk"]
    assert all(1 < row["perplexity"] < 1000 for row in results["scores"]["perplexity"])
    half, all_tokens = results["scores"]["capacity"][1:]
    assert half["selected"] == pytest.approx(0.5, abs=0.25) and all_tokens["selected"] == 1
    answers = json.loads((trained / "eval-causal.json").read_text())
    assert answers["results"]["words"]["acc,none"] in (0, 0.5, 1) and answers["n-samples"]["words"]["effective"] == 2
