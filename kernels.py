"""What PyTorch leaves slow: the linear layer, attention and the heap on a CPU, the loss over a large vocabulary, and on a GPU
the products of a decoding step.

Plain tensors in and out, with gradients; this file knows no model. What each gains is in docs/LOG.md.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import sysconfig
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula


def constant_to_compiler(function):
    """What torch.compiler.assume_constant_result does, without importing the compiler: half of every script's start."""
    function._dynamo_marked_constant = True
    return function


def made_by(vendor: str) -> bool:
    """Whether this processor is an x86 one of "GenuineIntel" or "AuthenticAMD"; False where there is no telling."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and vendor in cpuinfo.read_text()


# Which library multiplies float32 on this processor. Torch calls MKL, which is the faster one on Intel's, in training by
# 7 %, in decoding by a third; on others it knows AVX2 only, and runs products of one to some twenty rows on one core or
# nearly so. It goes by vendor and instruction set, not by a measurement: what is resumed must find the same bits. Figures of
# all of it are in docs/LOG.md.
_onednn = torch.backends.mkldnn.is_available()
# All products: oneDNN uses AVX-512 on all that have it.
ONEDNN = _onednn and torch.backends.cpu.get_cpu_capability() == "AVX512" and not made_by("GenuineIntel")
# Products of a decoding step alone, on AMD's with AVX2; the others stay MKL's.
SKINNY = _onednn and torch.backends.cpu.get_cpu_capability() == "AVX2" and made_by("AuthenticAMD")
# What of a decoding step oneDNN multiplies here, and is worth packing for it.
PACKS = {torch.float32} if ONEDNN or SKINNY else set()
if _onednn and torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    PACKS.add(torch.bfloat16)
# oneDNN takes some milliseconds to prepare a new shape: worth it for so many multiplications, or for the few rows of a
# decoding step, whose shapes come again and again; small weights are still MKL's.
SMALLEST, FEW_ROWS, LARGE_WEIGHT = 1 << 24, 16, 1 << (16 if ONEDNN else 17)

# Causal attention of so many tokens is written out, QUERIES at a time: torch's own kernel takes 1.2 to 2.3 times as long in
# training. Shorter it is not worth it, longer it keeps too many probabilities.
WRITTEN_OUT, QUERIES = range(128, 1025) if ONEDNN else range(0), 64


def triton_runs() -> bool:
    """Whether Triton is there, and what it needs to start its kernels: a C compiler and Python's headers; its interpreter
    needs neither.
    """
    compiler = any(map(shutil.which, (os.environ.get("CC", ""), "clang", "gcc")))
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks for them
    headers = Path(sysconfig.get_path("include", scheme), "Python.h").exists()
    starts = compiler and headers or bool(os.environ.get("TRITON_INTERPRET"))
    return starts and importlib.util.find_spec("triton") is not None


TRITON = triton_runs()


def _triton():
    import gpu_kernels

    return gpu_kernels


# A process may hold this file several times, and other versions of it: beside each model that transformers opens lies a
# copy. The first of a version registers its operators.
NAME = "nanodtf_" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
OPS = getattr(torch.ops, NAME)
FIRST = not hasattr(OPS, "product")

if PACKS and torch.ops.mkldnn._linear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * x_shape.numel() * weight_shape[0]


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x · weightᵀ + bias by oneDNN, without gradients: (…, n), (m, n), (m) → (…, m), on the CPU."""
    return (OPS.product if torch.compiler.is_compiling() else _product)(x, weight, bias)


def _product(x, weight, bias):
    if _PACKED and weight.is_contiguous():  # and no transpose of one that is packed
        packed = _PACKED.get(weight.data_ptr())
        if packed is not None and packed.version == weight._version:
            weight = packed
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


_PACKED = weakref.WeakValueDictionary()  # {address of a weight: the same as oneDNN lays it out}


