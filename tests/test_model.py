"""The model against transformers' Qwen2, the golden files, closed forms and brute force."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import measure_loading
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ARCHITECTURES,
    ROUTED,
    SMALL,
    golden_model,
    needs_compiler,
    random_ids,
    relative_error,
    set_thresholds,
    small_model,
)
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels
from blocks import Predictor
from errors import ModelError
from generation import sample
from model import SIZES, ModelConfig, Transformer

# ---------------------------------------------------------------------------------------------------------------------
# Forward pass


def qwen2(config: ModelConfig, seed: int = 0):
    """transformers' own model of the same shape, with weights large enough to tell mistakes from noise."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    theirs = Qwen2ForCausalLM(Qwen2Config(**config.to_dict(), attn_implementation="sdpa")).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return theirs


@pytest.mark.parametrize("T", [1, 33, 512])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [(4, 2, 5), (4, 1, 2), (2, 2, 3)], ids=lambda s: "heads{}kv{}layers{}".format(*s))
def test_dense_logits_equal_transformers(T, tied, shape):
    heads, kv, layers = shape
    config = ModelConfig(
        **SMALL
        | {"num_attention_heads": heads, "num_key_value_heads": kv, "num_hidden_layers": layers}
        | {"tie_word_embeddings": tied, "max_position_embeddings": 512, "rope_theta": 1e6}
    )
    theirs, ours = qwen2(config), Transformer(config)
    weights = {name: w for name, w in theirs.state_dict().items() if not (tied and name == "lm_head.weight")}
    ours.load_state_dict(weights)
    ids = random_ids(2, T)
    with torch.no_grad():
        assert relative_error(ours(ids).logits, theirs(ids).logits) <= 1e-5


def test_bfloat16_is_as_accurate_as_transformers():
    config = ModelConfig(**SMALL)
    theirs, ours = qwen2(config), Transformer(config)
    ours.load_state_dict({n: w for n, w in theirs.state_dict().items() if n != "lm_head.weight"})
    ids = random_ids(8, 100)
    with torch.no_grad():
        exact = theirs(ids).logits
        their_error, our_error = (
            (model.bfloat16()(ids).logits.float() - exact).square().mean().sqrt() for model in (theirs, ours)
        )
    assert our_error <= 1.1 * their_error


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_golden_files_are_reproduced(architecture, device):
    model, golden = golden_model(architecture)
    ids = torch.tensor(golden["input_ids"])[None]
    for routing in ("topk", "causal"):
        if f"{routing}.logits" not in golden.files:
            continue
        with torch.no_grad():
            out = model(ids, routing=routing, return_masks=True)
        assert relative_error(out.logits[0], torch.tensor(golden[f"{routing}.logits"])) <= 1e-4
        assert list(out.masks) == model.config.routed_layers
        for layer, mask in out.masks.items():
            assert mask[0].tolist() == golden[f"{routing}.layers.{layer}.mask"].tolist()
            for ours, name in (("score", "score"), ("S_CE", "s_ce"), ("S_CU", "s_cu")):
                if ours in out.tokens[layer] and f"{routing}.layers.{layer}.{name}" in golden.files:
                    expected = torch.tensor(golden[f"{routing}.layers.{layer}.{name}"])
                    assert relative_error(out.tokens[layer][ours][0], expected) <= 1e-4


