"""Log-probabilities of text under a model; its perplexity; what it copies; its loss at every capacity that its routers are
brought to.

`cfg` is bench.py's settings. All ranks of torchrun call `score` and share its work.
"""

import itertools
import math
import os
import statistics
import sys
from collections import ChainMap
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import metrics
from data import read_manifest
from errors import ConfigError, DataError
from figures import COLOURS, STYLE, print_table, save_figure
from measure import Decoder, calibrate, interleaved
from model import Transformer
from parallel import of_all, rank, world
from routers import valid_mask
from tokenizer import token_bytes, vocabulary
from trained import encode, read_text

LOGITS = 1 << 25  # numbers of logits that are in memory at a time
CALIBRATING = 32  # windows that routers are calibrated on, at most


def share_of_rank(order: list) -> list:
    """This rank's part of `order`: every world-th, so that long and short requests are spread evenly."""
    return order[rank() :: world()]


def progress(total: int, what: str):
    return tqdm(total=total, desc=what, unit="request", disable=rank() > 0 or not sys.stderr.isatty())


def padded(rows: list, device) -> tuple[torch.Tensor, list[int]]:
    """Rows of ids, padded on the right: (B, T), and their lengths."""
    lengths = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    ids[valid_mask(lengths, max(lengths), "cpu")] = torch.cat([torch.as_tensor(row) for row in rows]).long()
    return ids.to(device), lengths


@torch.inference_mode()
def score(model: Transformer, requests: list, routing: str, batch_size: int, what: str) -> list[tuple[float, bool]]:
    """For every (inputs, targets), ids both, the log-probability of the targets and whether each was the likeliest.

    The last len(targets) inputs predict the targets. Longest first, in batches padded on the right, which changes
    nothing: padding is neither seen nor selected. Under torchrun every rank must call this, and gets all results.
    """
    local = share_of_rank(sorted(range(len(requests)), key=lambda n: -len(requests[n][0])))
    scores, bar = {}, progress(len(local), what)
    for start in range(0, len(local), batch_size):
        batch = local[start : start + batch_size]
        ids, lengths = padded([requests[n][0] for n in batch], model.head_weight.device)
        hidden, _ = model.model(ids, routing, lengths if min(lengths) < max(lengths) else None)  # (B, T, d)
        counts = [len(requests[n][1]) for n in batch]
        asked = [row[length - n : length] for row, length, n in zip(hidden, lengths, counts, strict=True)]
        targets = torch.cat([torch.as_tensor(requests[n][1]) for n in batch]).long().to(ids.device)
        losses, greedy = losses_of(torch.cat(asked), model.head_weight, targets)  # read back once a batch
        for n, loss, likeliest in zip(batch, losses.cpu().split(counts), greedy.cpu().split(counts), strict=True):
            scores[n] = -loss.double().sum().item(), likeliest.all().item()
        bar.update(len(batch))
    bar.close()
    scores = ChainMap(*of_all(scores))
    return [scores[n] for n in range(len(requests))]


