"""Routing decisions against closed forms, brute force and the golden surprise gate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import routers

GOLDEN = Path(__file__).parent / "golden"


def test_surprise_gate_keeps_its_accuracy_after_an_outlier():
    """The golden series starts with 3e4; float32 must still reach the float64 reference."""
    golden = np.load(GOLDEN / "surprise_gate.npz")
    d_st, d_ch = (torch.tensor(golden[name])[None].float() for name in ("d_st", "d_ch"))
    assert d_st[0, 0] > 1e4
    window = int(golden["window"])
    gates = routers.surprise_gate(d_st, d_ch, **json.loads(str(golden["params"])), window=window)
    for gate, name in zip(gates, ("g", "s_ce", "s_cu"), strict=True):
        np.testing.assert_allclose(gate[0].numpy(), golden[name], rtol=1e-5, atol=1e-30)
    average = routers.moving_average(d_st, window)[0].numpy()
    np.testing.assert_allclose(average, golden["moving_average"], rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_surprise_and_its_gradients_are_those_of_the_formulas(dtype, tolerance):
    u, p = (torch.randn(3, 11, 8, dtype=dtype).requires_grad_() for _ in range(2))
    grads = [torch.rand(3, 11).to(torch.promote_types(dtype, torch.float32)) for _ in range(2)]
    got = routers.surprise(u, p)
    got_grads = torch.autograd.grad(got, (u, p), [*grads, torch.tensor(0.3, dtype=grads[0].dtype)])
    a, b = (t.detach().double().requires_grad_() for t in (u, p))
    expected = a.square().sum(-1) / 8, (a - b).square().sum(-1) / 8, (b - a.detach()).square().sum(-1).mean() / 8
    total = sum((e * g).sum() for e, g in zip(expected, (*grads, 0.3), strict=True))
    for mine, theirs in zip((*got, *got_grads), (*expected, *torch.autograd.grad(total, (a, b))), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)
    assert {t.dtype for t in got_grads} == {dtype}


@pytest.mark.parametrize("window", [1, 3, 100])
def test_moving_average_is_the_mean_of_the_window(window):
    d = torch.rand(3, 41)
    got = routers.moving_average(d, window)
    for t in range(41):
        torch.testing.assert_close(got[:, t], d[:, max(0, t - window + 1) : t + 1].mean(1))


def test_the_average_of_a_ring_is_that_of_the_whole_sequence():
    d, window, seen = torch.rand(3, 30), 7, [20, 3, 7]
    whole = routers.moving_average(d, window)
    ring = routers.last_values(d, torch.tensor(seen)[:, None], window)
    for step in range(10):
        at = torch.tensor(seen)[:, None] + step  # rows stand at different places
        ring.scatter_(1, at % window, d.gather(1, at))
        got = routers.ring_average(ring, at, min(seen) + step)
        torch.testing.assert_close(got, whole.gather(1, at))


def test_surprise_gate_gradients_reach_all_four_scalars():
    d_st, d_ch = torch.rand(2, 20, requires_grad=True), torch.rand(2, 20)
    raw = [torch.tensor(v, requires_grad=True) for v in (-0.3, -0.6, 0.58, 1.1)]
    routers.surprise_gate(d_st, d_ch, *raw, window=5)[0].sum().backward()
    assert all(p.grad.abs() > 0 for p in raw)
    assert d_st.grad.abs().sum() > 0


@settings(max_examples=60, deadline=None)
@given(T=st.integers(1, 40), capacity=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_top_k_takes_exactly_k_of_the_best_in_ascending_order(T, capacity, seed):
    torch.manual_seed(seed)
    score = torch.randint(0, 5, (3, T)).float()  # many ties
    k = max(1, int(capacity * T))
    assert routers.capacity_k(capacity, T) == k
    indices, mask = routers.top_k(score, k)
    assert indices.shape == (3, k) and mask.sum(1).tolist() == [k] * 3
    assert (indices.diff(dim=1) > 0).all()
    for row in range(3):
        assert mask[row].nonzero()[:, 0].tolist() == indices[row].tolist()
        assert sorted(score[row][mask[row]].tolist()) == sorted(score[row].tolist())[-k:]


def test_ragged_top_k_equals_each_row_alone():
    score, lengths = torch.randn(4, 17), [17, 1, 9, 4]
    mask = routers.top_k_ragged(score, 0.4, lengths)
    for row, n in enumerate(lengths):
        alone = routers.top_k(score[row : row + 1, :n], routers.capacity_k(0.4, n))[1]
        assert mask[row, :n].tolist() == alone[0].tolist()
        assert not mask[row, n:].any()


def test_pack_moves_selected_indices_to_the_left():
    mask = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]]).bool()
    indices, counts = routers.pack(mask)
    assert counts == [3, 0, 2] and indices.shape == (3, 3)
    assert indices[0].tolist() == [1, 3, 4] and indices[2, :2].tolist() == [0, 4]
    assert not mask[1, indices[1]].any() and not mask[2, indices[2, 2:]].any()
    assert routers.pack(torch.zeros(2, 5, dtype=torch.bool))[0].shape == (2, 0)


def test_causal_logits_are_the_linear_map_of_both_tokens():
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(1, 12), torch.randn(1)
    z = torch.cat((x, torch.cat((torch.zeros(2, 1, 6), x[:, :-1]), 1)), dim=-1)
    expected = (z @ weight.T)[..., 0] + bias
    logits, carried = routers.causal_logits(x, weight, bias)
    torch.testing.assert_close(logits, expected)
    step, _ = routers.causal_logits(x[:, 5:6], weight, bias, carried[:, 4])
    torch.testing.assert_close(step, expected[:, 5:6])


def test_straight_through_has_value_one_and_the_gradient_of_the_gate():
    gate = torch.tensor([0.2, 0.9], requires_grad=True)
    out = routers.straight_through(gate)
    assert out.tolist() == [1.0, 1.0]
    (out * torch.tensor([3.0, 5.0])).sum().backward()
    assert gate.grad.tolist() == [3.0, 5.0]


@pytest.mark.parametrize("value", [1e-3, 0.437, 1.025, 30.0])
def test_inverse_softplus(value):
    raw = torch.tensor(routers.inverse_softplus(value), dtype=torch.float64)
    torch.testing.assert_close(torch.nn.functional.softplus(raw).item(), value, rtol=1e-9, atol=0)


def test_routing_is_float32_under_autocast():
    x, weight = torch.randn(1, 8, 64), torch.randn(1, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = routers.linear_score(x, weight)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, (x @ weight.T)[..., 0])
