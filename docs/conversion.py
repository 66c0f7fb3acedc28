"""What a conversion costs: a dense parent becomes mod, dtf and stt at half the capacity, in four ways, three seeds each.

    python prepare.py && python docs/conversion.py [--jobs=2]

Parent and adaptations each see 393,216 tokens of the standard library (the demo's model). "soft" starts abruptly at capacity
0.5 with a soft gate, as the papers do; "anneal" starts at capacity 1 with straight-through gates, where it computes what the
parent computes, and comes down in the first half; "distil" is soft with the parent's distribution as a second target; "both".
The same number of tokens for the dense model is what they are measured against. Runs are in out/conversion; those that are
there already are not run again. Prints a table in Markdown, draws docs/images/conversion.png.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

OUT, PARENT, SEEDS, STEPS = Path("out/conversion"), Path("out/conversion/parent"), (1, 2, 3), 192
COMMON = ["config/demo.py", "--batch_size=8", f"--max_steps={STEPS}", "--eval_interval=48", "--eval_batches=24"]
ANNEAL = ["--gate=straight_through", "--capacity_start=1.0", f"--capacity_anneal_steps={STEPS // 2}"]
DISTIL = [f"--distill_from={PARENT}/final_model"]
METHODS = {"soft": ["--gate=soft"], "anneal": ANNEAL, "distil": ["--gate=soft", *DISTIL], "both": ANNEAL + DISTIL}


def train(out_dir, *keys):
    """One run of train.py on one thread, unless it is there; its metrics of every evaluation."""
    if not (out_dir / "final_model").exists():
        command = [sys.executable, "train.py", *COMMON, f"--out_dir={out_dir}", "--resume=auto", *keys]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val/loss" in line]


def study(jobs):
    """{(architecture, method): [metrics of each seed]}; dense has the method "dense"."""
    train(PARENT, "--architecture=dense")
    runs = {("dense", "dense", seed): [] for seed in SEEDS}
    runs |= {(a, m, seed): METHODS[m] for seed in SEEDS for a in ("mod", "dtf", "stt") for m in METHODS}

    def adapt(item):
        (architecture, method, seed), keys = item
        keys = [f"--architecture={architecture}", f"--init_from={PARENT}/final_model", f"--seed={seed}", *keys]
        return train(OUT / f"{architecture}-{method}-{seed}", *keys)

    with ThreadPoolExecutor(jobs) as pool:
        results = list(tqdm(pool.map(adapt, runs.items()), total=len(runs), desc="runs"))
    found = {}
    for (architecture, method, _), metrics in zip(runs, results, strict=True):
        found.setdefault((architecture, method), []).append(metrics)
    return found


def table(found):
    """Rows of Markdown: mean ± standard deviation over seeds, and the causal loss against the dense model's of that seed."""
    dense = [metrics[-1]["val/loss"] for metrics in found["dense", "dense"]]
    print("| model | conversion | loss, top-k | loss, causal | causal, against dense | top-k, first step |")
    print("|---|---|---:|---:|---:|---:|")
    for (architecture, method), seeds in found.items():
        columns = [[metrics[-1][name] for metrics in seeds] for name in ("val/loss", "val/loss_causal")]
        columns.append([100 * (causal / base - 1) for causal, base in zip(columns[1], dense, strict=True)])
        columns.append([metrics[0]["val/loss"] for metrics in seeds])
        digits = (".3f", ".3f", "+.1f", ".2f")
        cells = [
            f"{statistics.mean(c):{d}} ± {statistics.stdev(c):{d.lstrip('+')}}"
            for c, d in zip(columns, digits, strict=True)
        ]
        print(f"| {architecture} | {method} | {cells[0]} | {cells[1]} | {cells[2]} % | {cells[3]} |")


def draw(found, path):
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9.6, 3.4), layout="constrained")
    axes = fig.subplots(1, 3, sharey=True)
    styles = {"dense": ("black", "-", "o"), "soft": ("#0072B2", "--", "s"), "anneal": ("#D55E00", "-.", "^")}
    styles |= {"distil": ("#009E73", ":", "D"), "both": ("#CC79A7", "-", "v")}
    for ax, architecture in zip(axes, ("mod", "dtf", "stt"), strict=True):
        for method in ("dense", *METHODS):
            seeds = found["dense" if method == "dense" else architecture, method]
            colour, line, marker = styles[method]
            points = [
                (at[0]["tokens"] / 1000, statistics.mean(p["val/loss_causal"] for p in at))
                for at in zip(*seeds, strict=True)
            ]
            ax.plot(*zip(*points[1:], strict=True), line, color=colour, marker=marker, markersize=4, label=method)
        ax.set(title=architecture, xlabel="thousand tokens of adaptation")
    axes[0].set_ylabel("validation loss, causal routing (nats)")
    axes[0].legend(frameon=False)
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    jobs = next((int(arg[7:]) for arg in sys.argv[1:] if arg.startswith("--jobs=")), 1)
    os.chdir(Path(__file__).parent.parent)
    results = study(jobs)
    table(results)
    draw(results, "docs/images/conversion.png")