def losses_of(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (n, d), head (V, d), targets (n) → cross-entropies and whether each target was the likeliest, (n)."""
    losses, greedy = [], []
    size = max(1, LOGITS // head.size(0))  # so many rows of logits at a time
    for h, t in zip(hidden.split(size), targets.split(size), strict=True):
        logits = F.linear(h, head).float()  # (size, V)
        losses.append(F.cross_entropy(logits, t, reduction="none"))
        greedy.append(logits.argmax(-1) == t)
    return torch.cat(losses), torch.cat(greedy)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity


def read_texts(path: str, model: Transformer, tokenizer) -> dict[str, tuple[torch.Tensor, int]]:
    """{name: (ids (N), bytes of text)}: a text file, or the validation split of each source of a token folder."""
    if not os.path.isdir(path) and os.path.exists(path):
        text = read_text(path)
        if not text:
            raise DataError(f"text={path} is empty")
        return {path: (encode(model, tokenizer, text), len(text.encode()))}
    manifest = read_manifest(path)
    if manifest["vocab_size"] > model.config.vocab_size:
        raise DataError(
            f"{path} has token ids up to {manifest['vocab_size'] - 1}, the model vocab_size="
            f"{model.config.vocab_size}: name text that was prepared with this model's tokenizer"
        )
    own_tokenizer = os.path.join(path, "tokenizer.json")
    if os.path.exists(own_tokenizer) and vocabulary(own_tokenizer) != tokenizer.get_vocab():
        raise DataError(f"{path} has another tokenizer than the model: name text, or tokens of the model's own")
    bytes_of = token_bytes(tokenizer)
    width = np.array([len(bytes_of(i) or b"") for i in range(manifest["vocab_size"])])
    width[manifest["eot_token"]] = 0
    texts, dtype = {}, np.dtype(manifest["dtype"]).newbyteorder("<")
    for name, source in manifest["sources"].items():
        if not source["val"]["tokens"]:
            continue
        files = [np.fromfile(os.path.join(path, file["name"]), dtype) for file in source["val"]["files"]]
        ids = np.concatenate(files).astype(np.int64)
        if ids.max() >= manifest["vocab_size"]:
            raise DataError(f"{path}: token id {ids.max()} of {name} is beyond vocab_size: prepare it again")
        texts[name] = torch.from_numpy(ids), int(width[ids].sum())
    if not texts:
        raise DataError(
            f"{path} holds no validation tokens: prepare it with a larger val_fraction, or name a text file"
        )
    return texts


def windows_of(ids: torch.Tensor, start: int, length: int, stride: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets) of windows of `length` tokens, each asked for its last `stride` (the first: for all).

    `start` is what the very first token is predicted from. A token of ids (N) is a target exactly once.
    """
    inputs = torch.cat((torch.tensor([start]), ids))  # inputs[t] comes before ids[t]
    ends = [*range(length, len(ids), stride), len(ids)]
    return [(inputs[max(0, end - length) : end], ids[begin:end]) for begin, end in itertools.pairwise([0, *ends])]


def evenly(n: int, limit: int) -> list[int]:
    """`limit` of n numbers, spread over all (0: every one): the beginning of a text is no sample of it."""
    return [i * n // limit for i in range(limit)] if 0 < limit < n else list(range(n))


def perplexity(cfg, model: Transformer, tokenizer) -> list[dict]:
    """Loss of every token given the seq_len − stride tokens before it or more, under both routings. Prints a table.

    The very first token is predicted from the one that starts a text.
    """
    longest, stride = model.config.max_position_embeddings, cfg.stride or max(1, cfg.seq_len // 2)
    if cfg.seq_len > longest:
        raise ConfigError(f"seq_len={cfg.seq_len} is longer than max_position_embeddings={longest}")
    rows, start = [], tokenizer.start
    table = [["perplexity", "routing", "tokens", "bytes", "loss", "perplexity", "bits/byte"]]
    for name, (ids, n_bytes) in read_texts(cfg.text, model, tokenizer).items():
        windows = windows_of(ids, start, cfg.seq_len, stride)
        windows = [windows[i] for i in evenly(len(windows), cfg.limit)]
        count = sum(len(targets) for _, targets in windows)
        for routing in ("causal", "topk") if model.routed else ("causal",):
            scores = score(model, windows, routing, cfg.batch_size, f"{name}, {routing}")
            nats = -sum(logprob for logprob, _ in scores)
            row = {"text": name, "routing": routing, "tokens": count, "loss": nats / count}
            row |= {"perplexity": metrics.perplexity(nats / count), "window": cfg.seq_len, "stride": stride}
            size = bits = "n/a"  # of the part that --limit leaves nobody knows the bytes
            if count == len(ids) and n_bytes:
                row |= {"bytes": n_bytes, "bits_per_byte": nats / math.log(2) / n_bytes}
                size, bits = f"{n_bytes:,}", f"{row['bits_per_byte']:.4f}"
            rows.append(row)
            cells = [name[-28:], routing, f"{count:,}", size, f"{row['loss']:.4f}", f"{row['perplexity']:.4f}", bits]
            table.append(cells)
    print()
    print_table(table)
    return rows


COPIED = 16  # sequences that are read twice


def copying(cfg, model: Transformer, tokenizer) -> dict:
    """Loss of random ids, and of the same ids read once more, under causal routing: what a model has learnt to copy from its
    context (induction heads: Olsson et al. 2022, arXiv 2209.11895). Prints a table.

    seq_len tokens are half of either; the first of the second half, which nothing foretells, counts in none.
    """
    n, longest = cfg.seq_len // 2, model.config.max_position_embeddings
    if not 2 <= n <= longest // 2:
        raise ConfigError(f"seq_len={cfg.seq_len} must lie between 4 and max_position_embeddings={longest}")
    size, special = min(tokenizer.get_vocab_size(), model.config.vocab_size), tokenizer.get_added_tokens_decoder()
    words = [i for i in range(size) if i not in special]
    chosen = torch.randint(len(words), (COPIED, n), generator=torch.Generator().manual_seed(0))
    requests = [(text[:-1], row[1:]) for row in torch.tensor(words)[chosen] for text in (row, row.repeat(2))]
    losses = [-logprob / (n - 1) for logprob, _ in score(model, requests, "causal", cfg.batch_size, "copying")]
    found = {name: statistics.mean(losses[i::2]) for i, name in enumerate(("first", "again"))}
    print()
    print_table([["copying, random ids", "loss"], *([name, f"{loss:.4f}"] for name, loss in found.items())])
    return found | {"sequences": COPIED, "tokens": n}


# ---------------------------------------------------------------------------------------------------------------------
# Loss against compute


@torch.inference_mode()
def capacity_sweep(cfg, model: Transformer, tokenizer) -> list[dict]:
    """Loss, FLOPs per token and decoding speed at every causal capacity, as trained and calibrated: a table, a picture.

    Every second window of the text calibrates the routers, the others are scored.
    """
    ids = sweep_text(cfg, model, tokenizer)
    windows = ids[: len(ids) // (cfg.seq_len + 1) * (cfg.seq_len + 1)].view(-1, cfg.seq_len + 1)
    calibrating, held_out = (part[evenly(len(part), cfg.limit)] for part in (windows[::2], windows[1::2]))
    calibrating = calibrating[:CALIBRATING, :-1]  # (n, T)
    decoded = ids[None, : cfg.seq_len + cfg.decoded_tokens]
    rows, runs, decisions = [], {}, []
    for capacity in [None, *sorted(cfg.capacities)]:  # None: as trained
        if capacity is not None:
            calibrate(model, calibrating, capacity)
        loss, selected = causal_loss(model, held_out, cfg.batch_size)
        row = {"capacity": capacity, "selected": statistics.mean(selected.values()), "loss": loss}
        row["flops_per_token"] = model.flops_per_token(cfg.seq_len, capacity=list(selected.values()))
        rows.append(row)
        decisions.append([layer.offset for layer in model.routed])
        decoder = Decoder(model, decoded, cfg.seq_len, cfg.decode_steps)
        runs[capacity] = partial(decode_as, model, decisions[-1], decoder)
    times = interleaved(runs, ids.device, cfg.warmup, cfg.repeats)
    decide_as(model, decisions[0])
    table = [["capacity", "selected", "loss", "MFLOPs per token", "decode tokens/s"]]
    for row in rows:
        row["decode_tokens_per_s"] = cfg.decode_steps / statistics.median(times[row["capacity"]])
        name = "as trained" if row["capacity"] is None else f"{row['capacity']:g}"
        cells = [name, f"{row['selected']:.3f}", f"{row['loss']:.4f}"]
        table.append([*cells, f"{row['flops_per_token'] / 1e6:,.4g}", f"{row['decode_tokens_per_s']:,.0f}"])
    print()
    print_table(table)
    draw_sweep(rows, cfg.model_path)
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
        raise ConfigError(
            f"text={cfg.text} has {len(ids):,} tokens, too few for two windows of seq_len={T} "
            f"or for {decoded} decoded tokens behind one: lower seq_len, repeats or decode_steps, or name a longer text"
        )
    return ids


def decide_as(model: Transformer, offsets: list[float]):
    """Undoes `calibrate`: each routed layer decides as it did when its `offset` was this."""
    for layer, offset in zip(model.routed, offsets, strict=True):
        layer.offset = offset


def decode_as(model: Transformer, decisions: list[float], decoder: Decoder):
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


def draw_sweep(rows: list[dict], model_path: str):
    """Loss against FLOPs per token, and decoding speed against the share of tokens that runs.

    As capacity.png and .pdf in the model's folder, or in out/ for a model of the hub.
    """
    import matplotlib
    from matplotlib.figure import Figure

    trained, *swept = rows
    note = {"textcoords": "offset points", "fontsize": 7.5}
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(8.4, 3.4), layout="constrained")
        left, right = fig.subplots(1, 2)
        for ax, x, y, unit in ((left, "flops_per_token", "loss", 1e6), (right, "selected", "decode_tokens_per_s", 1)):
            ax.plot([row[x] / unit for row in swept], [row[y] for row in swept], "o-", color=COLOURS[1], markersize=4)
            point = trained[x] / unit, trained[y]
            ax.plot(*point, "D", color=COLOURS[2], markersize=6, clip_on=False)
            ax.annotate("as trained", point, (-7, -10), **note, color=COLOURS[2], ha="right")
            ax.margins(0.06, 0.14)
        for row in swept:
            point = row["flops_per_token"] / 1e6, row["loss"]
            left.annotate(f"{row['capacity']:g}", point, (0, 6), **note, color="#555555", ha="center")
        name = os.path.basename(model_path.rstrip("/"))
        left.set(xlabel="MFLOPs per token", ylabel="loss, nats per token", title=f"{name} at calibrated capacities")
        right.set(xlabel="share of tokens that routed blocks take", ylabel="tokens per second, batch 1")
        right.set(title="Decoding", ylim=(0, None))
    folder = model_path if os.path.isdir(model_path) else "out"
    save_figure(fig, f"{folder}/capacity.png", f"{folder}/capacity.pdf")
    print(f"picture: {folder}/capacity.png, .pdf")
