"""The numbers of a paper: speed against what FLOPs and bytes promise, perplexity, lm-eval suites, capacity sweeps.

    python bench.py                                                   speed: four architectures, transformers' Qwen2
    python bench.py --size=50M --capacity=0.125 --compile             … at any size, with any key of the model
    python bench.py --tasks=flops --size=7B                           what is counted, per component
    python bench.py --tasks=perplexity --model_path=out/demo/dtf-1 --text=README.md
    python bench.py --tasks=capacity --model_path=out/demo/dtf-1      loss against compute, table and picture
    python bench.py --tasks=perplexity --model_path=out/many --capacity=0.25      one of those that it is calibrated for
    python bench.py --tasks=copying --model_path=out/demo/dtf-1       loss of random tokens, and read once more
    python bench.py --tasks=general,math --model_path=out/dtf_05b --batch_size=8
    torchrun --standalone --nproc_per_node=8 bench.py --tasks=general --model_path=out/dtf_05b

Tasks are speed, flops, perplexity, capacity and copying; the suites general, math, code and quick_test; names of lm-eval tasks;
lm-eval task files (*.yaml), and folders of them. Each prints a table; the last line is all of it as JSON. Exit status 1:
a task could not be run (it is named on stderr), the others were; or something is slower than in the baseline.

In the speed table, ratio is the time over our dense model's; promised is the same ratio in FLOPs, or in bytes read for
decoding; efficiency is promised / ratio; "vs hf" is the time of transformers, not compiled, over the row's. Ratios are
medians over rounds of times that were taken next to each other. FLOPs count attention as the full square, as
FlopCounterMode does.
"""

import copy
import importlib.metadata
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

import kernels
import lora
from architectures import ARCHITECTURES
from configurator import Amount, Count, cli, configure, problems
from device import Dtype, device_name, pick_device
from errors import ConfigError
from files import write_whole
from harness import evaluate, find_tasks, log_to_wandb
from model import Capacity, ModelConfig
from parallel import local_rank, rank, say, start_ranks, world
from publish import git_revision
from scoring import capacity_sweep, copying, perplexity
from speed import MEASURES, ROUTED, Measure, flops_table, read_baseline, regressions, speed, speed_models, variant
from trained import open_model

OWN_TASKS = ("speed", "flops", "perplexity", "capacity", "copying")  # the others are lm-eval's


@dataclass
class BenchConfig:
    tasks: list[str] = field(default_factory=lambda: ["speed"])  # what to do, see above; several: a,b,c
    model_path: str = ""  # a model directory, a run or a hub id; empty: random weights of --size (speed, flops)
    size: str = "10M"  # shape without a model_path: demo, 10M, 50M, 0.5B … 72B; single keys override it
    batch_size: Count = 4  # sequences at a time
    seq_len: Count = 256  # tokens of a sequence; perplexity: of the window; decoding: of the prompt
    routing: Literal["causal", "topk"] = "causal"  # lm-eval: causal, or topk, the papers' protocol, which looks ahead
    limit: Amount = 0  # examples of an lm-eval task, windows of perplexity and capacity (0: all)
    output_path: str = ""  # JSON file of all results (lm-eval: the model folder's eval-ROUTING.json, if not set)
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Dtype = "auto"  # of the weights, in training of products; auto: the fastest here (device.py)
    threads: Amount = 0  # CPU threads (0: torch's choice)

    measure: list[Measure] = field(default_factory=lambda: list(MEASURES))  # speed: what to time, of these
    repeats: Count = 5  # speed, capacity: timed rounds
    warmup: Amount = 1  # speed, capacity: rounds before them
    decode_steps: Count = 16  # speed, capacity: tokens that a round of decoding generates
    compile: bool = False  # speed: torch.compile rows for train, forward and decode too
    baseline: str = ""  # speed: JSON of an earlier run, made if missing; exit status 1 where 5 % slower than there

    text: str = "data/stdlib"  # perplexity, capacity: a token folder (its validation split) or a UTF-8 text file
    stride: int = 0  # perplexity: new tokens of a window, behind seq_len − stride of context (0: half the window)
    capacities: list[Capacity] = field(default_factory=lambda: [0.125 * n for n in range(1, 9)])  # capacity: the sweep

    num_fewshot: Amount | None = None  # lm-eval: examples before each question (none: as the task or suite has it)
    gen_kwargs: str = ""  # lm-eval: settings of generation over the tasks' own: temperature=0.7,max_gen_toks=64
    allow_code_execution: bool = False  # lm-eval: run the programs that the model writes (suite code), on this machine
    wandb_log: bool = False  # lm-eval: log the results to Weights & Biases too
    wandb_project: str = "nanodtf"  # W&B project
    wandb_entity: str = ""  # W&B user or team (empty: your default)

    def __post_init__(self):
        wrong = problems(self)
        if not 0 <= self.stride <= self.seq_len:
            wrong.append(f"stride={self.stride} must lie between 1 and seq_len={self.seq_len}")
        if not self.model_path and any(task not in ("speed", "flops") for task in self.tasks):
            wrong.append(f"tasks={','.join(self.tasks)} needs a trained model: --model_path=…")
        if not self.tasks:
            wrong.append("tasks is empty: name one, such as speed or perplexity")
        if "code" in self.tasks and not self.allow_code_execution:
            wrong.append("tasks=code runs programs that the model wrote: allow it with --allow_code_execution")
        if wrong:
            raise ConfigError("; ".join(wrong))

    @property
    def decoded_tokens(self) -> int:
        """What a measurement of decoding generates behind seq_len."""
        return (self.warmup + self.repeats) * self.decode_steps

    @property
    def longest_sequence(self) -> int:
        """Tokens of the speed suite's longest sequence: decoding begins with a round in which it compiles."""
        return self.seq_len + self.decoded_tokens + self.compile * self.decode_steps

    def lm_eval_path(self, capacity: float | None) -> str:
        """Where lm-eval's results go: by default the model's own folder, or one in out/ for a model of the hub."""
        folder = self.model_path if os.path.isdir(self.model_path) else os.path.join("out", self.model_path)
        part = f"-capacity{capacity}" if capacity else ""
        part += f"-limit{self.limit}" if self.limit else ""
        return self.output_path or os.path.join(folder, f"eval-{self.routing}{part}.json")


