"""What a GPU would be asked to do, without one: nothing on the wrong device, and no more waits and copies than there must be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ARCHITECTURES

TRAINING = [
    f"{part}, {kind}" for part in ("micro-step", "update") for kind in ("bfloat16", "float16", "lora", "distillation")
]
NOTHING = {"waits": 0, "copies": 0}


@pytest.fixture(scope="module")
def counts():
    pytest.importorskip("peft")
    script = Path(__file__).with_name("fake_gpu.py")
    ran = subprocess.run([sys.executable, script, "small"], check=False, capture_output=True, text=True)
    assert ran.stdout, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gpu_is_never_waited_for_but_to_hear_what_was_selected(counts, architecture):
    """One routed layer: a wait in each eager pass under causal routing. Copies: lengths and positions, once for all layers."""
    routed = int(architecture != "dense")
    expected = {what: NOTHING for what in ["compiled step", *TRAINING]}
    expected["causal forward"] = {"waits": routed, "copies": 0}
    expected["prefill"] = {"waits": routed, "copies": 1}
    expected["decoding step"] = {"waits": routed, "copies": 1}
    expected["decoding step, a row idle"] = {"waits": routed, "copies": 1 + routed}  # which rows run, and where
    # 32 passes; the copies are the positions of each step, the prompts' lengths and the stop ids
    expected["generate, 32 tokens"] = {"waits": 2 + 32 * routed, "copies": 34}
    found = {what: {name: of[name] for name in NOTHING} for what, of in counts[architecture].items()}
    assert found == expected
    assert all(of["kernels"] > 50 for of in counts[architecture].values())  # it has been counting