def pack(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Lays weights (m, n) out as oneDNN multiplies few rows by them fastest, for as long as the result is held.

    That takes some decoding steps' time, and their memory once more; without room for it nothing is done.
    """
    weights = [w.detach() for w in weights if w.device.type == "cpu" and w.dtype in PACKS and w.numel() >= LARGE_WEIGHT]
    untracked = any(w.is_inference() for w in weights)  # whose changes nobody counts
    if untracked or sum(w.nbytes for w in weights) > free_memory() / 2:
        return []
    packed = []
    for weight in weights:
        packed.append(torch.ops.mkldnn._reorder_linear_weight(weight, FEW_ROWS // 2))
        packed[-1].version = weight._version
        _PACKED[weight.data_ptr()] = packed[-1]
    return packed


def free_memory() -> float:
    """Bytes that this machine can still give, infinite where it does not say."""
    meminfo = Path("/proc/meminfo")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines()) if meminfo.exists() else {}
    return 1024 * float(lines.get("MemAvailable", "inf").removesuffix("kB"))


# The same for the compiler, which asks of an operator that it knows that the weights be constants.
if FIRST:
    _library = torch.library.Library(NAME, "DEF")
    _library.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    _library.impl("product", _product, "CPU")
    torch.library.register_fake(f"{NAME}::product", lambda x, w, b: x.new_empty(*x.shape[:-1], w.size(0)))
    _library.define("product_where(Tensor x, Tensor runs, Tensor weight, Tensor? bias) -> Tensor")
    _library.impl("product_where", lambda *given: _triton().product_where(*given), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAME}::product_where", lambda x, runs, w, b: x.new_empty(*x.shape[:-1], w.size(0)))


def keep_heap():
    """Lets this process keep the memory that it has freed, up to 2 GiB, where its C library is glibc.

    Else glibc hands every large tensor back to the system, and the next one of that size arrives page by page: a tenth to
    a fifth of a training step on the CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_max = -1, -4  # their names in malloc.h
        mallopt(trim_threshold, 2**31 - 1), mallopt(mmap_max, 0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        x, flat = x.flatten(0, -2), grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = product(grad, weight.t()) if needs_x else None
        grad_weight = None
        if needs_weight:  # what stands first is copied, transposed: better the narrower one
            wide = x.size(1) > flat.size(1)
            grad_weight = product(flat.t(), x.t()) if wide else product(x.t(), flat.t()).t()
        return grad_x, grad_weight, flat.sum(0) if needs_bias else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear: (…, n), (m, n), (m) → (…, m), the fastest way that is there for these tensors."""
    if x.device.type != "cpu" or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows, trains, float32 = x.numel() // x.size(-1), torch.is_grad_enabled(), x.dtype == torch.float32
    if ONEDNN and float32 and rows * weight.numel() >= SMALLEST:
        return _Linear.apply(x, weight, bias) if trains else product(x, weight, bias)
    few = 0 < rows <= FEW_ROWS and weight.numel() >= LARGE_WEIGHT and x.dtype in PACKS
    # Half precision torch gives to oneDNN itself: only what is packed is faster. Compiled code asks when it runs.
    if few and not trains and (float32 or torch.compiler.is_compiling() or _PACKED):
        return product(x, weight, bias)
    return F.linear(x, weight, bias)


class _Attention(torch.autograd.Function):
    """Causal attention as products of QUERIES queries at a time, of which the probabilities are kept for the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v):
        y, p = OPS.attend(q, k, v, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, y, p)
        return y

    @staticmethod
    def backward(ctx, grad):
        return OPS.attend_backward(grad, *ctx.saved_tensors)


def keys_kept(T: int, device: str) -> float:
    """How many probabilities a query of T tokens leaves for the backward pass, on average."""
    return _pairs(T) / T if device == "cpu" and T in WRITTEN_OUT else 0


def _blocks(T: int) -> list[tuple[int, int]]:
    """(first query, behind the last) of each block; it sees the keys before its end."""
    return [(a, min(a + QUERIES, T)) for a in range(0, T, QUERIES)]


def _pairs(T: int) -> int:
    """How many queries and keys of one head the blocks bring together."""
    return sum((b - a) * b for a, b in _blocks(T))


def _by_group(x, n: int):
    """(B, H, T, hd) → (B, n, H / n, T, hd), what each of n keys is asked by."""
    return x.unflatten(1, (n, -1))


def _attend_shapes(q, k, v, keep: bool):
    B, H, T, _ = q.shape
    return torch.empty_like(q), q.new_empty(B * H * _pairs(T) if keep else 0)


@torch.autocast("cpu", enabled=False)
def _attend(q, k, v, keep: bool):
    """Causal attention: q (B, H, T, hd), k, v (B, n_kv, T, hd) → the like of q, and where `keep`, the probabilities."""
    (B, _, T, hd), n = q.shape, k.size(1)
    y, p = _attend_shapes(q, k, v, keep)
    y_of, q_of, left = _by_group(y, n), _by_group(q, n), p
    # Scores in float32, as in torch's own kernel.
    keys = k.float().mul(hd**-0.5).transpose(2, 3).flatten(0, 1)  # (B · n_kv, hd, T)
    values = v.flatten(0, 1)  # (B · n_kv, T, hd)
    later = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    for a, b in _blocks(T):
        queries = q_of[..., a:b, :].float().reshape(B * n, -1, hd)  # (B · n_kv, group · (b − a), hd)
        scores = torch.bmm(queries, keys[..., :b]).view(B * n, -1, b - a, b)
        scores[..., a:].masked_fill_(later[: b - a, : b - a], -torch.inf)
        found = scores.softmax(-1).to(v.dtype)
        y_of[..., a:b, :] = torch.bmm(found.view(B * n, -1, b), values[:, :b]).view_as(y_of[..., a:b, :])
        if keep:
            left[: found.numel()] = found.flatten()
            left = left[found.numel() :]
    return y, p


@torch.autocast("cpu", enabled=False)
def _attend_backward(grad, q, k, v, y, p):
    """The gradients of q, k and v."""
    (B, _, T, hd), n = q.shape, k.size(1)
    grad_q = torch.empty_like(q)
    of_q, q_of, grad_of = (_by_group(t, n) for t in (grad_q, q, grad))
    keys, values = k.flatten(0, 1), v.flatten(0, 1)  # (B · n_kv, T, hd)
    grad_k, grad_v = (torch.zeros(B * n, T, hd) for _ in range(2))  # float32
    along = (grad.float() * y).sum(-1).view(B * n, -1, T, 1)
    for a, b in _blocks(T):
        queries, g = (t[..., a:b, :].reshape(B * n, -1, hd) for t in (q_of, grad_of))
        found, p = p[: g.size(0) * g.size(1) * b].view(B * n, -1, b - a, b), p[g.size(0) * g.size(1) * b :]
        of_score = torch.bmm(g, values[:, :b].transpose(1, 2)).float().view_as(found)
        of_score = of_score.sub_(along[:, :, a:b]).mul_(found).mul_(hd**-0.5).to(q.dtype).view(B * n, -1, b)
        grad_v[:, :b] += torch.bmm(found.view_as(of_score).transpose(1, 2), g)
        grad_k[:, :b] += torch.bmm(of_score.transpose(1, 2), queries)
        of_q[..., a:b, :] = torch.bmm(of_score, keys[:, :b]).view_as(of_q[..., a:b, :])
    return grad_q, *(torch.empty_like(k).copy_(grad.view_as(k)) for grad in (grad_k, grad_v))


if FIRST:
    _library.define("attend(Tensor q, Tensor k, Tensor v, bool keep) -> (Tensor, Tensor)")
    _library.define(
        "attend_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor y, Tensor p) -> (Tensor, Tensor, Tensor)"
    )
    _library.impl("attend", _attend, "CPU")
    _library.impl("attend_backward", _attend_backward, "CPU")
    torch.library.register_fake(f"{NAME}::attend", _attend_shapes)
    torch.library.register_fake(f"{NAME}::attend_backward", lambda *given: tuple(map(torch.empty_like, given[1:4])))

    # The full square, as torch counts attention: two products forward, four backward.
    @register_flop_formula(OPS.attend)
    def _attend_flops(q_shape, *args, out_shape=None, **kwargs) -> int:
        return 4 * q_shape.numel() * q_shape[2]

    @register_flop_formula(OPS.attend_backward)
    def _attend_backward_flops(grad_shape, *args, out_shape=None, **kwargs) -> int:
        return 8 * grad_shape.numel() * grad_shape[2]


def attention(q, k, v, mask=None):
    """Attention of grouped queries: q (B, H, Q, hd), k, v (B, n_kv, S, hd) → (B, H, Q, hd). mask None: causal.

    On CUDA only the flash kernel takes groups as they are. Where it cannot run, keys and values are repeated for another
    one that is as frugal: torch would keep all H · Q · S scores.
    """
    if mask is None and q.device.type == "cpu" and q.size(2) in WRITTEN_OUT and not torch.compiler.is_compiling():
        dtype = product_dtype(q)
        if dtype != torch.float64:
            return _Attention.apply(q.to(dtype), k.to(dtype), v.to(dtype))
    if q.is_cuda and not flash_runs(product_dtype(q), mask is not None, q.device.index):
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    q, k, v = dense_on_mps(q, k, v)
    if mask is None and lets_the_future_in(q):
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=k.size(1) < q.size(1))


