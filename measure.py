"""How measurements are taken: calls side by side, routers brought to a capacity, decoding of given ids, the KV cache."""

import gc
import statistics
import time
from functools import partial

import torch

from device import synchronize
from generation import compiled_step
from model import Transformer


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
def cached(model: Transformer, ids: torch.Tensor) -> tuple[dict[int, float], float]:
    """Causal routing of ids (B, T): ({routed layer: share of the tokens that ran}, bytes per token that the KV cache holds)."""
    tokens, size = dict.fromkeys(model.config.routed_layers, 0), 0
    for chunk in ids.split(8):
        cache = model.new_cache(*chunk.shape)
        chunk = chunk.to(model.head_weight.device)
        for layer, mask in model(chunk, routing="causal", cache=cache, return_masks=True).masks.items():
            tokens[layer] += int(mask.sum())
        size += cache.bytes_used()
    return {layer: ran / ids.numel() for layer, ran in tokens.items()}, size / ids.numel()


@torch.no_grad()
def calibrate(model: Transformer, ids: torch.Tensor, capacity):
    """Moves the causal decision of every routed layer, its `offset`, so that of the tokens of ids (B, T) it selects the share
    that is its own of `capacity`, a float or one for each.

    In one pass over all of them, since what a layer selects changes what the next one reads.
    """
    for layer, share in zip(model.routed, model.config.capacities_at(capacity), strict=True):
        layer.calibrating = share
        if model.config.causal_decision == "threshold":
            layer.threshold.nan_to_num_()  # where no training has set it there are no margins
    model(ids, ids, routing="causal")  # through the whole model, which alone gathers what is sharded
    for layer in model.routed:
        layer.calibrating = None


class Decoder:
    """Decodes ids (B, T) behind their first `prompt` tokens: each call the next `steps`, whatever the model would say."""

    def __init__(self, model, ids: torch.Tensor, prompt: int, steps: int):
        self.model, self.ids, self.position, self.steps = model, ids, prompt, steps
        self.masks = []  # of every step so far {routed layer: (B, 1) bool}; none where steps are compiled
        self.cache = model.new_cache(*ids.shape)
        self.packed = model.pack() if isinstance(model, Transformer) else []
        model(ids[:, :prompt], routing="causal", cache=self.cache)
        self.compiled_step = None
        if getattr(model, "decodes_compiled", False):
            self.compiled_step = compiled_step(model.head_weight.is_cuda)
            self.cache = model.static_cache(self.cache)

    def __call__(self):
        for _ in range(self.steps):
            ids = self.ids[:, self.position : self.position + 1]  # (B, 1)
            self.position += 1
            if self.compiled_step:
                self.compiled_step(self.model, ids, self.cache).argmax(-1)
                continue
            out = self.model(ids, routing="causal", cache=self.cache, return_masks=True)
            out.logits.argmax(-1)
            self.masks.append(getattr(out, "masks", None))

    def rates(self) -> tuple[dict[int, float], dict[int, float]]:
        """({routed layer: share of the tokens that it selected}, {routed layer: share of steps in which any row ran})."""
        selected, ran = {}, {}
        for layer in self.masks[0]:
            masks = torch.stack([by_layer[layer] for by_layer in self.masks]).float()  # (steps, B, 1)
            selected[layer] = masks.mean().item()
            ran[layer] = masks.amax(1).mean().item()
        return selected, ran
