"""Log-probabilities of text under a model, and its perplexity. Called by all ranks of torchrun, which share the work."""

import itertools
import math
import os
import sys
from collections import ChainMap

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import metrics
from data import read_manifest
from errors import ConfigError, DataError
from model import Transformer
from parallel import of_all, rank, world
from routers import valid_mask
from tables import print_table
from tokenizer import vocabulary
from trained import encode, end_of_text, read_text

LOGITS = 1 << 25  # numbers of logits that are in memory at a time


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
        losses, greedy, counts = [], [], [len(requests[n][1]) for n in batch]
        for n, row, length in zip(batch, hidden, lengths, strict=True):
            targets = torch.as_tensor(requests[n][1], device=row.device).long()
            loss, likeliest = losses_of(row[length - len(targets) : length], model.head_weight, targets)
            losses.append(loss)
            greedy.append(likeliest)
        losses = torch.cat(losses).cpu().split(counts)  # read back once a batch
        greedy = torch.cat(greedy).cpu().split(counts)
        for n, loss, likeliest in zip(batch, losses, greedy, strict=True):
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
        return {path: (encode(model, tokenizer, text).cpu(), len(text.encode()))}
    manifest = read_manifest(path)
    if manifest["vocab_size"] > model.config.vocab_size:
        raise DataError(
            f"{path} has token ids up to {manifest['vocab_size'] - 1}, the model vocab_size="
            f"{model.config.vocab_size}: name text that was prepared with this model's tokenizer"
        )
    own_tokenizer = os.path.join(path, "tokenizer.json")
    if os.path.exists(own_tokenizer) and vocabulary(own_tokenizer) != tokenizer.get_vocab():
        raise DataError(f"{path} has another tokenizer than the model: name text, or tokens of the model's own")
    tokens = (tokenizer.id_to_token(i) or "" for i in range(manifest["vocab_size"]))
    width = np.array([len(token) for token in tokens])  # byte-level BPE: a character of the vocabulary is a byte
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
    return texts


def windows_of(ids: torch.Tensor, start: int, length: int, stride: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets) of windows of `length` tokens, each asked for its last `stride` (the first: for all).

    `start` is what the very first token is predicted from. A token of ids (N) is a target exactly once.
    """
    inputs = torch.cat((torch.tensor([start]), ids))  # inputs[t] comes before ids[t]
    ends = [min(length, len(ids)), *range(length + stride, len(ids), stride)]
    if ends[-1] < len(ids):
        ends.append(len(ids))
    pairs = itertools.pairwise([0, *ends])
    return [(inputs[max(0, end - length) : end], ids[begin:end]) for begin, end in pairs]


def perplexity(cfg, model: Transformer, tokenizer) -> list[dict]:
    """Loss of every token given the seq_len − stride tokens before it or more, under both routings. Prints a table.

    cfg: bench.py's settings. The very first token is predicted from the end-of-text token.
    """
    longest, stride = model.config.max_position_embeddings, cfg.stride or max(1, cfg.seq_len // 2)
    if cfg.seq_len > longest:
        raise ConfigError(f"seq_len={cfg.seq_len} is longer than max_position_embeddings={longest}")
    rows, start = [], end_of_text(tokenizer)
    for name, (ids, n_bytes) in read_texts(cfg.text, model, tokenizer).items():
        windows = windows_of(ids, start, cfg.seq_len, stride)[: cfg.limit or None]
        count = sum(len(targets) for _, targets in windows)
        for routing in ("causal", "topk") if model.routed else ("causal",):
            scores = score(model, windows, routing, cfg.batch_size, f"{name}, {routing}")
            nats = -sum(logprob for logprob, _ in scores)
            row = {"text": name, "routing": routing, "tokens": count, "loss": nats / count}
            row |= {"perplexity": metrics.perplexity(nats / count), "window": cfg.seq_len, "stride": stride}
            if count == len(ids) and n_bytes:  # of the part that --limit leaves nobody knows the bytes
                row |= {"bytes": n_bytes, "bits_per_byte": nats / math.log(2) / n_bytes}
            rows.append(row)
    print_perplexity(rows)
    return rows


def print_perplexity(rows: list[dict]):
    table = [["perplexity", "routing", "tokens", "bytes", "loss", "perplexity", "bits/byte"]]
    for row in rows:
        cells = [row["text"][-28:], row["routing"], f"{row['tokens']:,}"]
        cells.append(f"{row['bytes']:,}" if "bytes" in row else "n/a")
        cells += [f"{row['loss']:.4f}", f"{row['perplexity']:.4f}"]
        cells.append(f"{row['bits_per_byte']:.4f}" if "bytes" in row else "n/a")
        table.append(cells)
    print()
    print_table(table)