def dense_on_mps(*tensors):
    """What MPS attends to, without gaps: torch 2.11 computes wrongly with others (pytorch issue 181133)."""
    return tuple(t.contiguous() for t in tensors) if tensors[0].device.type == "mps" else tensors


def lets_the_future_in(q) -> bool:
    """Whether causal attention without a mask is wrong there: on MPS in half precision (pytorch issue 195910)."""
    return q.device.type == "mps" and q.dtype.itemsize == 2


def product_dtype(x) -> torch.dtype:
    """What its products are computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def flash_runs(dtype: torch.dtype, masked: bool, gpu: int | None = None) -> bool:
    """Whether CUDA's flash kernel takes it: half precision, no mask, and a GPU of compute capability 8 or newer."""
    return not masked and dtype.itemsize == 2 and capability(gpu) >= (8, 0)


@constant_to_compiler  # which cannot look into it, and would cut its graph at every attention
def capability(gpu: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(gpu)


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, x, runs=None):
        """runs (B) bool, only where `skips_idle`: x (B, 1, n) → (B, 1, m), 0 in rows that do not run.

        If none does, the weights are not read.
        """
        if runs is None:
            return linear(x, self.weight, self.bias)
        return OPS.product_where(x, runs, self.weight, self.bias)


def skips_idle(x) -> bool:
    """Whether products of a decoding step x (B, 1, d) can leave the weights alone where no row runs, unasked: on CUDA.

    In a large batch some row nearly always runs, and torch's own products are the faster ones. They are without gradients.
    """
    return TRITON and x.is_cuda and x.size(0) <= 8 and not torch.is_autocast_enabled(x.device.type)


