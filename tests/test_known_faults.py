"""The faults of existing DTF, STT and MoD code, 2024 to 2026, each seen by running it: one property each, shown here."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import ARCHITECTURES, ROUTED, random_ids, relative_error, small_model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import routers
from blocks import rope_tables
from model import Transformer
from train import lr_scale


@pytest.mark.parametrize("architecture", ROUTED)
def test_01_rows_of_a_batch_do_not_see_each_other(architecture):
    model, ids = small_model(architecture), random_ids(4, 32)
    for routing in ("topk", "causal"):
        batch = model(ids, routing=routing).logits
        for row in range(4):
            assert relative_error(batch[row], model(ids[row : row + 1], routing=routing).logits[0]) <= 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_02_padding_has_an_effect_and_what_stands_in_it_has_none(architecture):
    model, ids, lengths = small_model(architecture), random_ids(2, 30), [30, 12]
    other = ids.clone()
    other[1, 12:] = random_ids(18)
    a, b = (model(x, routing="topk", lengths=lengths, return_masks=True) for x in (ids, other))
    assert relative_error(b.logits[1, :12], a.logits[1, :12]) <= 1e-6
    assert not any(mask[1, 12:].any() for mask in a.masks.values())
    if architecture != "dense":
        assert relative_error(model(ids).logits[1, :12], a.logits[1, :12]) > 1e-3


def test_03_targets_are_shifted_once():
    """Trained on a fixed cycle of tokens, the model must say the next one, not the one after it."""
    model = small_model("mod", num_hidden_layers=2).train()
    cycle = torch.arange(1, 12).repeat(4)
    ids, targets = cycle[None, :-1], cycle[None, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, targets).loss.backward()
        optimizer.step()
    predicted = model.eval()(ids).logits.argmax(-1)
    assert (predicted == targets).float().mean() > 0.95
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, targets).losses["lm"], F.cross_entropy(logits[0], targets[0]))


@pytest.mark.parametrize("architecture", ROUTED)
def test_04_05_pretrained_weights_arrive_everywhere_the_decision_block_included(architecture, tmp_path):
    dense = small_model("dense")
    dense.save_pretrained(tmp_path)
    converted = Transformer.from_pretrained(str(tmp_path), architecture=architecture).state_dict()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(converted[name], tensor), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_06_training_and_evaluation_mode_compute_the_same(architecture):
    model, ids = small_model(architecture), random_ids(2, 32)
    losses = [model.train(mode)(ids, ids).losses["lm"].item() for mode in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("architecture", ["dtf", "stt"])
def test_07_both_criteria_of_the_gate_learn(architecture):
    model, ids = small_model(architecture).train(), random_ids(2, 32)
    model(ids, ids).loss.backward()
    for name in ("beta_ce", "beta_cu", "o_ce", "m_cu"):
        for layer in model.routed:
            assert getattr(layer.router, name).grad.abs() > 0, name


def test_08_a_negative_offset_is_no_nan_and_keeps_its_gradient():
    for raw in (-0.01, -3.0, -20.0):
        o_ce = torch.tensor(raw, requires_grad=True)
        d_st, d_ch = torch.rand(1, 50) * 4, torch.rand(1, 50) * 4
        g, _, _ = routers.surprise_gate(d_st, d_ch, -0.3, -0.6, o_ce, 1.1, 100)
        assert torch.isfinite(g).all()
        g.sum().backward()
        assert torch.isfinite(o_ce.grad) and o_ce.grad.abs() > 0


def brute_force_update(layer, x, indices, theta):
    """Δ of one row's selected tokens, each query attending to the selected tokens up to itself, in plain matrix products."""
    attention, d = layer.self_attn, x.size(-1)
    h = layer.input_layernorm(x[indices])
    heads, hd = attention.q_proj.out_features // attention.head_dim, attention.head_dim
    q, k, v = (p(h).view(len(indices), -1, hd) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    angles = indices[:, None] * theta ** -(torch.arange(0, hd, 2) / hd)
    cos, sin = (torch.cat((t, t), -1)[:, None] for t in (angles.cos(), angles.sin()))

    def turn(t):
        return t * cos + torch.cat((-t[..., hd // 2 :], t[..., : hd // 2]), -1) * sin

    q, k = turn(q), turn(k).repeat_interleave(heads // k.size(1), 1)
    v = v.repeat_interleave(heads // v.size(1), 1)
    rows = []
    for i in range(len(indices)):
        weights = torch.einsum("hd,jhd->hj", q[i], k[: i + 1]).div(math.sqrt(hd)).softmax(-1)
        rows.append(torch.einsum("hj,jhd->hd", weights, v[: i + 1]).reshape(d))
    update = attention.o_proj(torch.stack(rows))
    return update + layer.mlp(layer.post_attention_layernorm(x[indices] + update))


@pytest.mark.parametrize("routing", ["topk", "causal"])
@pytest.mark.parametrize("architecture", ROUTED)
def test_09_15_16_22_the_routed_block_by_brute_force(architecture, routing):
    """Attention among the selected tokens only, in their order, at their own positions; x + gate · Δ on them, x elsewhere."""
    model, ids = small_model(architecture), random_ids(2, 60)
    layer, seen = model.model.layers[3], {}
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out[0], notes=out[1]))
    model.model.layers[2].register_forward_hook(lambda _, args, out: seen.update(below=args[0]))
    model(ids, routing=routing)
    mask = seen["notes"].decision.mask
    assert mask.any() and not mask.all()
    for row in range(2):
        x, y, indices = seen["x"][row], seen["y"][row], mask[row].nonzero()[:, 0]
        gate = 1.0
        if architecture == "mod":
            gate = torch.sigmoid(x @ layer.router.weight[0])[indices, None]
        elif architecture == "norm":  # tests/new_architecture.py
            dense, rope = model.model.layers[2], rope_tables(torch.arange(60), 8, model.config.rope_theta)
            update = dense.delta(seen["below"], functools.partial(dense.self_attn, rope=rope))
            change = update.square().mean(-1)
            gate = torch.sigmoid(layer.router.weight[0] * (change / seen["below"].square().mean(-1)).log())
            gate = gate[row][indices, None]
        elif architecture == "dtf":
            gate = seen["notes"].tokens["G"][row][indices, None]
        expected = x.clone()
        expected[indices] += gate * brute_force_update(layer, x, indices, model.config.rope_theta)
        assert relative_error(y, expected) <= 1e-5
        assert torch.equal(y[~mask[row]], x[~mask[row]])


@pytest.mark.parametrize("architecture", ROUTED)
def test_11_21_skipped_tokens_cost_nothing(architecture):
    """Keys, values and everything else of a routed block are computed for its k tokens; with k = 1 it is all but free."""
    model, ids = small_model(architecture, capacity=0.25), random_ids(2, 40)
    for layer in model.routed:
        layer.causal_router.bias.data.fill_(-1e4)
    shapes = []
    for layer in model.routed:
        layer.self_attn.k_proj.register_forward_hook(lambda _, args, out: shapes.append(tuple(args[0].shape[:2])))
    with torch.no_grad():
        model(ids)
    packed = [(2, 10)] * 2
    assert [shape for shape in shapes if shape == (2, 10)] == packed
    assert len(shapes) == (4 if architecture == "stt" else 2)  # stt's dense pass in training

    def flops(model):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids, routing="causal")
        return counter.get_total_flops()

    assert flops(model) < 0.72 * flops(small_model("dense"))  # three of five blocks, priors and the head remain


@pytest.mark.parametrize("architecture", ROUTED)
def test_12_causal_mode_has_no_quota(architecture):
    """A router that wants all or nothing gets it: a selection that depends on other tokens' scores could not."""
    model, ids = small_model(architecture), random_ids(2, 32)
    for bias, share in ((-1e4, 0.0), (1e4, 1.0)):
        for layer in model.routed:
            layer.causal_router.bias.data.fill_(bias)
        masks = model(ids, routing="causal", return_masks=True).masks
        assert all(mask.float().mean() == share for mask in masks.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_13_cached_logits_equal_uncached_ones(architecture):
    model, ids = small_model(architecture), random_ids(2, 30)
    whole = model(ids, routing="causal").logits
    cache = model.new_cache(2, 30)
    with torch.no_grad():
        steps = [model(ids[:, :10], routing="causal", cache=cache).logits]
        steps += [model(ids[:, t : t + 1], routing="causal", cache=cache).logits for t in range(10, 30)]
    assert relative_error(torch.cat(steps, 1), whole[:, 9:]) <= 1e-4


def test_14_equal_scores_still_select_k():
    _, mask = routers.top_k(torch.zeros(2, 10), 4)
    assert mask.sum(1).tolist() == [4, 4]


@pytest.mark.parametrize("architecture", ROUTED)
def test_17_capacity_is_saved_with_the_model(architecture, tmp_path):
    for capacity in (0.3, [0.25, 0.75]):
        small_model(architecture, capacity=capacity).save_pretrained(tmp_path)
        again = Transformer.from_pretrained(str(tmp_path))
        assert again.config.capacity == capacity
        shares = capacity if isinstance(capacity, list) else [capacity] * 2
        selected = [int(m.sum()) for m in again(random_ids(1, 40), return_masks=True).masks.values()]
        assert selected == [int(c * 40) for c in shares]


@pytest.mark.parametrize("architecture", ROUTED)
def test_18_the_lm_loss_is_not_the_total(architecture):
    model, ids = small_model(architecture).train(), random_ids(2, 32)
    out = model(ids, ids)
    before = out.losses["lm"].item()
    assert (
        out.loss.item()
        > before
        == pytest.approx(F.cross_entropy(model(ids).logits[0:2].flatten(0, 1), ids.flatten()).item())
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_20_no_host_synchronisation_in_a_training_step(architecture):
    """On fake tensors, which have no data, every read of a value (`.item()`, `.tolist()`, bool()) raises."""
    with FakeTensorMode():
        model = small_model(architecture).train()
        hidden, notes = model.model(torch.zeros(2, 32, dtype=torch.long))
        losses, _ = model.collect(notes)
        (hidden.sum() + sum(losses.values())).backward()
        assert model.model.embed_tokens.weight.grad.shape == (97, 32)
        with pytest.raises(DataDependentOutputException):
            hidden.sum().item()


def test_10_the_attention_has_no_backward_of_its_own():
    """Every gradient is autograd's, of PyTorch's own kernel: dQ, dK and dV agree with plain matrix products."""
    torch.manual_seed(0)
    layer, x = small_model("dense").model.layers[0], torch.randn(12, 32, requires_grad=True)
    rope = rope_tables(torch.arange(12), 8, 1e4)
    inputs = [x, *(p.weight for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj))]
    direction = torch.randn(12, 32)
    plain = torch.autograd.grad((brute_force_update(layer, x, torch.arange(12), 1e4) * direction).sum(), inputs)
    ours = torch.autograd.grad(
        (layer.delta(x[None], lambda hidden: layer.self_attn(hidden, rope))[0] * direction).sum(), inputs
    )
    for got, expected in zip(ours, plain, strict=True):
        assert relative_error(got, expected) <= 1e-4


def test_19_the_schedule_survives_a_warm_up_as_long_as_the_run():
    for steps, warmup in ((10, 1.0), (1, 1.0), (1, 0.0), (10, 0.01)):
        scale = [lr_scale(step, steps, warmup, 0.1) for step in range(steps + 1)]
        assert all(0 < s <= 1 for s in scale) and max(scale) == 1
    assert lr_scale(50, 100, 0.0, 0.1) == pytest.approx(0.55)  # half-way down a cosine, not a line or a constant
    assert lr_scale(25, 100, 0.0, 0.1) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
