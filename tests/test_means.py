"""What a routed model may vary (DESIGN, section 3): each means by brute force, and with every property of the architectures."""

import os
import runpy
from functools import partial

import pytest
import test_model as properties
import torch
import torch.nn.functional as F
from helpers import Variant, random_ids, relative_error, set_thresholds, small_model
from test_known_faults import brute_force_update
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import measure
import routers
from model import ModelConfig, Transformer

MEANS = [
    {"routed_part": "mlp"},
    {"kv": "all"},
    {"router_input": "normed"},
    {"skip": "predict"},
    {"routed_layers": [2, 4]},
    {"routed_part": "mlp", "skip": "predict", "router_input": "normed", "gate": "straight_through"},
    {"kv": "all", "skip": "predict", "router_input": "normed", "routed_layers": [1, 3]},
]
VARIANTS = [Variant("mod", **means) for means in MEANS]
VARIANTS += [Variant(name, **means) for name in ("dtf", "stt") for means in MEANS[-2:]]
VARIANTS += [Variant("mod", router="random", kv="all"), Variant("mod", router="positional", routed_part="mlp")]
VARIANTS += [
    Variant("dtf", router="random"),
    Variant("stt", router="positional"),
    Variant("mod", routed_layers=[1, 2, 3]),
    Variant("mod", routed_part="mlp", skip="predict", kv="all"),
    Variant("dtf", router="fitted", kv="all"),
]
AVERAGED = [
    Variant(name, selection="threshold", causal_decision="threshold", **m)
    for name in ("mod", "dtf")
    for m in ({}, MEANS[1], {"router": "fitted"})
]
COMBINED = VARIANTS[5:]  # those before are parts of them: the compiler, which takes seconds, is asked once
every = pytest.mark.parametrize("variant", VARIANTS, ids=repr)


@every
def test_it_is_causal_and_rows_are_independent(variant):
    if "router" not in variant.overrides:  # whose selection does not depend on the text
        properties.test_causal_routing_never_looks_ahead(variant, "router")
    for routing in ("topk", "causal"):
        properties.test_rows_are_independent(variant, routing)
        properties.test_padding_changes_nothing(variant, routing)


@every
def test_cached_equals_uncached(variant, device):
    properties.test_generate_equals_the_uncached_causal_forward(variant, "router", device)


@every
def test_it_trains(variant):
    with pytest.MonkeyPatch.context() as patch:
        properties.test_gradients_equal_finite_differences(variant, patch)
    properties.test_every_parameter_gets_a_gradient(variant)
    properties.test_gradient_checkpointing_changes_no_gradient(variant)


@pytest.mark.parametrize("variant", COMBINED, ids=repr)
def test_it_compiles(variant, device, monkeypatch):
    properties.test_a_compiled_step_equals_the_uncached_causal_forward(variant, "router", 2, device)
    properties.test_the_trunk_is_one_graph_with_the_same_gradients(variant, 1 << 62, monkeypatch)


@every
def test_its_flops_are_counted(variant):
    properties.test_flops_equal_the_flop_counter(variant, 0.5)


@every
def test_it_is_saved_whole_and_converted(variant, tmp_path):
    properties.test_saved_models_come_back_whole(variant, True, tmp_path)
    properties.test_converted_at_capacity_one_with_straight_through_gates_equals_dense(variant)


def selected(variant, routing, **overrides):
    """A model of three layers whose second is routed; what goes into that layer, comes out, and its notes."""
    model, ids, seen = small_model(variant, num_hidden_layers=3, **overrides), random_ids(2, 40), {}
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out[0], notes=out[1]))
    with torch.no_grad():
        model(ids, routing=routing)
    return model, layer, seen["x"], seen["y"], seen["notes"]


@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_kv_all_by_brute_force(routing):
    """A selected token's update is what a dense block would give it: it sees the keys and values of all before it."""
    model, layer, x, y, notes = selected("mod", routing, kv="all")
    mask = notes.decision.mask
    assert mask.any() and not mask.all()
    for row in range(2):
        dense = brute_force_update(layer, x[row], torch.arange(40), model.config.rope_theta)
        gate = torch.sigmoid(x[row] @ layer.router.weight[0])[:, None]
        expected = torch.where(mask[row, :, None], x[row] + gate * dense, x[row])
        assert relative_error(y[row], expected) <= 1e-5


