"""Peak memory of Transformer.from_pretrained over the size of the model, on random checkpoints made on the fly.

python tests/measure_loading.py [DIRECTORY]     1.1 GB in float32, from float32 and bfloat16, single and sharded
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from model import ModelConfig, Transformer

CHILD = """
import re, sys
from model import Transformer
def peak():  # in bytes, pages of mapped files included; getrusage's ru_maxrss would begin with the parent's
    return 1024 * int(re.search("VmHWM:[^0-9]+([0-9]+) kB", open("/proc/self/status").read())[1])
Transformer.from_pretrained(sys.argv[2])  # a tiny one: what torch and safetensors load for their first use is no weights
before = peak()
model = Transformer.from_pretrained(sys.argv[1])
assert not model.initialized
print(peak() - before)
"""


def peak_and_size(directory, stored, shard_size=2**40, size="demo", **shape):
    """(bytes that loading added to the peak of a process of its own, bytes of the model in float32).

    stored: name of the dtype on disk. shard_size: bytes of the tensors after which a new file begins.
    """
    model = Transformer(ModelConfig.preset(size, **shape))
    nbytes = sum(p.numel() for p in model.parameters()) * 4
    model.to(getattr(torch, stored)).save_pretrained(directory, shard_size=shard_size)
    Transformer(ModelConfig()).save_pretrained(directory / "tiny")
    del model
    peak = subprocess.run(
        [sys.executable, "-c", CHILD, directory, directory / "tiny"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    return int(peak.stdout), nbytes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        for stored in ("float32", "bfloat16"):
            for shard_size in (2**40, 2**27):
                shape = {"size": "0.5B", "num_hidden_layers": 8, "vocab_size": 151936}
                peak, size = peak_and_size(Path(folder) / f"{stored}{shard_size}", stored, shard_size, **shape)
                print(f"{stored}, files of at most {shard_size:,} bytes: {peak:,} / {size:,} = {peak / size:.3f}")
