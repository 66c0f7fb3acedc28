"""What must stand in the environment before torch is imported."""

import os
import shutil
from contextlib import nullcontext

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for each of xdist's workers: with more, they would wait for each other
if not shutil.which("nvidia-smi"):
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU, statement by statement

import pytest
import torch


@pytest.fixture(params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request):
    """Everything that the test makes is made there."""
    with torch.device("cuda") if request.param == "cuda" else nullcontext():
        yield request.param
