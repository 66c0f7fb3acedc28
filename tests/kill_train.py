"""Kill training over and over, resume it each time, and compare with a run that nobody disturbed.

    python tests/kill_train.py 100      SIGKILL at 100 random moments of training, evaluation and saving
    python tests/kill_train.py ranks    SIGKILL one of two ranks, three times, under torchrun --max-restarts; ddp and fsdp

Equal must be, to the bit: the final weights, the optimizer's state and every line of metrics (clock readings excepted); so
no step is missing or done twice. Tests run the first one with a few kills (test_train.py).
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from helpers import toy_data
from safetensors.torch import load_file

import train

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
RUN = {"seq_len": 32, "batch_size": 4, "grad_accum_steps": 2, "max_steps": 40, "log_interval": 3, "eval_interval": 4}
RUN |= {"save_interval": 2, "eval_batches": 6, "device": "cpu", "resume": "auto", "architecture": "dtf"}


def arguments(data, out, **keys):
    keys = RUN | SHAPE | {"num_key_value_heads": 1, "data_dir": data, "out_dir": out} | keys
    return [f"--{name}={value}" for name, value in keys.items()]


def content(run):
    """Everything of a finished run that must not depend on being disturbed."""
    clock = "tokens_per_s", "mfu", "data_wait"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k not in clock} for line in lines]
    last = max(run.glob("step_*[0-9]"))
    tensors = {}  # of shards not the bytes: the order of their headers' entries is the library's whim
    for file in last.glob("*.safetensors"):
        tensors |= {f"{file.name} {name}": t.numpy().tobytes() for name, t in load_file(file).items()}
    if (last / "optimizer.pt").exists():
        state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
        tensors |= {f"{i} {key}": t.numpy().tobytes() for i, each in state.items() for key, t in each.items()}
    return metrics, tensors, (run / "final_model" / "model.safetensors").read_bytes()


def fork(argv):
    """Train in a child that needs no import any more; its process id."""
    child = os.fork()
    if child == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 2)
        try:
            train.main(argv)
            os._exit(0)
        except BaseException:  # noqa: BLE001, the parent looks at the status
            os._exit(1)
    return child


def saving_since(run, began):
    """Whether a checkpoint is being written that was begun after `began`: an older one was left by a kill."""
    try:
        return any(partial.stat().st_ctime > began for partial in run.glob("step_*.partial"))
    except FileNotFoundError:  # it has just become complete
        return False


def kill_moments(folder, kills, seed=0):
    data, rng = toy_data(folder / "data"), random.Random(seed)
    began = time.monotonic()
    assert os.waitpid(fork(arguments(data, folder / "whole")), 0)[1] == 0
    whole, length = content(folder / "whole"), time.monotonic() - began
    done, killed, saving, starts = 0, 0, 0, 0
    while True:
        out = folder / f"run{done}"
        if (out / "final_model").exists():
            assert content(out) == whole, f"{out} differs from the undisturbed run"
            done += 1
            if killed >= kills:
                break
            continue
        began = time.time()
        child, ended, until = fork(arguments(data, out)), 0, time.monotonic() + rng.uniform(0, 0.6 * length)
        if killed >= kills:
            until = math.inf
        wait_for_save, starts = starts % 2, starts + 1  # every second kill comes while a checkpoint is written
        while not ended and (time.monotonic() < until or (wait_for_save and not saving_since(out, began))):
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.0005)
        if ended:
            assert status == 0, "a resumed run failed"
        else:
            time.sleep(rng.uniform(0, 0.004))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed += 1
            saving += saving_since(out, began)
    print(f"{killed} kills, {saving} of them while a checkpoint was written; {done} runs, all equal to the bit")


def kill_ranks(folder):
    data = toy_data(folder / "data")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    for parallel in ("ddp", "fsdp"):
        runs = []
        for name in ("whole", "killed"):
            out = folder / f"{parallel}_{name}"
            argv = arguments(
                data, out, parallel=parallel, max_steps=200, save_interval=10, log_interval=10, eval_interval=50
            )
            with open(folder / f"{parallel}_{name}.log", "w") as log:
                job = subprocess.Popen([*torchrun, "train.py", *argv], stderr=log)
            killed, seen = 0, 0
            while job.poll() is None:
                time.sleep(0.1)
                steps = sorted(out.glob("step_*[0-9]"))
                if name == "killed" and killed < 3 and steps and int(steps[-1].name[5:]) > seen + 20:
                    seen = int(steps[-1].name[5:])
                    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
                    os.kill(int(random.choice(workers[-2:])), signal.SIGKILL)
                    killed += 1
            assert job.returncode == 0, (folder / f"{parallel}_{name}.log").read_text()[-9000:]
            runs.append(content(out))
        assert runs[0] == runs[1], f"{parallel}: differs from the undisturbed run"
        print(f"{parallel}: a rank killed {killed} times under --max-restarts: equal to the bit")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        if sys.argv[1] == "ranks":
            kill_ranks(Path(temporary))
        else:
            kill_moments(Path(temporary), int(sys.argv[1]))
