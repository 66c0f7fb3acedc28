"""LoRA: what is frozen, what is written, and the same logits from our adapter, from peft's own and merged."""

# ruff: noqa: F401, F811 (the fixtures of test_train.py)

import json
import os
import re
import shutil
import sys

import pytest
import torch
from helpers import ARCHITECTURES, random_ids, relative_error, run_ranks, small_model
from test_train import SEQ_LEN, VOCAB, common, cut_back, data, metrics, own_signal_handlers, start, without_clock
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import kernels
import lora
import train
from errors import ConfigError, ModelError
from model import Transformer

PROJECTIONS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


def adapted(model, directory, seed=0):
    """`model` saved as a base, and with adapters whose B is no longer zero."""
    model.save_pretrained(directory)
    lora.inject(model, r=4, alpha=8, dropout=0.1, base=str(directory))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_loaded_and_merged_logits_are_equal(architecture, tmp_path):
    model, ids = small_model(architecture), random_ids(2, 40)
    before = {routing: model(ids, routing=routing).logits for routing in ("topk", "causal")}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted(model, tmp_path / "base")
    layer = model.model.layers[1].mlp.up_proj
    x = torch.randn(3, layer.in_features)
    expected = x @ (layer.base_layer.weight + 8 / 4 * layer.lora_B.default.weight @ layer.lora_A.default.weight).T
    assert relative_error(layer(x), expected) < 1e-5
    assert type(layer.base_layer) is kernels.Linear

    wrapped = {name.removesuffix(".base_layer") for name, m in model.named_modules() if name.endswith(".base_layer")}
    assert wrapped == {f"model.layers.{i}.{p}" for i in range(5) for p in PROJECTIONS}
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name or model.is_routed_part(name)), name

    model.save_pretrained(tmp_path / "adapter")
    files = {"config.json", "adapter_config.json", "adapter_model.safetensors"}
    assert set(os.listdir(tmp_path / "adapter")) == files | (
        {"routed.safetensors"} if architecture != "dense" else set()
    )
    loaded = Transformer.from_pretrained(tmp_path / "adapter")
    merged = Transformer.from_pretrained(tmp_path / "adapter")
    lora.merge(merged)
    checkpoint.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "at once")])
    merged.save_pretrained(tmp_path / "merged")
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "at once")]
    assert written[0] == written[1]
    merged = Transformer.from_pretrained(tmp_path / "merged")
    assert all(p.requires_grad for p in merged.parameters())
    assert set(merged.state_dict()) == set(weights)
    shutil.copytree(tmp_path / "adapter", tmp_path / "replaced")
    merged.save_pretrained(tmp_path / "replaced")
    assert not Transformer.from_pretrained(tmp_path / "replaced").lora_rank
    for routing, unadapted in before.items():
        logits = model(ids, routing=routing).logits
        assert torch.equal(loaded(ids, routing=routing).logits, logits)
        assert relative_error(merged(ids, routing=routing).logits, logits) < 1e-5
        assert relative_error(logits, unadapted) > 1e-2
    assert torch.equal(loaded.generate(ids, 6), merged.generate(ids, 6))
    base = Transformer.from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(base[name], weights[name]) for name in weights)


