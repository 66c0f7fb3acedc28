"""Train a dense, MoD, DTF or STT model on token files: one GPU, a laptop's CPU, or many ranks.

    python train.py                                              a small dense model on data/stdlib
    python train.py config/demo.py --architecture=dtf            a config file, then keys; a later one wins
    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b.py
    torchrun --standalone --nproc_per_node=8 train.py config/dtf_7b.py    sharded: config says parallel = "fsdp"
    python train.py config/demo.py --resume=auto                 go on where the run in out_dir stopped

A resumed run takes every key that is not given from its checkpoint, and continues to the same bits. Ctrl-C, SIGTERM,
SIGUSR1 and --max_seconds end the step, save and stop; a second Ctrl-C stops at once. In <out_dir>: metrics.jsonl, step_*/ (checkpoints)
and, after the last step, final_model/.
"""

import filecmp
import json
import math
import os
import re
import signal
import sys
import time
import uuid
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import lora
import parallel
import publish
from configurator import ConfigError, cli, configure
from data import TokenData
from errors import CheckpointError, TrainError
from kernels import keep_heap
from model import SIZES, ModelConfig, Transformer
from tokenizer import vocabulary
from weights import find_model


@dataclass
class TrainConfig:
    data_dir: str = "data/stdlib"  # token files, as prepare.py writes them
    out_dir: str = "out/run"  # where metrics.jsonl, checkpoints and final_model go
    init_from: str = "scratch"  # scratch, a model directory, or a Hugging Face id: user/name or user/name@revision
    size: str = "demo"  # shape of a model from scratch: demo, 10M, 50M, 0.5B … 72B; single keys override it
    resume: str = "none"  # none; auto: the newest intact checkpoint of out_dir, if any; or a step or run directory

    seq_len: int = 256  # tokens of a sequence
    batch_size: int = 8  # sequences of a micro-batch, on one device
    grad_accum_steps: int = 1  # micro-batches of a step, of the whole job: they are divided over the ranks
    max_steps: int = 600  # optimizer steps
    max_seconds: float = 0.0  # save and stop after so long, to go on with --resume=auto (0: no limit)
    eval_interval: int = 100  # steps between evaluations (0: only before the first step and after the last)
    eval_batches: int = 8  # micro-batches of validation text in an evaluation, of the whole job
    log_interval: int = 10  # steps between two lines of metrics: the device is read no more often
    log_layers: bool = False  # log the statistics of every routed layer too, as layer_{i}/…
    save_interval: int = 200  # steps between checkpoints (0: only after the last step)
    keep_last: int = 2  # checkpoints to keep; the one with the best validation loss stays besides

    lr_base: float | None = None  # rate of all ordinary weights (unset: 1e-3 from scratch, 1e-5 on pretrained weights)
    lr_prior: float = 1e-3  # rate of priors and transition networks
    lr_router: float = 1e-2  # rate of routers and surprise gates
    lr_causal_router: float = 1e-3  # rate of causal routers
    lr_lora: float = 1e-4  # rate of LoRA adapters
    min_lr_ratio: float = 0.1  # where the cosine decay ends, as a share of the rate
    warmup_ratio: float = 0.01  # share of the steps with linear warm-up
    weight_decay: float = 0.01  # of matrices only
    grad_clip: float = 1.0  # largest norm of the gradient (0: no clipping)
    capacity_start: float | None = None  # anneal the capacity from here in 8 stairs (unset: no annealing)
    capacity_anneal_steps: int = 0  # steps until the annealed capacity reaches its value
    distill_from: str = ""  # dense parent to distil from: a directory or a hub id (weight of its loss: distill_weight)
    lora: bool = False  # freeze the weights of init_from and train adapters beside them, and all routed parts (lora.py)
    lora_r: int = 16  # rank of the adapters
    lora_alpha: float = 32  # an adapter's product is scaled by lora_alpha / lora_r
    lora_dropout: float = 0.05  # on the input of the adapters
    lora_merge: bool = False  # final_model is a plain model, the adapters added to its weights
    max_bad_steps: int = 10  # end the run after so many steps in a row without a finite loss and gradient

    seed: int = 42  # of initial weights and of the order of the data
    device: str = "auto"  # auto, cuda, mps, cpu
    dtype: str = "auto"  # float32, or bfloat16 (autocast over float32 weights); auto: bfloat16 on CUDA
    compile: bool = False  # torch.compile; what it makes is kept in TORCHINDUCTOR_CACHE_DIR
    gradient_checkpointing: bool = False  # less memory, a third more compute
    parallel: str = "ddp"  # many ranks: ddp (each holds the model) or fsdp (weights, gradients, optimizer are divided)
    offload: bool = False  # fsdp: weights, gradients and optimizer in CPU memory

    push_to_hub: str = ""  # user/name: upload final_model to the hub at the end (a new repository is private)
    eval_tasks: list[str] = field(
        default_factory=list
    )  # what bench.py runs on final_model at the end, e.g. general,math
    wandb_log: bool = False  # log to Weights & Biases too (WANDB_MODE=offline: into out_dir only)
    wandb_project: str = "nanodtf"  # W&B project
    wandb_entity: str = ""  # W&B user or team (empty: your default)
    wandb_run_name: str = ""  # W&B run name (empty: out_dir)

    def __post_init__(self):
        problems = []
        for name in ("seq_len", "batch_size", "grad_accum_steps", "eval_batches", "log_interval", "keep_last"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be at least 1")
        for name in (
            "max_steps",
            "max_seconds",
            "eval_interval",
            "save_interval",
            "capacity_anneal_steps",
            "weight_decay",
            "grad_clip",
        ):
            if getattr(self, name) < 0:
                problems.append(f"{name}={getattr(self, name)} must not be negative")
        for name in ("min_lr_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            problems.append(f"dtype={self.dtype!r} is not one of auto, float32, bfloat16")
        if self.parallel not in ("ddp", "fsdp"):
            problems.append(f"parallel={self.parallel!r} is not one of ddp, fsdp")
        if self.offload and self.parallel != "fsdp":
            problems.append("offload=True needs parallel=fsdp")
        if (self.capacity_start is None) != (self.capacity_anneal_steps == 0):
            problems.append("capacity_start and capacity_anneal_steps need each other: set both or none")
        if self.lora and self.init_from == "scratch":
            problems.append("lora=True needs pretrained weights: set init_from")
        if self.lora and self.parallel == "fsdp":
            problems.append("lora=True does not work with parallel=fsdp: its frozen weights need no dividing, use ddp")
        if self.lora_merge and not self.lora:
            problems.append("lora_merge=True needs lora=True")
        if self.lora_r < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            problems.append(
                f"lora_r={self.lora_r}, lora_alpha={self.lora_alpha:g}, lora_dropout={self.lora_dropout:g}: they must be at "
                "least 1, above 0, and in [0, 1)"
            )
        if self.lr_base is None:
            self.lr_base = 1e-3 if self.init_from == "scratch" else 1e-5
        if problems:
            raise ConfigError("; ".join(problems))


# What a resumed run must not change: with another value it would be another run. Beside them every field of the model,
# the data, and batch_size · grad_accum_steps (their product alone decides which sequences make a step).
FIXED = ("init_from", "size", "seq_len", "seed", "capacity_start", "capacity_anneal_steps", "distill_from")
FIXED += ("lora", "lora_r", "lora_alpha", "lora_dropout")

OUT_OF_TIME = signal.SIGALRM  # what --max_seconds is among the signals

# Dense bf16 matrix FLOP/s of one device with float32 accumulation, from the vendors' data sheets; the first whose words
# the device's name contains. A device that is missing here gets no MFU rather than a guess.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A6000": 154.8e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def peak_flops(device, bf16):
    """FLOP/s that MFU compares with, or None: no GPU, an unknown one, or not bfloat16."""
    if device.type != "cuda" or not bf16:
        return None
    name = torch.cuda.get_device_name(device)
    known = (flops for words, flops in PEAK_FLOPS.items() if re.search(rf"\b{words}\b(?!.*Laptop)", name))
    return next(known, None)


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a step


def lr_scale(step, max_steps, warmup_ratio, min_lr_ratio):
    """Share of the peak rate at `step` (0-based): linear warm-up, then a cosine down to min_lr_ratio."""
    warmup = int(warmup_ratio * max_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def annealed(step, start, end, steps):
    """Capacity at `step`: from `start` to `end` in 8 stairs, since every new k recompiles; `end` from 7/8 · steps on."""
    if isinstance(end, list | tuple):
        return [annealed(step, start, e, steps) for e in end]
    stair = min(7, 8 * step // steps) / 7
    return start * (1 - stair) + end * stair


def perplexity(loss):
    return math.exp(min(loss, 700.0))  # e^710 is no float


def spikes(table, step, recent, sequences):
    """Steps whose loss is not finite or beyond 6 standard deviations of those before: what to look at in the data.

    table: a row per step up to `step`, the loss first and whether the update was skipped last. recent: a deque of the
    losses before, which those of the table join. sequences: of a step; their numbers are what `data.py show` takes.
    """
    found = []
    for number, (loss, *_, bad) in enumerate(table, step - len(table)):  # 0-based, as the data is
        mean = sum(recent) / max(1, len(recent))
        deviation = math.sqrt(sum((x - mean) ** 2 for x in recent) / max(1, len(recent)))
        if bad or (len(recent) >= 20 and loss > mean + 6 * deviation):
            first_last = [number * sequences, (number + 1) * sequences - 1]
            found.append({"step": number + 1, "loss": loss if math.isfinite(loss) else None, "sequences": first_last})
        if not bad:
            recent.append(loss)
    return found


def param_groups(model, cfg):
    """Every trainable parameter in exactly one of AdamW's groups: by its name, and decayed if it is a matrix."""
    groups = {}
    for name, p in model.named_parameters():
        kind = "base"
        for part in ("router", "causal_router", "prior", "transition"):
            if f".{part}." in name:
                kind = "prior" if part == "transition" else part
        kind = "lora" if ".lora_" in name else kind
        if p.requires_grad:
            decay = cfg.weight_decay if p.ndim >= 2 else 0.0
            group = groups.setdefault((kind, p.ndim >= 2), {"name": kind, "params": [], "weight_decay": decay})
            group["params"].append(p)
    return list(groups.values())


def batches(data, firsts, count, device):
    """For each number in `firsts`, the `count` sequences from there as (input_ids, targets) on the device: (count, T).

    A thread makes them two ahead, in pinned memory on CUDA, so that the device never waits for the disk.
    """

    def make(first):
        if device.type != "cuda":
            return data.batch(first, count)
        torch.cuda.set_device(device)  # of this thread: else each rank would open a context on GPU 0
        return [t.pin_memory() for t in data.batch(first, count)]

    firsts = iter(firsts)
    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(make, first) for first in islice(firsts, 2))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(thread.submit(make, first) for first in islice(firsts, 1))
            yield tuple(t.to(device, non_blocking=True) for t in batch)


@torch.no_grad()
def evaluate(model, data, cfg, device, autocast, rank, world):
    """Mean loss of the first eval_batches micro-batches of validation text, under both routings: two floats.

    The batches are divided over the ranks, which run in step: one that has none left repeats the last, for nothing.
    A short validation split is read once.
    """
    count = min(cfg.batch_size, len(data))
    n = min(cfg.eval_batches, len(data) // count)
    mine = range(rank, -(-n // world) * world, world)
    routings = ["topk", "causal"] if model.config.routed_layers else ["topk"]  # dense: the two are one
    sums = torch.zeros(len(routings), device=device)
    model.eval()
    stream = batches(data, (min(number, n - 1) * count for number in mine), count, device)
    for number, (x, y) in zip(mine, stream, strict=True):
        for i, routing in enumerate(routings):
            with autocast:
                sums[i] += model(x, y, routing=routing).losses["lm"] * (number < n)
    model.train()
    if cfg.parallel == "fsdp":
        model.reshard()  # the embedding and the head were left whole for a backward pass
    if world > 1:
        dist.all_reduce(sums)
    losses = (sums / n).tolist()
    return losses[0], losses[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Setting up


def pick_device(cfg, local_rank, world):
    """The device and the autocast context of this rank. Raises ConfigError for a device that is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and world == 1,  # it has no collectives
        "cpu": True,
    }
    name = next(d for d in there if there[d]) if cfg.device == "auto" else cfg.device
    if not there.get(name):
        raise ConfigError(f"device={cfg.device!r} is not available here: {', '.join(d for d in there if there[d])}")
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"rank {local_rank} finds {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if name == "cpu":
        keep_heap()
    bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and name == "cuda" and torch.cuda.is_bf16_supported())
    device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    return device, torch.autocast(name, torch.bfloat16) if bf16 else nullcontext()


def merge(saved, train_set, model_set):
    """The configs of a resumed run: what its checkpoint says, then what is set now. Raises ConfigError for a conflict."""
    try:
        before = TrainConfig(**saved["config"]["train"])
        cfg = TrainConfig(**saved["config"]["train"] | train_set)
        model_cfg = ModelConfig.from_dict(saved["config"]["model"], **model_set)
        step, model_before = saved["step"], saved["config"]["model"]
        saved["bad"], saved["recent"], saved["about"]  # the youngest entries
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"state.json was written by another version of train.py: {e}") from e
    now, then = asdict(cfg), asdict(before)
    changed = [(name, then[name], now[name]) for name in FIXED if then[name] != now[name]]
    if cfg.batch_size * cfg.grad_accum_steps != before.batch_size * before.grad_accum_steps:
        changed.append(("batch_size · grad_accum_steps", *(c.batch_size * c.grad_accum_steps for c in (before, cfg))))
    model_now = json.loads(json.dumps(model_cfg.to_dict()))  # as it was read: lists, not tuples
    changed += [
        (name, model_before[name], model_now[name]) for name in model_set if model_before[name] != model_now[name]
    ]
    if changed:
        listed = ", ".join(f"{name} was {old!r} and is now {new!r}" for name, old, new in changed)
        raise ConfigError(
            f"the checkpoint is of another run: {listed}; drop these keys, or start with another --out_dir"
        )
    if cfg.max_steps < step:
        raise ConfigError(f"max_steps={cfg.max_steps} lies before the checkpoint's step {step}: raise it")
    return cfg, model_cfg


def check_fit(cfg, model_cfg, data, world):
    """Whether model, data and job can work together; ConfigError names everything that cannot."""
    problems = []
    if data.vocab_size > model_cfg.vocab_size:
        problems.append(
            f"{cfg.data_dir} has token ids up to {data.vocab_size - 1}, the model vocab_size={model_cfg.vocab_size}: "
            "prepare the text with this model's tokenizer, or raise vocab_size"
        )
    if cfg.seq_len > model_cfg.max_position_embeddings:
        problems.append(
            f"seq_len={cfg.seq_len} is longer than max_position_embeddings={model_cfg.max_position_embeddings}"
        )
    if cfg.grad_accum_steps % world:
        problems.append(
            f"grad_accum_steps={cfg.grad_accum_steps} cannot be divided over {world} ranks: "
            f"use {-(-cfg.grad_accum_steps // world) * world}"
        )
    if cfg.capacity_start is not None and not (model_cfg.routed_layers and 0 < cfg.capacity_start <= 1):
        problems.append(f"capacity_start={cfg.capacity_start} needs routed layers, and must lie in (0, 1]")
    if problems:
        raise ConfigError("; ".join(problems))


def another_tokenizer(source, data_dir):
    """Whether the model `source` comes with a tokenizer other than the data's: their ids would mean different things."""
    files = [os.path.join(folder, "tokenizer.json") for folder in (find_model(source), data_dir)]
    if not all(map(os.path.exists, files)) or filecmp.cmp(*files, shallow=False):
        return False
    return vocabulary(files[0]) != vocabulary(files[1])


def open_teacher(cfg, model_cfg, device, bf16):
    """The dense model to distil from, frozen, or None without distill_from. Raises ConfigError, ModelError."""
    if not cfg.distill_from:
        return None
    dtype = torch.bfloat16 if bf16 else torch.float32
    teacher = Transformer.from_pretrained(cfg.distill_from, dtype=dtype).to(device).requires_grad_(False)
    problems = []
    if teacher.config.architecture != "dense":
        problems.append(f"is {teacher.config.architecture}, a dense model is needed")
    if teacher.config.vocab_size != model_cfg.vocab_size:
        problems.append(f"has vocab_size={teacher.config.vocab_size}, the model {model_cfg.vocab_size}")
    if another_tokenizer(cfg.distill_from, cfg.data_dir):
        problems.append(f"has another tokenizer than {cfg.data_dir}")
    if cfg.seq_len > teacher.config.max_position_embeddings:
        problems.append(f"takes {teacher.config.max_position_embeddings} tokens, seq_len={cfg.seq_len}")
    if problems:
        raise ConfigError(f"distill_from={cfg.distill_from!r} " + "; ".join(problems))
    return teacher


def start_wandb(cfg, model_cfg, run_id, resumed):
    """The W&B run. Raises ConfigError where it cannot start."""
    try:
        import wandb
    except ImportError:
        raise ConfigError("wandb_log=True needs the package: pip install wandb, or --wandb_log=False") from None
    try:
        return wandb.init(
            project=cfg.wandb_project,
            entity=cfg.wandb_entity or None,
            name=cfg.wandb_run_name or cfg.out_dir,
            id=run_id,
            resume="allow" if resumed else None,
            dir=cfg.out_dir,
            config=asdict(cfg) | asdict(model_cfg),
        )
    except wandb.Error as e:
        raise ConfigError(f"W&B does not start: {e} (WANDB_MODE=offline needs no network)") from e


# ---------------------------------------------------------------------------------------------------------------------


def train(argv):
    """The run, from its configuration to final_model/. Returns (TrainConfig, whether the run is complete)."""
    started = time.perf_counter()
    train_set, model_set = configure(__doc__, argv, TrainConfig, ModelConfig)
    rank, world, local_rank = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if "RANK" in os.environ:  # torchrun; after a restart its store still holds the addresses of the ranks before
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(dist.rendezvous("env://"))[0])
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)

    def say(text):
        if rank == 0:
            tqdm.write(text, file=sys.stderr)

    # -- a new run, or the checkpoint of an old one
    resume, run = (train_set.get(key, getattr(TrainConfig, key)) for key in ("resume", "out_dir"))
    found = [checkpoint.find(resume, run, say) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(found)
    resumed, saved = found[0], {}
    if resumed:
        saved = checkpoint.read_state(resumed)
        cfg, model_cfg = merge(saved, {"out_dir": str(resumed.parent)} | train_set, model_set)
        if Path(cfg.out_dir).resolve() != resumed.parent.resolve():
            checkpoint.find("none", cfg.out_dir)  # goes on elsewhere: not on top of another run
    else:
        cfg = TrainConfig(**train_set)
    if cfg.eval_tasks:  # a typo is found now, not after days
        import bench

        bench.check(eval_argv(cfg))
    device, autocast = pick_device(cfg, local_rank, world)
    bf16, sharded = not isinstance(autocast, nullcontext), cfg.parallel == "fsdp"
    if sharded and not dist.is_initialized():
        raise ConfigError("parallel=fsdp divides a model over ranks: start it with torchrun, or set --parallel=ddp")
    data, val = (TokenData(cfg.data_dir, split, cfg.seq_len, seed=cfg.seed) for split in ("train", "val"))
    fingerprint = checkpoint.digest(Path(cfg.data_dir) / "manifest.json")
    if resumed and saved["data"] != fingerprint:
        raise ConfigError(f"data_dir={cfg.data_dir} is not the data that the checkpoint was trained on")

    # -- the model
    def shard(model):
        parallel.shard(model, device, bf16, cfg.offload)

    torch.manual_seed(cfg.seed)
    if not resumed and cfg.init_from == "scratch":
        vocabulary = {} if "vocab_size" in SIZES.get(cfg.size, {}) else {"vocab_size": data.vocab_size}
        model_cfg = ModelConfig.preset(cfg.size, **vocabulary | model_set)
        check_fit(cfg, model_cfg, data, world)
        with torch.device("meta"):
            model = Transformer(model_cfg)
        shard(model) if sharded else model.to_empty(device="cpu")
        model.init_weights(model.state_dict())
    else:
        # The capacity is the one that the run was given: that of an annealed checkpoint is on its way there.
        overrides = {"capacity": model_cfg.capacity} if resumed else model_set
        load = checkpoint.load_model if resumed else Transformer.from_pretrained
        model = load(resumed or cfg.init_from, shard=shard if sharded else None, **overrides)
        model_cfg = model.config
        shape = SIZES.get(cfg.size, {}).items() if "size" in train_set and not resumed else ()
        if any(getattr(model_cfg, name) != value for name, value in shape):
            raise ConfigError(f"size={cfg.size!r} is not the size of {cfg.init_from}: leave size out")
        if not resumed:
            if another_tokenizer(cfg.init_from, cfg.data_dir):
                raise ConfigError(
                    f"{cfg.data_dir} has another tokenizer than {cfg.init_from}: prepare the text with "
                    f"python prepare.py --tokenizer={cfg.init_from}"
                )
            parts = Counter(
                part for _, part in dict.fromkeys(tuple(name.split(".")[2:4]) for name in model.initialized)
            )
            new = ", ".join(f"{n} {part.replace('_', ' ')}s" for part, n in parts.items()) or "nothing"
            say(f"{cfg.init_from}: {len(model.loaded)} tensors loaded; new: {new}")
            if model.lora_rank:
                raise ConfigError(
                    f"init_from={cfg.init_from!r} is a LoRA adapter: merge it first (checkpoint.py merge)"
                )
            if cfg.lora:
                lora.inject(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.init_from)
        check_fit(cfg, model_cfg, data, world)
    model_config = model_cfg.to_dict()  # as asked for; annealing changes model.config
    model.gradient_checkpointing = cfg.gradient_checkpointing
    if model_cfg.beta_schedule:
        for layer in model.routed:  # they follow the schedule, not the optimizer
            layer.router.beta_ce.requires_grad_(False), layer.router.beta_cu.requires_grad_(False)
    teacher = open_teacher(cfg, model_cfg, device, bf16)
    model.train()
    if not sharded:
        model.to(device)
    if cfg.compile:
        model.compile_trunk()
    torch.manual_seed(cfg.seed + 1 + rank)  # what is drawn in training differs from rank to rank
    wrapped, saving_group = model, None
    if sharded:
        saving_group = dist.new_group(backend="gloo")  # of the threads that save
    elif world > 1:
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    # -- the optimizer
    groups = param_groups(model, cfg)
    rates = {"base": cfg.lr_base, "prior": cfg.lr_prior, "router": cfg.lr_router, "causal_router": cfg.lr_causal_router}
    rates["lora"] = cfg.lr_lora
    rates = {kind: rates[kind] for kind in rates if any(group["name"] == kind for group in groups)}
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr_base, betas=(0.9, 0.95), fused=True)

    # -- where the run stands
    step, flops, best_val_loss, run_id = 0, 0.0, None, uuid.uuid4().hex[:8]
    rows = []  # this rank's metrics of every step since the last log; their names come with the first step
    recent = deque(maxlen=100)  # the latest losses of the whole job, to tell a spike
    bad_in_a_row = bad_steps = 0  # as of the last log
    if resumed:
        step, flops, best_val_loss, run_id = (saved[k] for k in ("step", "flops", "best_val_loss", "wandb_id"))
        recent.extend(saved["recent"])
        bad_in_a_row, bad_steps = saved["bad"]
        checkpoint.load_optimizer(resumed, model, optimizer)
        ranks = torch.load(resumed / "ranks.pt", map_location="cpu", weights_only=True)
        if len(ranks) == world:
            rows = list(ranks[rank]["rows"].to(device))
            torch.set_rng_state(ranks[rank]["rng"])
            if device.type == "cuda" and "cuda" in ranks[rank]:
                torch.cuda.set_rng_state(ranks[rank]["cuda"], device)
        else:  # another number of ranks: new random numbers, and the mean of the metrics for each
            rows = list(torch.stack([each["rows"] for each in ranks]).mean(0).to(device))
            torch.manual_seed(cfg.seed + 1 + rank + step)
    val_loss = None  # that of this step, where it was evaluated
    about = publish.facts(cfg.init_from, data.manifest, argv, saved.get("about"))
    about["validation"] = saved["about"]["validation"] if resumed else None  # the last one
    saved_step, saving = step if resumed else None, None  # the last step on disk; the one being written, and its future

    micro_steps = cfg.grad_accum_steps // world  # micro-batches of a step on this rank
    tokens_per_step = cfg.batch_size * cfg.grad_accum_steps * cfg.seq_len
    flops_per_token, teacher_flops = model.flops_per_token(cfg.seq_len, training=True), 0.0
    if teacher:  # its forward pass, and the student's head a second time
        teacher_flops = teacher.flops_per_token(cfg.seq_len) + 6.0 * model_cfg.hidden_size * model_cfg.vocab_size
    peak = peak_flops(device, bf16)
    out_dir, pending, wandb_run = Path(cfg.out_dir), [], None
    metrics_file = out_dir / "metrics.jsonl"
    if rank == 0:
        if cfg.push_to_hub:  # a name or a token that the hub refuses is found now, not at the end
            publish.reserve(cfg.push_to_hub)
        out_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.rewind(out_dir, step if resumed else -1, complete=step == cfg.max_steps)
        if cfg.wandb_log:
            wandb_run = start_wandb(cfg, model_cfg, run_id, resumed)

    epochs = cfg.max_steps * tokens_per_step / data.tokens
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad or frozen) for frozen in (True, False)]
    say(f"{model_cfg.architecture}: {sizes[0]:,} parameters, {sizes[1]:,} of them trained")
    say(
        f"{cfg.data_dir}: {data.tokens:,} tokens; {cfg.max_steps} steps of {tokens_per_step:,} read {epochs:.2f} epochs"
    )
    say(f"{device}, {world} rank(s){', sharded' * sharded}, {'bfloat16' if bf16 else 'float32'}")
    parts = parallel.memory(model, cfg, world, micro_steps, bf16)
    if teacher:
        parts["teacher"] = sum(p.nbytes for p in teacher.parameters())
    total = f"{sum(parts.values()) / 1e9:.2f} GB = "
    say("memory per rank, estimated: " + total + " + ".join(f"{name} {n / 1e9:.2f}" for name, n in parts.items()))
    for group in groups:
        size, rate = sum(p.numel() for p in group["params"]), rates[group["name"]]
        say(f"  {group['name']:13} {size:13,} parameters, rate {rate:g}, weight decay {group['weight_decay']:g}")
    if device.type == "cuda" and bf16 and not peak:
        say(f"warning: no MFU, because {torch.cuda.get_device_name(device)} is not in PEAK_FLOPS")
    if resumed:
        say(f"resumed from {resumed}")

    def validate():
        """The validation metrics; every rank calls it."""
        nonlocal val_loss, best_val_loss
        topk, causal = evaluate(model, val, cfg, device, autocast, rank, world)
        if math.isfinite(topk):
            val_loss, best_val_loss = topk, topk if best_val_loss is None else min(topk, best_val_loss)
        say(f"step {step}: validation loss {topk:.4f}, under causal routing {causal:.4f}")
        about["validation"] = {"step": step, "loss": topk, "loss_causal": causal}
        losses = {"val/loss": topk, "val/loss_causal": causal}
        return losses | {name.replace("loss", "perplexity"): perplexity(loss) for name, loss in losses.items()}

    def record(metrics):
        """A line of metrics.jsonl, and the same on W&B."""
        if rank:
            return
        metrics = {"tokens": step * tokens_per_step, "flops": flops} | metrics
        finite = {  # JSON has no NaN
            name: value if isinstance(value, list) or math.isfinite(value) else None for name, value in metrics.items()
        }
        pending.append(json.dumps({"step": step} | finite) + "\n")
        try:
            checkpoint.append_lines(metrics_file, pending)
        except OSError as e:
            say(f"warning: {e}; the metrics wait in memory")
        if wandb_run:
            wandb_run.log(metrics, step=step)

    def save():
        """Begin a checkpoint of this step; every rank calls it. A full disk is a warning, not the end of the run."""
        nonlocal saving
        settle()
        mine = {"rows": torch.stack(rows).cpu() if rows else torch.zeros(0), "rng": torch.get_rng_state()}
        if device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(device)
        state = {"step": step, "tokens": step * tokens_per_step, "flops": flops, "val_loss": val_loss}
        state |= {"best_val_loss": best_val_loss, "bad": [bad_in_a_row, bad_steps], "recent": list(recent)}
        state |= {"data": fingerprint, "wandb_id": run_id, "world_size": world, "torch": torch.__version__}
        state |= {"config": {"train": asdict(cfg), "model": model_config}, "about": dict(about)}
        where = model, optimizer, mine, cfg.data_dir, cfg.keep_last, pending, saving_group
        saving = step, checkpoint.save(out_dir, state, *where)

    def settle():
        """Wait for the checkpoint that is being written, if any."""
        nonlocal saving, saved_step
        if saving:
            begun, future = saving
            saving = None
            try:
                future.result()
                saved_step = begun
            except CheckpointError as e:
                say(f"warning: step {begun} is not saved: {e}; what was saved before is intact")

    # -- A first signal ends the step, a second Ctrl-C stops at once. One key press comes twice under torchrun, from the
    # terminal and from torchrun itself: within a second it is the same one.
    stop = {"signal": 0, "time": 0.0}

    def on_signal(number, frame):
        if number == signal.SIGINT and stop["signal"] and time.monotonic() - stop["time"] > 1:
            raise KeyboardInterrupt
        if not stop["signal"]:
            stop.update(signal=number, time=time.monotonic())
            if rank == 0:
                os.write(2, b"\nstopping after this step; a second Ctrl-C stops at once\n")  # print() is not reentrant

    handled = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    if not resumed:
        if cfg.capacity_start is not None:
            model.set_capacity(annealed(0, cfg.capacity_start, model_config["capacity"], cfg.capacity_anneal_steps))
        record(validate())
    mine = range(step * cfg.grad_accum_steps + rank, cfg.max_steps * cfg.grad_accum_steps, world)  # micro-batches
    stream = batches(data, (number * cfg.batch_size for number in mine), cfg.batch_size, device)
    bar = tqdm(total=cfg.max_steps, initial=step, unit="step", disable=rank > 0 or not sys.stderr.isatty())
    logged, clock, waited, capacity, stopped, hopeless = step, time.perf_counter(), 0.0, None, 0, False
    compiling = cfg.compile

    # -----------------------------------------------------------------------------------------------------------------
    while step < cfg.max_steps and not stopped and not hopeless:
        # -- what changes with the step: rates, capacity, betas
        scale = lr_scale(step, cfg.max_steps, cfg.warmup_ratio, cfg.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = scale * rates[group["name"]]
        if cfg.capacity_start is not None:
            now = annealed(step, cfg.capacity_start, model_config["capacity"], cfg.capacity_anneal_steps)
            if now != capacity:
                capacity = now
                model.set_capacity(capacity)
                flops_per_token = model.flops_per_token(cfg.seq_len, training=True)
        if model_cfg.beta_schedule:
            cosine = 0.5 * (1 + math.cos(math.pi * step / cfg.max_steps))
            ranges = model_cfg.beta_ce_range, model_cfg.beta_cu_range
            model.set_betas(*(end + (begin - end) * cosine for begin, end in ranges))

        # -- forward and backward
        values, thresholds = 0.0, [buffer.clone() for buffer in model.buffers()]
        for micro in range(micro_steps):
            asked = time.perf_counter()
            x, y = next(stream)  # (B, T) each
            waited += time.perf_counter() - asked
            last_micro = micro == micro_steps - 1  # one exchange of gradients a step
            if sharded:
                model.set_requires_gradient_sync(last_micro)
            elif world > 1:
                wrapped.require_backward_grad_sync = last_micro
            with autocast:
                taught = {}
                if teacher:
                    with torch.no_grad():
                        taught = {"teacher": (teacher.model(x)[0], teacher.head_weight)}
                out = wrapped(x, y, **taught)
            (out.loss / micro_steps).backward()
            losses = {"train/loss" if name == "lm" else f"{name}_loss": loss for name, loss in out.losses.items()}
            stats = {name: stat for name, stat in out.stats.items() if cfg.log_layers or not name.startswith("layer_")}
            shown = {"total": out.loss} | losses | stats
            values = values + torch.stack([value.detach().float() for value in shown.values()]) / micro_steps
        if sharded:
            parallel.average_whole(model)
        grad_norm = parallel.clip_grad_norm(model.parameters(), cfg.grad_clip or math.inf, device)

        # -- update, unless the loss or the gradient is not finite: then, on all ranks, nothing changes. The optimizer
        # reads found_inf on the device, so the host need not wait to know.
        bad = 1 - torch.isfinite(values[0] + grad_norm).float()
        if world > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
            for buffer in model.buffers():  # average thresholds, each rank's own until here
                dist.all_reduce(buffer)
                buffer /= world
        for buffer, before in zip(model.buffers(), thresholds, strict=True):
            buffer.copy_(torch.where(bad.to(buffer.device) > 0, before, buffer))
        optimizer.found_inf = bad.cpu() if cfg.offload else bad
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if compiling:
            grad_norm.item()  # wait for the device, this once
            say(f"compiled within the first step, {time.perf_counter() - clock:.1f} s")
            compiling = False
        step += 1
        flops += (flops_per_token + teacher_flops) * tokens_per_step

        row = torch.cat([values[1:], grad_norm[None], bad[None]])
        if rows and len(rows[0]) != len(row):  # resumed, and log_layers has changed
            rows.clear()
        rows.append(row)

        late = 0 < cfg.max_seconds <= time.perf_counter() - started
        signals = torch.tensor(stop["signal"] or late * OUT_OF_TIME)
        if world > 1:
            dist.all_reduce(signals, dist.ReduceOp.MAX)  # on the CPU: no waiting for the device
        stopped, last = int(signals), step == cfg.max_steps

        # -- log
        metrics, val_loss = {}, None
        if step == 1 or step % cfg.log_interval == 0 or last:
            table = torch.stack(rows)  # (steps, metrics)
            rows.clear()
            if world > 1:
                dist.all_reduce(table)
            table = (table / world).tolist()  # waits for the device
            now = time.perf_counter()
            tokens_per_s = (step - logged) * tokens_per_step / (now - clock)
            good = [row for row in table if not row[-1]]
            means = [sum(column) / len(good) for column in zip(*good, strict=True)] or [math.nan] * len(table[0])
            metrics = dict(zip([*losses, *stats, "grad_norm"], means[:-1], strict=True))
            if found := spikes(table, step, recent, cfg.batch_size * cfg.grad_accum_steps):
                metrics["spikes"] = found
                for spike in found:
                    first, last_one = spike["sequences"]
                    say(f"spike: loss {spike['loss']} at step {spike['step']}, of sequences {first}-{last_one}")
            for *_, was_bad in table:
                bad_in_a_row, bad_steps = (bad_in_a_row + 1, bad_steps + 1) if was_bad else (0, bad_steps)
            metrics |= {"train/perplexity": perplexity(metrics["train/loss"])}
            metrics |= {f"lr/{kind}": scale * rate for kind, rate in rates.items()}
            metrics |= {"bad_steps": bad_steps, "tokens_per_s": tokens_per_s, "data_wait": waited / (now - clock)}
            line = f"loss {metrics['train/loss']:.4f}, {tokens_per_s:,.0f} tokens/s"
            if peak:
                metrics["mfu"] = tokens_per_s * (flops_per_token + teacher_flops) / (peak * world)
                line += f", MFU {metrics['mfu']:.1%}"
            bar.set_postfix_str(line, refresh=False)
            if bar.disable:
                left = tqdm.format_interval((cfg.max_steps - step) * tokens_per_step / tokens_per_s)
                say(f"step {step}/{cfg.max_steps}: {line}, {left} left")
            hopeless = bad_in_a_row >= cfg.max_bad_steps
            logged, clock, waited = step, now, 0.0
        bar.update()

        # -- evaluate and save, with the clock stopped
        due_eval = last or (cfg.eval_interval and step % cfg.eval_interval == 0)
        due_save = cfg.save_interval and step % cfg.save_interval == 0 and not last
        if device.type == "cuda" and (due_eval or due_save):
            torch.cuda.synchronize()
        paused = time.perf_counter()
        if due_eval:
            metrics |= validate()
        if metrics:
            record(metrics)
        if due_save:
            save()
        clock += time.perf_counter() - paused

    # -- the end, or a stop on the way
    bar.close()
    settle()
    new = [step != saved_step]
    if world > 1:
        dist.broadcast_object_list(new)  # only the main rank knows
    if new[0]:
        save()
        settle()
    if rank == 0 and step != saved_step:
        raise CheckpointError(f"step {step} is not saved in {out_dir}: make room and go on with --resume=auto")
    path = out_dir / f"step_{step:07d}"
    if hopeless:
        raise TrainError(
            f"no finite loss and gradient in {cfg.max_bad_steps} steps up to step {step}: they changed nothing, the "
            f"weights before them are in {path}; lower the rates, or look at the data"
        )
    if rank == 0 and step == cfg.max_steps and not (out_dir / "final_model").exists():
        if cfg.lora_merge:
            lora.merge(model)
        checkpoint.export(path, out_dir / "final_model", model if cfg.lora_merge else None)
        say(f"done: {out_dir / 'final_model'}")
    elif step == cfg.max_steps:
        say(f"the run in {out_dir} is complete: a larger --max_steps goes on")
    else:
        why = f"max_seconds={cfg.max_seconds:g}" if stopped == OUT_OF_TIME else signal.Signals(stopped).name
        say(f"{why}: stopped and saved in {path}; --resume=auto goes on")
    if wandb_run:
        wandb_run.finish()
    for number, handler in handled.items():  # an evaluation or an upload may be stopped as any program
        signal.signal(number, handler)
    del wrapped  # DDP goes before its process group: the other way round its destructor has been seen to wait for ever
    if dist.is_initialized():
        dist.barrier()  # no rank leaves while the main one still writes
        dist.destroy_process_group()
    if stopped == signal.SIGTERM and step < cfg.max_steps:
        sys.exit(128 + signal.SIGTERM)
    return cfg, step == cfg.max_steps


def eval_argv(cfg):
    """The command line of bench.py that evaluates what this run has trained."""
    argv = [f"--tasks={','.join(cfg.eval_tasks)}", f"--model_path={cfg.out_dir}/final_model", f"--text={cfg.data_dir}"]
    same = "batch_size", "seq_len", "device", "dtype", "wandb_log", "wandb_project", "wandb_entity"
    return argv + [f"--{name}={getattr(cfg, name)}" for name in same]


def main(argv):
    try:
        cfg, complete = train(argv)  # when it returns, the memory of the run is free
    except torch.OutOfMemoryError as e:
        raise TrainError(
            "out of memory; in this order: halve --batch_size and double --grad_accum_steps, --gradient_checkpointing, "
            f"--parallel=fsdp on several GPUs, with --offload, a shorter --seq_len ({str(e).splitlines()[0]})"
        ) from e
    status = 0
    if complete and cfg.eval_tasks:
        import bench

        try:
            bench.main(eval_argv(cfg))
        except SystemExit as e:  # a task could not be run
            status = e.code
    if complete and cfg.push_to_hub and os.environ.get("RANK", "0") == "0":
        print(f"uploaded: {publish.push(Path(cfg.out_dir) / 'final_model', cfg.push_to_hub)}", file=sys.stderr)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    cli(main)