def check(argv):
    """What a command line asks for: (BenchConfig, keys of the model, lm-eval's TaskManager and tasks). Raises ConfigError."""
    bench_set, model_set = configure(__doc__, argv, BenchConfig, ModelConfig)
    cfg = BenchConfig(**bench_set)
    given = [key for key in (*model_set, *(bench_set.keys() & {"size"})) if key != "capacity"]
    if cfg.model_path and given:
        raise ConfigError(f"model_path={cfg.model_path} has its own configuration: drop {', '.join(given)}")
    single = [task for task in cfg.tasks if task in OWN_TASKS and task not in ("perplexity", "copying")]
    if single and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"tasks={','.join(single)} measure one process: run them without torchrun")
    names = [task for task in cfg.tasks if task not in OWN_TASKS]
    manager, tasks = find_tasks(names, OWN_TASKS) if names else (None, {})
    return cfg, model_set, manager, tasks


def about(cfg: BenchConfig, device) -> dict:
    """What a number needs beside it to be compared with another."""
    packages = ("torch", "transformers", "lm_eval", "datasets")
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    facts = {"git": git_revision(), "device": device_name(device), "threads": torch.get_num_threads()}
    few = "torch's own, of a few rows oneDNN" if kernels.SKINNY else "torch's own"
    facts |= {"cpu_products": "oneDNN" if kernels.ONEDNN else few}
    return {"config": asdict(cfg), **facts, "packages": {name: installed.get(name) for name in packages}}


def costs(cfg: BenchConfig, model, model_set: dict, device, dtype) -> tuple[dict, list[str]]:
    """Runs the tasks speed and flops: (their results and what they were measured with, what is slower than the baseline).

    model: a trained one, or None for random weights of cfg.size and the keys in model_set.
    """
    if model:
        shape, names = model.config, [model.config.architecture]
    else:
        shape = ModelConfig.preset(cfg.size, **{"architecture": ROUTED[0]} | model_set)
        names = [shape.architecture] if "architecture" in model_set else ARCHITECTURES
    baseline, slower = read_baseline(cfg.baseline, cfg, shape), []
    document = about(cfg, device)
    on_cpu = ", {threads} threads, products by {cpu_products}".format_map(document)
    print(f"{document['device']}, {dtype}{on_cpu if device.type == 'cpu' else ''}")
    if "flops" in cfg.tasks:
        document["flops"] = flops_table({name: variant(shape, name) for name in names}, cfg.seq_len)
    if "speed" in cfg.tasks:
        trained = copy.deepcopy(model)
        if trained and trained.lora_rank:
            lora.merge(trained)
        models = speed_models(cfg, shape, names, trained, device)
        document["speed"] = speed(cfg, models, device, dtype) | {"model": shape.to_dict()}
        if baseline:
            slower = regressions(document["speed"], document, baseline)
        elif cfg.baseline:
            write_whole(cfg.baseline, document)
    return document, slower


def main(argv):
    cfg, model_set, manager, tasks = check(argv)
    start_ranks("gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device, dtype = pick_device(cfg.device, cfg.dtype, local_rank(), world())
    model = tokenizer = None
    if cfg.model_path:
        trained_in = torch.float32 if "speed" in cfg.tasks else dtype  # steps of training are measured too
        model, tokenizer = open_model(cfg.model_path, device, trained_in, model_set.get("capacity"))
    document, slower = costs(cfg, model, model_set, device, dtype)
    if model:
        model.to_dtype(dtype)
    if "perplexity" in cfg.tasks:
        document["perplexity"] = perplexity(cfg, model, tokenizer)
    if "capacity" in cfg.tasks:
        document["capacity"] = capacity_sweep(cfg, model, tokenizer)
    if "copying" in cfg.tasks:
        document["copying"] = copying(cfg, model, tokenizer)
    path, missing = cfg.output_path, []
    if tasks:
        path = cfg.lm_eval_path(model_set.get("capacity"))
        document, missing = evaluate(cfg, model, tokenizer, manager, tasks, path, document)
    print("\n" + json.dumps(document, default=str))
    if path and rank() == 0:
        write_whole(path, document)
    if tasks and cfg.wandb_log and rank() == 0:
        log_to_wandb(cfg, document["results"])
    if missing:
        say(f"error: {len(missing)} of {len(tasks)} tasks could not be run: {', '.join(missing)}")
    for line in slower:
        say(f"slower than {cfg.baseline} by more than 5 %: {line}")
    if dist.is_initialized():
        dist.destroy_process_group()
    if missing or slower:
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
