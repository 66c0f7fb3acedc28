"""Train a dense, MoD, DTF or STT model on token files: one GPU, a laptop's CPU, or many ranks.

    python train.py                                              a small dense model on data/stdlib
    python train.py config/demo.py --architecture=dtf            a config file, then keys; a later one wins
    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b.py
    torchrun --standalone --nproc_per_node=8 train.py config/dtf_05b.py config/7b.py    sharded
    python train.py config/demo.py --resume=auto                 go on where the run in out_dir stopped

A resumed run takes every key that is not given from its checkpoint, and continues to the same bits (on a CPU; flash
attention's backward pass on GPUs sums in no fixed order). Ctrl-C, SIGTERM, SIGUSR1 and --max_seconds end the step, save and
stop; a second Ctrl-C stops at once. In <out_dir>: metrics.jsonl, step_*/ (checkpoints) and, after the last step, final_model/.
"""

import filecmp
import math
import os
import random
import signal
import sys
import time
import uuid
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import kernels
import lora
import parallel
import publish
from configurator import cli, configure
from conversion import allot, choose_layers, fit_routers, removal_costs
from data import TokenData
from device import (
    autocast,
    device_name,
    moved,
    peak_flops,
    pick_device,
    random_state,
    set_random_state,
    synchronize,
)
from errors import CheckpointError, ConfigError, TrainError, UserError, first_line
from files import hold, sha256
from generation import missing_compiler
from measure import calibrate
from metrics import Metrics, Progress, perplexity, start_wandb
from model import SIZES, ModelConfig, Transformer
from optimizer import LossScale, lr_scale, make_optimizer, set_rates, step_unless
from parallel import all_reduce, from_main, local_rank, rank, say, start_ranks, world
from settings import FIXED, TrainConfig
from tokenizer import vocabulary
from weights import fill, find_model

CALIBRATING = 16_384  # tokens that thresholds are calibrated on
ALLOTTING = 16  # sequences by which a capacity is shared out among blocks with fitted routers
FITTING = 32  # times the hidden size: training tokens that lines are fitted on


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(argv) -> tuple[TrainConfig, bool]:
    """The run, from its configuration to final_model/. Returns its configuration, and whether it is complete."""
    started = time.perf_counter()
    run = Run(argv)
    cfg, model, optimizer, progress, metrics = run.cfg, run.model, run.optimizer, run.progress, run.metrics
    stop = Stop(started + cfg.max_seconds if cfg.max_seconds else math.inf)
    ends_here = progress.step == cfg.max_steps  # by a max_steps that was lowered to the checkpoint's step
    if ends_here and run.calibrate() or not run.resumed or ends_here and not run.validated:
        run.saved_step = None
        metrics.record(run.validate())
    elif run.saved_step is None:  # it goes on elsewhere: from now on by itself
        run.save()
    first, end = progress.step * cfg.grad_accum_steps + rank(), cfg.max_steps * cfg.grad_accum_steps
    numbers = range(first, end, world())  # of this rank's micro-batches
    stream = batches(run.data, (n * cfg.batch_size for n in numbers), cfg.batch_size, run.device)
    metrics.start_clock()

    while progress.step < cfg.max_steps and not stop.reason and not stop.hopeless:
        # -- what changes with the step: rates, capacity, what an architecture schedules
        rates = set_rates(optimizer, lr_scale(progress.step, cfg.max_steps, cfg.warmup_ratio, cfg.min_lr_ratio))
        run.set_capacity()
        model.schedule(progress.step / cfg.max_steps)

        # -- forward and backward
        values, buffers_before = 0.0, [buffer.clone() for buffer in model.buffers()]  # average thresholds
        for micro_step in range(run.micro_steps):
            x, y = metrics.wait(stream)  # (B, T) each
            run.exchange_gradients(micro_step == run.micro_steps - 1)
            with autocast(run.device, run.dtype):
                out = run.wrapped(x, y, teacher=run.teach(x))
            run.loss_scale.up(out.loss / run.micro_steps).backward()
            values = values + metrics.measure(out) / run.micro_steps
        if run.sharded:
            parallel.average_whole(model)
        run.loss_scale.down(model.parameters())
        grad_norm = parallel.clip_grad_norm(model.parameters(), cfg.grad_clip or math.inf, run.device)

        # -- update, unless the loss or the gradient is not finite: then, on all ranks, nothing changes
        bad = all_reduce(1 - torch.isfinite(values[0] + grad_norm).float(), dist.ReduceOp.MAX)
        for buffer, before in zip(model.buffers(), buffers_before, strict=True):  # each rank's own until here
            average = all_reduce(buffer.clone()) / world()
            buffer.copy_(torch.where(bad.to(buffer.device) > 0, before, average))
        step_unless(bad, optimizer)
        if run.loss_scale.on:
            bad = run.loss_scale.adapt(bad, all_reduce(values[0].clone()))
        # DDP's buckets hold the gradients: let go of, they would be there twice.
        optimizer.zero_grad(set_to_none=run.wrapped is model)
        run.say_compiled(grad_norm)
        progress.step += 1
        progress.flops += run.flops_per_token * metrics.tokens_per_step
        metrics.add(values, grad_norm, bad)
        stop.agree()

        # -- log, evaluate and save; the clock stands still for the last two
        last, line, progress.val_loss = progress.step == cfg.max_steps, {}, None
        if progress.step == 1 or progress.step % cfg.log_interval == 0 or last:
            line = metrics.read(rates) | run.loss_scale.metrics()
            stop.hopeless = progress.bad_in_a_row >= cfg.max_bad_steps
        metrics.bar.update()
        evaluates = last or (cfg.eval_interval and progress.step % cfg.eval_interval == 0)
        saves = cfg.save_interval and progress.step % cfg.save_interval == 0 and not last
        if evaluates or saves:
            synchronize(run.device)
        with metrics.clock_stopped():
            if last:
                run.calibrate()
            if evaluates:
                line |= run.validate()
            if line:
                metrics.record(line)
            if saves:
                run.save()

    metrics.bar.close()
    finish(run, stop)
    return cfg, progress.step == cfg.max_steps


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a step


