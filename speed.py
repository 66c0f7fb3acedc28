"""How fast models train and infer: ours and transformers' Qwen2, side by side, against what FLOPs and bytes promise;
and these FLOPs by component, as torch counts them.

`cfg` is bench.py's settings everywhere. Of the models, the dense one is what ratios refer to.
"""

import copy
import json
import os
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

from architectures import ARCHITECTURES
from blocks import RoutedBlock
from device import autocast, peak_flops
from errors import ConfigError
from figures import print_table
from measure import Decoder, cached, calibrate, interleaved
from model import ModelConfig, Transformer
from parallel import say

Measure = Literal["train", "forward", "causal", "prefill", "decode1", "decode8", "decode64"]
*MEASURES, _ = get_args(Measure)  # all but the last, which is for GPUs
PEER = "transformers"
DENSE = next(iter(ARCHITECTURES))
ROUTED = [name for name, kind in ARCHITECTURES.items() if issubclass(kind, RoutedBlock)]
SLOWER = 1.05  # times what it was in a baseline


def variant(shape: ModelConfig, architecture: str, **changes) -> ModelConfig:
    """`shape` as another architecture; what only routed layers have, one without them drops."""
    if architecture not in ROUTED:
        changes |= {
            "capacity": ModelConfig.capacity,
            "router": ModelConfig.router,
            "calibrated": None,
            "allotment": None,
        }
    return replace(shape, architecture=architecture, **changes)


def speed_models(cfg, shape: ModelConfig, names, trained: Transformer | None, device) -> dict[str, Transformer]:
    """{architecture: model}, dense first: random weights of one shape, but for the trained model where there is one."""
    tokens = cfg.longest_sequence
    if trained and tokens > shape.max_position_embeddings:
        raise ConfigError(
            f"seq_len={cfg.seq_len} and the tokens decoded behind it, {tokens} in all, pass this model's "
            f"max_position_embeddings={shape.max_position_embeddings}: lower seq_len, decode_steps or repeats"
        )
    models = {}
    for name in dict.fromkeys([DENSE, *names]):
        if trained and name == shape.architecture:
            models[name] = trained
            continue
        torch.manual_seed(0)
        with device:
            longest = max(tokens, shape.max_position_embeddings)
            models[name] = Transformer(variant(shape, name, max_position_embeddings=longest))
        # As in a trained model a token's own identity, not its sequence, should say most about its way: random routers
        # then select at an even rate.
        models[name].model.embed_tokens.weight.data.normal_()
    return models


def speed(cfg, models: dict[str, Transformer], device, dtype) -> dict:
    """Times every measure for `models` and transformers: {"rows": […], "memory": {variant: {…}}}. Prints tables."""
    suite = Suite(cfg, models, device, peak_flops(device, dtype))
    if "train" in cfg.measure:
        training(suite, autocast(device, dtype))
    with torch.inference_mode():
        inference(suite, dtype)
    print_memory(suite.memory, cfg.compile)
    return {"rows": suite.rows, "memory": suite.memory}


# ---------------------------------------------------------------------------------------------------------------------
# What is timed, and how


class Peer(torch.nn.Module):
    """transformers' model with sdpa attention and the weights of our dense model, behind our model's interface."""

    def __init__(self, dense: Transformer):
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        config = {name: value for name, value in dense.config.to_dict().items() if name != "architecture"}
        config = AutoConfig.for_model(**config)
        self.theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        self.theirs.load_state_dict(dense.state_dict() | {"lm_head.weight": dense.head_weight})
        self.__dict__["run"] = self.theirs  # no second child

    def compile_trunk(self):
        self.__dict__["run"] = torch.compile(self.theirs)

    def to_dtype(self, dtype):
        return self.to(dtype)

    def new_cache(self, batch, limit):
        from transformers import DynamicCache

        return DynamicCache(config=self.theirs.config)

    def forward(self, input_ids, targets=None, routing="topk", cache=None, return_masks=False):
        if targets is not None:
            return self.run(input_ids, labels=input_ids, use_cache=False)  # shifts them itself
        keep = 0 if cache is None else 1
        return self.run(input_ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep)


def compiled(model):
    """The same weights behind torch.compile."""
    fast = copy.copy(model)  # shares modules and weights
    fast.compile_trunk()
    if isinstance(fast, Transformer):
        fast.compile_decoding()
    return fast


