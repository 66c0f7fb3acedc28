"""One thread for each of xdist's workers, and for what they start: with more, they would wait for each other."""

import os
from contextlib import nullcontext

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request):
    """Everything that the test makes is made there."""
    with torch.device("cuda") if request.param == "cuda" else nullcontext():
        yield request.param
