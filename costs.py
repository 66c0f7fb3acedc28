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

    def take(measure, tokens, calls):
        times = interleaved(calls, x.device, warmup=1, repeats=ROUNDS - 1)
        ratios = [theirs / mine for theirs, mine in zip(times[reference[0]], times[run[0]], strict=True)]
        found[measure] = {"tokens_per_s": tokens / statistics.median(times[run[0]]), "ratio": statistics.median(ratios)}

    size, given = min(B, run[1]["batch_size"]), {path: settings for path, settings in (reference, run)}
    steps = {path: training_step(model, given[path], x[:size], y[:size], context) for path, model in models.items()}
    take("training", size * T, steps)
    with torch.inference_mode():
        for batch in sorted({1, B}):
            ids, few = x[:batch], max(1, T // 2 // ROUNDS)
            take(f"prefill{batch}", batch * T, {path: partial(prefill, model, ids) for path, model in models.items()})
            decoders = {path: Decoder(model, ids, T // 2, few) for path, model in models.items()}
            take(f"decode{batch}", batch * few, decoders)
    return found


def prefill(model, ids):
    return model.eval()(ids, routing="causal", cache=model.new_cache(*ids.shape))


def training_step(model, settings: dict, x, y, context):
    """A call that does what a step of the run did, on one micro-batch and at rate 0: the weights stay as they are."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    parent = settings.get("distill_from")
    teacher = Transformer.from_pretrained(parent).to(x.device).requires_grad_(False) if parent else None

    def step():
        model.train()
        with context:
            out = model(x, y, teacher=(teacher.model(x)[0], teacher.head_weight) if teacher else None)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
