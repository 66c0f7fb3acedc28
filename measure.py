"""Measures that several scripts take of a model: times side by side, and what causal routing leaves in the cache."""

import gc
import statistics
import time
from functools import partial

import torch

from device import synchronize


def interleaved(runs: dict, device, warmup: int, repeats: int) -> dict:
    """Seconds of every call in `runs`, a list of one per round each: side by side, in an order that turns around."""
    seconds = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # modules and weights are not looked through again and again
    for n in range(warmup + repeats):
        for name in list(runs)[:: 1 if n % 2 else -1]:
            gc.collect()
            gc.disable()
            synchronize(device)
            start = time.perf_counter()
            runs[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            gc.enable()
    gc.unfreeze()
    return {name: times[warmup:] for name, times in seconds.items()}


def decode_speeds(models: dict, prompt: torch.Tensor, n: int = 64, rounds: int = 5) -> dict[str, float]:
    """{name: tokens/s} of greedy decoding at batch 1 behind `prompt` (T): medians, the models taking turns."""
    device = next(iter(models.values())).head_weight.device
    ids = prompt[None].to(device)
    runs = {name: partial(model.generate, ids, n) for name, model in models.items()}
    times = interleaved(runs, device, warmup=1, repeats=rounds)
    return {name: n / statistics.median(seconds) for name, seconds in times.items()}


@torch.inference_mode()
def cached(model, ids: torch.Tensor) -> tuple[dict[int, float], float]:
    """What causal routing of ids (B, T) leaves in the KV cache: ({routed layer: share of tokens}, bytes per token)."""
    tokens, size = dict.fromkeys(model.config.routed_layers, 0), 0
    for chunk in ids.split(8):
        cache = model.new_cache(*chunk.shape)
        model(chunk.to(model.head_weight.device), routing="causal", cache=cache)
        for layer in tokens:
            tokens[layer] += sum(cache.layers[layer].lengths)
        size += cache.bytes_used()
    return {layer: held / ids.numel() for layer, held in tokens.items()}, size / ids.numel()