def test_peft_opens_the_adapter_on_transformers_qwen2(tmp_path):
    import peft
    import transformers

    model, ids = small_model("dense"), random_ids(2, 40)
    adapted(model, tmp_path / "base").save_pretrained(tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert relative_error(model(ids).logits, theirs(ids).logits) < 1e-5
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (4, 8, str(tmp_path / "base"))


def test_gradients(tmp_path):
    """Of adapters and routed parts only; the same with gradient checkpointing, and through torch.compile in one graph."""
    model, ids = adapted(small_model("dtf", num_hidden_layers=2), tmp_path), random_ids(2, 40)

    def gradients(trunk):
        model.zero_grad()
        hidden, notes = trunk(ids)
        (hidden.square().mean() + sum(model.collect(notes)[0].values())).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model.model)
    assert set(expected) == {n for n, p in model.named_parameters() if "lora_" in n or model.is_routed_part(n)}
    assert all(p.grad is None for n, p in model.named_parameters() if ".base_layer." in n or "layernorm" in n)
    assert model.head_weight.grad is None
    model.model.gradient_checkpointing = True
    again = gradients(model.model)
    model.model.gradient_checkpointing = False
    compiled = gradients(torch.compile(model.model, backend="aot_eager", fullgraph=True, dynamic=False))
    for other in (again, compiled):
        assert set(other) == set(expected)
        assert max(relative_error(other[name], grad) for name, grad in expected.items() if grad.any()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_lowered_base_computes_what_autocast_does(architecture, dtype, tmp_path):
    """To the bit, in half of the memory; what is saved is the same too."""
    model, ids = adapted(small_model(architecture), tmp_path / "base").train(), random_ids(2, 40)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0

    def step():
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            loss, causal = model(ids, ids).loss, model(ids, ids, routing="causal").losses["lm"]
        loss.backward()
        return [loss, causal] + [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, state = step(), {name: tensor.clone() for name, tensor in model.own_state().items()}
    before = sum(p.nbytes for p in model.parameters())
    lora.lower(model, dtype)
    frozen = [layer.base_layer for layer in model.modules() if hasattr(layer, "base_layer")]
    assert sum(p.nbytes for p in model.parameters()) == before - sum(
        p.nbytes for layer in frozen for p in layer.parameters()
    )
    now = step()
    assert len(now) == len(expected) > 10 and all(map(torch.equal, now, expected))
    assert state.keys() == model.own_state().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.own_state().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flops_equal_the_flop_counter(architecture, tmp_path):
    model, ids = adapted(small_model(architecture, vocab_size=96, num_hidden_layers=6), tmp_path), random_ids(2, 64)

    def training():
        hidden, notes = model.model(ids % 96)
        losses, _ = model.collect(notes)
        (torch.nn.functional.linear(hidden, model.head_weight).sum() + sum(losses.values())).backward()

    for run, train_step in ((training, True), (lambda: model(ids % 96), False)):
        if architecture == "stt" and not train_step:
            continue  # top-k routing includes the dense pass that inference never runs
        attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with attention, torch.set_grad_enabled(train_step), FlopCounterMode(display=False) as counter:
            run()
        measured = counter.get_total_flops() / ids.numel()
        assert measured == pytest.approx(model.flops_per_token(64, training=train_step), rel=0.01)


# -- in train.py ------------------------------------------------------------------------------------------------------


def arguments(data, start, architecture="dtf", **keys):
    """A LoRA run from the dense model; without dropout, whose noise differs from rank to rank, unless asked for."""
    keys = {"architecture": architecture, "init_from": start / "dense", "lora_r": 4, "lora_dropout": 0.0} | keys
    keys |= {"lr_lora": 3e-2, "causal_threshold": 0.5}
    return [*common(data), "--lora", *(f"--{key}={value}" for key, value in keys.items())]


@pytest.fixture(scope="module")
def run(data, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    train.main([*arguments(data, start), f"--out_dir={folder / 'dtf'}"])
    return folder / "dtf"


def test_a_run_writes_its_adapter_and_leaves_the_base(run, data, start, tmp_path, capsys):
    files = {"adapter_config.json", "adapter_model.safetensors", "routed.safetensors", "config.json", "tokenizer.json"}
    assert files <= set(os.listdir(run / "final_model")) and files <= set(os.listdir(run / "step_0000009"))
    assert not list(run.rglob("model*.safetensors"))
    lines = metrics(run)
    assert "lr/base" not in lines[-1] and lines[-1]["lr/lora"] > 0 and lines[-1]["lr/prior"] > 0
    assert lines[-1]["val/loss"] < lines[0]["val/loss"] - 0.1

    base = Transformer.from_pretrained(start / "dense").state_dict()
    final, ids = Transformer.from_pretrained(run / "final_model"), random_ids(2, SEQ_LEN, vocab=VOCAB)
    now = {name.replace(".base_layer", ""): t for name, t in final.state_dict().items()}
    assert all(torch.equal(t, now[name]) for name, t in base.items())
    untrained = [n for n, p in final.named_parameters() if "lora_B" in n and not p.any()]
    assert not untrained

    checkpoint.main(["merge", str(run / "final_model"), str(tmp_path / "merged")])
    merged = Transformer.from_pretrained(tmp_path / "merged")
    assert not merged.lora_rank and (tmp_path / "merged" / "tokenizer.json").exists()
    assert relative_error(merged(ids).logits, final(ids).logits) < 1e-5
    changed = {n.rsplit(".", 1)[0][15:] for n, t in base.items() if not torch.equal(t, merged.state_dict()[n])}
    assert changed == set(PROJECTIONS)

    # --lora_merge writes the same at once; the counts are said
    train.main([*arguments(data, start, max_steps=9), "--lora_merge", f"--out_dir={tmp_path / 'run'}"])
    at_once = Transformer.from_pretrained(tmp_path / "run" / "final_model")
    assert all(torch.equal(t, merged.state_dict()[n]) for n, t in at_once.state_dict().items())
    counts = [sum(p.numel() for n, p in final.named_parameters() if f in n) for f in ("", "lora_")]
    trained = sum(p.numel() for p in final.parameters() if p.requires_grad)
    err = capsys.readouterr().err
    assert f"{counts[0]:,} parameters, {trained:,} of them trained" in err
    assert re.search(rf"lora +{counts[1]:,} parameters, rate 0.03", err)


def test_adapters_beside_some_of_the_layers(data, start, tmp_path):
    """What is saved, in a step too, names the layers of the base that are left."""
    keys = [*arguments(data, start, architecture="dense", max_steps=5), "--keep_layers=0,2"]
    train.main([*keys, f"--out_dir={tmp_path / 'run'}"])
    model, ids = Transformer.from_pretrained(tmp_path / "run" / "final_model"), random_ids(2, SEQ_LEN, vocab=VOCAB)
    assert model.config.num_hidden_layers == 2 and model.lora_rank
    base = Transformer.from_pretrained(start / "dense", keep_layers=[0, 2])
    assert torch.equal(model.model.layers[1].mlp.up_proj.base_layer.weight, base.model.layers[1].mlp.up_proj.weight)
    checkpoint.main(["merge", str(tmp_path / "run" / "final_model"), str(tmp_path / "merged")])
    merged = Transformer.from_pretrained(tmp_path / "merged")
    assert relative_error(merged(ids).logits, model(ids).logits) < 1e-5
    assert relative_error(base(ids).logits, model(ids).logits) > 1e-3
    resumed = cut_back(tmp_path / "run", tmp_path / "resumed", 4)
    train.main([f"--resume={resumed}"])
    assert without_clock(resumed) == without_clock(tmp_path / "run")


def test_a_merged_model_has_the_capacity_that_was_reached(data, start, tmp_path):
    """Also where the run was complete, its model lost, and it is written anew; and the weights of its base as they were."""
    keys = ["--lora_merge", "--capacity_start=1.0", "--capacity_anneal_steps=4", f"--out_dir={tmp_path}"]
    train.main([*arguments(data, start, max_steps=5), *keys, "--dtype=bfloat16"])
    written = (tmp_path / "final_model" / "config.json").read_bytes()
    assert json.loads(written)["capacity"] == 0.5
    base, final = (Transformer.from_pretrained(path).state_dict() for path in (start / "dense", tmp_path))
    beside, name = Transformer.from_pretrained(tmp_path / "step_0000005"), "model.layers.1.mlp.up_proj"
    layer = beside.get_submodule(name)
    weight = base[f"{name}.weight"] + 32 / 4 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert relative_error(final[f"{name}.weight"], weight) < 1e-5  # products in bfloat16 have it at 2e-3
    shutil.rmtree(tmp_path / "final_model")
    train.main([f"--resume={tmp_path}"])
    assert (tmp_path / "final_model" / "config.json").read_bytes() == written


def test_resumed_is_undisturbed(data, start, tmp_path):
    """With dropout, from step 4 and step 8."""
    train.main([*arguments(data, start, "mod", lora_dropout=0.1), "--keep_last=5", f"--out_dir={tmp_path / 'whole'}"])
    for step in (4, 8):
        resumed = cut_back(tmp_path / "whole", tmp_path / f"resumed{step}", step)
        train.main([f"--resume={resumed}"])
        for path in (tmp_path / "whole" / "final_model").glob("*.safetensors"):
            assert (resumed / "final_model" / path.name).read_bytes() == path.read_bytes()
        assert without_clock(resumed) == without_clock(tmp_path / "whole")


def test_two_ranks_are_one(data, start, run, tmp_path):
    run_ranks(2, [*arguments(data, start), "--gradient_checkpointing", f"--out_dir={tmp_path / 'two'}"])
    for line, other in zip(metrics(run), metrics(tmp_path / "two"), strict=True):
        for name in {"train/loss", "val/loss", "val/loss_causal", "grad_norm"} & set(line):
            assert line[name] == pytest.approx(other[name], rel=1e-4)


def test_refusals(data, start, run, tmp_path, monkeypatch):
    def refused(error, match, argv):
        with pytest.raises(error, match=match):
            train.main(argv)

    given = [*arguments(data, start), f"--out_dir={tmp_path / 'run'}"]
    refused(ConfigError, "lora=True needs pretrained weights", [*given, "--init_from=scratch"])
    refused(ConfigError, "lora=True does not work with parallel=fsdp", [*given, "--parallel=fsdp"])
    refused(ConfigError, "lora_merge=True needs lora=True", [*common(data), "--lora_merge"])
    refused(
        ConfigError,
        r"lora_r=0 must be at least 1; lora_dropout=1.0 must lie in \[0, 1\)",
        [*given, "--lora_r=0", "--lora_dropout=1"],
    )
    refused(ConfigError, "is a LoRA adapter: merge it first", [*given, f"--init_from={run / 'final_model'}"])
    refused(ConfigError, "lora_r was 4 and is now 8", [f"--resume={run}", "--lora_r=8"])
    with pytest.raises(ConfigError, match="is a plain model already"):
        checkpoint.main(["merge", str(start / "dense"), str(tmp_path / "merged")])
    with pytest.raises(ModelError, match="cannot be sharded"):
        Transformer.from_pretrained(run / "final_model", shard=print)
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(ModelError, "pip install peft", given)
    monkeypatch.undo()

    def spoilt(match, spoil):
        folder = tmp_path / "spoilt"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run / "final_model", folder)
        shutil.copytree(start / "dense", folder / "base")
        said = json.loads((folder / "adapter_config.json").read_text())
        said["base_model_name_or_path"] = str(folder / "base")
        (folder / "adapter_config.json").write_text(json.dumps(said))
        Transformer.from_pretrained(folder)  # moved, it is the same base
        spoil(folder)
        with pytest.raises(ModelError, match=match):
            Transformer.from_pretrained(folder)

    spoilt("holds an adapter, not its base: .*neither a directory nor a hub id", lambda f: shutil.rmtree(f / "base"))
    spoilt("not those that this adapter was trained on", lambda f: small_base_change(f / "base"))
    spoilt("is an adapter too", lambda f: shutil.rmtree(f / "base") or shutil.copytree(run / "final_model", f / "base"))
    spoilt("routed.safetensors is missing", lambda f: (f / "routed.safetensors").unlink())
    spoilt("adapter_model.safetensors is damaged", lambda f: (f / "adapter_model.safetensors").write_bytes(b"1234"))
    spoilt("has no place in this model", lambda f: shutil.copy(f / "base/model.safetensors", f / "routed.safetensors"))
    spoilt("not one that this program wrote", lambda f: (f / "adapter_config.json").write_text('{"r": 4}'))


def small_base_change(directory):
    model = Transformer.from_pretrained(directory)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(directory)
