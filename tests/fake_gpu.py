"""A GPU that is not there: tensors without values on a device "gpu", and counts of what is asked of it. For test_fake_gpu.py.

    python tests/fake_gpu.py            counts of every architecture at the shape of Qwen2.5-0.5B, as a table
    python tests/fake_gpu.py small      of models of two layers, as JSON

torch's fake tensors know shapes, types and devices, and refuse a product across devices as CUDA does. Without a CUDA build the
device is a backend made in Python, which the model takes for CUDA (`is_cuda`). Counted are kernels (operators that make or
change a tensor: what a kernel is without a compiler), waits of the host for a value, and copies to the device of what the
host made up. Where the host asks what was selected it hears: 32 tokens of each row, in a decoding step all rows, or all but
the first.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import peft  # noqa: F401, it makes tensors when it is imported: they should have values
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import kernels
import lora
from device import autocast
from model import SIZES, ModelConfig, Transformer
from optimizer import LossScale, make_optimizer, step_unless
from parallel import clip_grad_norm
from train import TrainConfig

GPU = "gpu"


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend(GPU, Backend())
FakeTensor.tolist = torch.Tensor.tolist  # at once, not one by one
torch.Tensor.is_cuda = property(lambda tensor: tensor.device.type == GPU)
kernels.capability = lambda gpu: (9, 0)


def cast_products():
    """Autocast as CUDA has it, for the operators that the model's products are made of."""
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lowered(operator):
        def run(*args, **kwargs):
            dtype = torch.get_autocast_dtype(GPU)
            low = [a.to(dtype) if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in args]
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return operator(*low, **kwargs)

        return run

    for name in ("linear", "matmul", "mm", "scaled_dot_product_attention"):
        library.impl(name, lowered(getattr(torch.ops.aten, name).default))
    return rest, library


libraries = cast_products()


def fused(logits, targets, teacher=None, distill_weight=0.0):
    """The Triton loss, which takes no tensors without values: one kernel."""
    return logits.new_empty(logits.size(0), 1 if teacher is None else 2, dtype=torch.float32), logits


kernels._fused = lambda: fused


class OneKernel(torch.autograd.Function):
    """What CUDA has a kernel of its own for: one forward, as large as the first input, and backward one for each input."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return torch.zeros_like(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.zeros_like, ctx.saved_tensors))


def attention(q, k, v, mask=None, is_causal=False, enable_gqa=False, attn_mask=None):
    """By a kernel that keeps no scores: flash, or the memory-efficient one."""
    mask = attn_mask if mask is None else mask
    dtype = torch.get_autocast_dtype(GPU) if torch.is_autocast_enabled(GPU) else q.dtype
    if enable_gqa and not (mask is None and dtype.itemsize == 2):
        raise AssertionError("on CUDA grouped queries have a fused kernel in half precision and without a mask only")
    return OneKernel.apply(*(t.to(dtype) for t in (q, k, v)))


FUSED = {
    F.scaled_dot_product_attention: attention,
    F.rms_norm: lambda x, shape, weight, eps: OneKernel.apply(x, weight),
    F.silu: lambda x, inplace: OneKernel.apply(x),
}


class Operators(TorchDispatchMode):
    """Counts kernels, and copies from the host."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        tensors = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
        name = function._overloadpacket.__name__
        on_gpu = any(t.is_cuda for t in tensors)
        if name in ("_to_copy", "copy_") and on_gpu and not args[name == "copy_"].is_cuda:
            self.counts["copies"] += 1
        elif on_gpu and not function.is_view and name not in ("empty", "empty_like", "detach", "alias", "lift_fresh"):
            self.counts["kernels"] += 1
        return out


class Host(TorchFunctionMode):
    """Counts what the host asks of the device, and answers it."""

    def __init__(self, counts, idle: int):
        super().__init__()
        self.counts, self.idle = counts, idle

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "item", "__bool__", "__index__") and args[0].is_cuda:
            self.counts["waits"] += 1
            t = args[0]
            if name == "__bool__":
                return False
            value = t.dtype == torch.bool or (1.0 if t.dtype.is_floating_point else 32)
            answer = np.full(t.shape, value)
            answer[: self.idle if t.dtype == torch.bool else 0] = False
            return answer.tolist()
        if name in ("tensor", "as_tensor") and torch.device((kwargs or {}).get("device") or "cpu").type == GPU:
            self.counts["copies"] += 1
            made = torch.from_numpy(np.array(args[0]))  # for its shape and type
            return torch.empty(made.shape, dtype=kwargs.get("dtype") or made.dtype, device=GPU)
        if function in FUSED and args[0].is_cuda:
            function = FUSED[function]
        return function(*args, **kwargs or {})