def _to_targets(logits, targets):
    """−log p(target) of every row, and its gradient by the logits: (n, V), (n, 1) → (n, 1), (n, V)."""
    highest, at_target = logits.amax(-1, keepdim=True), logits.gather(1, targets)
    p = torch.softmax(logits, -1)
    # log Σ exp(logits) from the largest probability, which is at least 1 / V and cannot vanish
    losses = highest - p.amax(-1, keepdim=True).log() - at_target
    return losses, p.scatter_add_(1, targets, torch.full_like(at_target, -1))


def _to_both(logits, targets, teacher, distill_weight):
    """−log p(target) and KL(teacher ‖ model) of every row, and the gradient of the first + distill_weight · the second:
    (n, V), (n, 1), (n, V) → (n, 2), (n, V).
    """
    log_q, log_p = torch.log_softmax(teacher, -1), torch.log_softmax(logits, -1)
    q, at_target = log_q.exp(), log_p.gather(1, targets)
    divergence = log_q.sub_(log_p).mul_(q).sum(-1, keepdim=True)
    grad = log_p.exp_().mul_(1 + distill_weight).sub_(q, alpha=distill_weight)
    return torch.cat((-at_target, divergence), 1), grad.scatter_add_(1, targets, torch.full_like(at_target, -1))


def _losses_and_gradient(logits, targets, teacher=None, distill_weight=0.0):
    """The losses of every row, and their gradient by the logits, 0 where the target is −100: (n, V), (n, 1) → (n, 1), (n, V).

    With a teacher's logits (n, V) there are two, see `_to_both`: (n, 2).
    """
    if teacher is None:
        losses, grad = _to_targets(logits.float(), targets.clamp(min=0))
    else:
        losses, grad = _to_both(logits.float(), targets.clamp(min=0), teacher.float(), distill_weight)
    counts = targets >= 0
    return losses * counts, grad.mul_(counts).to(logits.dtype)


