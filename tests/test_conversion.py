"""A pretrained model becomes a routed one: blocks that are dropped, and blocks that are chosen by what their removal costs."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import random_ids, relative_error, small_model
from test_train import common, data, metrics, own_signal_handlers, start  # noqa: F401

import routers
import train
from conversion import allot, choose_layers, fit_routers, removal_costs
from errors import ConfigError, ModelError
from model import ModelConfig, Transformer


def test_dropped_blocks_are_gone_and_the_others_keep_their_order(tmp_path):
    model, ids = small_model("dense"), random_ids(2, 30)
    model.save_pretrained(tmp_path)
    kept = Transformer.from_pretrained(tmp_path, keep_layers=[0, 2, 3])
    assert kept.config.num_hidden_layers == 3 and kept.initialized == []
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in (0, 2, 3))
    with torch.no_grad():
        assert relative_error(kept(ids).logits, model(ids).logits) <= 1e-6
    routed = Transformer.from_pretrained(tmp_path, keep_layers=[0, 2, 3], architecture="mod")
    assert routed.config.routed_layers == [1]
    for bad in ([2, 0], [0, 5], [-1, 2]):
        with pytest.raises(ModelError, match="must ascend, from 0 to 4"):
            Transformer.from_pretrained(tmp_path, keep_layers=bad)


def test_removal_costs_are_what_the_loss_loses():
    model, ids, targets = small_model("dense", num_hidden_layers=3), random_ids(2, 20), random_ids(2, 20)
    costs = removal_costs(model, ids, targets)
    with torch.no_grad():
        whole = model(ids, targets).losses["lm"].item()
        layers = model.model.layers
        model.model.layers = torch.nn.ModuleList([layers[0], layers[2]])
        without = model(ids, targets).losses["lm"].item()
    assert costs[1] == pytest.approx(without - whole, rel=1e-4, abs=1e-6) and len(costs) == 3


def test_the_cheapest_blocks_are_chosen_and_stand_apart_where_they_must():
    costs = [7.5, 3.4, 0.2, 0.1, 0.3, 0.15, 2.5]
    mod, dtf = (ModelConfig(architecture=name) for name in ("mod", "dtf"))
    assert choose_layers(costs, 3 / 7, mod) == [2, 3, 5]
    assert choose_layers(costs, 3 / 7, dtf) == [1, 3, 5]
    with pytest.raises(ConfigError, match="routed_share=0.9 of 7 blocks is more than dtf can route"):
        choose_layers(costs, 0.9, dtf)


@pytest.mark.parametrize("part", ["block", "mlp"])
def test_fitted_routers_foretell_what_skipping_changes(part):
    """Against lstsq on what each token's update moves the log-probability of a drawn text by, from one backward pass a block."""
    model = small_model("dense", hidden_size=16, num_attention_heads=2, max_position_embeddings=400)
    ids = random_ids(3, 400)
    config = ModelConfig(**{**vars(model.config), "architecture": "mod", "routed_layers": [1, 3], "routed_part": part})
    torch.manual_seed(1)
    lines = fit_routers(model, config, ids)
    torch.manual_seed(1)
    with torch.no_grad():  # two rows at a time: 1,024 tokens
        drawn = [torch.multinomial(model(rows).logits.softmax(-1).flatten(0, 1), 1) for rows in (ids[:2], ids[2:])]
    drawn = torch.cat(drawn).view_as(ids)
    for i in (1, 3):
        seen = {}
        layer = model.model.layers[i]

        def moved(_, given, out, seen=seen):
            seen["x"], seen["update"] = given[0].detach(), torch.zeros_like(given[0], requires_grad=True)
            return out[0] + seen["update"], out[1]

        hook = layer.register_forward_hook(moved)
        attended = layer.self_attn.register_forward_hook(lambda _, given, out, seen=seen: seen.update(attended=out))
        logits = model(ids).logits
        said = logits.log_softmax(-1).gather(-1, drawn[..., None]).sum()
        (slope,) = torch.autograd.grad(said, seen["update"])
        hook.remove()
        attended.remove()
        with torch.no_grad():
            attention = seen["attended"]
            mlp = layer.mlp(layer.post_attention_layernorm(seen["x"] + attention))
            read, update = (seen["x"] + attention, mlp) if part == "mlp" else (seen["x"], attention + mlp)
            y = torch.log1p((slope * update).sum(-1).abs()).flatten().double()
            a = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + config.rms_norm_eps)
            a = F.pad(a.flatten(0, 1), (0, 1), value=1.0).double()
            ridge = (0.1 * len(a)) ** 0.5 * torch.eye(17, dtype=torch.float64)
            ridge[16] = 0
            expected = torch.linalg.lstsq(torch.cat((a, ridge)), torch.cat((y, torch.zeros(17)))[:, None]).solution
        assert relative_error(lines[f"model.layers.{i}.router.weight"], expected[:16].T) <= 1e-3
        assert relative_error(lines[f"model.layers.{i}.router.bias"], expected[16]) <= 1e-3


