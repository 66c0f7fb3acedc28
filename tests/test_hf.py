"""A routed model's folder in transformers and lm-eval, in a process that cannot import the project."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROUTED, random_ids, relative_error, small_model
from test_bench import TEXT, VOCAB, task_folder  # noqa: F401 (a fixture)
from test_bench import run as run_bench

import lora
import publish
from architectures import ARCHITECTURES
from errors import ModelError
from model import ModelConfig, Transformer
from tokenizer import train_tokenizer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
FAMILIES = {
    "mod": {"model_type": "qwen2", "capacity": [0.4, 0.7]},
    "dtf": {"model_type": "llama", "tie_word_embeddings": False, "rope_scaling": LLAMA3, "rope_theta": 5e5},
    "stt": {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
}
END = 0  # what the tokenizer's <|endoftext|> is
NEW = 12


def folder_of(model, path, tokenizer: bytes):
    """`model` as an export holds it, with the tokenizer as prepare.py writes one."""
    model.save_pretrained(path)
    publish.write_code(path)
    (path / "tokenizer.json").write_bytes(tokenizer)
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": END, "pad_token_id": END}))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, task_folder):  # noqa: F811
    """{architecture: (our model, its folder, what the process was given, what it found)}"""
    made, tokenizer = {}, train_tokenizer([TEXT], VOCAB)
    lengths = torch.tensor([20, 1, 13])
    for architecture, family in FAMILIES.items():
        root = tmp_path_factory.mktemp(architecture)
        model = small_model(architecture, vocab_size=VOCAB, eos_token_id=[END], **family)
        torch.manual_seed(0)
        given = {"ids": random_ids(3, 20), "mask": (torch.arange(20) >= 20 - lengths[:, None]).long()}
        given |= {"texts": ["def top_k(", "x", "the mean of all tokens"]}
        given |= {"rows": torch.arange(12).repeat(24, 3).tolist()}
        torch.save(given, root / "given.pt")
        made[architecture] = model, folder_of(model, root / "a model-1.0", tokenizer), given
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env = kept | {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", Path(__file__).with_name("hf_outside.py"), task_folder]
    command += [folder for _, folder, _ in made.values()]
    how = {"cwd": root, "env": env, "text": True, "capture_output": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, check=False, **how)
    assert done.returncode == 0, done.stderr[-5000:]
    return {name: (*case, torch.load(case[1].parent / "found.pt")) for name, case in made.items()}


@pytest.fixture(params=ROUTED)
def run(request, runs):
    return runs[request.param]


@torch.no_grad()
def test_logits_are_those_of_our_causal_forward(run):
    model, folder, given, found = run
    ids, lengths = given["ids"], given["mask"].sum(1).tolist()
    assert torch.equal(found["logits"], model(ids, routing="causal").logits)
    assert not torch.equal(found["logits"], model(ids).logits)  # top-k, which is another function
    for side in ("left", "right"):
        for row, n in enumerate(lengths):
            part = slice(20 - n, 20) if side == "left" else slice(0, n)
            expected = model(ids[row : row + 1, part], routing="causal").logits[0]
            assert relative_error(found[side][row, part], expected) < 1e-5, (side, row)
    ours = Transformer.from_pretrained(folder).to_dtype(torch.bfloat16)
    assert torch.equal(found["bfloat16"], ours(ids, routing="causal").logits)
    assert found["float32"] == {name for name in model.state_dict() if model.is_router(name)}


def test_generates_what_we_generate(run):
    """Greedy from prompts padded on the left, and sampled; from a cache that holds the selected tokens only."""
    model, _, given, found = run
    ids, lengths = given["ids"], given["mask"].sum(1).tolist()
    packed = torch.stack([row.roll(n - 20) if n < 20 else row for row, n in zip(ids, lengths, strict=True)])
    ours = model.generate(packed, NEW, stop_ids=(END,), lengths=lengths, pad_id=END)
    theirs = found["greedy"]
    assert torch.equal(theirs[:, :20], ids)
    for row, n in enumerate(lengths):
        assert torch.equal(theirs[row, 20:], ours[row, n : n + theirs.size(1) - 20]), row
    for row, n in enumerate(lengths):
        filed = theirs[row : row + 1, 20 - n : -1]  # nothing has been predicted from the last one
        masks = model(filed, routing="causal", return_masks=True).masks
        held = [int(masks[i].sum()) if i in masks else filed.size(1) for i in range(5)]
        assert [layer[row] for layer in found["held"]] == held, row
    assert any(sum(held) < sum(found["held"][0]) for held in found["held"])
    for name, prompt in (("sampled", ids), ("three", ids[:1].expand(3, -1))):
        torch.manual_seed(1)
        assert torch.equal(found[name], model.generate(prompt, NEW, temperature=0.7, stop_ids=())), name


def test_a_pipeline_continues_texts(run):
    from tokenizers import Tokenizer

    model, folder, given, found = run
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert found["tokens"] == [tokenizer.encode(text).ids for text in given["texts"]]
    for text, continued in zip(given["texts"], found["texts"], strict=True):
        ids = tokenizer.encode(text).ids
        new = model.generate(torch.tensor([ids]), 8, stop_ids=(END,), pad_id=END)[0, len(ids) :]
        assert continued == tokenizer.decode(new.tolist()), text


def test_the_training_loss_is_ours(run):
    """All of it, routed by top-k, and so are its gradients; in evaluation the causal one."""
    model, _, given, found = run
    ids, right = given["ids"], given["mask"].flip(1)
    for name, kept in (("loss", None), ("padded loss", right)):
        labels = ids if kept is None else ids.masked_fill(kept == 0, -100)
        lengths = None if kept is None else kept.sum(1).tolist()
        model.train().zero_grad()
        out = model(ids, F.pad(labels[:, 1:], (0, 1), value=-100), lengths=lengths)
        assert len(out.losses) > 1 and not torch.isclose(out.loss, out.losses["lm"], rtol=1e-5)
        assert torch.allclose(found[name], out.loss, rtol=1e-5), name
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found[f"gradients, {name}"].keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert torch.allclose(found[f"gradients, {name}"][parameter], gradient, rtol=1e-3, atol=1e-5), parameter
    model.eval()
    with torch.no_grad():
        causal = model(ids, F.pad(ids[:, 1:], (0, 1), value=-100), routing="causal").loss
    assert torch.allclose(found["evaluation"], causal, rtol=1e-5)


@torch.no_grad()
def test_trainer_trains_and_what_it_saves_is_ours(run):
    model, folder, given, found = run
    assert len(found["losses"]) == 6 and found["losses"][-1] < 0.8 * found["losses"][0]
    trained = Transformer.from_pretrained(folder.parent / "trained")
    assert relative_error(trained(given["ids"], routing="causal").logits, found["trained"]) < 1e-6
    assert asdict(trained.config) == asdict(model.config)
    stored = {path.name for path in (folder.parent / "trained").iterdir()}
    assert {path.name for path in folder.glob("*.py")} | {"config.json", "model.safetensors"} <= stored


def test_lm_eval_scores_as_bench_does(run, task_folder, tmp_path, capsys):  # noqa: F811
    _, folder, _, found = run
    ours, _, _ = run_bench(capsys, f"--model_path={folder}", f"--tasks={task_folder}", f"--output_path={tmp_path}/r")
    compared = 0
    for task, metrics in found["scores"].items():
        for metric, value in metrics.items():
            if "stderr" not in metric:
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
                compared += 1
    assert compared >= 4


# ---------------------------------------------------------------------------------------------------------------------
# What lies in the folder


@pytest.mark.parametrize("architecture", ROUTED)
def test_the_copies_are_the_project_s_files_that_import_each_other(architecture):
    sources = publish.code_of(Path(inspect.getfile(ARCHITECTURES[architecture])))
    root, ours = Path(publish.__file__).parent, {path.stem for path in Path(publish.__file__).parent.glob("*.py")}
    for name, source in sources.items():
        relative = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert not ours & {alias.name.split(".")[0] for alias in node.names}, (name, node.lineno)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] not in ours, (name, node.lineno)
            elif isinstance(node, ast.ImportFrom) and node.module:
                relative.add(node.module)
        assert relative <= sources.keys()
        assert set(re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE)) == relative, name
        back = re.sub(r"from \.(\w+) import __name__ as _; from \. (import \1)", r"\2", source)
        assert re.sub(r"from \.(\w+) import", r"from \1 import", back) == (root / f"{name}.py").read_text()
    assert {"hf", "model", "architectures", "blocks", "routers"} <= sources.keys()
    assert not {"publish", "checkpoint", "train"} & sources.keys()


@torch.no_grad()
def test_our_loader_runs_no_code_and_knows_folders_of_before(tmp_path):
    model, ids = small_model("dtf", model_type="qwen3", head_dim=10, eos_token_id=[END]), random_ids(2, 30)
    folder = folder_of(model, tmp_path / "m", b"{}")
    (folder / "hf.py").write_text("raise SystemExit('it ran')")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["family"], config["architecture"]) == ("nanodtf", "qwen3", "dtf")
    assert config["auto_map"]["AutoModelForCausalLM"] == "hf.NanoDTFForCausalLM"
    opened = Transformer.from_pretrained(folder)
    assert asdict(opened.config) == asdict(model.config) and opened.config.model_type == "qwen3"
    assert torch.equal(opened(ids, routing="causal").logits, model(ids, routing="causal").logits)
    before = config | {"model_type": "qwen3", "architectures": ["DtfForCausalLM"]}
    del before["family"], before["auto_map"]
    (folder / "config.json").write_text(json.dumps(before))
    assert asdict(Transformer.from_pretrained(folder).config) == asdict(model.config)
    (folder / "config.json").write_text(json.dumps(config | {"family": "gpt2"}))
    with pytest.raises(ModelError, match="model_type='gpt2' is not supported"):
        Transformer.from_pretrained(folder)


def test_dense_models_and_adapters_hold_no_code(tmp_path):
    for name, architecture in (("dense", "dense"), ("lora", "mod")):
        small_model("dense").save_pretrained(tmp_path / name)
        if name == "lora":
            base = Transformer.from_pretrained(tmp_path / "dense", architecture=architecture)
            lora.inject(base, r=2, alpha=4, dropout=0.0, base=str(tmp_path / "dense"))
            base.save_pretrained(tmp_path / name)
        publish.write_code(tmp_path / name)
        assert not list((tmp_path / name).glob("*.py")), name
        assert "auto_map" not in (tmp_path / name / "config.json").read_text()
    assert ModelConfig().to_dict()["model_type"] == "qwen2" and "family" not in ModelConfig().to_dict()
