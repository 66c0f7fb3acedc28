"""What a run says of itself: metrics.jsonl and W&B under the same names, the progress bar, rates, spikes of the loss."""

import json
import math
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from errors import ConfigError
from files import append_lines
from parallel import all_reduce, rank, say, world


@dataclass
class Progress:
    """Where a run stands: what a checkpoint keeps beside weights, optimizer and random generators."""

    step: int = 0
    flops: float = 0.0
    val_loss: float | None = None  # of this step, where it was evaluated
    bad_in_a_row: int = 0  # steps without a finite loss and gradient, as of the last log
    bad_steps: int = 0
    recent: deque = field(default_factory=lambda: deque(maxlen=100))  # the latest losses of the whole job
    rows: list[torch.Tensor] = field(default_factory=list)  # this rank's metrics of every step since the last log


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # e^710 is no float


def spikes(table, step, recent, sequences):
    """Steps whose loss is not finite or beyond 6 standard deviations of those before: what to look at in the data.

    table: a row per step up to `step`, the loss first and its kind last (0 good, 1 bad, 2 an overflow of float16). recent: a
    deque of the losses before, which those of the table join. sequences: of a step; their numbers are what `data.py show`
    takes.
    """
    found = []
    for number, (loss, *_, bad) in enumerate(table, step - len(table)):  # 0-based, as the data is
        mean = sum(recent) / max(1, len(recent))
        deviation = math.sqrt(sum((x - mean) ** 2 for x in recent) / max(1, len(recent)))
        if bad == 1 or (not bad and len(recent) >= 20 and loss > mean + 6 * deviation):
            first_last = [number * sequences, (number + 1) * sequences - 1]
            found.append({"step": number + 1, "loss": loss if math.isfinite(loss) else None, "sequences": first_last})
        if not bad:
            recent.append(loss)
    return found


class Metrics:
    """Collects a row of numbers a step, on the device; reads them at log_interval, and no more often."""

    def __init__(self, cfg, progress: Progress, peak: float | None):
        self.cfg, self.progress = cfg, progress
        self.peak = peak  # FLOP/s of a device, None where MFU is not known
        self.tokens_per_step = cfg.batch_size * cfg.grad_accum_steps * cfg.seq_len
        self.pending, self.wandb_run = [], None  # lines that are not on disk yet
        self.names: list[str] = []  # of the numbers of a row, without grad_norm and bad

    def start_clock(self):
        hidden = rank() > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=self.cfg.max_steps, initial=self.progress.step, unit="step", disable=hidden)
        self.logged, self.flops = self.progress.step, self.progress.flops
        self.clock, self.waited = time.perf_counter(), 0.0

    def wait(self, stream):
        """The next batch of the stream; the time that it takes is counted as waiting for data."""
        asked = time.perf_counter()
        batch = next(stream)
        self.waited += time.perf_counter() - asked
        return batch

    @contextmanager
    def clock_stopped(self):
        paused = time.perf_counter()
        yield
        self.clock += time.perf_counter() - paused

    def measure(self, out) -> torch.Tensor:
        """The numbers of one micro-batch, the total loss first, on the device."""
        values = {"train/loss" if name == "lm" else f"{name}_loss": loss for name, loss in out.losses.items()}
        values |= {name: v for name, v in out.stats.items() if self.cfg.log_layers or not name.startswith("layer_")}
        self.names = list(values)
        return torch.stack([value.detach().float() for value in (out.loss, *values.values())])

    def add(self, values: torch.Tensor, grad_norm: torch.Tensor, bad: torch.Tensor):
        """Keeps the numbers of one step, those that `measure` gave: of the whole step, this rank's mean."""
        rows, row = self.progress.rows, torch.cat([values[1:], grad_norm[None], bad[None]])
        if rows and len(rows[0]) != len(row):  # resumed, and log_layers has changed
            rows.clear()
        rows.append(row)

    def read(self, rates: dict[str, float]) -> dict:
        """The metrics since the last call, as means over good steps; waits for the device. Every rank calls it."""
        progress = self.progress
        table = all_reduce(torch.stack(progress.rows)) / world()  # (steps, numbers)
        progress.rows.clear()
        table = table.tolist()
        now = time.perf_counter()
        seconds = now - self.clock
        tokens_per_s = (progress.step - self.logged) * self.tokens_per_step / seconds
        metrics = self.means(table)
        if found := spikes(table, progress.step, progress.recent, self.cfg.batch_size * self.cfg.grad_accum_steps):
            metrics["spikes"] = found
            for spike in found:
                first, last = spike["sequences"]
                skipped = table[spike["step"] - progress.step - 1][-1]
                what = "skipped, not finite: the loss or gradient" if skipped else f"spike: loss {spike['loss']}"
                say(f"{what} at step {spike['step']}, of sequences {first}-{last}")
        for *_, kind in table:
            if kind < 2:  # an overflow, for which the scale is too large, says nothing of the run
                progress.bad_in_a_row = progress.bad_in_a_row + 1 if kind else 0
                progress.bad_steps += bool(kind)
        metrics |= {"train/perplexity": perplexity(metrics["train/loss"])}
        metrics |= {f"lr/{kind}": rate for kind, rate in rates.items()}
        metrics |= {"bad_steps": progress.bad_steps, "tokens_per_s": tokens_per_s, "data_wait": self.waited / seconds}
        if self.peak:
            metrics["mfu"] = (progress.flops - self.flops) / (seconds * self.peak * world())
        self.tell(metrics)
        self.logged, self.flops, self.clock, self.waited = progress.step, progress.flops, now, 0.0
        return metrics

    def means(self, table: list[list[float]]) -> dict[str, float]:
        good = [row for row in table if not row[-1]]
        columns = zip(*good, strict=True) if good else [[math.nan]] * len(table[0])
        means = [sum(column) / len(column) for column in columns]
        return dict(zip([*self.names, "grad_norm"], means[:-1], strict=True))

    def tell(self, metrics: dict):
        """The progress bar's text, or a line where there is no terminal."""
        line = f"loss {metrics['train/loss']:.4f}, {metrics['tokens_per_s']:,.0f} tokens/s"
        if "mfu" in metrics:
            line += f", MFU {metrics['mfu']:.1%}"
        self.bar.set_postfix_str(line, refresh=False)
        if self.bar.disable:
            step, steps = self.progress.step, self.cfg.max_steps
            left = tqdm.format_interval((steps - step) * self.tokens_per_step / metrics["tokens_per_s"])
            say(f"step {step}/{steps}: {line}, {left} left")

    def record(self, metrics: dict):
        """A line of metrics.jsonl, and the same on W&B; on the main rank."""
        if rank():
            return
        progress = self.progress
        metrics = {"tokens": progress.step * self.tokens_per_step, "flops": progress.flops} | metrics
        line = {"step": progress.step}
        for name, value in metrics.items():
            line[name] = value if isinstance(value, list) or math.isfinite(value) else None  # JSON has no NaN
        self.pending.append(json.dumps(line) + "\n")
        try:
            append_lines(f"{self.cfg.out_dir}/metrics.jsonl", self.pending)
        except OSError as e:
            say(f"warning: {e}; the metrics wait in memory")
        if self.wandb_run:
            self.wandb_run.log(metrics, step=progress.step)


def start_wandb(cfg, settings: dict, run_id: str, resumed: bool):
    """The W&B run of these settings. Raises ConfigError where it cannot start."""
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
            config=settings,
        )
    except wandb.Error as e:
        raise ConfigError(f"W&B does not start: {e} (WANDB_MODE=offline needs no network)") from e
