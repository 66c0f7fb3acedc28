"""What must stand in the environment before torch is imported."""

import os
import shutil
from contextlib import nullcontext

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for each of xdist's workers: with more, they would wait for each other
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # float32 unless a test says so, also where there is AMX
if not shutil.which("nvidia-smi"):
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU, statement by statement

import pytest
import torch

# Files that take longest, in the order of their time: a worker gets the next one when it is done, and none should be the last.
LONGEST = [
    "train",
    "parallel",
    "prepare",
    "new_architecture",
    "model",
    "bench",
    "study",
    "means",
    "publish",
    "hf",
    "lora",
]


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request):
    """Everything that the test makes is made there."""
    with torch.device("cuda") if request.param == "cuda" else nullcontext():
        yield request.param


@pytest.fixture
def gpu_kernels(device):
    """The module, without a GPU in Triton's interpreter; its functions then take tensors on the CPU."""
    module = pytest.importorskip("gpu_kernels")
    if device == "cpu" and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("Triton runs on the GPU here")
    return module
