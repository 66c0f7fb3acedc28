"""Pictures of training runs.

    python plot.py out/demo/dense-1 out/demo/dtf-1 losses and the router's signals over steps, runs side by side
    python plot.py report out/demo/*/              report.md: a table, these curves, a routing map, a sample of each
    python plot.py routing out/demo/dtf-1          which tokens the router takes, on validation text; of several runs,
                                                   whether they take the same

A run is an out_dir of train.py. In a report, runs that differ in nothing but their seed are one column. Pictures are written
as PNG and PDF. Models are measured under causal routing.
"""

import json
import math
import os
import re
import statistics
from dataclasses import dataclass, field

import numpy as np
import torch

import checkpoint
from comparison import NONE, difference, paired, spread
from configurator import Count, cli, configure, problems
from data import TokenData
from device import device_name, pick_device
from errors import CheckpointError, ConfigError
from figures import COLOURS, STYLE, colours, label_ends, markdown_table, print_table, routing_map, save_figure, si
from files import write_whole
from measure import cached, decode_speeds
from trained import continuations, encode, open_model, token_texts, trace, trace_window, visible


@dataclass
class PlotConfig:
    runs: list[str] = field(default_factory=list)  # run folders; the word `report` or `routing` before them as above
    out: str = ""  # folder for what is written (empty: the folder that holds all runs; the run itself for one)
    sequences: Count = 64  # report, routing: validation sequences to measure on
    prompt: str = "def main("  # report: text that every model continues
    device: str = "auto"  # report, routing: auto, cuda, mps or cpu

    def __post_init__(self):
        if found := problems(self):
            raise ConfigError("; ".join(found))


SEED = 42  # of the report's samples

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
            value = math.nan if value is None else value  # what was not finite
            if isinstance(value, int | float):
                steps, values = metrics.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return metrics


def curves(runs: dict[str, list[dict]]):
    """Figure of {label: metrics of its runs, one a seed}: losses above; below, where there are any, the routers' signals."""
    import matplotlib
    from matplotlib.figure import Figure

    signals = [name for name in SIGNALS if any(name in metrics for of_seeds in runs.values() for metrics in of_seeds)]
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(12, 6 if signals else 3.4), layout="constrained")
        upper, lower = fig.subfigures(2, 1, height_ratios=[1.3, 1]) if signals else (fig, None)
        train, val = upper.subplots(1, 2)
        train.set(title="Training loss, top-k routing", ylabel="nats per token")
        val.set(title="Validation loss: top-k routing (lines), causal routing (circles)")
        metric_panel(train, runs, "train/loss", gap=0.06)
        metric_panel(val, runs, "val/loss", gap=0.06)
        if signals:
            for ax, name in zip(lower.subplots(1, len(signals), squeeze=False)[0], signals, strict=True):
                ax.set_title(SIGNALS[name])
                metric_panel(ax, runs, name, gap=0.1)
    return fig


def metric_panel(ax, runs: dict[str, list[dict]], name: str, gap: float):
    """One metric of every run that has it, over steps; circles for the same loss under causal routing."""
    ends, late = [], []
    for (label, of_seeds), colour in zip(runs.items(), colours(runs), strict=True):
        last = []
        for metrics in (metrics for metrics in of_seeds if name in metrics):
            steps, values = metrics[name]
            ax.plot(steps, values, color=colour, linewidth=STYLE["lines.linewidth"] / (1 if len(of_seeds) == 1 else 2))
            if name == "val/loss" and "val/loss_causal" in metrics:
                ax.plot(*metrics["val/loss_causal"], "o", color=colour, markersize=5, fillstyle="none")
            last.append(values[-1])
            late += [v for s, v in zip(steps, values, strict=True) if s >= 0.15 * steps[-1] and math.isfinite(v)]
        if last:
            mean = statistics.fmean(last)
            ends.append((mean, f"{label} {mean:.2f}", colour))
    if name == "val/loss" and late:  # the fall from the initial loss would flatten all that matters later
        margin = 0.06 * (max(late) - min(late)) + 0.01
        ax.set_ylim(min(late) - margin, max(late) + margin)
    ax.set_xlabel("step")
    label_ends(ax, ends, gap)


def save(figure, folder: str, name: str) -> str:
    """Writes a figure as PNG, whose path is returned, and as PDF."""
    path = os.path.join(folder, name)
    save_figure(figure, f"{path}.png", f"{path}.pdf")
    return f"{path}.png"