@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_routed_mlp_by_brute_force(routing):
    """Attention for all; router, gate and MLP read what attention has made of x; skipped tokens keep that."""
    model, layer, x, y, notes = selected("mod", routing, routed_part="mlp", router_input="normed")
    mask = notes.decision.mask
    assert mask.any() and not mask.all()
    for row in range(2):
        h = x[row] + layer.self_attn(layer.input_layernorm(x[row : row + 1]), tables(model, 40))[0]
        normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
        gate = torch.sigmoid(normed @ layer.router.weight[0])[:, None]
        norm = layer.post_attention_layernorm
        expected = torch.where(mask[row, :, None], h + gate * layer.mlp(norm(h)), h)
        assert relative_error(y[row], expected) <= 1e-5
        before = F.pad(normed, (0, 0, 1, 0))[:-1]
        logits = torch.cat((normed, before), -1) @ layer.causal_router.weight[0] + layer.causal_router.bias
        torch.testing.assert_close(notes.tokens["causal_probability"][row], logits.sigmoid(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["mod", "dtf", "stt"])
def test_a_fitted_router_by_brute_force(variant):
    """The k tokens with the highest line run, their update as it is; by the threshold, the same line decides at inference."""
    model, ids, seen = small_model(variant, router="fitted", causal_decision="threshold"), random_ids(2, 40), {}
    set_thresholds(model)
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out[0], mask=out[1].decision.mask))
    for routing in ("topk", "causal"):
        with torch.no_grad():
            model(ids, routing=routing)
        x, y, mask = seen["x"], seen["y"], seen["mask"]
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
        line = normed @ layer.router.weight[0] + layer.router.bias  # (2, 40)
        kth = line.topk(20, dim=1).values[:, -1:]
        assert torch.equal(mask, line >= kth if routing == "topk" else line > layer.threshold) and not mask.all()
        for row in range(2):
            indices = mask[row].nonzero()[:, 0]
            update = brute_force_update(layer, x[row], indices, model.config.rope_theta)
            assert relative_error(y[row, indices], x[row, indices] + update) <= 1e-5
            assert torch.equal(y[row][~mask[row]], x[row][~mask[row]])


def tables(model, T):
    from blocks import rope_tables

    return rope_tables(torch.arange(T), model.config.head_dim, model.config.rope_theta)


@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_a_guess_stands_in_for_skipped_tokens(routing):
    model, layer, x, y, notes = selected("mod", routing, skip="predict")
    mask = notes.decision.mask
    guess = layer.skip(x)
    torch.testing.assert_close(y[~mask], (x + guess)[~mask], rtol=1e-5, atol=1e-6)
    for row in range(2):
        indices = mask[row].nonzero()[:, 0]
        update = brute_force_update(layer, x[row], indices, model.config.rope_theta)
        gate = torch.sigmoid(x[row] @ layer.router.weight[0])[indices, None]
        assert relative_error(y[row, indices], x[row, indices] + gate * update) <= 1e-5
    if routing == "topk":
        updates = [brute_force_update(layer, x[r], mask[r].nonzero()[:, 0], model.config.rope_theta) for r in range(2)]
        expected = (torch.cat(updates) - guess[mask]).square().mean()
        torch.testing.assert_close(notes.losses["skip"], expected, rtol=1e-4, atol=1e-6)
    else:
        assert notes.losses == {}


@pytest.mark.parametrize("variant", AVERAGED, ids=repr)
def test_selection_by_the_average_threshold_is_causal_in_training(variant, device):
    """Top-k routing then looks at no later token, has no more room than 1.25 · γ · T, and is what inference does."""
    model = small_model(variant).train()
    ids = random_ids(2, 40)
    model(ids, ids)  # the first batch sets the threshold
    assert all(layer.threshold.isfinite() for layer in model.routed)
    model.eval()
    other = torch.cat((ids[:, :23], random_ids(2, 17)), 1)
    with torch.no_grad():
        trained, changed, causal = (
            model(ids, return_masks=True),
            model(other, return_masks=True),
            model(ids, routing="causal", return_masks=True),
        )
    first = model.config.routed_layers[0]
    for i in model.config.routed_layers:
        assert (trained.masks[i][:, :23] == changed.masks[i][:, :23]).all()
        assert 0 < trained.masks[i].sum(1).max() <= 25 and trained.rules[i] == "average threshold"
    within = causal.masks[first].cumsum(1) <= 25
    assert torch.equal(trained.masks[first], causal.masks[first] & within)
    assert relative_error(changed.logits[:, :23], trained.logits[:, :23]) <= 1e-5
    for layer in model.routed:
        layer.threshold.fill_(-1e9)  # all want to run: the earliest do
    full = model(ids, return_masks=True).masks[first]
    assert full[:, :25].all() and not full[:, 25:].any()
    properties.test_generate_equals_the_uncached_causal_forward(variant, "threshold", device)


@pytest.mark.parametrize("known", [True, False])
def test_the_average_threshold_is_the_same_for_padded_rows(known):
    """What a row selects does not depend on the rows beside it, nor how many of those that pass it has room for."""
    model, ids = small_model("mod", selection="threshold", causal_decision="threshold"), random_ids(3, 40)
    for layer in model.routed:
        layer.threshold.fill_(0.0 if known else torch.nan)
    lengths = [40, 23, 40] if known else [40, 31, 12]
    hidden, notes = model.model(ids, "topk", lengths)
    masks = {i: notes[i].decision.mask for i in model.config.routed_layers}
    for row, n in enumerate(lengths) if known else ():
        alone, noted = model.model(ids[row : row + 1, :n], "topk")
        for i, mask in masks.items():
            assert torch.equal(mask[row, :n], noted[i].decision.mask[0]) and not mask[row, n:].any()
            assert mask[row].sum() <= 1.25 * 0.5 * n + 1
        assert relative_error(hidden[row, :n], alone[0]) <= 1e-5
    assert all(0 < mask[:, 12:].sum() and notes[i].decision.rule == "average threshold" for i, mask in masks.items())