def test_a_capacity_is_allotted_by_one_border():
    """The γ highest scores of all routed blocks together fall into each as often as γ^p of its tokens."""
    model, ids = small_model("mod", router="fitted", capacity=0.3, num_hidden_layers=7), random_ids(4, 50)
    for layer, bias in zip(model.routed, (-0.3, 0.1, 0.0), strict=True):
        layer.router.bias.fill_(bias)
    powers = allot(model, ids)
    scores = torch.stack([model(ids, return_masks=True).tokens[i]["score"].flatten() for i in (1, 3, 5)])  # (3, 200)
    border = scores.flatten().sort(descending=True).values[179]  # 0.3 · 600 tokens
    shares = (scores >= border).double().mean(1).tolist()
    assert [0.3**power for power in powers] == pytest.approx(shares, abs=1e-6) and sum(shares) == pytest.approx(0.9)
    assert shares[0] < shares[2] < shares[1]
    model.config.allotment = powers
    model.set_capacity(0.3)
    masks = model(ids, return_masks=True).masks
    assert [mask.sum(1).tolist() for mask in masks.values()] == [
        [routers.capacity_k(each, 50)] * 4 for each in model.config.capacities
    ]
    assert model.config.capacities_at(1.0) == [1.0, 1.0, 1.0]
    assert model.config.capacities_at([0.5, 0.2, 1.0]) == [0.5, 0.2, 1.0]
    assert model.flops_per_token(50) == model.flops_per_token(50, capacity=model.config.capacities)
    with pytest.raises(ModelError, match="allotment has 2 values for the routed layers"):
        ModelConfig(**{**vars(model.config), "allotment": powers[:2]})


def test_a_conversion_fits_its_routers_once_and_leaves_them(data, start, tmp_path):  # noqa: F811
    keys = [
        *common(data),
        "--architecture=mod",
        "--router=fitted",
        "--causal_decision=threshold",
        "--capacity=0.25",
        f"--out_dir={tmp_path}",
    ]
    train.main([*keys, f"--init_from={start / 'dense'}", "--max_steps=1"])
    first = Transformer.from_pretrained(tmp_path / "final_model").state_dict()
    train.main([*keys, "--resume=auto", "--max_steps=4"])
    last = Transformer.from_pretrained(tmp_path / "final_model").state_dict()
    config = json.loads((tmp_path / "final_model" / "config.json").read_text())
    assert config["capacity"] == 0.25 and len(config["allotment"]) == len(config["routed_layers"])
    fixed = {name for name in last if name.endswith(("router.weight", "router.bias")) and "causal" not in name}
    assert {name for name in last if torch.equal(first[name], last[name])} == fixed and fixed
    with pytest.raises(ConfigError, match="fitted to a parent when train.py converts one: set init_from"):
        train.main([*keys, "--resume=none", f"--out_dir={tmp_path / 'x'}", "--init_from=scratch"])


def test_a_conversion_that_cannot_be_trained_is_refused_before_anything_is_measured(data, start, tmp_path):  # noqa: F811
    small_model("dense", vocab_size=40).save_pretrained(tmp_path / "few")
    keys = [*common(data), f"--init_from={tmp_path / 'few'}", f"--out_dir={tmp_path / 'x'}", "--max_steps=4"]
    for key in ("--router=fitted", "--routed_layers=auto"):
        with pytest.raises(ConfigError, match="has token ids up to 63, the model vocab_size=40"):
            train.main([*keys, "--architecture=mod", key])


def test_training_chooses_writes_and_keeps_its_choice(data, start, tmp_path, capsys):  # noqa: F811
    keys = [*common(data), f"--init_from={start / 'dense'}", "--routed_layers=auto", f"--out_dir={tmp_path}"]
    train.main([*keys, "--architecture=mod", "--routed_share=0.25", "--max_steps=4"])
    assert "loss without each block: 0 " in capsys.readouterr().err
    config = json.loads((tmp_path / "final_model" / "config.json").read_text())
    assert len(config["routed_layers"]) == 1
    train.main([*keys, "--architecture=mod", "--routed_share=0.25", "--resume=auto", "--max_steps=5"])
    assert metrics(tmp_path)[-1]["step"] == 5
    with pytest.raises(
        ModelError, match="routed_layers='auto' is chosen when train.py converts a model: set init_from"
    ):
        ModelConfig(architecture="mod", routed_layers="auto")
    with pytest.raises(ConfigError, match="routed_layers='auto' needs a dense parent"):
        train.main(
            [*common(data), f"--init_from={start / 'mod'}", "--routed_layers=auto", f"--out_dir={tmp_path / 'x'}"]
        )