# ---------------------------------------------------------------------------------------------------------------------
# The report


def newest_step(run: str):
    """The newest checkpoint of a run. Raises ConfigError where there is none."""
    steps = checkpoint.steps(run)
    if not steps:
        raise ConfigError(f"{run} has no checkpoint (step_*) that says what data it was trained on")
    return steps[-1]


def data_of(run: str) -> tuple[str, int]:
    """The (data_dir, seq_len) that a run was trained with, from its newest checkpoint."""
    step = newest_step(run)
    try:
        train = checkpoint.read_state(step)["config"]["train"]
        return str(train["data_dir"]), int(train["seq_len"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{step}/state.json does not say what data the run was trained on") from None


def kinds_of_run(folders: dict[str, str]) -> dict[str, dict[int, str]]:
    """{label: {seed: name}} of runs {name: folder}: those that differ in nothing but their seed are of one kind."""
    groups = {}
    for name, folder in folders.items():
        config = checkpoint.read_state(newest_step(folder))["config"]
        train = {key: value for key, value in config["train"].items() if key not in ("seed", "out_dir", "resume")}
        key, seed = json.dumps([train, config.get("model")], sort_keys=True), config["train"].get("seed")
        if seed in groups.get(key, {}):  # the same run once more
            key += name
        groups.setdefault(key, {})[seed] = name
    kinds = {}
    for names in groups.values():
        # mod_0.5 of mod_0.5-1 and mod_0.5-2
        shared = re.fullmatch(r"(.+?)[-_./]\d*", os.path.commonprefix([*names.values()]))
        alone = len(names) == 1 or not shared or shared[1] in kinds or shared[1] in folders
        kinds[next(iter(names.values())) if alone else shared[1]] = names
    return kinds


count, percent = "{:,.0f}".format, "{:.1%}".format
TOPK_LOSS, CAUSAL_LOSS = "validation loss, top-k routing", "validation loss, causal routing"


def final_losses(of_seeds: dict[int, dict], metric: str = "val/loss_causal") -> dict[int, float]:
    """{seed: a loss that its run logged, the last one} from {seed: metrics}; without seeds that logged none."""
    return {seed: metrics[metric][1][-1] for seed, metrics in of_seeds.items() if metric in metrics}


def first_losses(of_seeds: dict[int, dict]) -> dict[int, float]:
    """{seed: the validation loss before the first step}; without runs that go on from elsewhere."""
    logged = {
        seed: zip(*metrics["val/loss"], strict=True) for seed, metrics in of_seeds.items() if "val/loss" in metrics
    }
    return {seed: loss for seed, points in logged.items() for step, loss in points if step == 0}


def quantities(model, of_seeds: dict[int, dict], ids: torch.Tensor, decoding: float) -> dict[str, tuple]:
    """{quantity: (its format, its value)} of one kind of run; losses {seed: value}; NaN where there is none.

    model: of the first seed, as are all values but losses. decoding: tokens/s.
    """
    logged = {metric: values for metric, (_, values) in next(iter(of_seeds.values())).items()}
    last = {metric: values[-1] for metric, values in logged.items()}
    shares, cache_bytes = cached(model, ids)
    capacity = list(shares.values())
    return {
        "parameters": (count, sum(p.numel() for p in model.parameters())),
        "FLOPs per token, training": (si, model.flops_per_token(ids.size(1), training=True)),
        "FLOPs per token, causal inference": (si, model.flops_per_token(ids.size(1), capacity=capacity)),
        "training, tokens/s": (count, statistics.median(logged.get("tokens_per_s", [math.nan]))),
        "decoding, tokens/s": (count, decoding),
        "KV cache, bytes per token": (count, cache_bytes),
        "validation loss, before training": (spread, first_losses(of_seeds)),
        TOPK_LOSS: (spread, final_losses(of_seeds, "val/loss")),
        CAUSAL_LOSS: (spread, final_losses(of_seeds)),
        "causal router, accuracy": (percent, last.get("causal_accuracy", math.nan)),
        "causal router, capacity": (percent, statistics.mean(capacity) if capacity else math.nan),
    }


def cell(quantity: str, column: dict, dense: dict | None, routed: bool) -> str:
    """One cell of the report's table: the value and, in brackets, what it is relative to dense or to the top-k loss."""
    form, value = column[quantity]
    if form is spread:
        text = spread(value.values())
        if quantity == CAUSAL_LOSS and routed and value:
            text += f" ({statistics.fmean(value.values()) / statistics.fmean(column[TOPK_LOSS][1].values()) - 1:+.2%})"
        return text
    if not math.isfinite(value):
        return NONE
    text = form(value)
    if form in (count, si) and dense and column is not dense:
        text += f" ({value / dense[quantity][1]:.2f}×)"
    return text


def table_of(runs: dict[str, dict], models: dict, dense: str | None, ids: torch.Tensor, prompt) -> list[list[str]]:
    """The report's table: a header row, then a row per quantity with a cell per kind of run.

    runs: {label: {seed: metrics}}; dense: the label that others are compared with; ids: (B, T) validation text.
    """
    speeds = decode_speeds(models, prompt)
    columns = {name: quantities(model, runs[name], ids, speeds[name]) for name, model in models.items()}
    routed = {name: bool(model.config.routed_layers) for name, model in models.items()}
    table = [["", *models]]
    for quantity in columns[next(iter(columns))]:
        cells = [cell(quantity, column, columns.get(dense), routed[name]) for name, column in columns.items()]
        table.append([quantity, *cells])
        if quantity == CAUSAL_LOSS and dense and len(models) > 1:
            losses = {name: column[quantity][1] for name, column in columns.items()}
            table.append([f"− {dense}'s", *(difference(of_kind, losses[dense]) for of_kind in losses.values())])
    return table


def what_seeds_say(runs: dict[str, dict], dense: str) -> str:
    """How far the differences of {label: {seed: metrics}} from dense can be believed."""
    losses, apart, unknown, unclear = {label: final_losses(of_seeds) for label, of_seeds in runs.items()}, [], [], []
    for label, of_kind in losses.items():
        mean, half = paired(of_kind, losses[dense])
        if label != dense and math.isnan(mean):
            apart.append(label)
        elif label != dense and not math.isfinite(half):
            unknown.append(label)
        elif label != dense and abs(mean) <= half:
            unclear.append(label)
    said = "± is the standard deviation over seeds. Differences are paired by seed, with their 95 % interval."
    if apart:
        said += f" **No seed in common with {dense}, or one that diverged: {', '.join(apart)}**: not compared."
    if unknown:
        said += f" **One seed in common with {dense}: {', '.join(unknown)}**, so that difference is a hint at most."
    if unclear:
        what = f"whose difference from {dense} is smaller than what seeds make of it: these runs do not decide it"
        said += f" **Not told apart: {', '.join(unclear)}**, {what}."
    return said


def map_of_all(models: dict, tokenizer, ids: torch.Tensor):
    """The token × layer map of ids (T) with the strips of all models that route, or None where none does."""
    groups = {name: trace(model, ids).masks for name, model in models.items() if model.config.routed_layers}
    if not groups:
        return None
    colour_of = dict(zip(models, colours(models), strict=True))
    title = "Validation text, and the tokens that entered each routed block (filled)"
    return routing_map(title, token_texts(tokenizer, ids.tolist()), groups, [colour_of[name] for name in groups])


def sample_lines(name: str, model, tokenizer, prompt: torch.Tensor) -> list[str]:
    """Markdown that shows how the model continues the prompt (T)."""
    torch.manual_seed(SEED)
    ids = continuations(model, prompt, 120, temperature=0.8, top_k=50)[0]
    text = "".join(visible(t) if "\n" not in t else t for t in token_texts(tokenizer, ids.tolist()))
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"**{name}**", "", fence, text, fence, ""]


def report(runs: dict[str, dict], folders: dict[str, str], out: str, cfg: PlotConfig):
    """Writes report.md with its pictures into `out`, and prints its table. runs: {name: metrics}."""
    sources = {name: data_of(folder) for name, folder in folders.items()}
    if len(set(sources.values())) > 1:
        raise ConfigError(f"the runs were trained on different data or sequence lengths: {sources}")
    kinds = kinds_of_run(folders)
    models, tokenizers = {}, {}
    for label, names in kinds.items():
        folder = folders[next(iter(names.values()))]
        models[label], tokenizers[label] = open_model(folder, pick_device(cfg.device)[0])
    metrics = {label: {seed: runs[name] for seed, name in names.items()} for label, names in kinds.items()}
    for label, of_seeds in metrics.items():
        ends = {logged["val/loss_causal"][0][-1] for logged in of_seeds.values() if "val/loss_causal" in logged}
        if len(ends) > 1:
            raise ConfigError(
                f"the runs of {label} stand at different steps, {sorted(ends)}: finish them, or leave them out"
            )
    dense = next((label for label, model in models.items() if not model.config.routed_layers), None)
    first = next(iter(models))
    data_dir, seq_len = next(iter(sources.values()))
    val = TokenData(data_dir, "val", seq_len)
    ids, _ = val.batch(0, min(cfg.sequences, len(val)))  # (B, T)
    prompt = encode(models[first], tokenizers[first], cfg.prompt)
    table = table_of(metrics, models, dense, ids, prompt)

    save(curves({label: [*of_seeds.values()] for label, of_seeds in metrics.items()}), out, "curves")
    routing_picture = map_of_all(models, tokenizers[first], ids[0, :160])
    if routing_picture:
        save(routing_picture, out, "routing")

    device = models[first].head_weight.device
    hardware = device_name(device) + ("" if device.type == "cuda" else f", {torch.get_num_threads()} threads")
    measured = f"{len(ids)} × {seq_len} validation tokens of {data_dir}"
    lines = ["# Report: " + ", ".join(models), "", *markdown_table(table), ""]
    lines += ["Losses in nats per token. In brackets: relative to dense; for the causal loss, to the top-k loss.", ""]
    lines += [what_seeds_say(metrics, dense), ""] if len(models) > 1 and dense else []
    if unfinished := [name for name, folder in folders.items() if not os.path.exists(f"{folder}/final_model")]:
        lines += [f"**Not finished: {', '.join(unfinished)}**: what they stood at is no result.", ""]
    lines += [
        "All but losses is of the first seed. Training speed is what the run logged, beside whatever ran with it.",
        "",
    ]
    lines += [f"Capacity, KV cache and FLOPs at inference: {measured}, causal routing.", ""]
    lines += [f"Decoding: batch 1, greedy, on {hardware}, torch {torch.__version__}.", ""]
    lines += ["## Curves", "", "![Losses and router signals over steps](curves.png)", ""]
    if routing_picture:
        lines += ["## What the routers took", "", "![Token × layer map](routing.png)", ""]
    lines += ["## Samples", "", f"Temperature 0.8, top-k 50, seed {SEED}.", ""]
    for name, model in models.items():
        lines += sample_lines(name, model, tokenizers[name], prompt)
    path = os.path.join(out, "report.md")
    write_whole(path, "\n".join(lines))
    print_table(table)
    print(f"\n{path}")


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens are routed

KINDS = ("word start", "continuation", "punctuation", "whitespace", "number")


def kinds_of(texts: list[str]) -> list[int]:
    """Index into KINDS of each token, given the texts of a running sequence."""
    kinds, previous = [], ""
    for text in texts:
        core = text.strip()
        if not core:
            kind = "whitespace" if text else "continuation"  # "": the first bytes of a character
        elif any(c.isalpha() for c in core):
            inside_word = core[0].isalnum() and text[0] == core[0] and previous[-1:].isalnum()
            kind = "continuation" if inside_word else "word start"
        else:
            kind = "number" if any(c.isnumeric() for c in core) else "punctuation"
        kinds.append(KINDS.index(kind))
        previous = text or previous
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


@dataclass
class Selection:
    """What a model's causal routing selects of B sequences of validation text, whose n = B·T tokens stand in a row."""

    layers: list[int]  # the routed ones
    capacities: list[float]  # of each in training
    masks: np.ndarray  # (layers, n) bool: selected
    loss: np.ndarray  # (n) of the token after each one, in nats
    kinds: np.ndarray  # (n) index into KINDS
    counts: np.ndarray  # (n) how often the token stands in training text
    seq_len: int  # T

    @property
    def shades(self) -> np.ndarray:
        """A colour for each layer: deeper is darker."""
        import matplotlib

        return matplotlib.colormaps["viridis"](np.linspace(0.7, 0.1, len(self.layers)))


@torch.inference_mode()
def selection_of(folder: str, cfg: PlotConfig) -> Selection:
    """What the model of a run selects of the validation text that it was trained with."""
    model, tokenizer = open_model(folder, pick_device(cfg.device)[0])
    layers = model.config.routed_layers
    if not layers:
        raise ConfigError(f"{folder} is a dense model: it routes nothing")
    data_dir, seq_len = data_of(folder)
    train, val = TokenData(data_dir, "train", seq_len), TokenData(data_dir, "val", seq_len)
    ids, targets = val.batch(0, min(cfg.sequences, len(val)))  # (B, T)
    traces = [trace_window(model, row, seq_len, 0) for row in torch.cat((ids, targets[:, -1:]), 1)]
    kinds = [kinds_of(token_texts(tokenizer, row.tolist())) for row in ids]
    in_training = torch.bincount(train.batch(0, 1024)[0].flatten(), minlength=train.vocab_size)  # of 1024 sequences
    return Selection(
        layers=layers,
        capacities=model.config.capacities,
        masks=torch.cat([torch.stack([*each.masks.values()]) for each in traces], 1).numpy(),  # (layers, tokens)
        loss=torch.cat([each.loss for each in traces]).numpy(),
        kinds=np.concatenate(kinds),
        counts=in_training[ids].flatten().numpy(),
        seq_len=seq_len,
    )


SHARE = "share of tokens selected"


def layer_panel(ax, selection: Selection):
    layers = selection.layers
    ax.bar(range(len(layers)), selection.masks.mean(1), 0.6, color=selection.shades)
    ax.plot(range(len(layers)), selection.capacities, "_", color="#333333", markersize=18)
    ax.set(title="By layer (dash: capacity in training)", xlabel="routed layer", ylabel=SHARE)
    ax.set(ylim=(0, 1), xticks=range(len(layers)), xticklabels=layers)


def kind_panel(ax, selection: Selection):
    by_kind = rates(selection.masks, selection.kinds, len(KINDS))  # (layers, kinds)
    ax.barh(range(len(KINDS)), by_kind.mean(0), 0.6, color="#DDDDDD")
    for row, shade in zip(by_kind, selection.shades, strict=True):
        ax.plot(row, range(len(KINDS)), "o", color=shade, markersize=5, clip_on=False)
    shares = np.bincount(selection.kinds, minlength=len(KINDS)) / len(selection.kinds)
    names = [f"{kind} ({share:.0%})" for kind, share in zip(KINDS, shares, strict=True)]
    ax.set(title="By kind (bar: mean of layers)", xlabel=SHARE, xlim=(0, 1))
    ax.set(yticks=range(len(KINDS)), yticklabels=names)
    ax.invert_yaxis()


def rate_lines(ax, selection: Selection, x, groups: np.ndarray, **labels):
    """The selection rate of each layer within each group of tokens, drawn at x (groups)."""
    by_group, ends = rates(selection.masks, groups, len(x)), []
    for row, layer, shade in zip(by_group, selection.layers, selection.shades, strict=True):
        ax.plot(x, row, color=shade, marker="o", markersize=2.5, clip_on=False)
        ends.append((row[-1], f"layer {layer}", shade))
    ax.set(ylim=(0, 1), **labels)
    label_ends(ax, ends if len(ends) <= 6 else [ends[0], ends[-1]], gap=0.08)


def surprise_panel(ax, metrics: dict):
    """The shares of S_CE and S_CU in their sum, over training; nothing where the run logged no surprise."""
    if "S_CE" not in metrics:
        ax.set_axis_off()
        return
    (steps, expected), (_, unexpected) = metrics["S_CE"], metrics["S_CU"]
    expected, unexpected = np.array(expected), np.array(unexpected)
    share = expected / np.maximum(expected + unexpected, 1e-12)
    ax.plot(steps, share, color=COLOURS[1])
    ax.plot(steps, 1 - share, color=COLOURS[2])
    ax.set(title="What drives G", xlabel="step", ylabel="share of S_CE + S_CU", ylim=(0, 1))
    label_ends(ax, [(share[-1], "S_CE", COLOURS[1]), (1 - share[-1], "S_CU", COLOURS[2])], gap=0.08)


def correlation(a: np.ndarray, b: np.ndarray) -> str:
    """Pearson's r of two lists of numbers, – where one of them does not change."""
    return f"{np.corrcoef(a, b)[0, 1]:+.2f}" if a.std() > 0 and b.std() > 0 else NONE


def what_was_taken(selections: dict[str, Selection]) -> list[list[str]]:
    """Table of runs {name: selection} of the same text: the share of each kind of token that enters a routed block, and how
    the number of blocks that a token enters goes with its loss, frequency and position, and with that of the other runs.
    """
    entered = {name: selection.masks.sum(0) for name, selection in selections.items()}  # (n) each
    table = [["", *selections]]
    for kind, title in enumerate(KINDS):
        shares = [rates(s.masks, s.kinds, len(KINDS))[:, kind].mean() for s in selections.values()]
        table.append([f"{title}, share selected", *(NONE if np.isnan(share) else f"{share:.1%}" for share in shares)])
    about = {
        "the next token's loss": lambda s: s.loss,
        "log frequency in training text": lambda s: np.log1p(s.counts),
        "position": lambda s: np.arange(len(s.loss)) % s.seq_len,
    }
    for title, of in about.items():
        cells = [correlation(entered[name], of(selection)) for name, selection in selections.items()]
        table.append([f"blocks entered, r with {title}", *cells])
    for other in selections if len(selections) > 1 else ():
        cells = [NONE if name == other else correlation(entered[name], entered[other]) for name in selections]
        table.append([f"… with those of {other}", *cells])
    return table


def routing(name: str, metrics: dict, selection: Selection):
    """Figure of the selection rates of a run's causal routing, by layer, kind, frequency, position and loss."""
    import matplotlib
    from matplotlib.figure import Figure

    n, seq_len = len(selection.loss), selection.seq_len
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(11, 6), layout="constrained")
        by_layer, by_kind, by_frequency, by_position, by_loss, surprise = fig.subplots(2, 3).flat
        layer_panel(by_layer, selection)
        kind_panel(by_kind, selection)

        labels = {"title": "By frequency in training text", "xlabel": "decile (10: most frequent)"}
        rate_lines(by_frequency, selection, range(1, 11), deciles(selection.counts), **labels)

        bins = min(32, seq_len)
        bin_of, middles = np.arange(n) % seq_len * bins // seq_len, (np.arange(bins) + 0.5) * seq_len / bins
        labels = {"title": "By position", "xlabel": "token of the sequence", "ylabel": SHARE}
        rate_lines(by_position, selection, middles, bin_of, **labels)

        groups = deciles(selection.loss)
        means = [selection.loss[groups == decile].mean() for decile in range(10)]
        labels = {"title": "By the loss of the next token", "xlabel": "nats (means of deciles)"}
        rate_lines(by_loss, selection, means, groups, **labels)

        surprise_panel(surprise, metrics)
        fig.suptitle(f"{name}: tokens that causal routing selects, {n:,} tokens of validation text", fontsize=10)
    return fig


