"""What a finished run's model costs, measured: FLOPs and KV cache of causal routing, speeds in turns with another model's.

A run is given as its model directory and its settings, {key of train.py: value}.
"""

import json
import statistics
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from data import TokenData, read_manifest
from device import autocast, pick_device
from measure import Decoder, cached, interleaved
from model import SIZES, ModelConfig, Transformer
from settings import TrainConfig
from weights import find_model

ROUNDS = 8  # of every measurement, the first does not count


def device_of(settings: dict):
    """The device and the number format of a run."""
    return pick_device(settings.get("device", "auto"), settings.get("dtype", "auto"))


def is_rebuilt(settings: dict) -> bool:
    """Whether `config_of` is the model that these settings train: a parent's blocks or weights are changed when it is read."""
    return not (settings.get("keep_layers") or settings.get("lora") or settings.get("routed_layers") == "auto")


def config_of(settings: dict) -> ModelConfig:
    """The model that a run with these settings trains."""
    given = {f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings}
    if settings["init_from"] == "scratch":
        known = SIZES.get(settings["size"], {}) | given
        vocab_size = {} if "vocab_size" in known else {"vocab_size": read_manifest(settings["data_dir"])["vocab_size"]}
        return ModelConfig.preset(settings["size"], **vocab_size | given)
    parent = json.loads((Path(find_model(settings["init_from"])) / "config.json").read_text())
    return ModelConfig.from_dict(parent, **given)


def opened(path, settings: dict, sequences: int):
    """The model, of random weights where path is None, and the first sequences of the run's validation text: ids and targets,
    (B, T) each.
    """
    device, _ = device_of(settings)
    data = TokenData(settings["data_dir"], "val", settings["seq_len"])
    x, y = data.batch(0, min(sequences, len(data)))
    model = Transformer(config_of(settings)) if path is None else Transformer.from_pretrained(path)
    return model.to(device).eval(), x.to(device), y.to(device)


def of_inference(path, settings: dict) -> dict:
    """What causal routing selects, and costs: shares of tokens, FLOPs and bytes of KV cache a token.

    Of all the validation text that the run was evaluated on: how much is selected differs from text to text.
    """
    evaluated = settings.get("eval_batches", TrainConfig.eval_batches) * settings["batch_size"]
    model, x, _ = opened(path, settings, evaluated)
    selected, kv_bytes = cached(model, x)
    flops = model.flops_per_token(x.size(1), capacity=list(selected.values()))
    return {"flops_per_token": flops, "kv_bytes": kv_bytes, "selected": list(selected.values())}


def speeds(runs: dict[str, tuple], reference: str, name: str) -> dict[str, dict]:
    """{measure: {tokens_per_s, ratio}} of a run in training, prefill and decoding at batch 1 and 8; where there is no trained
    model, in training alone.

    runs: {name: (path or None, settings)}, of the two. ratio: how many times as fast as the reference, the median over rounds.
    """
    given, trained = {each: runs[each][1] for each in (reference, name)}, all(path for path, _ in runs.values())
    context = autocast(*device_of(given[name]))
    models, found = {}, {}
    for each, settings in given.items():
        models[each], x, y = opened(runs[each][0] if trained else None, settings, 8)
    B, T = x.shape

    def take(measure, tokens, calls, steps=None):
        times = interleaved(calls, x.device, warmup=1, repeats=ROUNDS - 1)
        if steps:
            times = {each: [seconds / steps[each] for seconds in of_each] for each, of_each in times.items()}
        ratios = [theirs / mine for theirs, mine in zip(times[reference], times[name], strict=True)]
        found[measure] = {"tokens_per_s": tokens / statistics.median(times[name]), "ratio": statistics.median(ratios)}

    size = min(B, given[name]["batch_size"])
    calls = {each: training_steps(model, given[each], x[:size], y[:size], context) for each, model in models.items()}
    take("training", size * T, calls, {each: micro_batches(settings) for each, settings in given.items()})
    if not trained:
        return found
    with torch.inference_mode():
        for batch in sorted({1, B}):
            ids, few = x[:batch], max(1, T // 2 // ROUNDS)
            take(f"prefill{batch}", batch * T, {each: partial(prefill, model, ids) for each, model in models.items()})
            decoders = {each: Decoder(model, ids, T // 2, few) for each, model in models.items()}
            take(f"decode{batch}", batch * few, decoders)
    return found


def prefill(model, ids):
    return model.eval()(ids, routing="causal", cache=model.new_cache(*ids.shape))


def choices(settings: dict) -> list:
    """The capacities that steps of a run are drawn from: None where there is one only, the model's."""
    found = settings.get("capacity_choices", [])
    return found if len(set(found)) > 1 else [None]


def micro_batches(settings: dict) -> int:
    """How many a call of `training_steps` runs."""
    return len(choices(settings)) * settings["grad_accum_steps"]


def training_steps(model, settings: dict, x, y, context):
    """A call that does what steps of the run did, one at each capacity, on one and the same micro-batch and at rate 0: the
    weights stay as they are, and average thresholds.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    parent, trained = settings.get("distill_from"), model.config.capacity
    dtype = device_of(settings)[1]
    teacher = Transformer.from_pretrained(parent, dtype=dtype).to(x.device).requires_grad_(False) if parent else None

    def steps():
        buffers = [buffer.clone() for buffer in model.buffers()]
        model.train()
        for capacity in choices(settings):
            if capacity is not None:
                model.set_capacity(capacity)
            for _ in range(settings["grad_accum_steps"]):
                with context:
                    out = model(x, y, teacher=(teacher.model(x)[0], teacher.head_weight) if teacher else None)
                out.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if model.routed:
            model.set_capacity(trained)
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    return steps