def drawn(choices, seed, step):
    """The capacity of `step` out of `choices`: another each step, whoever asks, however often the run was stopped."""
    return random.Random(f"{seed} {step}").choice(choices)


def annealed(step, start, end, steps):
    """Capacity at `step`: from `start` to `end` in 8 stairs, since every new k recompiles; `end` from 7/8 · steps on."""
    if isinstance(end, list | tuple):
        return [annealed(step, start, e, steps) for e in end]
    stair = min(7, 8 * step // steps) / 7
    return start * (1 - stair) + end * stair


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
            yield tuple(moved(t, device) for t in batch)


@torch.no_grad()
def evaluate(model, data, cfg, device, dtype):
    """Mean loss of the first eval_batches micro-batches of validation text, under both routings: two floats.

    The batches are divided over the ranks, which run in step: one that has none left repeats the last, for nothing.
    A short validation split is read once.
    """
    count = min(cfg.batch_size, len(data))
    n = min(cfg.eval_batches, len(data) // count)
    numbers = range(rank(), -(-n // world()) * world(), world())  # of this rank's batches
    routings = ["topk", "causal"] if model.config.routed_layers else ["topk"]  # dense: the two are one
    sums = torch.zeros(len(routings), device=device)
    model.eval()
    stream = batches(data, (min(number, n - 1) * count for number in numbers), count, device)
    for number, (x, y) in zip(numbers, stream, strict=True):
        for i, routing in enumerate(routings):
            with autocast(device, dtype):
                sums[i] += model(x, y, routing=routing).losses["lm"] * (number < n)
    model.train()
    if cfg.parallel == "fsdp":
        model.reshard()  # the embedding and the head were left whole for a backward pass
    losses = (all_reduce(sums) / n).tolist()
    return losses[0], losses[-1]


class Stop:
    """Why a run ends before its last step: a signal, --max_seconds, or bad steps; the same on all ranks.

    From now on a first signal ends the step, a second Ctrl-C stops at once.
    """

    OUT_OF_TIME = signal.SIGALRM  # what --max_seconds is among the signals

    def __init__(self, deadline: float):
        self.deadline = deadline  # by time.perf_counter()
        self.signal, self.signal_time = 0, 0.0  # the first one of this process
        self.reason = 0  # what the ranks have agreed on
        self.hopeless = False  # too many steps in a row without a finite loss and gradient
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
        self.handlers = {number: signal.signal(number, self.on_signal) for number in numbers}

    def on_signal(self, number, frame):
        """One key press comes twice under torchrun, from the terminal and from torchrun itself: within a second it is one."""
        if number == signal.SIGINT and self.signal and time.monotonic() - self.signal_time > 1:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()
            if rank() == 0:
                os.write(2, b"\nstopping after this step; a second Ctrl-C stops at once\n")  # print() is not reentrant

    def agree(self):
        late = time.perf_counter() >= self.deadline
        number = torch.tensor(self.signal or late * self.OUT_OF_TIME)
        self.reason = int(all_reduce(number, dist.ReduceOp.MAX))  # on the CPU: no waiting for the device


class Run:
    """Everything that a run holds between two steps."""

    def __init__(self, argv):
        """A new run, or the one of a checkpoint, ready for its next step. Raises a UserError before anything is written."""
        train_set, model_set = configure(__doc__, argv, TrainConfig, ModelConfig)
        start_ranks()
        self.resumed, saved, cfg, model_cfg = read_settings(train_set, model_set)
        if cfg.eval_tasks:  # a typo is found now, not after days
            import bench

            bench.check(eval_argv(cfg))
        self.cfg, self.out_dir, self.sharded = cfg, Path(cfg.out_dir), cfg.parallel == "fsdp"
        self.device, self.dtype = pick_device(cfg.device, cfg.dtype, local_rank(), world())
        cfg.dtype = str(self.dtype).removeprefix(
            "torch."
        )  # "auto" is decided once: a resumed run goes on in its format
        if self.sharded and not dist.is_initialized():
            raise ConfigError("parallel=fsdp divides a model over ranks: start it with torchrun, or set --parallel=ddp")
        self.data, self.val = (TokenData(cfg.data_dir, split, cfg.seq_len, seed=cfg.seed) for split in ("train", "val"))
        self.fingerprint = sha256(Path(cfg.data_dir) / "manifest.json")
        if self.resumed and saved["data"] != self.fingerprint:
            raise ConfigError(f"data_dir={cfg.data_dir} is not the data that the checkpoint was trained on")

        torch.manual_seed(cfg.seed)
        placed = {"device": self.device, "dtype": self.dtype, "offload": cfg.offload}
        shard = partial(parallel.shard, **placed) if self.sharded else None
        model = build_model(cfg, model_set, model_cfg, self.resumed, self.data, shard, self.device, self.dtype)
        if cfg.lora:
            lora.lower(model, self.dtype)
        model.model.gradient_checkpointing = cfg.gradient_checkpointing
        if not self.resumed or saved["step"] < cfg.max_steps:  # the weights move on
            model.config.calibrated = None
            model.set_capacity(model.config.capacity)  # whose borders were calibrated
        self.model, self.model_config = model, model.config.to_dict()  # as asked for; annealing changes model.config
        several, asked = len(set(cfg.capacity_choices)) > 1, self.model_config["capacity"]
        self.choices = cfg.capacity_choices if several else []  # of which each step draws one
        if cfg.capacity_choices and not several and asked not in cfg.capacity_choices:
            say(f"note: capacity={asked} goes before capacity_choices={cfg.capacity_choices}")
        self.teacher = open_teacher(cfg, model.config, self.device, self.dtype)
        model.train()
        if not self.sharded:
            model.to(self.device)
        self.compiling = self.is_compiled()  # until it has been said how long that took
        if self.compiling:
            model.compile_trunk()
        torch.manual_seed(cfg.seed + 1 + rank())  # what is drawn in training differs from rank to rank
        self.wrapped = model
        if world() > 1 and not self.sharded:
            # Looking for unused parameters, DDP keeps its buckets as they are; else it sorts them anew after its first step,
            # and the first step after a resume would be summed in another order. On GPUs sums have no fixed order anyway.
            fixed = self.device.type == "cpu"
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            self.wrapped = DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=fixed
            )
        self.optimizer = make_optimizer(model, cfg)
        self.loss_scale = LossScale(self.dtype, self.device, saved.get("loss_scale"))
        self.micro_steps = cfg.grad_accum_steps // world()  # micro-batches of a step on this rank

        self.about = publish.facts(cfg.init_from, self.data.manifest, argv, saved.get("about"))  # for the card
        self.about["validation"] = saved["about"]["validation"] if self.resumed else None  # the last one
        self.wandb_id = saved.get("wandb_id") or uuid.uuid4().hex[:8]
        self.saving = None  # the step that is being written, and its future
        here = self.resumed and self.resumed.parent.resolve() == self.out_dir.resolve()
        self.saved_step = saved["step"] if here else None  # the last one on disk
        self.validated = saved.get("val_loss") is not None  # at the step of the checkpoint
        self.saving_group = dist.new_group(backend="gloo") if self.sharded else None  # of the threads that save
        self.progress = Progress()
        if self.resumed:
            self.restore(saved)
        self.metrics = Metrics(cfg, self.progress, peak_flops(self.device, self.dtype))
        self.costs: dict[str, float] = {}  # {capacity: FLOPs per token, with all that training computes for it}
        self.set_capacity()
        self.prepare_folder()
        self.introduce()

    def is_compiled(self) -> bool:
        """Whether training is, by compile= and what is there to compile with."""
        if self.cfg.compile != "auto" or self.device.type != "cuda":
            return self.cfg.compile is True
        missing = missing_compiler()
        if not missing and not kernels.TRITON:
            missing = "Triton, a C compiler or Python's headers (python3-dev)"
        if missing:
            say(f"not compiled, and slower: {missing} is not there; install it (CXX names another C++ compiler)")
        return not missing

    def restore(self, saved: dict):
        """Puts a run where its checkpoint stood: optimizer, counters, random generators, metrics not yet logged."""
        progress, device = self.progress, self.device
        progress.step, progress.flops = saved["step"], saved["flops"]
        progress.bad_in_a_row, progress.bad_steps = saved["bad"]
        progress.recent.extend(saved["recent"])
        used, now = saved["optimizer"], type(self.optimizer).__name__
        if used != now:
            raise ConfigError(f"{self.resumed} was made with {used}, not with {now}: start with another --out_dir")
        checkpoint.load_optimizer(self.resumed, self.model, self.optimizer)
        ranks = torch.load(self.resumed / "ranks.pt", map_location="cpu", weights_only=True)
        if len(ranks) == world():
            of_rank = ranks[rank()]
            progress.rows = list(of_rank["rows"].to(device))
            set_random_state(device, of_rank)
        else:  # another number of ranks: new random numbers, and the mean of the metrics for each
            progress.rows = list(torch.stack([of_rank["rows"] for of_rank in ranks]).mean(0).to(device))
            torch.manual_seed(self.cfg.seed + 1 + rank() + progress.step)

    def prepare_folder(self):
        """Makes out_dir what it was at this step, on the main rank; and starts W&B."""
        cfg, step = self.cfg, self.progress.step
        if rank():
            return
        if cfg.push_to_hub:  # a name or a token that the hub refuses is found now, not at the end
            publish.reserve(cfg.push_to_hub)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        hold(self.out_dir)
        checkpoint.rewind(self.out_dir, step if self.resumed else -1, complete=step == cfg.max_steps)
        if cfg.wandb_log:
            settings = asdict(cfg) | self.model_config
            self.metrics.wandb_run = start_wandb(cfg, settings, self.wandb_id, bool(self.resumed))

    def introduce(self):
        """Says what will be trained on what, and what it will take."""
        cfg, model, data = self.cfg, self.model, self.data
        size = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f"{model.config.architecture}: {size:,} parameters, {trained:,} of them trained")
        per_step = self.metrics.tokens_per_step
        epochs = cfg.max_steps * per_step / data.tokens
        say(f"{cfg.data_dir}: {data.tokens:,} tokens; {cfg.max_steps} steps of {per_step:,} read {epochs:.2f} epochs")
        sharded = ", sharded" if self.sharded else ""
        say(f"{self.device}, {world()} rank(s){sharded}, {self.cfg.dtype}")
        parts = parallel.memory(model, cfg, world(), self.micro_steps, self.dtype, self.device.type)
        if self.teacher:
            parts["teacher"] = sum(p.nbytes for p in self.teacher.parameters())
        total = f"{sum(parts.values()) / 1e9:.2f} GB = "
        say("memory per rank, estimated: " + total + " + ".join(f"{name} {n / 1e9:.2f}" for name, n in parts.items()))
        for group in self.optimizer.param_groups:
            n, rate, decay = sum(p.numel() for p in group["params"]), group["peak"], group["weight_decay"]
            say(f"  {group['name']:13} {n:13,} parameters, rate {rate:g}, weight decay {decay:g}")
        if self.device.type == "cuda" and self.dtype == torch.bfloat16 and not self.metrics.peak:
            say(f"warning: no MFU, because {device_name(self.device)} is not in PEAK_FLOPS")
        if self.resumed:
            say(f"resumed from {self.resumed}")

    def set_capacity(self):
        """The capacity of this step, where it is annealed or drawn; and what a token then costs."""
        cfg, config = self.cfg, self.model.config
        now, end = config.capacity, self.model_config["capacity"]
        if self.choices:
            now = drawn(self.choices, cfg.seed, self.progress.step)
        if cfg.capacity_start is not None:
            now = annealed(self.progress.step, cfg.capacity_start, end, cfg.capacity_anneal_steps)
        if now != config.capacity:
            self.model.set_capacity(now)
        if str(now) not in self.costs:
            cost = self.model.flops_per_token(cfg.seq_len, training=True)
            if self.teacher:
                cost += self.teacher.flops_per_token(cfg.seq_len)
            self.costs[str(now)] = cost
        self.flops_per_token = self.costs[str(now)]

    def leave_the_drawn_capacity(self):
        """For the one that was asked for: what is measured, saved and exported has that."""
        if self.choices:
            self.model.set_capacity(self.model_config["capacity"])

    def calibrate(self) -> bool:
        """Where the causal decision of each routed layer selects each of its choices, on some training text. Whether it did."""
        cfg, end = self.cfg, self.model_config["capacity"]
        if not cfg.capacity_choices or self.model.config.calibrated:
            return False
        say(f"calibrating {len(self.model.routed)} routed blocks on {CALIBRATING:,} tokens")
        ids, found = self.data.batch(0, -(-CALIBRATING // cfg.seq_len))[0].to(self.device), {}
        self.model.eval()
        for capacity in sorted({end, *self.choices}):
            self.model.set_capacity(capacity)
            with autocast(self.device, self.dtype):
                calibrate(self.model, ids, capacity)
            found[str(capacity)] = [layer.offset for layer in self.model.routed]
        self.model.train()
        if self.sharded:
            self.model.reshard()
        self.model.config.calibrated = found
        self.model.set_capacity(end)
        return True

    def exchange_gradients(self, last_micro_step: bool):
        """One exchange a step: to be said before the forward pass of each micro-batch."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last_micro_step)
        elif world() > 1:
            self.wrapped.require_backward_grad_sync = last_micro_step

    @torch.no_grad()
    def teach(self, x):
        """What `Transformer.forward` takes as teacher: its hidden states and head, or None."""
        return self.teacher and (self.teacher.model(x)[0], self.teacher.head_weight)

    def say_compiled(self, result):
        """After the first step, how long it took to compile."""
        if self.compiling:
            result.item()  # wait for the device, this once
            say(f"compiled within the first step, {time.perf_counter() - self.metrics.clock:.1f} s")
            self.compiling = False

    def validate(self) -> dict:
        """The validation metrics; every rank calls it."""
        progress = self.progress
        self.leave_the_drawn_capacity()
        topk, causal = evaluate(self.model, self.val, self.cfg, self.device, self.dtype)
        if math.isfinite(topk):
            progress.val_loss = topk
        say(f"step {progress.step}: validation loss {topk:.4f}, under causal routing {causal:.4f}")
        self.about["validation"] = {"step": progress.step, "loss": topk, "loss_causal": causal}
        losses = {"val/loss": topk, "val/loss_causal": causal}
        return losses | {name.replace("loss", "perplexity"): perplexity(loss) for name, loss in losses.items()}

    def save(self):
        """Begin a checkpoint of this step; every rank calls it. A full disk is a warning, not the end of the run."""
        self.settle()
        cfg, progress = self.cfg, self.progress
        self.leave_the_drawn_capacity()
        rows = torch.stack(progress.rows).cpu() if progress.rows else torch.zeros(0)
        of_rank = {"rows": rows} | random_state(self.device)
        state = {
            "step": progress.step,
            "tokens": progress.step * self.metrics.tokens_per_step,
            "flops": progress.flops,
            "val_loss": progress.val_loss,
            "bad": [progress.bad_in_a_row, progress.bad_steps],
            "recent": list(progress.recent),
            "data": self.fingerprint,
            "wandb_id": self.wandb_id,
            "world_size": world(),
            "torch": torch.__version__,
            "optimizer": type(self.optimizer).__name__,
            "loss_scale": self.loss_scale.state(),
            "config": {"train": asdict(cfg), "model": self.model_config},
            "about": dict(self.about),
        }
        where, pending = self.out_dir, self.metrics.pending
        future = checkpoint.save(
            where, state, self.model, self.optimizer, of_rank, cfg.data_dir, cfg.keep_last, pending, self.saving_group
        )
        self.saving = progress.step, future

    def settle(self):
        """Wait for the checkpoint that is being written, if any."""
        if not self.saving:
            return
        (step, future), self.saving = self.saving, None
        try:
            future.result()
            self.saved_step = step
        except CheckpointError as e:
            say(f"warning: step {step} is not saved: {e}; what was saved before is intact")


# ---------------------------------------------------------------------------------------------------------------------
# What a run is made of


def read_settings(train_set, model_set):
    """(checkpoint to go on from or None, its state.json, TrainConfig, ModelConfig or None where the model is yet to be)."""
    resume, out_dir = (train_set.get(key, getattr(TrainConfig, key)) for key in ("resume", "out_dir"))
    if rank() == 0 and resume in ("auto", "none") and os.path.isdir(out_dir):
        hold(out_dir)  # before it is searched: a run that ended in between would be taken back to the step found here
    resumed = from_main(checkpoint.find(resume, out_dir, say) if rank() == 0 else None)
    if not resumed:
        cfg = TrainConfig(**train_set)
        if "size" in train_set and cfg.init_from != "scratch":
            raise ConfigError(
                f"size={cfg.size!r} is of a model from scratch, {cfg.init_from} has its own: leave size out"
            )
        return None, {}, cfg, None
    saved = checkpoint.read_state(resumed)
    cfg, model_cfg = go_on(saved, {"out_dir": str(resumed.parent)} | train_set, model_set)
    if Path(cfg.out_dir).resolve() != resumed.parent.resolve():
        checkpoint.find("none", cfg.out_dir)  # goes on elsewhere: not on top of another run
    return resumed, saved, cfg, model_cfg


def go_on(saved, train_set, model_set):
    """The configs of a resumed run: what its checkpoint says, then what is set now. Raises ConfigError for a conflict."""
    model_set = {name: value for name, value in model_set.items() if value != "auto"}  # the choice was made then
    try:
        earlier = TrainConfig(**saved["config"]["train"])
        cfg = TrainConfig(**saved["config"]["train"] | train_set)
        model_cfg = ModelConfig.from_dict(saved["config"]["model"], **model_set)
        step, earlier_model = saved["step"], asdict(ModelConfig.from_dict(saved["config"]["model"]))
        for youngest in ("bad", "recent", "about", "optimizer"):
            saved[youngest]
    except (KeyError, TypeError) as e:
        raise CheckpointError(f"state.json was written by another version of train.py: {e}") from e
    changed = [(name, getattr(earlier, name), getattr(cfg, name)) for name in FIXED]
    sequences = [c.batch_size * c.grad_accum_steps for c in (earlier, cfg)]
    changed.append(("batch_size · grad_accum_steps", *sequences))
    changed += [(name, earlier_model[name], getattr(model_cfg, name)) for name in model_set]
    listed = ", ".join(f"{name} was {old!r} and is now {new!r}" for name, old, new in changed if old != new)
    if listed:
        cure = "drop these keys, or start with another --out_dir"
        raise ConfigError(f"the checkpoint is of another run: {listed}; {cure}")
    if cfg.max_steps < step:
        raise ConfigError(f"max_steps={cfg.max_steps} lies before the checkpoint's step {step}: raise it")
    return cfg, model_cfg


def build_model(cfg, model_set, model_cfg, resumed, data, shard, device, dtype) -> Transformer:
    """The model of a new or a resumed run, on the CPU or sharded. model_cfg: of a resumed one."""
    if resumed:
        # The capacity is the one that the run was given: that of an annealed checkpoint is on its way there.
        model = checkpoint.load_model(resumed, shard, capacity=model_cfg.capacity)
    elif cfg.init_from == "scratch":
        if model_set.get("router") == "fitted":
            raise ConfigError("router='fitted' is fitted to a parent when train.py converts one: set init_from")
        of_data = {"eos_token_id": data.manifest["eot_token"], "vocab_size": data.vocab_size}
        model_cfg = ModelConfig.preset(cfg.size, **of_data | SIZES.get(cfg.size, {}) | model_set)
        check_fit(cfg, model_cfg, data, world())  # before memory is taken
        model = checkpoint.empty_model(model_cfg, shard)
        model.init_weights(model.state_dict())
    else:
        model = convert(cfg, model_set, data, shard, device, dtype)
    check_fit(cfg, model.config, data, world())
    return model


def convert(cfg, model_set, data, shard, device, dtype) -> Transformer:
    """The model of init_from, as the architecture that is asked for. Raises ConfigError where it cannot be trained on.

    device, dtype: where and in what its parent runs, if it is asked which blocks it can spare and what they do.
    """
    if another_tokenizer(cfg.init_from, cfg.data_dir):
        cure = f"prepare the text with python prepare.py --tokenizer={cfg.init_from}"
        raise ConfigError(f"{cfg.data_dir} has another tokenizer than {cfg.init_from}: {cure}")
    keep, parent = cfg.keep_layers or None, None
    choose, route = model_set.get("routed_layers") == "auto", model_set.get("router") == "fitted"
    if choose or route:
        parent = Transformer.from_pretrained(cfg.init_from, shard=shard, keep_layers=keep)
        check_fit(cfg, parent.config, data, world(), routes=False)  # before anything is measured
        if shard is None:
            parent.to(device)
    if choose:
        model_set = model_set | {"routed_layers": spared_layers(cfg, model_set, data, parent, device, dtype)}
    model = Transformer.from_pretrained(cfg.init_from, shard=shard, keep_layers=keep, calibrated=None, **model_set)
    places = dict.fromkeys(tuple(name.split(".")[2:4]) for name in model.initialized)  # (layer, part)
    counts = Counter(part for _, part in places)
    new = ", ".join(f"{n} {part.replace('_', ' ')}s" for part, n in counts.items()) or "nothing"
    say(f"{cfg.init_from}: {len(model.loaded)} tensors loaded; new: {new}")
    if model.lora_rank:
        raise ConfigError(f"init_from={cfg.init_from!r} is a LoRA adapter: merge it first (checkpoint.py merge)")
    if route and "router" in counts:
        start_routers(cfg, model, data, parent, device, dtype)
    if cfg.lora:
        lora.inject(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, cfg.init_from, keep)
    return model


def start_routers(cfg, model, data, parent, device, dtype):
    """router="fitted": fits the routers to the parent, on some sequences of the training text, and allots the capacity."""
    ids, _ = data.batch(0, -(-FITTING * model.config.hidden_size // cfg.seq_len))
    ids = ids.to(device)
    with autocast(device, dtype):
        lines = from_main(fit_routers(parent, model.config, ids))  # ranks may round otherwise, and must agree
        fill(model.state_dict(), {name: tensor.__getitem__ for name, tensor in lines.items()})
        if not parallel.is_sharded(model.head_weight):  # one of them at a time
            parent.cpu()
            model.to(device)
        capacity = model.config.capacity
        if isinstance(capacity, float) and capacity < 1 and not model.config.allotment:
            model.config.allotment = from_main(allot(model, ids[:ALLOTTING]))
            model.set_capacity(capacity)
            parallel.reshard(model)
    said = ", ".join(
        f"{i} {share:.2f}" for i, share in zip(model.config.routed_layers, model.config.capacities, strict=True)
    )
    say(f"share of the tokens that each routed block takes: {said}")


def spared_layers(cfg, model_set, data, parent, device, dtype) -> list[int]:
    """routed_layers="auto": the blocks that the dense parent misses least, on some sequences of the training text."""
    if parent.routed:
        raise ConfigError(
            f"routed_layers='auto' needs a dense parent, and {cfg.init_from} is {parent.config.architecture}"
        )
    wanted = ModelConfig(**{key: model_set[key] for key in ("architecture", "router") if key in model_set})
    if not wanted.routed_layers:
        raise ConfigError("routed_layers='auto' chooses for a routed architecture: set architecture")
    with autocast(device, dtype):
        costs = removal_costs(parent, *(part.to(device) for part in data.batch(0, 8)))
    costs = from_main(costs)  # ranks may round otherwise, and must agree
    chosen = choose_layers(costs, cfg.routed_share, wanted)
    said = ", ".join(f"{i} {costs[i]:+.3f}{' routed' if i in chosen else ''}" for i in range(len(costs)))
    say(f"loss without each block: {said}")
    return chosen


def check_fit(cfg, model_cfg, data, ranks, routes=True):
    """Whether model, data and job can work together; ConfigError names everything that cannot.

    routes: False for a parent, of which no routing is asked yet.
    """
    found = []
    vocab_size, longest = model_cfg.vocab_size, model_cfg.max_position_embeddings
    if data.vocab_size > vocab_size:
        ids = f"{cfg.data_dir} has token ids up to {data.vocab_size - 1}, the model vocab_size={vocab_size}"
        found.append(f"{ids}: prepare the text with this model's tokenizer, or raise vocab_size")
    if cfg.seq_len > longest:
        found.append(f"seq_len={cfg.seq_len} is longer than max_position_embeddings={longest}")
    if cfg.grad_accum_steps % ranks:
        cure = f"use {-(-cfg.grad_accum_steps // ranks) * ranks}"
        found.append(f"grad_accum_steps={cfg.grad_accum_steps} cannot be divided over {ranks} ranks: {cure}")
    if routes and cfg.capacity_start is not None and not (model_cfg.routed_layers and 0 < cfg.capacity_start <= 1):
        found.append(f"capacity_start={cfg.capacity_start} needs routed layers, and must lie in (0, 1]")
    if cfg.capacity_anneal_steps and 0 < cfg.max_steps <= math.ceil(7 / 8 * cfg.capacity_anneal_steps):
        cure = f"set it to at most max_steps={cfg.max_steps}, half of that is usual"
        found.append(f"capacity_anneal_steps={cfg.capacity_anneal_steps} never reaches the capacity: {cure}")
    if routes and cfg.capacity_choices and not (model_cfg.routed_layers and isinstance(model_cfg.capacity, float)):
        found.append(f"capacity_choices={cfg.capacity_choices} needs routed layers, and one capacity for all of them")
    if model_cfg.selection == "threshold" and (cfg.capacity_start is not None or len(set(cfg.capacity_choices)) > 1):
        key = "capacity_choices" if cfg.capacity_choices else "capacity_start"
        found.append(f"selection='threshold' keeps one average score, {key} wants one for each capacity: drop either")
    if found:
        raise ConfigError("; ".join(found))


def another_tokenizer(source, data_dir):
    """Whether the model `source` comes with a tokenizer other than the data's: their ids would mean different things."""
    files = [os.path.join(folder, "tokenizer.json") for folder in (find_model(source), data_dir)]
    if not all(map(os.path.exists, files)) or filecmp.cmp(*files, shallow=False):
        return False
    return vocabulary(files[0]) != vocabulary(files[1])


def open_teacher(cfg, model_cfg, device, dtype):
    """The dense model to distil from, frozen, or None without distill_from. Raises ConfigError, ModelError."""
    if not cfg.distill_from:
        return None
    teacher = Transformer.from_pretrained(cfg.distill_from, dtype=dtype).to(device).requires_grad_(False)
    found = []
    if teacher.config.architecture != "dense":
        found.append(f"is {teacher.config.architecture}, a dense model is needed")
    if teacher.config.vocab_size != model_cfg.vocab_size:
        found.append(f"has vocab_size={teacher.config.vocab_size}, the model {model_cfg.vocab_size}")
    if another_tokenizer(cfg.distill_from, cfg.data_dir):
        found.append(f"has another tokenizer than {cfg.data_dir}")
    if cfg.seq_len > teacher.config.max_position_embeddings:
        found.append(f"takes {teacher.config.max_position_embeddings} tokens, seq_len={cfg.seq_len}")
    if found:
        raise ConfigError(f"distill_from={cfg.distill_from!r} " + "; ".join(found))
    return teacher


# ---------------------------------------------------------------------------------------------------------------------
# The end, or a stop on the way


def finish(run: Run, stop: Stop):
    """Saves the step that the run has come to; after the last one writes final_model/."""
    cfg, step = run.cfg, run.progress.step
    run.settle()
    if from_main(step != run.saved_step):  # only the main rank knows
        run.save()
        run.settle()
    if rank() == 0 and step != run.saved_step:
        raise CheckpointError(f"step {step} is not saved in {run.out_dir}: make room and go on with --resume=auto")
    path, final = run.out_dir / f"step_{step:07d}", run.out_dir / "final_model"
    if stop.hopeless:
        raise TrainError(
            f"no finite loss and gradient in {cfg.max_bad_steps} steps up to step {step}: they changed nothing, the "
            f"weights before them are in {path}; lower the rates, or look at the data"
        )
    if step < cfg.max_steps:
        timed_out = stop.reason == Stop.OUT_OF_TIME
        why = f"max_seconds={cfg.max_seconds:g}" if timed_out else signal.Signals(stop.reason).name
        say(f"{why}: stopped and saved in {path}; --resume=auto goes on")
    elif rank() == 0 and not final.exists():
        merged = checkpoint.merged(path) if cfg.lora_merge else None
        checkpoint.export(path, final, merged)
        say(f"done: {final}")
    else:
        say(f"the run in {run.out_dir} is complete: a larger --max_steps goes on")
    if run.metrics.wandb_run:
        run.metrics.wandb_run.finish()
    for number, handler in stop.handlers.items():  # an evaluation or an upload may be stopped as any program
        signal.signal(number, handler)
    run.wrapped = None  # DDP goes before its process group: the other way round its destructor has been seen to wait
    if dist.is_initialized():
        dist.barrier()  # no rank leaves while the main one still writes
        dist.destroy_process_group()
    if stop.reason == signal.SIGTERM and step < cfg.max_steps:
        sys.exit(128 + signal.SIGTERM)


def eval_argv(cfg):
    """The command line of bench.py that evaluates what this run has trained."""
    argv = [f"--tasks={','.join(cfg.eval_tasks)}", f"--model_path={cfg.out_dir}/final_model", f"--text={cfg.data_dir}"]
    same = (
        "batch_size",
        "seq_len",
        "device",
        "dtype",
        "allow_code_execution",
        "wandb_log",
        "wandb_project",
        "wandb_entity",
    )
    return argv + [f"--{name}={getattr(cfg, name)}" for name in same]


def main(argv):
    try:
        cfg, complete = train(argv)  # when it returns, the memory of the run is free
    except (MemoryError, RuntimeError) as e:
        named = isinstance(e, torch.OutOfMemoryError | MemoryError)
        if not named and "can't allocate memory" not in str(e):  # what a CPU says
            raise
        raise TrainError(
            "out of memory; in this order: halve --batch_size and double --grad_accum_steps, --gradient_checkpointing, "
            f"--parallel=fsdp on several GPUs, with --offload, a shorter --seq_len ({first_line(e)})"
        ) from e
    status = 0
    if complete and cfg.eval_tasks:
        import bench

        try:
            bench.main(eval_argv(cfg))
        except SystemExit as e:  # a task could not be run
            status = e.code
        except UserError as e:
            say(f"error: {e}; final_model is complete")
            status = 2
    if complete and cfg.push_to_hub and os.environ.get("RANK", "0") == "0":
        print(f"uploaded: {publish.push(Path(cfg.out_dir) / 'final_model', cfg.push_to_hub)}", file=sys.stderr)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    cli(main)