# ---------------------------------------------------------------------------------------------------------------------


def named(paths: list[str]) -> tuple[dict[str, str], str]:
    """({name: run folder}, the folder that holds them all): a name is the folder's own, or its path where two are alike."""
    parent = os.path.commonpath([os.path.abspath(path) for path in paths])
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    if len(set(names)) < len(names):
        names = [os.path.relpath(path, parent) for path in paths]
    folder = parent if os.path.isabs(paths[0]) else os.path.relpath(parent)  # written as the runs were
    return dict(zip(names, paths, strict=True)), folder


def main(argv: list[str]):
    (settings,) = configure(__doc__, argv, PlotConfig, positional="runs")
    cfg = PlotConfig(**settings)
    command, paths = "curves", [os.path.normpath(run) for run in cfg.runs]
    if paths[:1] in (["report"], ["routing"]):
        command, *paths = paths
    if not paths:
        raise ConfigError("no run is named: python plot.py out/quickstart")
    folders, parent = named(paths)
    runs = {name: read_metrics(path) for name, path in folders.items()}
    out = cfg.out or parent
    if command == "report":
        report(runs, folders, out, cfg)
    elif command == "curves":
        print(save(curves({name: [metrics] for name, metrics in runs.items()}), out, "curves"))
    else:
        selections = {name: selection_of(folder, cfg) for name, folder in folders.items()}
        for name, selection in selections.items():
            title = "routed_tokens" if len(folders) == 1 else f"routed_tokens_{name}"
            print(save(routing(name, runs[name], selection), out, title))
        if len({data_of(folder) for folder in folders.values()}) == 1:
            table = what_was_taken(selections)
            write_whole(os.path.join(out, "routed_tokens.md"), "\n".join(markdown_table(table)) + "\n")
            print_table(table)


if __name__ == "__main__":
    cli(main)