class Suite:
    """What the measures share: the models, the ids that they read, and the results so far."""

    def __init__(self, cfg, models: dict[str, Transformer], device, peak: float | None):
        self.cfg, self.models, self.device, self.peak = cfg, models, device, peak
        self.variants = {PEER: Peer(models[DENSE]).to(device), **models}
        self.compiled = {name: compiled(model) for name, model in self.variants.items()} if cfg.compile else {}
        self.rows, self.memory = [], {}
        for name, model in self.variants.items():
            self.memory[name] = {"parameters": sum(p.numel() for p in model.parameters())}
        torch.manual_seed(1)
        self.decoded = self.random_ids(64 if "decode64" in cfg.measure else 8, cfg.longest_sequence)
        self.x, self.y = (self.random_ids(cfg.batch_size, cfg.seq_len) for _ in range(2))

    def random_ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(self.models[DENSE].config.vocab_size, shape, device=self.device)

    def time(self, run, compiled: dict) -> dict:
        """Seconds of run(model, name), {(name, compiled): one a round}, of every variant and the models in `compiled`."""
        for name, model in compiled.items():
            start = time.perf_counter()
            run(model, name)
            self.memory[name].setdefault("compile_seconds", 0)
            self.memory[name]["compile_seconds"] += time.perf_counter() - start
        runs = {(name, False): partial(run, model, name) for name, model in self.variants.items()}
        runs |= {(name, True): partial(run, model, name) for name, model in compiled.items()}
        return interleaved(runs, self.device, self.cfg.warmup, self.cfg.repeats)

    def report(self, measure: str, times: dict, tokens: int, promised: dict[str, float], steps: int = 1):
        """Keeps and prints the rows of a measure.

        tokens are of one timed call, which is `steps` steps; promised: {architecture: FLOPs or bytes} of one step.
        """
        rows = []
        for (name, is_compiled), seconds in times.items():
            low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
            row = {"measure": measure, "variant": name, "compiled": is_compiled, "seconds": median / steps}
            row |= {"quartiles": [low / steps, high / steps], "tokens_per_s": tokens / median}
            row["ratio"] = median_ratio(seconds, times[DENSE, is_compiled])
            if name in promised:
                row["promised"] = promised[name] / promised[DENSE]
                row["efficiency"] = row["promised"] / row["ratio"]
                if measure.startswith("decode"):
                    row["gb_per_s"] = promised[name] / row["seconds"] / 1e9
                elif self.peak:
                    row["mfu"] = promised[name] / row["seconds"] / self.peak
            row["vs_hf"] = median_ratio(times[PEER, False], seconds)
            rows.append(row)
        print_speed(rows)
        self.rows += rows


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """Of times that were taken next to each other."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The measures


def training(suite: Suite, context):
    """A training step: its time and memory, and a trace where one is wanted."""
    B, T = suite.x.shape
    steps = {name: training_step(model, suite.x, suite.y, context) for name, model in suite.variants.items()}
    flops = {name: model.flops_per_token(T, training=True) * B * T for name, model in suite.models.items()}
    times = suite.time(lambda model, name: steps[name][0](model), suite.compiled)
    suite.report("train", times, B * T, flops)
    for name, (step, optimizer) in steps.items():
        suite.memory[name] |= step_memory(step, suite.variants[name], optimizer, suite.device)


def training_step(model, x, y, context):
    """(a function that does one training step through `forward`, its optimizer)."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(forward):
        with context:
            loss = forward(x, y).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def step_memory(step, model, optimizer, device) -> dict[str, int]:
    """Bytes that autograd keeps for the backward pass, and on CUDA the peak of weights, optimizer and step."""
    saved, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model)
    memory = {"activation_bytes": sum(saved.values())}
    if device.type == "cuda":
        held = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
        torch.cuda.reset_peak_memory_stats()
        of_all_variants = torch.cuda.memory_allocated()
        step(model)
        peak = torch.cuda.max_memory_allocated() - of_all_variants
        memory["peak_bytes"] = peak + sum(tensor.nbytes for tensor in held)
    return memory


