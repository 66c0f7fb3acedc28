"""Pictures of training runs.

    python plot.py out/demo/dense out/demo/dtf     losses and the router's signals over steps, runs side by side
    python plot.py report out/demo/*/              report.md: a table, these curves, a routing map, a sample of each
    python plot.py routing out/demo/dtf            which tokens the router takes, on validation text

A run is an out_dir of train.py. Pictures are written as PNG and PDF. Models are measured under causal routing.
"""

import json
import math
import os
import re
import statistics
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
from checkpoint import CheckpointError
from configurator import ConfigError, cli, configure
from data import TokenData
from sample import (
    COLOURS,
    STYLE,
    SampleConfig,
    continuations,
    encode,
    open_model,
    routing_map,
    save_figure,
    token_texts,
    trace,
    visible,
)
from weights import replacing


@dataclass
class PlotConfig:
    runs: list[str] = field(default_factory=list)  # run folders; the word `report` or `routing` before them as above
    out: str = ""  # folder for what is written (empty: the folder that holds all runs; the run itself for one)
    sequences: int = 64  # report, routing: validation sequences to measure on
    prompt: str = SampleConfig.prompt  # report: text that every model continues
    device: str = "auto"  # report, routing: auto, cuda, mps or cpu

    def __post_init__(self):
        if self.sequences < 1:
            raise ConfigError(f"sequences={self.sequences} must be at least 1")


SIGNALS = {
    "S_CE": "S_CE, expected change",
    "S_CU": "S_CU, unexpected change",
    "G_cont": "G, either of the two",
    "causal_accuracy": "Causal router's accuracy",
    "causal_capacity": "Causal router's capacity",
}


def read_metrics(run: str) -> dict[str, tuple[list[int], list[float]]]:
    """{metric: (steps, values)} of a run's metrics.jsonl. A last line torn by a crash is left out."""
    path = os.path.join(run, "metrics.jsonl")
    if not os.path.exists(path):
        raise ConfigError(f"{run} is no run (it has no metrics.jsonl): name an out_dir of train.py")
    with open(path, encoding="utf-8", errors="replace") as f:
        lines = f.readlines()
    metrics = {}
    for n, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            if n == len(lines) and not line.endswith("\n"):
                break
            raise ConfigError(f"{path}, line {n} is no JSON object with a step: {line[:40]!r}") from None
        for name, value in record.items():
            if isinstance(value, int | float):
                steps, values = metrics.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return metrics


def label_ends(ax, ends: list[tuple[float, str, str]], gap: float):
    """Writes (y, label, colour) behind the right end of the curves: as near to y as can be (least squares), but at least
    `gap` of the axis apart and inside it.
    """
    low, high = ax.get_ylim()
    ends = sorted(((y - low) / (high - low), label, colour) for y, label, colour in ends if math.isfinite(y))
    stacks = []  # [mean of y − i·gap, labels]: isotonic regression, by pooling neighbours that are out of order
    for i, (y, _, _) in enumerate(ends):
        stacks.append((y - i * gap, 1))
        while len(stacks) > 1 and stacks[-2][0] > stacks[-1][0]:
            (a, n), (b, m) = stacks[-2:]
            stacks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    places = [mean for mean, n in stacks for _ in range(n)]
    for i, (place, (_, label, colour)) in enumerate(zip(places, ends, strict=True)):
        y = min(max(place, 0), 1 - (len(ends) - 1) * gap) + i * gap
        ax.text(1.02, y, label, color=colour, transform=ax.transAxes, va="center", fontsize=8.5)


def colours(runs) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(len(runs))]