class Counted:
    """with Counted() as counts: …     idle: so many rows are not selected in a decoding step."""

    def __init__(self, idle: int = 0):
        self.idle = idle

    def __enter__(self):
        counts = Counter(kernels=0, waits=0, copies=0)
        self.modes = [Operators(counts), Host(counts, self.idle)]
        for mode in self.modes:
            mode.__enter__()
        return counts

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
DEVICE = torch.device(GPU)


def model_of(architecture: str, size: dict) -> Transformer:
    with DEVICE:
        return Transformer(ModelConfig(architecture=architecture, **size))


def ids_of(B: int, T: int) -> torch.Tensor:
    return torch.zeros(B, T, dtype=torch.int64, device=GPU)


def training(architecture: str, kind: str, size: dict, B=2, T=64) -> dict[str, Counter]:
    """A step as train.py takes it: its micro-step, and what follows."""
    model, teacher, dtype = model_of(architecture, size).train(), None, torch.bfloat16
    if kind == "float16":
        dtype = torch.float16
    if kind == "lora":
        # Everything is where it should be, and the weights of a module cannot be exchanged for other fake ones.
        torch.nn.Module.to = lambda module, *where, **how: module
        with DEVICE:
            lora.adapt(model, r=4, lora_alpha=8, lora_dropout=0.0)
    if kind == "distillation":
        teacher = torch.zeros(B, T, model.config.hidden_size, device=GPU), model_of("dense", size).head_weight
    optimizer, ids = make_optimizer(model, TrainConfig(device="cpu")), ids_of(B, T)
    with Counted():
        scale = LossScale(dtype, DEVICE)
    with Counted() as micro_step:
        with autocast(DEVICE, dtype):
            out = model(ids, ids, teacher=teacher)
        scale.up(out.loss).backward()
    with Counted() as update:
        scale.down(model.parameters())
        norm = clip_grad_norm(model.parameters(), 1.0, DEVICE)
        bad = 1 - torch.isfinite(out.loss + norm).float()
        step_unless(bad, optimizer)
        if scale.on:
            scale.adapt(bad, out.loss.detach().clone())
    assert all(p.grad.is_cuda for p in model.parameters() if p.requires_grad)
    return {f"micro-step, {kind}": micro_step, f"update, {kind}": update}


@torch.no_grad()
def inference(architecture: str, size: dict, B=2, T=64) -> dict[str, Counter]:
    """A causal forward, and decoding of rows of different lengths."""
    model, ids, found = model_of(architecture, size).eval(), ids_of(B, T), {}
    with Counted() as found["causal forward"]:
        model(ids, routing="causal")
    cache = model.new_cache(B, 2 * T)
    with Counted() as found["prefill"]:
        model(ids, routing="causal", cache=cache, lengths=[T - n % 2 for n in range(B)])
    with Counted() as found["decoding step"]:
        model(ids[:, :1], routing="causal", cache=cache)
    with Counted(idle=1) as found["decoding step, a row idle"]:
        model(ids[:, :1], routing="causal", cache=cache)
    static = model.static_cache(cache)
    with Counted() as found["compiled step"]:
        model.step(ids[:, :1], static)
    with Counted() as found["generate, 32 tokens"]:
        model.generate(ids, 32, temperature=1.0, stop_ids=[0])
    return found


def count(size: dict, kinds: list[str], **shape) -> dict[str, dict[str, Counter]]:
    found = {}
    for architecture in ("dense", "mod", "dtf", "stt"):
        found[architecture] = inference(architecture, size, **shape)
        for kind in kinds:
            found[architecture] |= training(architecture, kind, size, **shape)
    return found


def table(found) -> str:
    """Markdown: kernels, and where there are any waits and copies."""
    lines = ["| | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for what in next(iter(found.values())):
        if what.startswith("update"):  # on a GPU one kernel works on many tensors at a time there, here on one
            continue
        cells = []
        for counts in (of_architecture[what] for of_architecture in found.values()):
            rare = ", ".join(f"{counts[name]} {name}" for name in ("waits", "copies") if counts[name])
            cells.append(f"{counts['kernels']:,}" + (f" ({rare})" if rare else ""))
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    with FakeTensorMode(allow_non_fake_inputs=True):
        if sys.argv[1:] == ["small"]:
            text = json.dumps(count(SMALL, ["bfloat16", "float16", "lora", "distillation"]))
        else:
            text = table(count(SIZES["0.5B"], ["bfloat16"], B=16, T=1024))
    print(text, flush=True)
    os._exit(0)  # the threads of the backward pass would end in a backend that is gone


main()
