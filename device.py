"""Where tensors live and how fast that is: the device and number format of a run, and what depends on its type."""

import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch

from errors import ConfigError
from kernels import keep_heap

Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # of products, see `fastest_dtype`
# What oneDNN calls sets of instructions that multiply bfloat16 without AMX or with it.
AVX512_BF16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16")

# Dense bf16 matrix FLOP/s of one device with float32 accumulation, from the vendors' data sheets; the first whose words
# the device's name contains. A device that is missing here gets no MFU rather than a guess.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "GB300": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "RTX 6000 Ada": 364e12,
    "A6000": 154.8e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090 D": 147e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def peak_flops(device, dtype: torch.dtype) -> float | None:
    """FLOP/s that MFU compares with, or None: no GPU, an unknown one, or not bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    known = (flops for words, flops in PEAK_FLOPS.items() if re.search(rf"\b{words}\b(?!.*Laptop)", name))
    return next(known, None)


def pick_device(device: str, dtype: str = "auto", local_rank: int = 0, world: int = 1):
    """The device and the number format of this rank ("auto": the best that is there).

    Raises ConfigError for a device that is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and world == 1,  # it has no collectives
        "cpu": True,
    }
    name = next(kind for kind in available if available[kind]) if device == "auto" else device
    if not available.get(name):
        found = ", ".join(kind for kind in available if available[kind])
        raise ConfigError(f"device={device!r} is not available here: {found}")
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"rank {local_rank} finds {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans every new shape anew, and decoding has one a token
    if name == "cpu":
        keep_heap()
    if name == "mps" and dtype in ("bfloat16", "float16"):  # pytorch issue 195910: causal attention lets the future in
        raise ConfigError(f"dtype={dtype} is not to be trusted on MPS: use float32")
    place = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    return place, getattr(torch, fastest_dtype(name) if dtype == "auto" else dtype)


def fastest_dtype(kind: str) -> str:
    """What "auto" is: bfloat16 where it is multiplied in hardware, float16 on GPUs that only emulate it, else float32."""
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if kind == "cpu" and multiplies_bfloat16() else "float32"


def multiplies_bfloat16() -> bool:
    """Whether this processor has AMX or AVX512_BF16, and oneDNN, which multiplies by it, is not told to leave it alone."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    unlimited = limit in ("ALL", "DEFAULT")
    amx = torch.cpu._is_amx_tile_supported() and (unlimited or "AMX" in limit)
    return amx or torch.cpu._is_avx512_bf16_supported() and (unlimited or limit in AVX512_BF16)


def autocast(device, dtype: torch.dtype):
    """The context in which products run in dtype, over float32 weights."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def moved(tensor, device):
    """A batch on its device. Only CUDA may go on before it is there: MPS is known to copy what is no longer there."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def random_state(device) -> dict[str, torch.Tensor]:
    """The states of the random generators that a run draws from, by device type."""
    states = {"rng": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_random_state(device, states: dict[str, torch.Tensor]):
    """Goes on from `random_state`, also on a device of another type, whose generator then begins anew."""
    torch.set_rng_state(states["rng"])
    if device.type in states:
        getattr(torch, device.type).set_rng_state(states[device.type])


def synchronize(device):
    """Wait until the device has done all that it was asked to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def device_name(device) -> str:
    """The name of the GPU or, for a CPU, of the processor, as its vendor gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if device.type == "cpu" and cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [device.type])[0]