def curves(runs: dict[str, dict]):
    """Figure of {run: its metrics}: losses above; below, where there are any, what the routers said."""
    import matplotlib
    from matplotlib.figure import Figure

    signals = [name for name in SIGNALS if any(name in metrics for metrics in runs.values())]
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(12, 6 if signals else 3.4), layout="constrained")
        upper, lower = fig.subfigures(2, 1, height_ratios=[1.3, 1]) if signals else (fig, None)
        train, val = upper.subplots(1, 2)
        train.set(title="Training loss, top-k routing", ylabel="nats per token")
        val.set(title="Validation loss: top-k routing (lines), causal routing (circles)")
        panels = [(train, "train/loss"), (val, "val/loss")]
        if signals:
            axes = lower.subplots(1, len(signals), squeeze=False)[0]
            panels += zip(axes, signals, strict=True)
        for ax, name in panels:
            ends, late = [], []
            for (run, metrics), colour in zip(runs.items(), colours(runs), strict=True):
                if name not in metrics:
                    continue
                steps, values = metrics[name]
                ax.plot(steps, values, color=colour)
                if name == "val/loss" and "val/loss_causal" in metrics:
                    ax.plot(*metrics["val/loss_causal"], "o", color=colour, markersize=5, fillstyle="none")
                ends.append((values[-1], f"{run} {values[-1]:.2f}", colour))
                late += [v for s, v in zip(steps, values, strict=True) if s >= 0.15 * steps[-1] and math.isfinite(v)]
            if name == "val/loss" and late:  # the fall from the initial loss would flatten all that matters later
                margin = 0.06 * (max(late) - min(late)) + 0.01
                ax.set_ylim(min(late) - margin, max(late) + margin)
            if name in SIGNALS:
                ax.set_title(SIGNALS[name])
            ax.set_xlabel("step")
            label_ends(ax, ends, gap=0.06 if ax in (train, val) else 0.1)
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# The report