def _in_pieces(logits, targets, teacher=None, distill_weight=0.0):
    """The same in the logits' own place, in pieces whose float32 copies stay in a processor's cache."""
    rows = max(1, (1 << 21) // logits.size(1))
    losses = logits.new_empty(logits.size(0), 1 if teacher is None else 2, dtype=torch.float32)
    for start in range(0, logits.size(0), rows):
        part = slice(start, start + rows)
        of_teacher = None if teacher is None else teacher[part]
        losses[part], logits[part] = _losses_and_gradient(logits[part], targets[part], of_teacher, distill_weight)
    return losses, logits


def _fused():
    """The same for a GPU, where triton is there: see gpu_kernels.py."""
    return _triton().losses_and_gradient if TRITON else _losses_and_gradient


def _way(kind, dtype, vocab_size):
    """How many rows' logits exist at a time, and what makes their losses and their gradient.

    A CPU wants chunks that it need not fetch from the system anew. Where products are much faster than sums, as in half
    precision and on a GPU, chunks are few and large, since each adds to the weight's gradient.
    """
    if kind == "cuda" and _fused() is not _losses_and_gradient:  # which needs no float32 copies of the logits
        return 4096, _fused()
    on_cpu, half = kind == "cpu", dtype.itemsize == 2
    logits = (1 << 26 if half else 1 << 22) if on_cpu else 1 << 27
    return max(256, logits // vocab_size), _in_pieces if on_cpu and half else _losses_and_gradient


def _weight_gradient(grad, hidden):
    """gradᵀ · hidden in float32: (n, V), (n, d) → (V, d)."""
    if grad.is_cuda and grad.dtype.itemsize == 2:
        return torch.mm(grad.t(), hidden, out_dtype=torch.float32)
    if grad.dtype == torch.float16:  # smaller, or a long sum leaves its range
        return linear(hidden.t() * 2.0**-8, grad.t()).t().float() * 2.0**8
    if grad.dtype == torch.bfloat16:
        return torch.mm(grad.t(), hidden).float()
    return linear(hidden.t(), grad.t()).t()  # the first is copied, transposed: better the narrower one


class _HeadLoss(torch.autograd.Function):
    """Both gradients are made with the loss, while a chunk's logits are there: nothing is computed twice.

    They are those of the sum, whose terms float16 holds; the mean's, an N-th, would vanish there. Products are in hidden's
    format, the weight's gradient is summed, and handed on, in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, teacher, distill_weight):
        total, grad_weight, weight = 0.0, None, weight.to(hidden.dtype)
        kind = "cuda" if hidden.is_cuda else hidden.device.type
        rows, losses_and_gradient = _way(kind, hidden.dtype, weight.size(0))
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        share = 1 / (targets >= 0).sum()  # of one token in the mean
        for start in range(0, hidden.size(0), rows):
            part = slice(start, start + rows)
            h, of_teacher = hidden[part], teacher and linear(teacher[0][part], teacher[1])  # (rows, d), (rows, V)
            # (rows, 1), or (rows, 2) with a teacher, and (rows, V)
            losses, grad = losses_and_gradient(linear(h, weight), targets[part, None], of_teacher, distill_weight)
            total += losses.sum(0)
            if grad_hidden is not None:
                grad_hidden[part] = linear(grad, weight.t())
            if ctx.needs_input_grad[1]:
                of_part = _weight_gradient(grad, h)
                grad_weight = of_part if grad_weight is None else grad_weight.add_(of_part)
        ctx.save_for_backward(grad_hidden, grad_weight, share)
        means = total * share
        ctx.mark_non_differentiable(means)
        ctx.set_materialize_grads(False)  # nor zeros in its place
        return means.sum() if teacher is None else means[0] + distill_weight * means[1], means

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, grad_weight, share = ctx.saved_tensors
        grad = grad * share
        of_hidden, of_weight = (None if g is None else g * grad for g in (grad_hidden, grad_weight))
        return of_hidden, of_weight, None, None, None


def loss_memory(n: int, weight: torch.Tensor, dtype: torch.dtype, device: str, taught: bool) -> float:
    """Estimated bytes that `head_loss` of n rows in `dtype`, or `taught_loss`, holds at its peak on a type of device, beside
    its inputs.
    """
    rows, losses_and_gradient = _way(device, dtype, weight.size(0))
    # In float32: logits that are copied, and probabilities; with a teacher their logarithms, too.
    copies = 4 if taught else 2
    in_float32 = 4 * copies if losses_and_gradient is _losses_and_gradient else 0
    logits = min(n, rows) * weight.size(0) * (dtype.itemsize * (1 + taught) + in_float32)
    of_weight = 4 * weight.numel() * (1 + (n > rows)) if weight.requires_grad else 0  # the sum, and what a chunk adds
    return n * weight.size(1) * dtype.itemsize + logits + of_weight


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the logits hidden · weightᵀ with the targets that are not −100, a scalar in float32.

    hidden (N, d), weight (V, d), targets (N). The logits exist one chunk of rows at a time: at 16 × 1024 tokens and a
    vocabulary of 151,936 they would be 10 GB.
    """
    return _loss(hidden, weight, targets, None, 0.0)[0]


def taught_loss(hidden, weight, targets, teacher, distill_weight: float) -> tuple[torch.Tensor, ...]:
    """(cross-entropy + distill_weight · KL(teacher ‖ model), the cross-entropy, the divergence), scalars in float32 of which
    the first has a gradient: means over the targets that are not −100, as in `head_loss`, from one pass over the logits.

    teacher: its hidden states (N, d') and its head (V, d'). The divergence is the distillation loss of Hinton et al. 2015 at
    temperature 1.
    """
    loss, means = _loss(hidden, weight, targets, teacher, distill_weight)
    return loss, *means.unbind()


def _loss(hidden, weight, *given):
    if not torch.is_grad_enabled():  # of which needs_input_grad knows nothing
        hidden, weight = hidden.detach(), weight.detach()
    return _HeadLoss.apply(hidden, weight, *given)
