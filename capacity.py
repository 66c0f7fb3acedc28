"""The trade-off of one trained model: loss against compute, at every capacity that its causal routers can be brought to."""

import os
import statistics
from functools import partial

import torch

from errors import ConfigError
from figures import COLOURS, STYLE, save_figure
from inference import Decoder, calibrate
from measure import interleaved
from model import Transformer
from scoring import read_texts
from tables import print_table

CALIBRATING = 32  # windows that the routers are calibrated on, at most


@torch.inference_mode()
def capacity_sweep(cfg, model: Transformer, tokenizer) -> list[dict]:
    """Loss, FLOPs per token and decoding speed at every causal capacity, as trained and calibrated. Prints a table.

    cfg: bench.py's settings. Every second window of the text calibrates the routers, the others are scored.
    """
    ids = sweep_text(cfg, model, tokenizer)
    windows = ids[: len(ids) // (cfg.seq_len + 1) * (cfg.seq_len + 1)].view(-1, cfg.seq_len + 1)
    windows = windows[: 2 * cfg.limit or None]  # (n, T + 1)
    calibrating, held_out = windows[::2][:CALIBRATING, :-1], windows[1::2]
    decoded = ids[None, : cfg.seq_len + cfg.decoded_tokens]
    rows, runs, trained = [], {}, decisions_of(model)
    for capacity in [None, *sorted(cfg.capacities)]:
        if capacity is not None:
            calibrate(model, calibrating, capacity)
        loss, selected = causal_loss(model, held_out, cfg.batch_size)
        row = {"capacity": capacity, "selected": statistics.mean(selected.values()), "loss": loss}
        row["flops_per_token"] = model.flops_per_token(cfg.seq_len, capacity=list(selected.values()))
        rows.append(row)
        decoder = Decoder(model, decoded, cfg.seq_len, cfg.decode_steps)
        runs[len(runs)] = partial(decode_as, model, decisions_of(model), decoder)
    times = interleaved(runs, ids.device, cfg.warmup, cfg.repeats)
    decide_as(model, trained)
    for row, seconds in zip(rows, times.values(), strict=True):
        row["decode_tokens_per_s"] = cfg.decode_steps / statistics.median(seconds)
    print_sweep(rows)
    return rows


def sweep_text(cfg, model: Transformer, tokenizer) -> torch.Tensor:
    """The ids (N) that are scored and decoded. Raises ConfigError where the model or the text cannot be swept."""
    if not model.routed:
        raise ConfigError(f"model_path={cfg.model_path} is dense: it has no capacity to sweep")
    T, decoded = cfg.seq_len, cfg.decoded_tokens
    if T + decoded > model.config.max_position_embeddings:
        raise ConfigError(
            f"seq_len={T} + {decoded} decoded tokens pass max_position_embeddings: lower seq_len or repeats"
        )
    ids = torch.cat([ids for ids, _ in read_texts(cfg.text, model, tokenizer).values()]).to(model.head_weight.device)
    if len(ids) < max(2 * (T + 1), T + decoded):
        raise ConfigError(f"text={cfg.text} has {len(ids):,} tokens, too few for two windows of seq_len={T}: lower it")
    return ids


def decisions_of(model: Transformer) -> list[dict[str, torch.Tensor]]:
    """A copy of what `calibrate` moves in each routed layer."""
    return [layer.decision_state() for layer in model.routed]


def decide_as(model: Transformer, decisions: list[dict[str, torch.Tensor]]):
    for layer, state in zip(model.routed, decisions, strict=True):
        layer.load_state_dict(state, strict=False)


def decode_as(model: Transformer, decisions: list[dict[str, torch.Tensor]], decoder: Decoder):
    decide_as(model, decisions)
    decoder()


def causal_loss(model: Transformer, windows: torch.Tensor, batch_size: int) -> tuple[float, dict[int, float]]:
    """Mean loss of windows (n, T + 1) under causal routing, and the share of the tokens that each routed layer ran."""
    loss, ran = 0.0, dict.fromkeys(model.config.routed_layers, 0.0)
    for batch in windows.split(batch_size):
        out = model(batch[:, :-1], batch[:, 1:], routing="causal")
        loss += out.losses["lm"].item() * len(batch) / len(windows)
        for layer in ran:
            share = out.stats[f"layer_{layer}/causal_capacity"].item()
            ran[layer] += share * len(batch)  # divided at the end: 1 stays 1
    return loss, {layer: total / len(windows) for layer, total in ran.items()}


def print_sweep(rows: list[dict]):
    table = [["capacity", "selected", "loss", "MFLOPs per token", "decode tokens/s"]]
    for row in rows:
        name = "as trained" if row["capacity"] is None else f"{row['capacity']:g}"
        cells = [name, f"{row['selected']:.3f}", f"{row['loss']:.4f}"]
        table.append([*cells, f"{row['flops_per_token'] / 1e6:,.4g}", f"{row['decode_tokens_per_s']:,.0f}"])
    print()
    print_table(table)


def draw_sweep(rows: list[dict], model_path: str):
    """Saves the sweep's picture as capacity.png and .pdf in the model's folder, or in out/ for a model of the hub."""
    folder = model_path if os.path.isdir(model_path) else "out"
    figure = sweep_figure(rows, os.path.basename(model_path.rstrip("/")))
    save_figure(figure, f"{folder}/capacity.png", f"{folder}/capacity.pdf")
    print(f"picture: {folder}/capacity.png, .pdf")


def sweep_figure(rows: list[dict], title: str):
    """Loss against FLOPs per token, and decoding speed against the share of tokens that runs."""
    import matplotlib
    from matplotlib.figure import Figure

    trained, *swept = rows
    note = {"textcoords": "offset points", "fontsize": 7.5}
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(8.4, 3.4), layout="constrained")
        left, right = fig.subplots(1, 2)
        for ax, x, y, unit in ((left, "flops_per_token", "loss", 1e6), (right, "selected", "decode_tokens_per_s", 1)):
            ax.plot([row[x] / unit for row in swept], [row[y] for row in swept], "o-", color=COLOURS[1], markersize=4)
            ax.plot(trained[x] / unit, trained[y], "D", color=COLOURS[2], markersize=6, clip_on=False)
            point = trained[x] / unit, trained[y]
            ax.annotate("as trained", point, (-7, -10), **note, color=COLOURS[2], ha="right")
            ax.margins(0.06, 0.14)
        for row in swept:
            point = row["flops_per_token"] / 1e6, row["loss"]
            left.annotate(f"{row['capacity']:g}", point, (0, 6), **note, color="#555555", ha="center")
        left.set(xlabel="MFLOPs per token", ylabel="loss, nats per token", title=f"{title} at calibrated capacities")
        right.set(
            xlabel="share of tokens that routed blocks take", ylabel="tokens per second, batch 1", title="Decoding"
        )
        right.set_ylim(bottom=0)
    return fig
