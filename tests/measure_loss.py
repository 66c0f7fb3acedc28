"""The loss over a large vocabulary, forward and backward: time, share of the card's peak, memory. On demand, by gpu.sh.

python tests/measure_loss.py TOKENS WIDTH VOCABULARY
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.nn.functional as F

import kernels
from device import device_name, peak_flops, synchronize

N, D, V = map(int, sys.argv[1:])
ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32


def seconds(run, rounds=5):
    times = []
    for _ in range(rounds + 2):
        synchronize(DEVICE)
        start = time.perf_counter()
        run()
        synchronize(DEVICE)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def plain(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight.to(DTYPE)).float(), targets)


def taught(hidden, weight, targets, teacher):
    return kernels.taught_loss(hidden, weight, targets, teacher, 1.0)[0]


def main():
    torch.manual_seed(0)
    hidden = torch.randn(N, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = (0.02 * torch.randn(V, D, device=DEVICE)).requires_grad_()
    targets = torch.randint(V, (N,), device=DEVICE)
    teacher = (hidden.detach(), weight.detach().to(DTYPE))
    block = torch.empty(1 << 26, device=DEVICE)
    speed = 2 * block.nbytes / seconds(lambda: block.clone()) / 1e9
    print(
        f"{device_name(DEVICE)}, {DTYPE}: {N:,} tokens, width {D}, {V:,} words; a copy reads and writes {speed:,.0f} GB/s"
    )
    fused, torchs = kernels._fused, kernels._losses_and_gradient
    ways = {"in chunks, by torch": (lambda: torchs, kernels.head_loss, ())}
    if ON_CUDA and fused() is not torchs:
        ways["in chunks, in Triton"] = (fused, kernels.head_loss, ())
        ways["in Triton, with a teacher"] = (fused, taught, (teacher,))
    ways["torch's, whole"] = (lambda: torchs, plain, ())
    peak = peak_flops(DEVICE, DTYPE)
    print(f"{'loss':28} {'ms':>9} {'TFLOP/s':>9} {'of peak':>8} {'GB beyond what goes in and out':>31}")
    for name, (kernel, loss, more) in ways.items():
        kernels._fused = kernel

        def step(loss=loss, more=more):
            loss(hidden, weight, targets, *more).backward()
            hidden.grad = weight.grad = None

        try:
            took = seconds(step)
            if ON_CUDA:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                extra = f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f}"
            else:
                extra = "n/a"
        except torch.cuda.OutOfMemoryError:
            print(f"{name:28} out of memory")
            continue
        rate = (8 if more else 6) * N * D * V / took
        print(
            f"{name:28} {1e3 * took:9.2f} {rate / 1e12:9.2f} {f'{rate / peak:.1%}' if peak else 'n/a':>8} {extra:>31}"
        )


main()