def inference(suite: Suite, dtype):
    cfg, x = suite.cfg, suite.x
    B, T = x.shape
    causal_flops = prepare_inference(suite, dtype)
    config = suite.models[DENSE].config
    if "forward" in cfg.measure:  # what a training step does forward: for some architectures more than inference does
        flops = {}
        for name, model in suite.models.items():
            # A third of the step; of a causal router, whose input takes no gradient, the step has two parts of three.
            routers = 4 * config.hidden_size * len(model.routed)
            flops[name] = (model.flops_per_token(T, training=True) + routers) / 3 * B * T
        suite.report("forward", suite.time(lambda model, _: model(x), suite.compiled), B * T, flops)
    if "causal" in cfg.measure:
        suite.report("causal", suite.time(lambda model, _: model(x, routing="causal"), {}), B * T, causal_flops)
    if "prefill" in cfg.measure:
        head = 2 * config.hidden_size * config.vocab_size * B * (T - 1)  # only the last token's logits are computed
        flops = {name: flops - head for name, flops in causal_flops.items()}
        times = suite.time(lambda model, _: model(x, routing="causal", cache=model.new_cache(B, T)), {})
        suite.report("prefill", times, B * T, flops)
    for batch in (1, 8, 64):
        if f"decode{batch}" in cfg.measure:
            decode(suite, batch)


