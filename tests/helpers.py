"""What several tests build: small models whose routers really select, and random prompts."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from random import SystemRandom

import numpy as np
import pytest
import torch

import architectures
from model import ModelConfig, Transformer

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = tuple(architectures.ARCHITECTURES)  # the four, and what a plugin has entered
ROUTED = ARCHITECTURES[1:]
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "ma_window": 7,
    "prior_factor": 0.25,
}


class Variant(str):
    """An architecture's name that carries other settings: the tests of the architecture are tests of them."""

    def __new__(cls, name: str, **overrides):
        variant = super().__new__(cls, name)
        variant.overrides = overrides
        return variant

    def __repr__(self):
        return " ".join([str(self), *(f"{key}={value}" for key, value in self.overrides.items())])


def small_model(architecture: str, seed: int = 0, **overrides) -> Transformer:
    """Random weights ten times the usual size, so that attention and routing matter to every output."""
    torch.manual_seed(seed)
    carried = getattr(architecture, "overrides", {})
    if max(carried.get("routed_layers", [0])) >= overrides.get("num_hidden_layers", SMALL["num_hidden_layers"]):
        carried = {name: value for name, value in carried.items() if name != "routed_layers"}
    overrides = carried | overrides
    model = Transformer(ModelConfig(architecture=architecture, **(SMALL | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return model


@torch.no_grad()
def set_thresholds(model: Transformer):
    """Average thresholds that half of the tokens of a random text pass in each routed layer."""
    tokens = model(random_ids(2, 40), return_masks=True).tokens
    for layer in model.routed:
        layer.threshold.fill_(tokens[layer.index]["score"].median())


def toy_data(folder: Path, vocab: int = 64) -> Path:
    """A token folder whose next token is one of four: about log 4 of loss to be reached, log 64 to start from."""
    rng, source = np.random.default_rng(0), {"weight": 1.0, "from": {"input": "local"}}
    folder.mkdir(exist_ok=True)
    for split, n in (("train", 40_000), ("val", 700)):
        tokens = (np.cumsum(rng.choice([1, 1, 1, 2, 5], n)) % vocab).astype("<u2")
        file = folder / split / "toy-00000.bin"
        file.parent.mkdir()
        tokens.tofile(file)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        entry = {"name": f"{split}/toy-00000.bin", "tokens": n, "sha256": sha256}
        source[split] = {"tokens": n, "documents": 1, "files": [entry]}
    manifest = {"version": 1, "tokenizer": "toy", "dtype": "uint16", "vocab_size": vocab, "eot_token": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sources": {"toy": source}}))
    (folder / "tokenizer.json").write_text('{"toy": true}')
    return folder


# What torchrun does, by fork: torch, and the compiler that its optimizers import, are loaded once, not by each rank.
RANKS = """
import faulthandler, json, os, sys
import torch._dynamo, train
ranks, jobs = json.loads(sys.argv[1])
children = {}
for rank in range(ranks):
    child = os.fork()
    if not child:
        faulthandler.dump_traceback_later(800, exit=True)  # a hang shows where
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        for port, arguments in jobs:
            os.environ["MASTER_PORT"] = str(port)
            train.main(arguments)
        sys.exit()
    children[child] = rank
while children:
    child, status = os.wait()
    del children[child]
    if status:
        for other in children:
            os.kill(other, 9)
        sys.exit(f"a rank of {ranks} failed")
"""


def free_port() -> socket.socket:
    """Bound to a port that nobody is given unasked, as those from 32768 on are: it will be listened on minutes later."""
    while True:
        with suppress(OSError):
            return socket.create_server(("127.0.0.1", SystemRandom().randrange(20_000, 32_768)))


def run_ranks(ranks: int, *jobs: list, imports: str = ""):
    """Run train.main on each list of arguments, one after another, on `ranks` ranks; `imports`: run before, in each."""
    with ExitStack() as held:  # until all ports are found, so that no two are the same
        sockets = [held.enter_context(free_port()) for _ in jobs]
        given = [(s.getsockname()[1], [str(a) for a in job]) for s, job in zip(sockets, jobs, strict=True)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", imports + RANKS, json.dumps([ranks, given])]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr


def golden_model(architecture: str) -> tuple[Transformer, dict]:
    """The model of a golden file, and the file."""
    golden = np.load(GOLDEN / f"{architecture}.npz")
    model = Transformer(ModelConfig(**json.loads(str(golden["config"])))).eval()
    prefix = "weights."
    weights = {
        name.removeprefix(prefix): torch.tensor(golden[name]) for name in golden.files if name.startswith(prefix)
    }
    model.load_state_dict(weights)
    return model, golden


def random_ids(*shape: int, vocab: int = 97) -> torch.Tensor:
    return torch.randint(1, vocab, shape)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()
