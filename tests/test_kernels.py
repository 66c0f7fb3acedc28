"""The linear layer and the loss against PyTorch's own operators, values and gradients; and what the loss holds in memory."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ARCHITECTURES, needs_compiler, random_ids, small_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import generation
import kernels
from model import ModelConfig, Transformer


def agree(ours, theirs, inputs, rtol=1e-5, atol=1e-5):
    """Equal values, and equal gradients of a random direction."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    direction = torch.randn_like(theirs)
    gradients = (torch.autograd.grad(y, inputs, direction.to(y.dtype)) for y in (ours, theirs))
    for got, expected in zip(*gradients, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol * expected.abs().max().item())


@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_layer(bias, monkeypatch):
    torch.manual_seed(0)
    x, layer = torch.randn(3, 50, 40, requires_grad=True), kernels.Linear(40, 70, bias)
    calls, product = [], kernels.product
    monkeypatch.setattr(kernels, "product", lambda *args: calls.append(args[0].shape) or product(*args))
    for smallest in (0, kernels.SMALLEST):  # through oneDNN, and not
        monkeypatch.setattr(kernels, "SMALLEST", smallest)
        agree(layer(x), F.linear(x, layer.weight, layer.bias), [x, *layer.parameters()])
        with torch.no_grad():
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert len(calls) == (4 if kernels.ONEDNN else 0)  # forward, two of backward, forward

    monkeypatch.setattr(kernels, "SMALLEST", 0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))
    assert len(calls) == (4 if kernels.ONEDNN else 0)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_by_packed_weights(dtype, monkeypatch):
    """Without gradients by oneDNN, packed where they are held so; with them, or in bfloat16 unpacked, as PyTorch has it."""
    torch.manual_seed(0)
    for name, value in {"ONEDNN": False, "PACKS": {dtype}, "LARGE_WEIGHT": 1 << 17}.items():
        monkeypatch.setattr(kernels, name, value)
    used, product = [], torch.ops.mkldnn._linear_pointwise

    def noted(x, weight, *others):
        used.append(weight.is_mkldnn)
        return product(x, weight, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noted)
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for width, bias in ((300, True), (300, False), (40, True)):
        layer = kernels.Linear(500, width, bias).to(dtype)
        packed = kernels.pack([layer.weight])
        assert len(packed) == (width == 300)
        for held in (True, False):
            if not held:
                del packed
            for rows in range(20):
                x = torch.randn(rows, 1, 500).to(dtype)
                expected = F.linear(x, layer.weight, layer.bias)
                assert torch.equal(layer(x), expected)
                with torch.no_grad():
                    torch.testing.assert_close(layer(x), expected, **bound)
                    assert layer(x.view(1, rows, 500)).is_contiguous()
                taken = width == 300 and 0 < rows <= 16 and (held or dtype == torch.float32)
                assert used == (2 * [held] if taken else []), (rows, held)
                used.clear()
        assert not kernels._PACKED


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
def test_what_is_packed_is_never_stale(monkeypatch):
    monkeypatch.setattr(kernels, "PACKS", {torch.float32})
    monkeypatch.setattr(kernels, "LARGE_WEIGHT", 0)
    x, layer = torch.randn(3, 1, 48), kernels.Linear(48, 48, bias=False)
    packed = kernels.pack([layer.weight])
    with torch.no_grad():
        torch.testing.assert_close(kernels.product(x, layer.weight.t()), x @ layer.weight)  # at the same address
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), x @ layer.weight.t())
        layer.weight.copy_(torch.randn(48, 48))
        torch.testing.assert_close(layer(x), x @ layer.weight.t())
    assert len(kernels._PACKED) == len(packed) == 1
    monkeypatch.setattr(kernels, "free_memory", lambda: 2 * layer.weight.nbytes - 1)
    assert kernels.pack([layer.weight]) == []
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "PACKS", {torch.float32})
    with torch.inference_mode():
        assert kernels.pack([torch.randn(1000, 1000)]) == []


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_generation_packs_each_weight_once_and_lets_go_of_all(head, monkeypatch):
    """Also where it is interrupted and a traceback keeps its frame: what .data changes then nobody counts."""
    monkeypatch.setattr(kernels, "LARGE_WEIGHT", 0)
    packed = []
    monkeypatch.setattr(kernels, "pack", lambda weights: packed.extend(weights) or packed)
    model, ids = small_model("dense", tie_word_embeddings=head == "tied"), random_ids(1, 5)
    model.generate(ids, 2)
    assert not packed, "too few tokens"
    monkeypatch.setattr(generation, "sample", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        model.generate(ids, generation.PACKED)
    assert kept.tb is not None and not packed
    with model.packed():
        assert len({id(weight) for weight in packed}) == len(packed) == 5 * 7 + 1


def test_another_version_of_this_file_has_operators_of_its_own(tmp_path):
    """A model's folder holds the version that it was saved with: two may be opened in one process."""
    source = Path(kernels.__file__).read_text()
    (tmp_path / "kernels_before.py").write_text(source.replace("hd**-0.5", "hd**-1.0"))
    spec = importlib.util.spec_from_file_location("kernels_before", tmp_path / "kernels_before.py")
    before = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(before)
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    ours, theirs = (module.OPS.attend(q, k, v, False)[0] for module in (kernels, before))
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(theirs, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, heads, keys", [(2, 4, 4), (64, 4, 2), (201, 6, 2)])
def test_attention_written_out(T, heads, keys, dtype, monkeypatch):
    """Against PyTorch's own in float64: values, gradients and FLOPs; half precision no further from it than PyTorch's."""
    monkeypatch.setattr(kernels, "WRITTEN_OUT", range(2, 1025))
    torch.manual_seed(0)
    given = [torch.randn(3, T, n, 16).to(dtype).transpose(1, 2).requires_grad_() for n in (heads, keys, keys)]
    direction = torch.randn(3, heads, T, 16).to(dtype)

    def outcome(attention, tensors):
        with FlopCounterMode(display=False) as counter:
            y = attention(*tensors)
            return [y, *torch.autograd.grad(y, tensors, direction.to(y.dtype))], counter.get_total_flops()

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    exact = [t.detach().double().requires_grad_() for t in given]
    with sdpa_kernel(SDPBackend.MATH):
        expected, flops = outcome(torchs, exact)
        assert all(map(torch.equal, outcome(kernels.attention, exact)[0], expected)), "float64 stays PyTorch's"
    (ours, counted), (theirs, _) = outcome(kernels.attention, given), outcome(torchs, given)
    assert counted == flops
    for got, own, exactly in zip(ours, theirs, expected, strict=True):
        assert got.dtype == dtype and got.stride() == own.stride()
        error, their_error = ((t - exactly).abs().max() / exactly.abs().max() for t in (got, own))
        assert error < (2e-6 if dtype == torch.float32 else max(0.01, 2 * their_error))

    with torch.no_grad():
        assert torch.equal(kernels.attention(*given), ours[0])
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            assert torch.equal(kernels.attention(*(t.float() for t in given)), ours[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in given]
        y = kernels.attention(*fake)
        assert [t.shape for t in torch.autograd.grad(y.sum(), fake)] == [t.shape for t in given]


@needs_compiler
def test_the_linear_layer_compiled(monkeypatch):
    """By the real compiler, which knows oneDNN's operator and refuses it in training."""
    monkeypatch.setattr(kernels, "SMALLEST", 0)
    torch.manual_seed(0)
    x, layer = torch.randn(3, 50, 40, requires_grad=True), kernels.Linear(40, 70)
    ours = torch.compile(layer, fullgraph=True)(x)
    agree(ours, F.linear(x, layer.weight, layer.bias), [x, *layer.parameters()])


@pytest.mark.skipif(not kernels.ONEDNN, reason="this processor takes PyTorch's own path")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_large_model_computes_what_pytorchs_own_layers_compute(architecture, monkeypatch):
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 600}
    model, ids = Transformer(ModelConfig(architecture=architecture, **shape)).train(), random_ids(4, 256)
    results = []
    for smallest in (kernels.SMALLEST, 1 << 62):
        monkeypatch.setattr(kernels, "SMALLEST", smallest)
        with FlopCounterMode(display=False) as counter:
            loss = model(ids, ids).loss
            grads = torch.autograd.grad(loss, model.parameters())
        counted = sum(
            n for operation, n in counter.get_flop_counts()["Global"].items() if "linear_pointwise" in str(operation)
        )
        results.append((loss, grads, counter.get_total_flops(), counted))
    (loss, grads, flops, counted), (own_loss, own_grads, own_flops, none) = results
    torch.testing.assert_close(loss, own_loss)
    for got, expected in zip(grads, own_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert flops == own_flops and counted > 0.5 * flops and none == 0


@pytest.mark.parametrize("vocab", [97, 1 << 17])
def test_the_loss_equals_cross_entropy(vocab):
    torch.manual_seed(0)
    hidden, weight = torch.randn(400, 16, requires_grad=True), torch.randn(vocab, 16, requires_grad=True)
    targets = torch.randint(0, vocab, (400,))
    targets[7:20] = -100
    ours = kernels.head_loss(hidden, weight, targets)  # in two chunks
    theirs = F.cross_entropy(F.linear(hidden, weight), targets)
    agree(ours, theirs, (hidden, weight), atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(kernels.head_loss(hidden, weight, targets), theirs, rtol=1e-5, atol=0)
    only = kernels.head_loss(hidden, weight.detach(), targets)  # a frozen head
    agree(only, F.cross_entropy(F.linear(hidden, weight.detach()), targets), [hidden], atol=1e-6)


def test_the_loss_of_extreme_and_of_half_precise_logits():
    targets = torch.tensor([0, 1, 2])
    for scale in (1e4, -1e4):  # a target of probability zero: its loss is the difference of the logits
        hidden, weight = torch.ones(3, 1), scale * torch.tensor([[1.0], [2.0], [3.0]])
        expected = F.cross_entropy((hidden @ weight.t()).double(), targets)
        assert kernels.head_loss(hidden, weight, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(300, 16), torch.randn(50, 16), torch.randint(0, 50, (300,))
    half = [t.bfloat16().requires_grad_() for t in (hidden, weight)]
    exact = [t.detach().double().requires_grad_() for t in half]
    ours, theirs = kernels.head_loss(*half, targets), F.cross_entropy(F.linear(*exact), targets)
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(theirs.item(), rel=5e-3)
    for got, expected in zip(torch.autograd.grad(ours, half), torch.autograd.grad(theirs, exact), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), expected, rtol=0.03, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("vocab", [97, 1 << 17])
def test_the_loss_with_a_teacher_is_cross_entropy_and_kl_divergence(vocab):
    torch.manual_seed(0)
    hidden, weight = torch.randn(400, 16, requires_grad=True), torch.randn(vocab, 16, requires_grad=True)
    teacher, targets = (torch.randn(400, 8), torch.randn(vocab, 8)), torch.randint(0, vocab, (400,))
    targets[7:20] = -100

    def both(hidden, weight, teacher):
        q, p = F.linear(*teacher).log_softmax(-1), F.linear(hidden, weight).log_softmax(-1)
        divergence = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)[targets != -100].mean()
        return F.nll_loss(p, targets), divergence

    exact_inputs = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact, theirs = both(*exact_inputs, [t.double() for t in teacher]), both(hidden, weight, teacher)
    loss, *parts = kernels.taught_loss(hidden, weight, targets, teacher, 0.7)
    for part, expected in zip(parts, exact, strict=True):
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=0)
        assert not part.requires_grad
    whole, their_whole = exact[0] + 0.7 * exact[1], theirs[0] + 0.7 * theirs[1]
    torch.testing.assert_close(loss.double(), whole, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(y, x) for y, x in ((loss, (hidden, weight)), (their_whole, (hidden, weight)))]
    for got, their_own, expected in zip(*gradients, torch.autograd.grad(whole, exact_inputs), strict=True):
        rounding = (their_own - expected).abs().max()  # what float32 costs PyTorch's own operators
        assert 0 < (got - expected).abs().max() < 1.5 * rounding < 1e-4 * expected.abs().max()
    same = kernels.taught_loss(hidden, weight, targets, (hidden.detach(), weight.detach()), 1.0)
    assert abs(same[2].item()) < 1e-6  # nothing to learn from oneself
    with torch.no_grad():
        torch.testing.assert_close(
            kernels.taught_loss(hidden, weight, targets, teacher, 0.7)[0], loss, rtol=1e-6, atol=0
        )


def test_every_negative_target_is_none():
    hidden, weight, targets = torch.randn(6, 8), torch.randn(11, 8), torch.tensor([3, -100, 0, 10, 7, 2])
    expected = kernels.head_loss(hidden, weight, targets)
    assert torch.equal(kernels.head_loss(hidden, weight, targets.masked_fill(targets < 0, -1)), expected)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="getrusage would begin with the parent's peak")
@pytest.mark.parametrize("taught", [False, True])
def test_loss_memory_is_bounded(taught):
    """2,048 tokens by 32,768 words would be 256 MiB of float32 logits; the process grows by what `loss_memory` says."""
    code = (
        "import re, torch; from kernels import head_loss, loss_memory, taught_loss\n"
        "h, w = torch.randn(2048, 8, requires_grad=True), torch.randn(32768, 8, requires_grad=True)\n"
        "def grow(n):\n"
        f"    loss, taught = (taught_loss, [(h[:n].detach(), w.detach()), 1.0]) if {taught} else (head_loss, [])\n"
        "    out = loss(h[:n], w, torch.zeros(n, dtype=torch.long), *taught)\n"
        "    (out[0] if taught else out).backward()\n"
        "    w.grad = None\n"
        "    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        f"before = grow(64); print(grow(2048) - before, loss_memory(2048, w, w.dtype, 'cpu', {taught}))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, estimated = map(float, process.stdout.split())
    assert grown == pytest.approx(estimated, rel=0.25)


@pytest.mark.parametrize("V", [7, 1000, 4096, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("taught", [False, True])
def test_the_loss_in_triton_is_that_of_float64(V, dtype, taught, gpu_kernels):
    """The kernels themselves, without a GPU in Triton's interpreter: losses, gradients, for words that no block ends with."""
    torch.manual_seed(V)
    logits, teacher = ((4 * torch.randn(5, V)).to(dtype) for _ in range(2))
    targets = torch.randint(0, V, (5, 1))
    targets[2] = -100
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets[:, 0], reduction="none")[:, None]
    if taught:
        log_q = teacher.double().log_softmax(-1)
        divergence = (log_q.exp() * (log_q - exact.log_softmax(-1))).sum(-1) * (targets[:, 0] != -100)
        expected = torch.stack((expected[:, 0], divergence), 1)
    (expected * torch.tensor([1, 0.7])[: expected.size(1)]).sum().backward()
    losses, grad = gpu_kernels.losses_and_gradient(logits.clone(), targets, teacher if taught else None, 0.7)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
    # the interpreter cuts bfloat16 off where a GPU rounds: an error of up to 2⁻⁷, not 2⁻⁸
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(grad.double(), exact.grad, rtol=rounding, atol=max(1e-6, rounding * 2**-6))
    assert not grad[2].any() and grad.dtype == dtype


@pytest.mark.parametrize("taught", [False, True])
def test_the_head_gets_the_same_gradients_through_triton(taught, gpu_kernels, monkeypatch):
    torch.manual_seed(1)
    hidden, weight = torch.randn(70, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    teacher = (torch.randn(70, 8), torch.randn(300, 8)) if taught else None
    targets = torch.randint(0, 300, (70,))
    targets[5:9] = -100
    ours = []
    for chunk in (kernels._losses_and_gradient, gpu_kernels.losses_and_gradient):
        monkeypatch.setattr(kernels, "_losses_and_gradient", chunk)
        if taught:
            loss, *parts = kernels.taught_loss(hidden, weight, targets, teacher, 0.7)
        else:
            loss, parts = kernels.head_loss(hidden, weight, targets), []
        ours.append((loss, *parts, *torch.autograd.grad(loss, (hidden, weight))))
    for one, other in zip(*ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "B, n, m, biased", [(1, 5, 9, True), (1, 2000, 7, False), (3, 300, 20, True), (8, 129, 64, False)]
)
def test_a_product_in_triton_skips_the_rows_that_do_not_run(B, n, m, biased, dtype, gpu_kernels):
    """Against float64; and where none runs no weight is read: it may be anything."""
    torch.manual_seed(n)
    x, weight, bias = torch.randn(B, 1, n).to(dtype), torch.randn(m, n).to(dtype), torch.randn(m).to(dtype)
    runs = torch.arange(B) % 2 == 0
    out = kernels.OPS.product_where(x, runs, weight, bias if biased else None)
    expected = x.double() @ weight.double().t() + (bias.double() if biased else 0)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(out[runs].double(), expected[runs], rtol=rounding, atol=1e-5 * n**0.5)
    x[~runs] = torch.nan
    assert torch.equal(kernels.OPS.product_where(x, runs, weight, None)[~runs], torch.zeros_like(out[~runs]))
    none, anything = torch.zeros(B, dtype=torch.bool), torch.full_like(weight, torch.nan)
    assert not kernels.OPS.product_where(x, none, anything, bias).any()


class OnCuda(torch.Tensor):
    """A tensor that says it lies there."""

    is_cuda = True


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_keys_give_what_grouped_queries_do(masked, monkeypatch):
    """What runs where CUDA's flash kernel cannot: values and gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, requires_grad=True) for heads in (6, 2, 2))
    mask = (torch.rand(2, 1, 9, 9) < 0.7) | torch.eye(9, dtype=torch.bool) if masked else None
    monkeypatch.setattr(kernels, "flash_runs", lambda *given: False)
    results, groups = [], []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: groups.append(k["enable_gqa"]) or plain(*a, **k)
    )
    for ours in (q, q.as_subclass(OnCuda)):
        out = kernels.attention(ours, k, v, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert groups == [True, False]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other.as_subclass(torch.Tensor))


def test_attention_is_masked_where_the_causal_kernel_lets_the_future_in(monkeypatch):
    """As on MPS in half precision, which transformers may ask a routed model for."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8) for heads in (6, 2, 2))
    expected, plain, masks = kernels.attention(q, k, v), F.scaled_dot_product_attention, []
    monkeypatch.setattr(kernels, "lets_the_future_in", lambda q: True)
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, mask, **how: masks.append(mask) or plain(q, k, v, mask, **how),
    )
    torch.testing.assert_close(kernels.attention(q, k, v), expected)
    assert torch.equal(masks[0], torch.ones(9, 9).tril().bool())


@pytest.mark.parametrize(
    "capability, dtype, masked, runs",
    [
        ((9, 0), torch.bfloat16, False, True),
        ((7, 5), torch.float16, False, False),  # a T4
        ((9, 0), torch.float32, False, False),
        ((9, 0), torch.bfloat16, True, False),
    ],
)
def test_where_the_flash_kernel_runs(capability, dtype, masked, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels.flash_runs(dtype, masked) == runs