def prepare_inference(suite: Suite, dtype) -> dict[str, float]:
    """Brings every model to `dtype` and its routers to their capacity, and notes what that leaves in the KV cache.

    Returns {architecture: FLOPs of a causal forward pass of x}.
    """
    T, flops = suite.cfg.seq_len, {}
    for model in suite.variants.values():
        model.to_dtype(dtype).eval()
    text = suite.random_ids(max(1, 8192 // T), T)
    for name, model in suite.models.items():
        calibrate(model, text, model.config.capacity)
        selected, suite.memory[name]["kv_bytes_per_token"] = cached(model, suite.x)
        suite.memory[name]["causal_capacity"] = statistics.mean(selected.values()) if selected else 1.0
        flops[name] = model.flops_per_token(T, capacity=list(selected.values())) * suite.x.numel()
    return flops


def decode(suite: Suite, batch: int):
    cfg, decoders, nbytes = suite.cfg, {}, {}
    compiled = {name: suite.compiled[name] for name in suite.models if cfg.compile}  # transformers': eager only
    for model in (*suite.variants.values(), *compiled.values()):
        decoders[model] = Decoder(model, suite.decoded[:batch], cfg.seq_len, cfg.decode_steps)
    times = suite.time(lambda model, _: decoders[model](), compiled)
    for name, model in suite.models.items():
        context = cfg.seq_len + cfg.decoded_tokens / 2
        nbytes[name] = model.decode_bytes(batch, context, *decoders[model].rates())
    suite.report(f"decode{batch}", times, batch * cfg.decode_steps, nbytes, steps=cfg.decode_steps)


# ---------------------------------------------------------------------------------------------------------------------
# Tables, and the comparison with an earlier run


def print_speed(rows: list[dict]):
    """The rows of one measure; a column stands there if any row has a value for it."""
    columns = {"mfu": "MFU", "gb_per_s": "GB/s", "ratio": "ratio", "promised": "promised"}
    columns |= {"efficiency": "efficiency", "vs_hf": "vs hf"}
    columns = {key: title for key, title in columns.items() if any(key in row for row in rows)}
    table = [[rows[0]["measure"], "ms", "(quartiles)", "tokens/s", *columns.values()]]
    for row in rows:
        name = f"{row['variant']}, compiled" if row["compiled"] else row["variant"]
        low, high = (f"{1e3 * quartile:.2f}" for quartile in row["quartiles"])
        cells = [name, f"{1e3 * row['seconds']:.2f}", f"({low}–{high})", f"{row['tokens_per_s']:,.0f}"]
        table.append(cells + [f"{row[key]:.3f}" if key in row else "" for key in columns])
    print()
    print_table(table)


def print_memory(memory: dict[str, dict], compile: bool):
    columns = ["parameters", "activation_bytes", "peak_bytes", "kv_bytes_per_token", "causal_capacity"]
    columns += ["compile_seconds"] if compile else []
    table = [["", *columns]]
    for name, values in memory.items():
        table.append([name, *(f"{values[column]:,.9g}" if column in values else "n/a" for column in columns)])
    print()
    print_table(table)


def read_baseline(path: str, cfg, shape: ModelConfig) -> dict | None:
    """An earlier run of the speed suite at the same sizes; None where there is none yet. Raises ConfigError."""
    if not path or not os.path.exists(path):
        return None
    compared = ("seq_len", "batch_size", "decode_steps", "dtype")
    try:
        with open(path, encoding="utf-8") as f:
            baseline = json.load(f)
        sizes = [baseline["config"][key] for key in compared] + [baseline["speed"]["model"]]
        by_key(baseline["speed"]["rows"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"baseline={path} holds no results of bench.py's speed suite: {e!r}") from None
    if sizes != [getattr(cfg, key) for key in compared] + [json.loads(json.dumps(shape.to_dict()))]:
        raise ConfigError(f"baseline={path} is of another size: give the keys it was made with, or another file")
    return baseline


def by_key(rows: list[dict]) -> dict[tuple, dict[str, float]]:
    """{(measure, variant, compiled): the two ratios that a comparison reads}."""
    return {
        (row["measure"], row["variant"], row["compiled"]): {name: row[name] for name in ("ratio", "vs_hf")}
        for row in rows
    }


def regressions(speed: dict, facts: dict, baseline: dict) -> list[str]:
    """What is slower by more than 5 % than in the baseline: our time over dense's, or over transformers'."""
    if any(baseline[name] != facts[name] for name in ("device", "threads", "packages")):
        say("note: the baseline was measured on another machine, or with other versions: ratios may differ for that")
    earlier, slower = by_key(baseline["speed"]["rows"]), []
    for key, ratios in by_key(speed["rows"]).items():
        if key[1] == PEER or key not in earlier:
            continue
        for ratio, now in ratios.items():
            then = earlier[key][ratio]
            if (now / then if ratio == "ratio" else then / now) > SLOWER:
                words = " ".join([*key[:2], "compiled"] if key[2] else key[:2])
                slower.append(f"{words}: {ratio} {then:.3f} → {now:.3f}")
    return slower


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs by component


def count_flops(config: ModelConfig, seq_len: int) -> tuple[dict[str, float], float]:
    """FLOPs per token of one sequence's forward pass by component, and of the training step, as torch counts them.

    Every operation of the real forward and backward pass, on tensors without memory: any size, on any machine. The loss
    is taken from the logits, for the chunked loss is one operation that FlopCounterMode does not know.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = Transformer(config)
        ids = torch.zeros(1, seq_len, dtype=torch.int64)
        out = model(ids)
        by_module = counter.get_flop_counts()
        (F.cross_entropy(out.logits[0], ids[0]) + sum(out.losses.values())).backward()
    components = by_component(model, by_module)
    return {name: flops / seq_len for name, flops in components.items()}, counter.get_total_flops() / seq_len


def by_component(model: Transformer, by_module: dict[str, dict]) -> dict[str, float]:
    """Adds up what FlopCounterMode found in each module, {module: {operation: FLOPs}}."""
    total = {name: sum(operations.values()) for name, operations in by_module.items()}
    names = ("attention, projections", "attention, products", "MLP", "priors", "routers", "head")
    components = dict.fromkeys(names, 0)
    components["head"] = total["Transformer"] - total["Transformer.model"]
    for i, layer in enumerate(model.model.layers):
        path = f"Transformer.model.layers.{i}"
        operations = by_module.get(f"{path}.self_attn", {})
        attending = ("bmm", "attend")  # PyTorch's; written out in kernels.py
        products = sum(n for operation, n in operations.items() if any(name in str(operation) for name in attending))
        attention, mlp = sum(operations.values()), total.get(f"{path}.mlp", 0)
        priors = sum(total.get(f"{path}.{part}", 0) for part, group in layer.parts.items() if group == "prior")
        components["attention, projections"] += attention - products
        components["attention, products"] += products
        components["MLP"] += mlp
        components["priors"] += priors
        components["routers"] += total[path] - attention - mlp - priors  # what is left of the layer
    return components


def flops_table(configs: dict[str, ModelConfig], seq_len: int) -> dict:
    """Prints and returns {architecture: {component: FLOPs per token}}, with the sums of flops_per_token beside it."""
    table = {}
    for name, config in configs.items():
        components, counted = count_flops(config, seq_len)
        with torch.device("meta"):
            model = Transformer(config)
        table[name] = components | {
            "training, forward": sum(components.values()),
            "training step, counted": counted,
            "training step, flops_per_token": model.flops_per_token(seq_len, training=True),
            "inference, flops_per_token": model.flops_per_token(seq_len),
        }
    rows = [[f"MFLOPs per token, T={seq_len}", *table]]
    for component in next(iter(table.values())):
        rows.append([component, *(f"{column[component] / 1e6:,.4g}" for column in table.values())])
    print()
    print_table(rows)
    return table