def data_of(run: str) -> tuple[str, int]:
    """The (data_dir, seq_len) that a run was trained with, from its newest checkpoint."""
    steps = checkpoint.steps(run)
    if not steps:
        raise ConfigError(f"{run} has no checkpoint (step_*) that says what data it was trained on")
    try:
        train = checkpoint.read_state(steps[-1])["config"]["train"]
        return str(train["data_dir"]), int(train["seq_len"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{steps[-1]}/state.json does not say what data the run was trained on") from None


@torch.inference_mode()
def cached(model, ids: torch.Tensor) -> tuple[list[float], float]:
    """What causal routing of ids (B, T) leaves in the KV cache: (share of tokens per routed layer, bytes per token)."""
    held, size = [0] * len(model.config.routed_layers), 0
    for chunk in ids.split(8):
        cache = model.new_cache(*chunk.shape)
        model(chunk.to(model.head_weight.device), routing="causal", cache=cache)
        held = [n + sum(cache.layers[i].lengths) for n, i in zip(held, model.config.routed_layers, strict=True)]
        size += cache.bytes_used()
    return [n / ids.numel() for n in held], size / ids.numel()


def decode_speeds(models: dict, prompt: torch.Tensor, n: int = 64, rounds: int = 5) -> dict[str, float]:
    """{name: tokens/s} of greedy decoding at batch 1: medians, the models taking turns after a warm-up."""
    seconds = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            ids = prompt[None].to(model.head_weight.device)
            start = time.perf_counter()
            model.generate(ids, n).cpu()
            seconds[name].append(time.perf_counter() - start)
    return {name: n / statistics.median(times[1:]) for name, times in seconds.items()}


def si(value: float) -> str:
    """Three digits and a unit prefix: 1234567 → 1.23 M."""
    power = min(int(math.log10(max(value, 1)) / 3), 5)
    return f"{value / 1000**power:.3g} {' kMGTP'[power]}".rstrip()


def table_of(runs: dict[str, dict], models: dict, ids: torch.Tensor, prompt: torch.Tensor) -> list[list[str]]:
    """The report's table: a header row, then a row per quantity with a cell per run. ids: (B, T) validation text."""
    count, loss, share = "{:,.0f}".format, "{:.3f}".format, "{:.1%}".format
    speeds, columns = decode_speeds(models, prompt), {}
    for name, model in models.items():
        logged = {metric: values for metric, (_, values) in runs[name].items()}
        last = {metric: values[-1] for metric, values in logged.items()}
        capacity, size = cached(model, ids)
        columns[name] = {
            "parameters": (count, sum(p.numel() for p in model.parameters())),
            "FLOPs per token, training": (si, model.flops_per_token(ids.size(1), training=True)),
            "FLOPs per token, causal inference": (si, model.flops_per_token(ids.size(1), capacity=capacity)),
            "training, tokens/s": (count, statistics.median(logged.get("tokens_per_s", [math.nan]))),
            "decoding, tokens/s": (count, speeds[name]),
            "KV cache, bytes per token": (count, size),
            "validation loss, before training": (loss, logged.get("val/loss", [math.nan])[0]),
            "validation loss, top-k routing": (loss, last.get("val/loss", math.nan)),
            "validation loss, causal routing": (loss, last.get("val/loss_causal", math.nan)),
            "causal router, accuracy": (share, last.get("causal_accuracy", math.nan)),
            "causal router, capacity": (share, statistics.mean(capacity) if capacity else math.nan),
        }
    dense = next((name for name, model in models.items() if model.config.architecture == "dense"), None)
    table = [["", *models]]
    for quantity in columns[next(iter(columns))]:
        row = [quantity]
        for name, column in columns.items():
            show, value = column[quantity]
            cell = show(value) if math.isfinite(value) else "–"
            if show in (count, si) and name != dense and dense and math.isfinite(value):
                cell += f" ({value / columns[dense][quantity][1]:.2f}×)"
            if quantity == "validation loss, causal routing" and models[name].config.routed_layers:
                cell += f" ({value / column['validation loss, top-k routing'][1] - 1:+.2%})"
            row.append(cell)
        table.append(row)
    return table


def report(runs: dict[str, dict], folders: dict[str, str], out: str, cfg: PlotConfig):
    """Writes report.md with its pictures into `out`, and prints its table."""
    models, tokenizers = {}, {}
    for name, folder in folders.items():
        models[name], tokenizers[name] = open_model(folder, cfg.device)
    sources = {name: data_of(folder) for name, folder in folders.items()}
    if len(set(sources.values())) > 1:
        raise ConfigError(f"the runs were trained on different data or sequence lengths: {sources}")
    (data_dir, seq_len), tokenizer = next(iter(sources.values())), next(iter(tokenizers.values()))
    val = TokenData(data_dir, "val", seq_len)
    ids, _ = val.batch(0, min(cfg.sequences, len(val)))  # (B, T)
    prompt = encode(next(iter(models.values())), tokenizer, cfg.prompt)
    table = table_of(runs, models, ids, prompt)

    save_figure(curves(runs), *(os.path.join(out, f"curves.{kind}") for kind in ("png", "pdf")))
    passage = ids[0, :160]
    groups = {name: trace(model, passage).masks for name, model in models.items() if model.config.routed_layers}
    if groups:
        chosen = [colour for name, colour in zip(models, colours(models), strict=True) if name in groups]
        title = "Validation text, and the tokens that entered each routed block (filled)"
        figure = routing_map(title, token_texts(tokenizer, passage.tolist()), groups, chosen)
        save_figure(figure, *(os.path.join(out, f"routing.{kind}") for kind in ("png", "pdf")))

    device = next(iter(models.values())).head_weight.device.type
    where = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    lines = ["# Report: " + ", ".join(models), ""]
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    lines += [rows[0], "|---" + "|---:" * len(models) + "|", *rows[1:], ""]
    lines += ["Losses in nats per token. In brackets: relative to dense; for the causal loss, to the top-k loss.", ""]
    measured = f"{len(ids)} × {seq_len} validation tokens of {data_dir}"
    lines += [f"Capacity, KV cache and FLOPs at inference: {measured}, causal routing.", ""]
    lines += [f"Decoding: batch 1, greedy, on {where}, torch {torch.__version__}.", ""]
    lines += ["## Curves", "", "![Losses and router signals over steps](curves.png)", ""]
    if groups:
        lines += ["## What the routers took", "", "![Token × layer map](routing.png)", ""]
    lines += ["## Samples", "", f"Temperature 0.8, top-k 50, seed {SampleConfig.seed}.", ""]
    for name, model in models.items():
        torch.manual_seed(SampleConfig.seed)
        sample = continuations(model, tokenizers[name], prompt, 120, temperature=0.8, top_k=50)[0]
        text = "".join(visible(t) if "\n" not in t else t for t in token_texts(tokenizers[name], sample.tolist()))
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
        lines += [f"**{name}**", "", fence, text, fence, ""]
    path = os.path.join(out, "report.md")
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.write("\n".join(lines))

    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *cells in table:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print(first.ljust(widths[0]), *cells, sep="  ")
    print(f"\n{path}")


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens are routed

KINDS = ("word start", "continuation", "punctuation", "whitespace", "number")


def kinds_of(texts: list[str]) -> list[int]:
    """Index into KINDS of each token, given the texts of a running sequence."""
    kinds, before = [], ""
    for text in texts:
        core = text.strip()
        if not core:
            kind = "whitespace" if text else "continuation"  # "": the first bytes of a character
        elif any(c.isalpha() for c in core):
            inside = core[0].isalnum() and text[0] == core[0] and before[-1:].isalnum()
            kind = "continuation" if inside else "word start"
        else:
            kind = "number" if any(c.isnumeric() for c in core) else "punctuation"
        kinds.append(KINDS.index(kind))
        before = text or before
    return kinds


def deciles(values: np.ndarray) -> np.ndarray:
    """0 … 9 for each value, by its rank; equal values share the decile of their middle rank."""
    ordered = np.sort(values)
    middle = (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2
    return np.minimum(10 * middle / len(values), 9).astype(int)


def rates(masks: np.ndarray, groups: np.ndarray, n: int) -> np.ndarray:
    """Selection rate of masks (layers, tokens) within each of n groups: (layers, n), NaN for an empty group."""
    count = np.bincount(groups, minlength=n)
    with np.errstate(invalid="ignore"):
        return np.stack([np.bincount(groups, weights=mask, minlength=n) / count for mask in masks])


@torch.inference_mode()
def routing(name: str, metrics: dict, folder: str, cfg: PlotConfig):
    """Figure of the selection rates of a run's causal routing, by layer, kind, frequency, position and loss."""
    import matplotlib
    from matplotlib.figure import Figure

    model, tokenizer = open_model(folder, cfg.device)
    layers = model.config.routed_layers
    if not layers:
        raise ConfigError(f"{folder} is a dense model: it routes nothing")
    data_dir, seq_len = data_of(folder)
    train, val = (TokenData(data_dir, split, seq_len) for split in ("train", "val"))
    ids, targets = val.batch(0, min(cfg.sequences, len(val)))  # (B, T)
    masks, loss = [], []
    for x, y in zip(ids.split(4), targets.split(4), strict=True):
        out = model(x.to(model.head_weight.device), routing="causal", return_masks=True)
        masks.append(torch.stack([out.masks[i].flatten() for i in layers]).cpu())  # (layers, tokens)
        loss.append(F.cross_entropy(out.logits.flatten(0, 1).float().cpu(), y.flatten(), reduction="none"))
    masks, loss = torch.cat(masks, 1).numpy(), torch.cat(loss).numpy()
    kinds = np.concatenate([kinds_of(token_texts(tokenizer, row.tolist())) for row in ids])
    seen = torch.bincount(train.batch(0, 1024)[0].flatten(), minlength=train.vocab_size)
    position = np.tile(np.arange(seq_len), len(ids))
    bins = min(32, seq_len)

    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(11, 6), layout="constrained")
        axes = fig.subplots(2, 3).flat
        shades = matplotlib.colormaps["viridis"](np.linspace(0.7, 0.1, len(layers)))  # deeper is darker

        def lines(ax, x, rate, **labels):
            for row, shade in zip(rate, shades, strict=True):
                ax.plot(x, row, color=shade, marker="o", markersize=2.5, clip_on=False)
            ax.set(ylim=(0, 1), **labels)
            ends = [(row[-1], f"layer {i}", shade) for row, i, shade in zip(rate, layers, shades, strict=True)]
            label_ends(ax, ends if len(ends) <= 6 else [ends[0], ends[-1]], gap=0.08)

        trained = np.broadcast_to(model.config.capacity, len(layers))
        axes[0].bar(range(len(layers)), masks.mean(1), 0.6, color=shades)
        axes[0].plot(range(len(layers)), trained, "_", color="#333333", markersize=18)
        axes[0].set(
            title="By layer (dash: capacity in training)", xlabel="routed layer", ylabel="share of tokens selected"
        )
        axes[0].set(ylim=(0, 1), xticks=range(len(layers)), xticklabels=layers)

        by_kind, share = rates(masks, kinds, len(KINDS)), np.bincount(kinds, minlength=len(KINDS)) / len(kinds)
        axes[1].barh(range(len(KINDS)), by_kind.mean(0), 0.6, color="#DDDDDD")
        for row, shade in zip(by_kind, shades, strict=True):
            axes[1].plot(row, range(len(KINDS)), "o", color=shade, markersize=5, clip_on=False)
        names = [f"{kind} ({s:.0%})" for kind, s in zip(KINDS, share, strict=True)]
        axes[1].set(title="By kind (bar: mean of layers)", xlabel="share of tokens selected", xlim=(0, 1))
        axes[1].set(yticks=range(len(KINDS)), yticklabels=names)
        axes[1].invert_yaxis()

        ylabel = "share of tokens selected"
        rate = rates(masks, deciles(seen[ids].flatten().numpy()), 10)
        lines(axes[2], range(1, 11), rate, title="By frequency in training text", xlabel="decile (10: most frequent)")
        rate = rates(masks, position * bins // seq_len, bins)
        where = (np.arange(bins) + 0.5) * seq_len / bins
        lines(axes[3], where, rate, title="By position", xlabel="token of the sequence", ylabel=ylabel)
        decile = deciles(loss)
        rate = rates(masks, decile, 10)
        where = [loss[decile == d].mean() for d in range(10)]
        lines(axes[4], where, rate, title="By the loss of the next token", xlabel="nats (means of deciles)")
        if "S_CE" in metrics:
            (steps, ce), (_, cu) = metrics["S_CE"], metrics["S_CU"]
            driven = np.array(ce) / np.maximum(np.array(ce) + np.array(cu), 1e-12)
            axes[5].plot(steps, driven, color=COLOURS[1])
            axes[5].plot(steps, 1 - driven, color=COLOURS[2])
            axes[5].set(title="What drives G", xlabel="step", ylabel="share of S_CE + S_CU", ylim=(0, 1))
            label_ends(axes[5], [(driven[-1], "S_CE", COLOURS[1]), (1 - driven[-1], "S_CU", COLOURS[2])], gap=0.08)
        else:
            axes[5].set_axis_off()
        fig.suptitle(
            f"{name}: tokens that causal routing selects, {len(kinds):,} tokens of validation text", fontsize=10
        )
    return fig


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str]):
    (settings,) = configure(__doc__, argv, PlotConfig, positional="runs")
    cfg = PlotConfig(**settings)
    command, paths = "curves", [os.path.normpath(run) for run in cfg.runs]
    if paths[:1] in (["report"], ["routing"]):
        command, *paths = paths
    if not paths:
        raise ConfigError("no run is named: python plot.py out/quickstart")
    parent = os.path.commonpath([os.path.abspath(path) for path in paths])
    unique = len({os.path.basename(path) for path in paths}) == len(paths)
    names = [os.path.basename(os.path.abspath(path)) if unique else os.path.relpath(path, parent) for path in paths]
    folders = dict(zip(names, paths, strict=True))
    runs = {name: read_metrics(path) for name, path in folders.items()}
    out = cfg.out or (parent if os.path.isabs(paths[0]) else os.path.relpath(parent))  # named as the runs were
    if command == "report":
        report(runs, folders, out, cfg)
        return
    figures = {"curves": curves(runs)} if command == "curves" else {}
    for name, folder in folders.items() if command == "routing" else ():
        figures["routed_tokens" if len(folders) == 1 else f"routed_tokens_{name}"] = routing(
            name, runs[name], folder, cfg
        )
    for name, figure in figures.items():
        save_figure(figure, *(os.path.join(out, f"{name}.{kind}") for kind in ("png", "pdf")))
        print(os.path.join(out, f"{name}.png"))


if __name__ == "__main__":
    cli(main)
