"""What a finished run's model costs, measured: FLOPs and KV cache of causal routing, speeds in turns with another model's.

A run is given as its model directory and its settings, {key of train.py: value}.
"""

import statistics
from functools import partial

import torch

from data import TokenData
from device import autocast, pick_device
from measure import Decoder, cached, interleaved
from model import Transformer

ROUNDS = 8  # of every measurement, the first does not count


def device_of(settings: dict):
    """The device and the number format of a run."""
    return pick_device(settings.get("device", "auto"), settings.get("dtype", "auto"))


def opened(path, settings: dict):
    """The model, and 8 sequences of the run's validation text: ids and targets, (B, T) each."""
    device, _ = device_of(settings)
    data = TokenData(settings["data_dir"], "val", settings["seq_len"])
    x, y = data.batch(0, min(8, len(data)))
    return Transformer.from_pretrained(path).to(device).eval(), x.to(device), y.to(device)


def of_inference(path, settings: dict) -> dict:
    """What causal routing selects of validation text, and costs: shares of tokens, FLOPs and bytes of KV cache a token."""
    model, x, _ = opened(path, settings)
    selected, kv_bytes = cached(model, x)
    flops = model.flops_per_token(x.size(1), capacity=list(selected.values()))
    return {"flops_per_token": flops, "kv_bytes": kv_bytes, "selected": list(selected.values())}


def speeds(reference: tuple, run: tuple) -> dict[str, dict]:
    """{measure: {tokens_per_s, ratio}} of a run in training, prefill and decoding at batch 1 and 8.

    ratio: how many times as fast as the reference, the median over rounds; both are (path, settings), and may be one.
    """
    context = autocast(*device_of(run[1]))
    models, found = {}, {}
    for path, settings in (reference, run):
        models[path], x, y = opened(path, settings)
    B, T = x.shape

    def take(measure, tokens, calls, steps=None):
        times = interleaved(calls, x.device, warmup=1, repeats=ROUNDS - 1)
        if steps:
            times = {path: [seconds / steps[path] for seconds in of_path] for path, of_path in times.items()}
        ratios = [theirs / mine for theirs, mine in zip(times[reference[0]], times[run[0]], strict=True)]
        found[measure] = {"tokens_per_s": tokens / statistics.median(times[run[0]]), "ratio": statistics.median(ratios)}

    size, given = min(B, run[1]["batch_size"]), {path: settings for path, settings in (reference, run)}
    calls = {path: training_steps(model, given[path], x[:size], y[:size], context) for path, model in models.items()}
    take("training", size * T, calls, {path: len(choices(settings)) for path, settings in given.items()})
    with torch.inference_mode():
        for batch in sorted({1, B}):
            ids, few = x[:batch], max(1, T // 2 // ROUNDS)
            take(f"prefill{batch}", batch * T, {path: partial(prefill, model, ids) for path, model in models.items()})
            decoders = {path: Decoder(model, ids, T // 2, few) for path, model in models.items()}
            take(f"decode{batch}", batch * few, decoders)
    return found


def prefill(model, ids):
    return model.eval()(ids, routing="causal", cache=model.new_cache(*ids.shape))


def choices(settings: dict) -> list:
    """The capacities that steps of a run are drawn from: None where there is one only."""
    return settings.get("capacity_choices") or [None]


def training_steps(model, settings: dict, x, y, context):
    """A call that does what steps of the run did, one at each capacity, on one micro-batch and at rate 0: the weights stay
    as they are.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    parent, trained = settings.get("distill_from"), model.config.capacity
    dtype = device_of(settings)[1]
    teacher = Transformer.from_pretrained(parent, dtype=dtype).to(x.device).requires_grad_(False) if parent else None

    def steps():
        model.train()
        for capacity in choices(settings):
            if capacity is not None:
                model.set_capacity(capacity)
            with context:
                out = model(x, y, teacher=(teacher.model(x)[0], teacher.head_weight) if teacher else None)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if model.routed:
            model.set_capacity(trained)

    return steps