@pytest.mark.skipif(not os.environ.get("COMPILE"), reason="COMPILE=1: a quarter of a minute each on two cores")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_golden_files_are_reproduced_by_the_compiler(architecture, dtype, tolerance, device):
    model, golden = golden_model(architecture)
    torch._dynamo.reset()
    model.to(dtype).compile_trunk()
    with torch.no_grad():
        out = model(torch.tensor(golden["input_ids"])[None], return_masks=True)
    assert relative_error(out.logits[0], torch.tensor(golden["topk.logits"])) <= tolerance
    for layer, mask in out.masks.items():
        assert mask[0].tolist() == golden[f"topk.layers.{layer}.mask"].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_takes_the_flash_kernel(architecture, device, monkeypatch):
    """In training, prefill and steps, dense and packed lengths, grouped keys not expanded: no other kernel is allowed."""
    model, ids = small_model(architecture).train(), random_ids(2, 61)
    attention, seen = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: seen.append(a[1].shape) or attention(*a, **k)
    )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.autocast(device, dtype=torch.bfloat16):
            model(ids, ids).loss.backward()
        assert set(seen) == {(2, 2, length, 8) for length in ([61] if architecture == "dense" else [61, 30])}
        model.to_dtype(torch.bfloat16).eval().generate(ids[:1], 5)
    with pytest.raises(RuntimeError, match="No available kernel"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attention(*torch.randn(3, 1, 2, 8, 8).double().requires_grad_(), dropout_p=0.5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_autocast_stays_close_to_float32(architecture):
    """At capacity 1, so that no selection can differ where two scores are closer than bfloat16 tells apart."""
    model, ids = small_model(architecture, capacity=1.0), random_ids(2, 60)
    with torch.no_grad():
        exact = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids).logits.float()
    assert 0 < (logits - exact).abs().mean() / exact.abs().mean() <= 0.03


@pytest.mark.parametrize("architecture", ROUTED)
def test_converted_at_capacity_one_with_straight_through_gates_equals_dense(architecture):
    dense = small_model("dense")
    routed = small_model(architecture, seed=1, capacity=1.0, gate="straight_through")
    routed.load_state_dict(dense.state_dict(), strict=False)
    ids = random_ids(3, 50)
    for training in (False, True):  # with and without the gradient of the gates
        dense.train(training), routed.train(training)
        assert relative_error(routed(ids).logits, dense(ids).logits) <= 1e-5


@pytest.mark.parametrize("architecture", ROUTED)
def test_gates_scale_the_update_only(architecture):
    """mod's linear gate and a soft gate: y − x of the routed layer is the gate times the straight-through update."""
    model = small_model(architecture, gate="soft", num_hidden_layers=2)
    ids = random_ids(1, 20)
    seen = {}
    hook = model.model.layers[1].register_forward_hook(
        lambda layer, inputs, output: seen.update(x=inputs[0], y=output[0], notes=output[1])
    )
    for gate in ("soft", "straight_through"):
        model.model.layers[1].gate = gate
        model(ids)
        seen[gate] = seen["y"] - seen["x"]
    hook.remove()
    score, mask = seen["notes"].tokens["score"], seen["notes"].decision.mask
    gate = torch.sigmoid(score) if architecture == "mod" else score
    torch.testing.assert_close(seen["soft"], seen["straight_through"] * gate[..., None], rtol=1e-4, atol=1e-5)
    assert seen["straight_through"][~mask].abs().max() == 0


def test_mod_linear_gate():
    linear, sigmoid = (small_model("mod", mod_gate=gate) for gate in ("linear", "sigmoid"))
    ids = random_ids(2, 30)
    assert relative_error(linear(ids).logits, sigmoid(ids).logits) > 1e-2


def test_stt_dense_output_is_the_dense_model():
    dense, stt = small_model("dense"), small_model("stt", seed=1, stt_output="dense")
    stt.load_state_dict(dense.state_dict(), strict=False)
    ids = random_ids(2, 40)
    out = stt(ids, return_masks=True)
    assert relative_error(out.logits, dense(ids).logits) <= 1e-5
    assert out.masks[1].sum(1).tolist() == [20, 20] and out.losses["causal"] > 0


def test_capacity_per_layer_and_its_change():
    model = small_model("mod", capacity=[0.25, 0.75])
    ids = random_ids(2, 40)
    assert [int(m.sum()) for m in model(ids, return_masks=True).masks.values()] == [20, 60]
    model.set_capacity(0.5)
    assert [int(m.sum()) for m in model(ids, return_masks=True).masks.values()] == [40, 40]
    with pytest.raises(ModelError, match="capacity"):
        model.set_capacity(1.5)


# ---------------------------------------------------------------------------------------------------------------------
# Causality, independence of rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("decision", ["router", "threshold"])
def test_causal_routing_never_looks_ahead(architecture, decision):
    if architecture == "stt" and decision == "threshold":
        pytest.skip("refused by ModelConfig")
    model = small_model(architecture, causal_decision=decision)
    if decision == "threshold":
        set_thresholds(model)
    ids = random_ids(2, 40)
    other = torch.cat((ids[:, :23], random_ids(2, 17)), dim=1)
    with torch.no_grad():
        a, b = (model(x, routing="causal", return_masks=True) for x in (ids, other))
    assert relative_error(b.logits[:, :23], a.logits[:, :23]) <= 1e-5
    assert relative_error(b.logits[:, 23:], a.logits[:, 23:]) > 1e-2
    for layer, mask in a.masks.items():
        assert (mask[:, :23] == b.masks[layer][:, :23]).all()
    if a.masks:
        assert 0.05 < torch.stack(list(a.masks.values())).float().mean() < 0.95


@pytest.mark.parametrize("routing", ["topk", "causal"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_independent(architecture, routing):
    model = small_model(architecture)
    ids = random_ids(3, 40)
    other = ids.clone()
    other[1] = random_ids(40)
    with torch.no_grad():
        a, b = (model(x, routing=routing).logits for x in (ids, other))
    assert relative_error(b[[0, 2]], a[[0, 2]]) <= 1e-5


@pytest.mark.parametrize("routing", ["topk", "causal"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_nothing(architecture, routing):
    """Right-padded rows with `lengths` equal each row alone, under top-k too."""
    model = small_model(architecture)
    ids, lengths = random_ids(4, 30), [30, 1, 13, 22]
    with torch.no_grad():
        padded = model(ids, routing=routing, lengths=lengths, return_masks=True)
        for row, n in enumerate(lengths):
            alone = model(ids[row : row + 1, :n], routing=routing, return_masks=True)
            assert relative_error(padded.logits[row, :n], alone.logits[0]) <= 1e-5
            for layer, mask in alone.masks.items():
                assert padded.masks[layer][row].tolist() == mask[0].tolist() + [False] * (30 - n)


@pytest.mark.parametrize("architecture", ROUTED)
def test_padding_counts_in_no_loss_and_no_statistic(architecture):
    """As transformers' Trainer pads: losses, gradients and the average k-th score are those of the row alone."""
    options = {} if architecture == "stt" else {"causal_decision": "threshold"}
    ids, targets, results = random_ids(1, 20), random_ids(1, 20), []
    for width in (20, 40):
        model = small_model(architecture, **options).train()
        given = F.pad(ids, (0, width - 20), value=5), F.pad(targets, (0, width - 20), value=-100)
        out = model(*given, lengths=[20])
        grads = torch.autograd.grad(out.loss, model.parameters(), allow_unused=True)
        results.append((out.losses | out.stats, [grad for grad in grads if grad is not None]))
    (alone, of_alone), (padded, of_padded) = results
    assert alone.keys() == padded.keys() and len(of_alone) == len(of_padded)
    for name, value in alone.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for one, other in zip(of_alone, of_padded, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5 * one.abs().max().item() + 1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("decision", ["router", "threshold"])
def test_generate_equals_the_uncached_causal_forward(architecture, decision, device):
    """Greedy tokens and step logits of ragged batches of 1 to 5 rows, against each row alone without a cache."""
    if architecture == "stt" and decision == "threshold":
        pytest.skip("refused by ModelConfig")
    for seed in range(4):
        model = small_model(architecture, seed, causal_decision=decision)
        if decision == "threshold":
            set_thresholds(model)
        rows = [1, 2, 3, 5][seed]
        lengths = torch.randint(1, 24, (rows,)).tolist()
        ids, new = random_ids(rows, max(lengths)), 18
        result = model.generate(ids, new, lengths=lengths)
        assert result.shape == (rows, max(lengths) + new)
        cache = model.new_cache(rows, max(lengths) + new)
        with torch.no_grad():
            steps = [model(ids, routing="causal", lengths=lengths, cache=cache).logits[:, -1]]
            for step in range(new - 1):
                last = torch.stack([result[r, n + step] for r, n in enumerate(lengths)])
                steps.append(model(last[:, None], routing="causal", cache=cache).logits[:, -1])
            for r, n in enumerate(lengths):
                alone = model(result[r : r + 1, : n + new], routing="causal").logits[0, n - 1 : -1]  # (new, V)
                assert result[r, n : n + new].tolist() == alone.argmax(-1).tolist()
                assert relative_error(torch.stack([s[r] for s in steps]), alone) <= 1e-4
                assert (result[r, n + new :] == 0).all()


@pytest.mark.parametrize("decision", ["router", "threshold"])
@pytest.mark.parametrize("architecture", ROUTED)
def test_decoding_in_bfloat16_routes_as_in_float32(architecture, decision, device):
    """Its first routed layer reads the same hidden states but for rounding; routers and thresholds are not rounded."""
    if architecture == "stt" and decision == "threshold":
        pytest.skip("no such decision")
    model = small_model(architecture, causal_decision=decision)
    for layer in model.routed:
        if decision == "threshold":
            layer.threshold.fill_(0.7512345)
    low = small_model(architecture, causal_decision=decision)
    low.load_state_dict(model.state_dict())
    low.to_dtype(torch.bfloat16)
    assert low.head_weight.dtype == low.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
    for name, tensor in low.state_dict().items():
        if "router." in name or name.endswith("threshold"):
            assert torch.equal(tensor, model.state_dict()[name])
    ids = random_ids(3, 30)
    for rows in (ids[:1], ids):  # one row: all of them or none
        assert low.generate(rows, 12, lengths=[30, 11, 25][: len(rows)]).shape == (len(rows), 42)
        cache = low.new_cache(len(rows), 30)
        with torch.no_grad():
            steps = [low(rows[:, :20], routing="causal", cache=cache)]
            steps += [low(rows[:, t : t + 1], routing="causal", cache=cache) for t in range(20, 30)]
            whole = low(rows, routing="causal").logits[:, 19:].float()
        assert steps[-1].logits.dtype == torch.bfloat16
        assert relative_error(torch.cat([step.logits for step in steps], 1).float(), whole) < 0.1


@pytest.mark.parametrize("rows", [1, 2, 5])  # the last: masked, nothing is asked
@pytest.mark.parametrize("decision", ["router", "threshold"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_compiled_step_equals_the_uncached_causal_forward(architecture, decision, rows, device):
    """One graph, in static shapes. Random tokens behind ragged prompts, against each row alone without a cache."""
    if architecture in ("dense", "stt") and decision == "threshold":
        pytest.skip("dense decides nothing, and stt's score looks at the update")
    model = small_model(architecture, rows, causal_decision=decision, num_hidden_layers=4)
    if decision == "threshold":
        set_thresholds(model)
    ids, lengths = random_ids(rows, 40), [20, 3, 11, 1, 17][:rows]
    torch._dynamo.reset()
    backend = "inductor" if os.environ.get("COMPILE") else "eager"
    compiled_step = torch.compile(Transformer.step, fullgraph=True, backend=backend)
    for _ in range(2):  # the second time in the tensors of the first
        cache, logits = model.new_cache(rows, 40), []
        with torch.no_grad():
            model(ids[:, :20], routing="causal", lengths=lengths, cache=cache)
            cache = model.static_cache(cache)
            for step in range(20):
                last = torch.stack([row[n + step] for row, n in zip(ids, lengths, strict=True)])
                logits.append(compiled_step(model, last[:, None], cache))
            for r, n in enumerate(lengths):
                out = model(ids[r : r + 1, : n + 20], routing="causal", return_masks=True)
                assert relative_error(torch.stack([at[r] for at in logits]), out.logits[0, n:]) <= 1e-4
                for i, mask in out.masks.items():
                    held = mask.sum() if model.config.compact_cache else n + 20
                    assert cache.layers[i].lengths[r] == held
    assert cache.lengths.tolist() == [n + 20 for n in lengths]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch.cond could not write into a cache")
@pytest.mark.parametrize("architecture", ROUTED)
def test_a_compiled_step_that_selects_no_row_leaves_the_block_alone(architecture, device):
    model = small_model(architecture, num_hidden_layers=4)
    for layer in model.routed:
        layer.causal_router.bias.data.fill_(-1e4)
    torch._dynamo.reset()
    with torch.no_grad():
        caches = []
        for rows in (2, 9):  # of nine, half of them on average, one is taken for granted: their keys are written
            cache = model.new_cache(rows, 20)
            model(random_ids(rows, 8), routing="causal", cache=cache)
            caches.append(model.static_cache(cache))
            compiled_step = torch.compile(Transformer.step, fullgraph=True, backend="eager")
            compiled_step(model, random_ids(rows, 1), caches[-1])
    for i in (1, 3):
        assert caches[0].layers[i].k.count_nonzero() == 0 < caches[1].layers[i].k.count_nonzero()
        assert caches[0].layers[i].lengths.tolist() == [0, 0] and caches[1].layers[i].lengths.tolist() == [0] * 9


@pytest.mark.parametrize(
    "architecture, options",
    [("mod", {}), ("dtf", {}), ("stt", {"routed_part": "mlp"}), ("mod", {"kv": "all", "skip": "predict"})],
)
def test_steps_whose_products_skip_idle_rows_are_the_same(architecture, options, gpu_kernels, monkeypatch):
    """As on CUDA, without it in Triton's interpreter, in one graph. No row ever enters the first routed block."""
    model = small_model(architecture, num_hidden_layers=4, **options)
    ids = random_ids(5, 9)  # of five rows, one is taken to run: none asks
    model.routed[0].causal_router.bias.data.fill_(-1e4)
    results, asked, product = [], [], gpu_kernels.product_where
    monkeypatch.setattr(gpu_kernels, "product_where", lambda *a: asked.append(a[1].tolist()) or product(*a))
    torch._dynamo.reset()
    compiled_step = torch.compile(Transformer.step, fullgraph=True, backend="eager")
    for skips, step in (False, Transformer.step), (True, compiled_step):
        monkeypatch.setattr(kernels, "skips_idle", lambda x, skips=skips: skips)
        cache = model.new_cache(5, 9)
        with torch.no_grad():
            model(ids[:, :6], routing="causal", lengths=[6, 4, 6, 1, 5], cache=cache)
            static = model.static_cache(cache)
            results.append(torch.stack([step(model, ids[:, t : t + 1], static) for t in range(6, 9)]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert asked.count([False] * 5) >= len(asked) // 2 and any(map(any, asked))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_by_packed_weights_is_the_same(architecture, monkeypatch):
    """For 31 tokens nothing is packed yet."""
    monkeypatch.setattr(kernels, "PACKS", {torch.float32})
    monkeypatch.setattr(kernels, "LARGE_WEIGHT", 0)
    held, pack = [], kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda weights: held.append(len(weights)) or pack(weights))
    model, ids, lengths = small_model(architecture), random_ids(3, 9), [9, 2, 5]
    expected = model.generate(ids, 31, lengths=lengths)
    assert not held
    for row, as_expected, n in zip(model.generate(ids, 32, lengths=lengths), expected, lengths, strict=True):
        assert torch.equal(row[: n + 31], as_expected[: n + 31])
    assert held[0] >= 7 * model.config.num_hidden_layers + 1 and not kernels._PACKED


@pytest.mark.parametrize("layers", [[0, 2], [0, 1, 2]])
def test_a_first_block_that_has_selected_nothing_has_no_keys_to_copy(layers):
    """Nor has a model in which all blocks are routed, until one selects a token."""
    model, ids = small_model("mod", num_hidden_layers=3, routed_layers=layers), random_ids(2, 9)
    for layer in model.routed:
        layer.causal_router.bias.data.fill_(-1e4)
    cache = model.new_cache(2, 9)
    with torch.no_grad():
        model(ids[:, :6], routing="causal", cache=cache)
        assert (cache.keys is None) == (len(layers) == 3)
        model.routed[-1].causal_router.bias.data.fill_(1e4)
        steps = [model(ids[:, t : t + 1], routing="causal", cache=cache).logits[:, -1] for t in (6, 7)]
        static = model.static_cache(cache)
        steps.append(model.step(ids[:, 8:], static))
        model.routed[-1].causal_router.bias.data.fill_(-1e4)
        first = model(ids[:, :6], routing="causal").logits[:, -1]
    assert static.lengths.tolist() == [9, 9] and torch.isfinite(torch.stack([first, *steps])).all()


@needs_compiler
def test_compiled_generation_is_the_eager_one(device):
    """By the real compiler: ragged rows, stop ids, one of them a first token, wider caches and the first again."""
    model = small_model("dtf", num_hidden_layers=3, max_position_embeddings=512)
    ids, lengths = random_ids(3, 9), [9, 4, 6]
    free = model.generate(ids, 30, lengths=lengths)
    stops = [[int(free[1, 4 + 5])], [int(free[0, 9])]]
    calls = [{"stop_ids": stop, "pad_id": 96, "lengths": lengths} for stop in stops]
    calls += [{}, {"max_new_tokens": 300}, {"max_new_tokens": 1}, calls[0]]
    calls = [{"input_ids": ids, "max_new_tokens": 30} | call for call in calls]
    expected = [model.generate(**call) for call in calls]
    model.compile_decoding()
    for call, result in zip(calls, expected, strict=True):
        assert torch.equal(model.generate(**call), result)
    assert model.static.key[:3] == (3, 256, 256)


@pytest.mark.parametrize("what", ["compile_trunk", "compile_decoding"])
def test_compiling_without_a_compiler_is_refused(what, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match="needs a C.. compiler, and no-such-compiler is not there: install it"):
        getattr(small_model("mod"), what)()


def test_compiled_generation_survives_what_models_go_through(monkeypatch, device):
    """Copies with weights of their own, weights that were NaN, inference mode first, another type of the weights."""
    monkeypatch.setattr(
        "generation.compiled_step", lambda cuda: torch.compile(Transformer.step, fullgraph=True, backend="eager")
    )
    model, ids = small_model("dtf", num_hidden_layers=3), random_ids(2, 9)
    model.decodes_compiled = True
    with torch.inference_mode():
        model.generate(ids, 30)
    good = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.generate(ids, 30)
    model.load_state_dict(good)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    results = [one.generate(ids, 30) for one in (model, other)]
    for one, result in zip((model, other), results, strict=True):
        one.decodes_compiled = False
        assert torch.equal(one.generate(ids, 30), result)
    assert not torch.equal(*results)
    model.decodes_compiled = True
    with torch.autocast(device, dtype=torch.bfloat16):
        model.generate(ids, 30)
    assert model.to_dtype(torch.bfloat16).generate(ids, 30).shape == (2, 39)
    assert pickle.loads(pickle.dumps(model)).decodes_compiled


def test_beyond_the_compilers_limit_steps_run_uncompiled(monkeypatch, caplog):
    model = small_model("dtf", num_hidden_layers=3)
    batches = [random_ids(rows, 9) for rows in range(1, 6)]
    expected = [model.generate(ids, 12) for ids in batches]
    torch._dynamo.reset()
    step = torch.compile(Transformer.step, backend="eager")
    monkeypatch.setattr("generation.compiled_step", lambda cuda: step)
    model.decodes_compiled = True
    with torch._dynamo.config.patch(recompile_limit=2):
        assert all(torch.equal(model.generate(ids, 12), want) for ids, want in zip(batches, expected, strict=True))
    assert "hit config.recompile_limit" in caplog.text


@pytest.mark.parametrize("architecture", ROUTED)
def test_caches_hold_selected_tokens_only(architecture):
    model = small_model(architecture)
    ids, lengths = random_ids(3, 40), [40, 11, 25]
    cache = model.new_cache(3, 60)
    with torch.no_grad():
        out = model(ids, routing="causal", lengths=lengths, cache=cache, return_masks=True)
        selected = {layer: mask.sum(1) for layer, mask in out.masks.items()}
        for _ in range(12):
            out = model(random_ids(3, 1), routing="causal", cache=cache, return_masks=True)
            selected = {layer: n + out.masks[layer][:, 0] for layer, n in selected.items()}
    token_bytes = 2 * 2 * 8 * 4  # keys and values, KV heads, head size, float32
    total = 0
    for i, layer in enumerate(cache.layers):
        expected = selected[i].tolist() if i in selected else [n + 12 for n in lengths]
        assert layer.lengths == expected
        total += sum(expected) * token_bytes
        assert i not in selected or layer.k.size(2) <= max(32, 2 * max(expected))
    assert cache.bytes_used() == total < sum(n + 12 for n in lengths) * 5 * token_bytes


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_may_be_gone_on_with_beyond_its_limit(architecture):
    model, ids = small_model(architecture, causal_threshold=0.3), random_ids(2, 80)
    cache = model.new_cache(2, 36)
    logits = [model(ids[:, :33], routing="causal", cache=cache).logits]
    logits += [model(ids[:, t : t + 1], routing="causal", cache=cache).logits for t in range(33, 80)]
    assert relative_error(torch.cat(logits, 1), model(ids, routing="causal").logits[:, 32:]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_opened_in_inference_mode_is_like_any(dtype, tmp_path):
    small_model("mod").save_pretrained(tmp_path)
    ids = random_ids(2, 9)
    with torch.inference_mode():
        model = Transformer.from_pretrained(tmp_path, dtype)
        inside = model.generate(ids, 4)
    assert not any(p.is_inference() for p in model.parameters())
    assert torch.equal(inside, model.to_dtype(dtype).generate(ids, 4))


@pytest.mark.parametrize("architecture", ROUTED)
def test_a_step_that_selects_no_row_runs_no_matmul_of_the_block(architecture):
    model = small_model(architecture)
    for layer in model.routed:
        layer.causal_router.bias.data.fill_(-1e4)
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        model(random_ids(2, 8), routing="causal", cache=cache)
        ran = []
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i))
            layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        model(random_ids(2, 1), routing="causal", cache=cache)
    assert ran == [0, 0, 2, 2, 4, 4]
    assert all(cache.layers[i].lengths == [0, 0] for i in (1, 3))


def test_stop_ids_end_a_row():
    model = small_model("dtf")
    ids, lengths = random_ids(3, 9), [9, 4, 6]
    free = model.generate(ids, 30, lengths=lengths)
    stop = int(free[1, 4 + 5])  # what row 1 says in its sixth step at the latest
    stopped = model.generate(ids, 30, lengths=lengths, stop_ids=[stop], pad_id=96)
    for r, n in enumerate(lengths):
        said = free[r, n : n + 30].tolist()
        end = said.index(stop) + 1 if stop in said else 30
        assert stopped[r, : n + end].tolist() == free[r, : n + end].tolist()
        assert (stopped[r, n + end :] == 96).all()


def test_sampling_follows_the_distribution(monkeypatch):
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    many = logits.expand(20000, -1)

    def frequencies(**cut):
        options = {"temperature": 1.0, "top_k": None, "top_p": None} | cut
        return torch.bincount(sample(many, **options), minlength=5) / 20000

    def close(got, expected):
        torch.testing.assert_close(got, expected, atol=0.015, rtol=0)

    probability = logits[0].softmax(-1)
    close(frequencies(), probability)
    close(frequencies(temperature=0.5), (logits[0] / 0.5).softmax(-1))
    best = torch.tensor([0, 1, 1, 0, 0]) * probability
    close(frequencies(top_k=2), best / best.sum())
    close(frequencies(top_p=0.6), best / best.sum())  # 0.58 + 0.21 is the first sum to reach 0.6
    assert frequencies(top_p=1e-9)[2] == 1
    assert sample(many, 0.0, None, None).unique().tolist() == [2]
    assert sample(many, 1e-40, None, None).unique().tolist() == [2]
    tail = torch.zeros(64, 50_000)  # a sum of probabilities in float32 is 1 before its end
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "sort", None)
        assert len(sample(tail, 1.0, None, 1.0).unique()) > 50


def test_generate_is_reproducible_and_refuses_what_it_cannot_do():
    model = small_model("mod")
    ids = random_ids(2, 5)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(model.generate(ids, 12, temperature=0.8, top_k=20, top_p=0.9))
    assert (runs[0] == runs[1]).all()
    assert model.generate(ids, 0).tolist() == ids.tolist()
    with pytest.raises(ModelError, match="max_position_embeddings=256"):
        model.generate(ids, 252)
    for empty in (ids[:, :0], ids[:0]):
        with pytest.raises(ModelError, match="at least one token"):
            model.generate(empty, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Losses and gradients


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_is_lm_plus_the_weighted_terms(architecture):
    model = small_model(architecture, g_reg_weight=0.3).train()
    ids, targets = random_ids(2, 40), random_ids(2, 40)
    out, logits = model(ids, targets), model(ids).logits
    lm = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(out.losses["lm"], lm)
    assert out.logits is None
    weights = {"causal": 0.01, "mod_aux": 0.01, "mod_z": 1e-4, "prior": 0.05, "tpn": 0.05, "g_reg": 0.3}
    expected = lm + sum(weights[name] * value for name, value in out.losses.items() if name != "lm")
    torch.testing.assert_close(out.loss, expected)
    terms = {
        "dense": set(),
        "mod": {"causal", "mod_aux", "mod_z"},
        "dtf": {"causal", "prior"},
        "stt": {"causal", "tpn", "g_reg"},
    }
    assert out.losses.keys() == {"lm"} | terms[architecture]


def test_auxiliary_losses_equal_their_formulas():
    ids = random_ids(2, 24)
    mod = small_model("mod", num_hidden_layers=2)
    out = mod(ids, ids, return_masks=True)
    r, mask = out.tokens[1]["score"], out.masks[1].float()
    p = r.sigmoid()
    torch.testing.assert_close(out.losses["mod_aux"], -(mask * p.log() + (1 - mask) * (1 - p).log()).mean())
    torch.testing.assert_close(out.losses["mod_z"], r.square().mean())
    p = out.tokens[1]["causal_probability"]
    torch.testing.assert_close(out.losses["causal"], -(mask * p.log() + (1 - mask) * (1 - p).log()).mean())
    accuracy = ((p > 0.5) == out.masks[1]).float().mean()
    torch.testing.assert_close(out.stats["causal_accuracy"], accuracy)

    dtf = small_model("dtf", num_hidden_layers=2)
    seen = {}
    dtf.model.layers[0].register_forward_hook(lambda layer, args, output: seen.update(x=args[0], y=output[0]))
    out = dtf(ids, ids)
    prior = seen["x"] + dtf.model.layers[0].prior(seen["x"])
    torch.testing.assert_close(out.losses["prior"], (prior - seen["y"]).square().mean())


@pytest.mark.parametrize("architecture", ROUTED)
def test_causal_router_never_moves_the_trunk(architecture):
    model = small_model(architecture).train()
    ids = random_ids(2, 40)
    model(ids, ids).losses["causal"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {f"model.layers.{i}.causal_router.{kind}" for i in (1, 3) for kind in ("weight", "bias")}


def test_prior_loss_does_not_make_x_chase_what_follows_it():
    """A prior that says nothing, whatever x, leaves its loss no way to the trunk; only its own output layer learns."""
    model, ids = small_model("dtf").train(), random_ids(4, 40)
    for layer in model.model.layers[0:4:2]:
        layer.prior.down_proj.weight.data.zero_()
    model(ids, ids).losses["prior"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {f"model.layers.{i}.prior.down_proj.weight" for i in (0, 2)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_gets_a_gradient(architecture):
    model = small_model(architecture).train()
    ids = random_ids(2, 40)
    model(ids, ids).loss.backward()
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, grad in trained if grad is None or grad.abs().max() == 0] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_finite_differences(architecture, monkeypatch):
    """Float64, selections held still by the small step: the loss moves along its gradient by what the gradient says."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # no float32 island in between
    model = small_model(architecture).double().train()
    ids = random_ids(1, 16)
    loss = model(ids, ids).losses["lm"]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "causal_router" not in n]
    if any(layer.gate == "straight_through" for layer in model.routed):
        for layer in model.routed:  # its gradient is not that of its value, by design
            layer.gate = "soft"
        loss = model(ids, ids).losses["lm"]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    torch.manual_seed(1)
    directions = [torch.randn_like(p) for _, p in named]
    slope = sum((g * v).sum() for g, v in zip(grads, directions, strict=True) if g is not None)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for (_, p), v in zip(named, directions, strict=True):
                p.add_(v, alpha=sign * 1e-6)
            values.append(model(ids, ids).losses["lm"])
            for (_, p), v in zip(named, directions, strict=True):
                p.sub_(v, alpha=sign * 1e-6)
    measured = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close(measured, slope.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_changes_no_gradient(architecture):
    model = small_model(architecture).train()
    ids, grads, calls, passes = random_ids(2, 40), [], [], []
    model(ids, ids)  # from which on there are average k-th scores
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for on in (False, True):
        model.load_state_dict(buffers, strict=False)
        model.model.gradient_checkpointing = on
        model.zero_grad()
        model(ids, ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        passes.append(len(calls))
    assert passes[1] == 3 * passes[0] > 0, "once, and then twice: the block is recomputed"
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@pytest.mark.parametrize("smallest", [0, 1 << 62])  # 0: every product by oneDNN, where that is taken
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_trunk_is_one_graph_with_the_same_gradients(architecture, smallest, monkeypatch):
    """fullgraph refuses any graph break; aot_eager traces forward and backward like the compiler, without compiling."""
    monkeypatch.setattr(kernels, "SMALLEST", smallest)
    model, ids = small_model(architecture, num_hidden_layers=2).train(), random_ids(2, 40)
    eager = model(ids, ids)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(eager.loss, trained)
    torch._dynamo.reset()
    model.__dict__["compiled"] = torch.compile(model.model, fullgraph=True, backend="aot_eager", dynamic=False)
    traced = model(ids, ids)
    torch.testing.assert_close(traced.losses, eager.losses)
    for got, grad in zip(torch.autograd.grad(traced.loss, trained), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5)
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_every_stair_of_an_annealed_capacity_is_compiled(monkeypatch):
    """Each with and without gradients: the fifth is beyond the compiler's usual limit of 8 variants."""
    compile = torch.compile
    monkeypatch.setattr("model.need_compiler", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda module, **how: compile(module, backend="eager", **how))
    model, ids = small_model("mod", num_hidden_layers=2), random_ids(1, 64)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_trunk()
    for stair in range(5):
        model.set_capacity(1 - stair / 16)
        model(ids, ids).loss.backward()
        with torch.no_grad():
            model(ids, ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 10


def test_thresholds_average_the_kth_score():
    model = small_model("mod", causal_decision="threshold", num_hidden_layers=2).train()
    ids, expected = random_ids(2, 20), None
    for _ in range(3):
        out = model(ids, ids, return_masks=True)
        kth = out.tokens[1]["score"].sort(dim=1, descending=True).values[:, 9].mean().item()
        expected = kth if expected is None else 0.99 * expected + 0.01 * kth
        with torch.no_grad():
            model.model.layers[1].router.weight.add_(0.05)
        assert model.model.layers[1].threshold.item() == pytest.approx(expected, rel=1e-5)
    model.eval()
    model(ids, ids)
    assert model.model.layers[1].threshold.item() == pytest.approx(expected, rel=1e-5)


def test_scheduled_betas_are_what_the_gate_uses():
    model = small_model("dtf", beta_schedule="cosine", beta_ce_range=(1.2, 0.4), beta_cu_range=(1.7, 1.7))
    model.schedule(0.5)  # half-way down the cosine
    stats = model(random_ids(1, 10)).stats
    assert stats["beta_ce"].item() == pytest.approx(0.8, rel=1e-5)
    assert stats["layer_3/beta_cu"].item() == pytest.approx(1.7, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("capacity", [0.5, 0.125])
def test_flops_equal_the_flop_counter(architecture, capacity):
    model = small_model(architecture, capacity=capacity, vocab_size=96, num_hidden_layers=6).train()
    ids = random_ids(2, 64, vocab=96)

    def measured(run):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / ids.numel()

    def training():
        hidden, notes = model.model(ids)
        losses, _ = model.collect(notes)
        (F.linear(hidden, model.head_weight).sum() + sum(losses.values())).backward()

    assert measured(training) == pytest.approx(model.flops_per_token(64, training=True), rel=0.01)
    if architecture != "stt":  # whose top-k forward includes the dense pass that inference never runs
        with torch.no_grad():
            assert measured(lambda: model(ids)) == pytest.approx(model.flops_per_token(64), rel=0.01)
    for layer in model.routed:  # every token: capacity 1 under causal routing
        layer.offset = -1e4
    with torch.no_grad():
        causal = measured(lambda: model(ids, routing="causal"))
    assert causal == pytest.approx(model.flops_per_token(64, capacity=1.0), rel=0.01)


PUBLISHED = {
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_parameter_counts(size):
    assert {name for name in SIZES if name.endswith("B")} == PUBLISHED.keys()
    for architecture in ARCHITECTURES:
        config = ModelConfig.preset(size, architecture=architecture)
        with torch.device("meta"):
            model = Transformer(config)
        d, routed = config.hidden_size, len(config.routed_layers)
        predictor = 3 * d * Predictor.width(config) + d
        extra = {"dense": 0, "mod": d, "dtf": 4 + predictor, "stt": 4 + predictor}[architecture]
        extra += 0 if architecture == "dense" else 2 * d + 1
        assert sum(p.numel() for p in model.parameters()) == PUBLISHED[size] + routed * extra


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"architecture": "moe"}, "architecture='moe' is not one of dense, mod, dtf, stt"),
        ({"hidden_size": 30}, "hidden_size=30 is not divisible by num_attention_heads=4"),
        ({"hidden_size": 36}, "must be even for RoPE"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        ({"capacity": 0.0}, "capacity=0.0"),
        ({"capacity": 1.5}, "capacity=1.5"),
        ({"architecture": "mod", "capacity": [0.5]}, "1 values for the routed layers [1, 3]"),
        ({"architecture": "stt", "causal_decision": "threshold"}, "not available for stt"),
        ({"architecture": "dtf", "routed_layers": [2, 3]}, "below layer 3 dtf needs one that is not routed"),
        ({"architecture": "mod", "routed_layers": [3, 2]}, "routed_layers=[3, 2] must ascend, from 0 to 4"),
        ({"architecture": "mod", "routed_layers": [5]}, "routed_layers=[5] must ascend"),
        ({"architecture": "mod", "selection": "threshold"}, "selection='threshold' needs causal_decision='threshold'"),
        (
            {"architecture": "mod", "router": "random", "causal_decision": "threshold"},
            "needs a score, and router='random' has none",
        ),
        ({"architecture": "stt", "stt_output": "dense", "skip": "predict"}, "skip='predict' would learn nothing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ],
)
def test_bad_configurations_are_refused(bad, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        ModelConfig(**SMALL | bad)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ModelError, match="router='x'.*gate='y'"):
        ModelConfig(router="x", gate="y")


@pytest.mark.parametrize("alias, name", [("standard", "dense"), ("sdt", "dtf"), ("tdtf", "stt")])
def test_aliases(alias, name):
    assert ModelConfig(architecture=alias).architecture == name


def test_layer_pattern_of_an_odd_number_of_layers():
    kinds = [type(layer).__name__ for layer in small_model("dtf").model.layers]
    assert kinds == ["DecisionBlock", "DynamicBlock", "DecisionBlock", "DynamicBlock", "Block"]
    assert [type(layer).__name__ for layer in small_model("mod").model.layers][::2] == ["Block"] * 3


def test_initial_weights():
    torch.manual_seed(0)
    config = ModelConfig.preset("demo", architecture="stt", hidden_size=256, intermediate_size=512)
    for name, parameter in Transformer(config).named_parameters():
        if parameter.ndim == 2 and parameter.numel() > 4000:
            residual = "o_proj" in name or "mlp.down_proj" in name
            assert parameter.std().item() == pytest.approx(0.02 / 12**0.5 if residual else 0.02, rel=0.05), name
        elif "norm" in name or name.endswith("bias"):
            assert (parameter == ("norm" in name)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Directories


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_models_come_back_whole(architecture, tied, tmp_path):
    model = small_model(architecture, tie_word_embeddings=tied, capacity=0.3, gate="soft")
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(str(tmp_path))
    assert again.config == model.config and again.initialized == []
    ids = random_ids(2, 30)
    for routing in ("topk", "causal"):
        assert torch.equal(again(ids, routing=routing).logits, model(ids, routing=routing).logits)
    assert names_in(tmp_path) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("tied", [True, False])
def test_dense_exports_open_in_transformers_and_theirs_here(tied, tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = small_model("dense", tie_word_embeddings=tied), random_ids(2, 30)
    model.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert relative_error(theirs(ids).logits, model(ids).logits) <= 1e-5
    theirs.bfloat16().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    again = Transformer.from_pretrained(str(tmp_path / "theirs"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(again(ids).logits, theirs(ids).logits) <= 1e-5


@pytest.mark.parametrize("architecture", ROUTED)
def test_conversion_starts_the_routed_parts_anew(architecture, tmp_path):
    dense = small_model("dense")
    dense.save_pretrained(tmp_path)
    model = Transformer.from_pretrained(str(tmp_path), architecture=architecture, capacity=0.25)
    assert model.config.capacity == 0.25
    assert set(model.loaded) == dense.state_dict().keys()
    assert set(model.initialized) == model.state_dict().keys() - set(model.loaded) and model.initialized
    for name, tensor in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    if architecture in ("dtf", "stt"):
        assert model.model.layers[1].router.o_ce.item() == pytest.approx(0.5806)


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def damaged(directory, **changes):
    """A saved dense model with some of its config's fields changed."""
    small_model("dense").save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return str(directory)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "RoPE scaling"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"vocab_size": 98}, "model.embed_tokens.weight has shape \\(97, 32\\), \\(98, 32\\) is expected"),
        ({"num_hidden_layers": 4}, "unknown tensor model.layers.4"),
        ({"num_hidden_layers": 6}, "missing tensors model.layers.5"),
    ],
)
def test_unusable_checkpoints_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        Transformer.from_pretrained(damaged(tmp_path, **changes))


def test_missing_or_renamed_tensors_are_errors(tmp_path):
    small_model("mod").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    router = tensors.pop("model.layers.1.router.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="missing tensors model.layers.1.router.weight"):
        Transformer.from_pretrained(str(tmp_path))
    save_file(tensors | {"model.layers.1.rooter.weight": router}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="unknown tensor model.layers.1.rooter.weight"):
        Transformer.from_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="unknown tensor"):  # a routed model is not silently made dense
        Transformer.from_pretrained(str(tmp_path), architecture="dense")


def test_pickles_and_damaged_files_are_refused(tmp_path):
    directory = damaged(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    with pytest.raises(ModelError, match="model.safetensors is damaged"):
        Transformer.from_pretrained(directory)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights \\(pytorch_model.bin\\)"):
        Transformer.from_pretrained(directory)
    with pytest.raises(ModelError, match="neither a directory nor a hub id"):
        Transformer.from_pretrained(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not a model configuration"):
        Transformer.from_pretrained(directory)


def test_shards_are_read_and_their_faults_refused_by_name(tmp_path):
    model = small_model("dense", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    names = sorted(tensors)

    def shards(first, second, weight_map=None):
        save_file({name: tensors[name] for name in first}, tmp_path / "a.safetensors")
        save_file({name: tensors[name] for name in second}, tmp_path / "b.safetensors")
        found = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
        index.write_text(json.dumps({"metadata": {}, "weight_map": found | (weight_map or {})}))

    shards(names[:20], names[20:])
    again = Transformer.from_pretrained(str(tmp_path))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    cases = [
        (names[:20], names[19:], None, f"tensor {names[19]} is in two files"),
        (names[:20], names[21:], None, f"missing tensors {names[20]}"),
        (names[:20], names[20:], {"x": "c.safetensors"}, "c.safetensors is missing, though model.safetensors.index"),
        (names[:20], names[20:], {"x": "../a.safetensors"}, "points outside its directory: ../a.safetensors"),
        (names[:20], names[20:], {"x": "/a.safetensors"}, "points outside its directory: /a.safetensors"),
        (names[:20], names[20:], {"x": 3}, "is not an index"),
    ]
    for first, second, weight_map, message in cases:
        shards(first, second, weight_map)
        with pytest.raises(ModelError, match=re.escape(message)):
            Transformer.from_pretrained(str(tmp_path))
    for content in ("{", "[]", "{}", '{"weight_map": []}'):
        index.write_text(content)
        with pytest.raises(ModelError, match="model.safetensors.index.json is not an index"):
            Transformer.from_pretrained(str(tmp_path))


def test_large_models_are_saved_in_shards(tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = small_model("dense"), random_ids(2, 30)
    size = sum(p.numel() for p in model.parameters()) * 4
    model.save_pretrained(tmp_path, shard_size=size)
    assert names_in(tmp_path) == ["config.json", "model.safetensors"]
    for shard_size in (20_000, 50_000):
        model.save_pretrained(tmp_path, shard_size=shard_size)
        files = [tmp_path / name for name in names_in(tmp_path) if name.endswith(".safetensors")]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == size
        assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
        assert len(files) >= size / shard_size and max(file.stat().st_size for file in files) < shard_size + 3000
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(Transformer.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
            assert relative_error(theirs(ids).logits, model(ids).logits) <= 1e-5
    model.save_pretrained(tmp_path)
    assert names_in(tmp_path) == ["config.json", "model.safetensors"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    """Under 1.3 times the model, what the files map included; a gigabyte: python tests/measure_loading.py."""
    for stored in ("float32", "bfloat16"):
        peak, size = measure_loading.peak_and_size(tmp_path / stored, stored, hidden_size=512, vocab_size=32768)
        assert 0.9 * size < peak < 1.3 * size, stored


def test_bad_calls_are_refused():
    model = small_model("mod")
    with pytest.raises(ModelError, match="max_position_embeddings=256"):
        model(random_ids(1, 257))
    with pytest.raises(ModelError, match="routing='best'"):
        model(random_ids(1, 4), routing="best")
    with pytest.raises(ModelError, match="lengths"):
        model(random_ids(2, 4), lengths=[5, 1])
    with pytest.raises(ModelError, match="KV cache"):
        model(random_ids(1, 4), cache=model.new_cache(1, 8))


def test_model_imports_no_heavy_library():
    heavy = "transformers", "datasets", "wandb", "peft", "lm_eval"
    code = f"import sys, model; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
