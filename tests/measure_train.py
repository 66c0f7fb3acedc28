"""What training costs beside the steps themselves; run on demand, figures in docs/LOG.md.

python tests/measure_train.py memory     resident memory over 2,000 steps of a tiny model, first and last 500 compared
python tests/measure_train.py save       a step that saves against one that does not, at 50M parameters
"""

import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from helpers import toy_data
from kill_train import arguments, fork

import train


def memory(folder):
    """Checkpoints, evaluations and logs included; the anonymous part, which is what the program holds."""
    out, readings = folder / "run", {}
    intervals = {"log_interval": 10, "save_interval": 100, "eval_interval": 100}
    child = fork(arguments(toy_data(folder / "data"), out, max_steps=2000, **intervals))
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(0.05)
        try:
            status = Path(f"/proc/{child}/status").read_text()
            step = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
            readings.setdefault(step, []).append(int(status.split("RssAnon:")[1].split()[0]) / 1024)
        except (OSError, IndexError, ValueError):  # not there yet, or half a line
            continue
    halves = [[r for step in readings if a < step <= b for r in readings[step]] for a, b in ((0, 500), (1500, 2000))]
    for name, values in zip(("first", "last"), halves, strict=True):
        print(f"{name} 500 steps: {statistics.mean(values):.1f} MB in the mean, {max(values):.1f} at most")


def save(folder):
    """Times from one clipping of gradients to the next: a saving step's own end, and then the writing thread, fall in.

    Beside wall-clock time, which neighbours on the machine disturb, the time that this process was on a processor, all of
    its threads together: more than the step is longer by where a processor is free to write.
    """
    times, clip = [], train.parallel.clip_grad_norm

    def clocked(*arguments):
        times.append((time.perf_counter(), time.process_time()))
        return clip(*arguments)

    train.parallel.clip_grad_norm = clocked
    keys = {"size": "50M", "seq_len": 512, "batch_size": 4, "grad_accum_steps": 2, "max_steps": 17, "save_interval": 4}
    argv = arguments(toy_data(folder / "data"), folder / "run", **keys, eval_interval=0, vocab_size=4096)
    train.main([a for a in argv if not a.startswith(("--hidden", "--interm", "--num_"))])
    for i, clock in enumerate(("wall", "processor")):
        steps = {
            n: b[i] - a[i] for n, (a, b) in enumerate(pairwise(times), 1)
        }  # from step n's clipping to the next one's
        ordinary, saving = (
            statistics.median(steps[n] for n in numbers) for numbers in ((3, 7, 11, 15), (4, 8, 12, 16))
        )
        print(f"{clock}: ordinary {ordinary:.2f} s, saving {saving:.2f} s, medians of 4: ratio {saving / ordinary:.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        {"memory": memory, "save": save}[sys.argv[1]](Path(temporary))
