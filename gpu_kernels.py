"""What a GPU does in Triton: the loss over a large vocabulary, and a decoding step's products that skip what does not run.

kernels.py imports this file where it can run: it needs triton, which comes with torch for GPUs. TRITON_INTERPRET=1 runs it on a
CPU, for tests. All arithmetic is in float32.
"""

import torch

try:  # transformers refuses a model whose files import what is not there, unless it is tried
    import triton
    import triton.language as tl
except ImportError:
    raise ImportError("gpu_kernels.py is for GPUs with triton: kernels.py asks before it imports it") from None

# ---------------------------------------------------------------------------------------------------------------------
# The loss: n rows, V words. Logits are read twice and become their gradient where they lie. What torch would do one by one
# (to float32, maximum, exponentials, sum, division, subtraction, back to bfloat16) each reads and writes them all: at
# 16 × 1024 tokens and 151,936 words 5 GB.

BLOCK = 4096  # words that a program has in its registers at a time


@triton.jit
def cross_entropy(logits, targets, losses, V, BLOCK: tl.constexpr):
    """Row by row: −log p(target) to losses (n), p − (1 at the target) over logits (n, V); 0 where the target is −100."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    counts = target >= 0
    at_target = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)  # now: the last loop writes over it
    highest, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        word = start + tl.arange(0, BLOCK)
        x = tl.load(logits + word, word < V, float("-inf")).to(tl.float32)
        before, highest = highest, tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(before - highest) + tl.sum(tl.exp(x - highest), 0)
    log_sum = highest + tl.log(total)
    tl.store(losses + row, tl.where(counts, log_sum - at_target, 0.0))
    for start in range(0, V, BLOCK):
        word = start + tl.arange(0, BLOCK)
        x = tl.load(logits + word, word < V, float("-inf")).to(tl.float32)
        grad = tl.exp(x - log_sum) - tl.where(word == target, 1.0, 0.0)
        tl.store(logits + word, tl.where(counts, grad, 0.0).to(logits.dtype.element_ty), word < V)


@triton.jit
def taught(logits, teacher, targets, losses, distill_weight, V, BLOCK: tl.constexpr):
    """Row by row: −log p(target) and KL(teacher ‖ model) to losses (n, 2), the gradient of the first + distill_weight · the
    second over logits (n, V); 0 where the target is −100.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    teacher += row * V
    target = tl.load(targets + row)
    counts = target >= 0
    at_target = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)  # now: the last loop writes over it
    highest, total = float("-inf"), 0.0  # of the model
    highest_t, total_t, dot = float("-inf"), 0.0, 0.0  # of the teacher; Σ exp(t) (t − x)
    for start in range(0, V, BLOCK):
        word = start + tl.arange(0, BLOCK)
        x = tl.load(logits + word, word < V, float("-inf")).to(tl.float32)
        t = tl.load(teacher + word, word < V, float("-inf")).to(tl.float32)
        before, highest = highest, tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(before - highest) + tl.sum(tl.exp(x - highest), 0)
        before, highest_t = highest_t, tl.maximum(highest_t, tl.max(t, 0))
        weight = tl.exp(t - highest_t)
        total_t = total_t * tl.exp(before - highest_t) + tl.sum(weight, 0)
        dot = dot * tl.exp(before - highest_t) + tl.sum(tl.where(word < V, weight * (t - x), 0.0), 0)
    log_sum, log_sum_t = highest + tl.log(total), highest_t + tl.log(total_t)
    tl.store(losses + 2 * row, tl.where(counts, log_sum - at_target, 0.0))
    tl.store(losses + 2 * row + 1, tl.where(counts, dot / total_t - log_sum_t + log_sum, 0.0))
    for start in range(0, V, BLOCK):
        word = start + tl.arange(0, BLOCK)
        x = tl.load(logits + word, word < V, float("-inf")).to(tl.float32)
        t = tl.load(teacher + word, word < V, float("-inf")).to(tl.float32)
        grad = (1 + distill_weight) * tl.exp(x - log_sum) - distill_weight * tl.exp(t - log_sum_t)
        grad -= tl.where(word == target, 1.0, 0.0)
        tl.store(logits + word, tl.where(counts, grad, 0.0).to(logits.dtype.element_ty), word < V)


def losses_and_gradient(logits: torch.Tensor, targets: torch.Tensor, teacher=None, distill_weight: float = 0.0):
    """(losses (n, 1) in float32, their gradient by the logits) of logits (n, V), which are overwritten; targets (n, 1).

    The loss of a row is the cross-entropy with its target; with a teacher's logits (n, V) there are two, (n, 2), that and
    KL(teacher ‖ model), and the gradient is of the first + distill_weight · the second. 0 where the target is −100.
    """
    n, V = logits.shape
    losses = torch.empty(n, 1 if teacher is None else 2, dtype=torch.float32, device=logits.device)
    given = targets.contiguous(), losses
    with torch.cuda.device_of(logits):  # else Triton starts them on the current one
        if teacher is None:
            cross_entropy[(n,)](logits, *given, V, BLOCK, num_warps=8)
        else:
            taught[(n,)](logits, teacher, *given, distill_weight, V, BLOCK, num_warps=8)
    return losses, logits


# ---------------------------------------------------------------------------------------------------------------------
# The product of a routed layer's decoding step: where no row runs, its weights stay unread. Nobody is asked: programs see the
# selection on the device and end at once, also within a CUDA graph.

OUTPUTS, TILE = 8, 1 << 13  # outputs of a program, numbers of its tile: rows · outputs · inputs at a time


@triton.jit
def product_of(x, runs, weight, bias, out, B, M, N, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """x (B, N) · weightᵀ (M, N) + bias (M) to out (B, M), 0 in rows whose runs (B) is false."""
    row, m = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    run = tl.load(runs + row, row < B, 0) != 0
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    parts = tl.zeros((ROWS, OUTPUTS, INPUTS), tl.float32)  # summed over threads once, behind the loop
    if tl.max(run.to(tl.int32), 0) > 0:
        weights = weight + m.to(tl.int64)[:, None] * N
        for start in range(0, N, INPUTS):
            n = start + tl.arange(0, INPUTS)
            w = tl.load(weights + n[None, :], (m[:, None] < M) & (n[None, :] < N), 0.0).to(tl.float32)
            v = tl.load(x + row[:, None] * N + n[None, :], run[:, None] & (n[None, :] < N), 0.0).to(tl.float32)
            parts += v[:, None, :] * w[None, :, :]
        total = tl.sum(parts, 2)
        if bias is not None:
            total += tl.load(bias + m, m < M, 0.0).to(tl.float32)[None, :]
        total = tl.where(run[:, None], total, 0.0)
    where = (row[:, None] < B) & (m[None, :] < M)
    tl.store(out + row[:, None] * M + m[None, :], total.to(out.dtype.element_ty), where)


def product_where(x: torch.Tensor, runs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x · weightᵀ + bias of the rows that run, 0 in the others.

    x (B, 1, N), runs (B) bool, weight (M, N), bias (M) → (B, 1, M), without gradients.
    """
    (B, _, N), M = x.shape, weight.size(0)
    rows = triton.next_power_of_2(B)
    out = torch.empty(B, 1, M, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(M, OUTPUTS),)
    inputs = TILE // (rows * OUTPUTS)
    given = x.contiguous(), runs.contiguous(), weight, bias, out
    with torch.cuda.device_of(x):
        product_of[grid](*given, B, M, N, rows, OUTPUTS, inputs, num_warps=4)
    return out
