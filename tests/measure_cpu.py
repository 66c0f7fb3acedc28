"""What kernels.py decides by vendor and instruction set, measured on this processor: few rows, and causal attention.

    OMP_NUM_THREADS=2 python tests/measure_cpu.py

Times of the ways, taking turns, in microseconds and milliseconds; weights come from memory, not from a cache.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.nn.functional as F

import device
import kernels
from measure import interleaved

CPU = torch.device("cpu")
BEYOND_CACHES = 64_000_000  # bytes
WEIGHTS = ((512, 512), (1408, 512), (512, 1408), (1536, 576), (4864, 896), (8192, 512))
ROWS = (1, 2, 4, 8, 16)
ATTENTION = ((8, 4, 2, 32, 256), (4, 9, 3, 64, 256), (2, 9, 3, 64, 512), (2, 8, 2, 64, 1024), (1, 14, 2, 64, 1024))


def milliseconds(ways: dict) -> str:
    times = interleaved(ways, CPU, warmup=1, repeats=7)
    return "  ".join(f"{name} {1e3 * statistics.median(taken):8.3f}" for name, taken in times.items())


@torch.no_grad()
def few_rows():
    """The ways of `kernels.linear` with a few rows, over weights (m, n)."""
    print("\nms for 100 million numbers of weights: torch's own; oneDNN; oneDNN over packed weights")
    kernels.PACKS.add(torch.float32)  # where it is not done, too
    for dtype in sorted(kernels.PACKS, key=str, reverse=True):
        for m, n in WEIGHTS:
            copies = [torch.randn(m, n, dtype=dtype) for _ in range(max(2, BEYOND_CACHES // (dtype.itemsize * m * n)))]
            others = [w.clone() for w in copies]
            packed = kernels.pack(others)  # held: `product` finds them by their address
            ways = {"own": (F.linear, copies), "oneDNN": (kernels.product, copies)}
            ways |= {"packed": (kernels.product, others)} if packed else {}  # with room, and large enough
            scale = 1e8 / (m * n * len(copies))
            for rows in ROWS:
                x = torch.randn(rows, n, dtype=dtype)
                runs = {name: lambda f=f, x=x, ws=ws: [f(x, w) for w in ws] for name, (f, ws) in ways.items()}
                times = interleaved(runs, CPU, warmup=1, repeats=5)
                cells = "  ".join(f"{name} {scale * 1e3 * statistics.median(t):6.2f}" for name, t in times.items())
                print(f"{str(dtype)[6:]:8} {m:5} × {n:5}, {rows:2} rows:  {cells}", flush=True)


def attention():
    """torch's causal attention and the one that is written out: forward and backward pass together, and forward alone."""
    print("\nms of causal attention: torch's own; written out; both without gradients")
    for dtype in (torch.float32, torch.bfloat16):
        for B, H, n, hd, T in ATTENTION:
            shape = [(B, T, heads, hd) for heads in (H, n, n)]
            given = [torch.randn(*each, dtype=dtype).transpose(1, 2).requires_grad_() for each in shape]
            direction = torch.randn(B, H, T, hd, dtype=dtype)
            ways = {"own": own, "written out": kernels._Attention.apply}
            both = {name: lambda way=way, g=given, d=direction: way(*g).backward(d) for name, way in ways.items()}
            with torch.no_grad():
                alone = milliseconds({name: lambda way=way, g=given: way(*g) for name, way in ways.items()})
            print(f"{str(dtype)[6:]:8} B={B} H={H} n_kv={n} hd={hd} T={T}:  {milliseconds(both)}   {alone}", flush=True)


def own(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) < q.size(1))


if __name__ == "__main__":
    torch.manual_seed(0)
    kernels.keep_heap()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{device.device_name(CPU)}, {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    attention()
    few_rows()