def test_controls_select_their_exact_share_by_position_alone():
    T, ids = 256, random_ids(2, 256)
    for router in ("random", "positional"):
        for capacity in (0.25, 0.5, 1.0):
            model = small_model("mod", router=router, capacity=capacity, max_position_embeddings=T)
            assert not any("router" in name for name in model.state_dict())
            out = model(ids, return_masks=True)
            for mask in out.masks.values():
                assert (mask.sum(1) == int(capacity * T)).all() and torch.equal(mask[0], mask[1])
            assert out.losses == {} and set(out.rules.values()) == {f"{router} control"}
            assert all((out.tokens[i]["margin"] > 0).equal(mask) for i, mask in out.masks.items())
        masks = small_model("mod", router=router, max_position_embeddings=T)(ids, return_masks=True).masks
        assert torch.equal(masks[1], masks[3]) == (router == "positional")
    gaps = masks[1][0].nonzero()[:, 0].diff()
    assert (gaps == 2).all()
    ranks = routers.control_rank("random", 3, torch.arange(4096), torch.arange(64)).view(-1, 64)
    assert torch.equal(ranks.sort(1).values, torch.arange(64).expand(64, -1))  # a permutation of every group
    assert (ranks[0] != ranks[1]).any()


@pytest.mark.parametrize("router", ["random", "positional"])
@pytest.mark.parametrize("capacity", [0.35, 0.7, 1.1 - 0.6])
def test_a_control_runs_what_its_mask_holds(router, capacity):
    """Host and device find the same tokens, where γ · 64 is not whole or a hair beside it, as it is and calibrated: one too
    many would stand behind later ones and see them.
    """
    model = small_model("mod", router=router, capacity=capacity, max_position_embeddings=128).eval()
    ids = random_ids(2, 128)
    other = torch.cat((ids[:, :100], random_ids(2, 28)), 1)
    with torch.no_grad():
        for _ in range(2):
            out, changed = (model(each, routing="causal", return_masks=True) for each in (ids, other))
            assert relative_error(changed.logits[:, :100], out.logits[:, :100]) <= 1e-5
            cache = model.new_cache(2, 128)
            steps = [model(ids[:, :120], routing="causal", cache=cache).logits]
            steps += [model(ids[:, t : t + 1], routing="causal", cache=cache).logits for t in range(120, 128)]
            assert relative_error(torch.cat(steps, 1), out.logits[:, 119:]) <= 1e-5
            measure.calibrate(model, ids, capacity)
    assert all(mask.float().mean().sub(capacity).abs() < 1 / 64 for mask in out.masks.values())


@pytest.mark.parametrize("variant", AVERAGED, ids=repr)
def test_what_an_average_threshold_has_room_for_is_counted(variant):
    model, ids = (
        small_model(variant, capacity=0.4, vocab_size=96, num_hidden_layers=6).train(),
        random_ids(2, 64, vocab=96),
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids).loss.backward()
    assert counter.get_total_flops() / ids.numel() == pytest.approx(model.flops_per_token(64, training=True), rel=0.01)


def test_an_average_threshold_moves_beside_a_backward_pass_that_computes_anew(monkeypatch):
    """Checkpointing inside a compiled trunk reads the threshold in the backward pass: as it was, not as it has become."""
    ids, gradients = random_ids(2, 40), []
    for compiled in (False, True):
        model = small_model(AVERAGED[0]).train()
        model.model.gradient_checkpointing = compiled
        if compiled:
            monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
            model.compile_trunk()
        for _ in range(2):
            model.zero_grad()
            model(ids, ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        assert relative_error(mine, theirs) <= 1e-4


def test_the_papers_settings_are_the_defaults():
    """config/paper.py names nothing but defaults, which the golden files were made with, and all of what may vary."""
    given = {name: value for name, value in runpy.run_path("config/paper.py").items() if not name.startswith("_")}
    assert given.pop("capacity_choices") == []  # a key of train.py
    assert given == {name: ModelConfig.__dataclass_fields__[name].default for name in given}
    assert {name for means in MEANS for name in means} | {
        "selection",
        "causal_decision",
        "capacity",
        "router",
    } == given.keys()
    config = ModelConfig(architecture="mod", num_hidden_layers=6)
    assert config.routed_layers == [1, 3, 5] and config.compact_cache
    assert ModelConfig.from_dict(ModelConfig(num_hidden_layers=6).to_dict(), architecture="dtf").routed_layers == [
        1,
        3,
        5,
    ]
    assert [name for name, _ in Transformer(config).named_parameters() if "skip" in name] == []
    assert os.path.exists("tests/golden/mod.npz")
