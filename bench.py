"""The numbers of a paper: speed against what FLOPs and bytes promise, perplexity, lm-eval suites, capacity sweeps.

    python bench.py                                                   speed: four architectures, transformers' Qwen2
    python bench.py --size=50M --capacity=0.125 --compile             … at any size, with any key of the model
    python bench.py --tasks=flops --size=7B                           what is counted, per component
    python bench.py --tasks=perplexity --model_path=out/demo/dtf --text=README.md
    python bench.py --tasks=capacity --model_path=out/demo/dtf        loss against compute, table and picture
    python bench.py --tasks=general,math --model_path=out/dtf_05b --batch_size=8
    torchrun --standalone --nproc_per_node=8 bench.py --tasks=general --model_path=out/dtf_05b

Tasks are speed, flops, perplexity and capacity; the suites general, math, code and quick_test; names of lm-eval tasks; and
folders of lm-eval task files. Each prints a table; the last line is all of it as JSON. Exit status 1: a task could
not be run (it is named on stderr), the others were; or something is slower than in the baseline.

In the speed table, ratio is the time over our dense model's; promised is the same ratio in FLOPs, or in bytes read for
decoding; efficiency is promised / ratio; "vs hf" is the time of transformers, not compiled, over the row's. Ratios are
medians over rounds of times that were taken next to each other. FLOPs count attention as the full square, as
FlopCounterMode does.
"""

import copy
import difflib
import gc
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from configurator import ConfigError, cli, configure
from data import DataError, read_manifest
from model import ARCHITECTURES, ModelConfig, ModelError, Transformer, compiled_step
from publish import git_revision
from routers import valid_mask
from sample import COLOURS, EOT, STYLE, encode, open_model, read_text, save_figure
from tokenizer import vocabulary
from train import peak_flops, pick_device
from weights import replacing

OWN = ("speed", "flops", "perplexity", "capacity")
MEASURES = ("train", "forward", "causal", "prefill", "decode1", "decode8")
SUITES = {  # lm-eval tasks and their few-shot examples
    "general": {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "winogrande": 5, "truthfulqa_mc2": 0},
    "math": {"gsm8k": None, "mathqa": None},
    "code": {"humaneval": None, "mbpp": None},
    "quick_test": {"truthfulqa_mc2": 0},
}


@dataclass
class BenchConfig:
    tasks: list[str] = field(default_factory=lambda: ["speed"])  # what to do, see above; several: a,b,c
    model_path: str = ""  # a model directory, a run or a hub id; empty: random weights of --size (speed, flops)
    size: str = "10M"  # shape without a model_path: demo, 10M, 50M, 0.5B … 72B; single keys override it
    batch_size: int = 4  # sequences at a time
    seq_len: int = 256  # tokens of a sequence; perplexity: of the window; decoding: of the prompt
    routing: str = "causal"  # lm-eval: causal, or topk (the papers' protocol, which looks at the future)
    limit: int = 0  # examples of an lm-eval task, windows of perplexity and capacity (0: all)
    output_path: str = ""  # JSON file of all results (lm-eval: the model folder's eval-ROUTING.json, if not set)
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: str = "auto"  # float32, or bfloat16 (training: autocast over float32 weights); auto: bfloat16 on CUDA
    threads: int = 0  # CPU threads (0: torch's choice)

    measure: list[str] = field(default_factory=lambda: list(MEASURES))  # speed: what to time, of these
    repeats: int = 5  # speed, capacity: timed rounds
    warmup: int = 1  # speed, capacity: rounds before them
    decode_steps: int = 16  # speed, capacity: tokens that a round of decoding generates
    compile: bool = False  # speed: torch.compile rows for train, forward and decode too
    baseline: str = (
        ""  # speed: compare with this JSON file of an earlier run, made if missing; 5 % worse: exit status 1
    )
    profile: bool = False  # speed: write a Chrome trace of one training step of every variant to out/trace.json

    text: str = "data/stdlib"  # perplexity, capacity: a token folder (its validation split) or a UTF-8 text file
    stride: int = 0  # perplexity: new tokens of a window, behind seq_len − stride of context (0: half the window)
    capacities: list[float] = field(default_factory=lambda: [0.125 * n for n in range(1, 9)])  # capacity: the sweep

    allow_code_execution: bool = False  # lm-eval: run the programs that the model writes (suite code), on this machine
    wandb_log: bool = False  # lm-eval: log the results to Weights & Biases too
    wandb_project: str = "nanodtf"  # W&B project
    wandb_entity: str = ""  # W&B user or team (empty: your default)

    def __post_init__(self):
        problems = []
        for name in ("batch_size", "seq_len", "repeats", "decode_steps"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("limit", "warmup", "threads"):
            if getattr(self, name) < 0:
                problems.append(f"{name}={getattr(self, name)} must not be negative")
        for name in self.measure:
            if name not in MEASURES:
                problems.append(f"measure={name!r} is not one of {', '.join(MEASURES)}")
        if self.routing not in ("causal", "topk"):
            problems.append(f"routing={self.routing!r} is not one of causal, topk")
        if not 0 <= self.stride <= self.seq_len:
            problems.append(f"stride={self.stride} must lie between 1 and seq_len={self.seq_len}")
        if not all(0 < c <= 1 for c in self.capacities):
            problems.append(f"capacities={self.capacities} must lie in (0, 1]")
        if not self.model_path and any(task not in ("speed", "flops") for task in self.tasks):
            problems.append(f"tasks={','.join(self.tasks)} needs a trained model: --model_path=…")
        if "code" in self.tasks and not self.allow_code_execution:
            problems.append("tasks=code runs programs that the model wrote: allow it with --allow_code_execution")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def decoded_tokens(self) -> int:
        """What a measurement of decoding generates behind seq_len."""
        return (self.warmup + self.repeats) * self.decode_steps

    @property
    def longest_sequence(self) -> int:
        """Tokens of the speed suite's longest sequence: decoding begins with a round in which it compiles."""
        return self.seq_len + self.decoded_tokens + self.compile * self.decode_steps


# ---------------------------------------------------------------------------------------------------------------------
# Causal routers at a chosen capacity


@torch.inference_mode()
def calibrate(model: Transformer, ids: torch.Tensor, capacity: float):
    """Shifts every causal router so that it selects the share `capacity` of the tokens of ids (B, T).

    Layer by layer, from below: what a layer selects changes what the next one reads. Moves the bias of a causal router,
    or the threshold itself where causal_decision="threshold".
    """
    by_score = model.config.causal_decision == "threshold"
    for layer in model.routed:
        seen = model.model(ids, routing="causal")[1][layer.index].tokens
        value = seen["score"] if by_score else seen["causal_probability"].logit(1e-7)
        value = value.flatten().sort().values  # (B·T)
        skipped = round((1 - capacity) * len(value))
        below = value[skipped - 1] if skipped else value[0] - 16  # all, also of other text
        cut = ((below + value[min(skipped, len(value) - 1)]) / 2).item()
        if by_score:
            layer.threshold.fill_(cut)
        else:
            threshold = model.config.causal_threshold
            layer.causal_router.bias += math.log(threshold / (1 - threshold)) - cut


def shares(model: Transformer, stats: dict) -> dict[int, torch.Tensor]:
    """{routed layer: share of the tokens that ran, a scalar} of one causal forward pass."""
    return {i: stats[f"layer_{i}/causal_capacity"] for i in model.config.routed_layers}


# ---------------------------------------------------------------------------------------------------------------------
# Speed


class Peer(torch.nn.Module):
    """transformers' Qwen2 with sdpa attention and the weights of our dense model, behind our model's interface."""

    def __init__(self, dense: Transformer):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        super().__init__()
        config = {name: value for name, value in dense.config.to_dict().items() if name != "architecture"}
        self.qwen2 = Qwen2ForCausalLM(Qwen2Config(**config, attn_implementation="sdpa"))
        self.qwen2.load_state_dict(dense.state_dict() | {"lm_head.weight": dense.head_weight})
        self.__dict__["run"] = self.qwen2  # no second child

    def compile_trunk(self):
        self.__dict__["run"] = torch.compile(self.qwen2)

    def to_dtype(self, dtype):
        return self.to(dtype)

    def new_cache(self, batch, limit):
        from transformers import DynamicCache

        return DynamicCache(config=self.qwen2.config)

    def forward(self, input_ids, targets=None, routing="topk", cache=None, return_masks=False):
        if targets is not None:
            return self.run(input_ids, labels=input_ids, use_cache=False)  # shifts them itself
        keep = 0 if cache is None else 1
        return self.run(input_ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep)


def interleaved(runs: dict, cfg: BenchConfig, device) -> dict:
    """Seconds of every call in `runs`, a list of one per round each: side by side, in an order that turns around."""

    def synchronize():
        if device.type != "cpu":
            torch.accelerator.synchronize()

    times = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # modules and weights are not looked through again and again
    for n in range(cfg.warmup + cfg.repeats):
        for name in list(runs)[:: 1 if n % 2 else -1]:
            gc.collect()
            gc.disable()
            synchronize()
            start = time.perf_counter()
            runs[name]()
            synchronize()
            times[name].append(time.perf_counter() - start)
            gc.enable()
    gc.unfreeze()
    return {name: seconds[cfg.warmup :] for name, seconds in times.items()}


def compiled(model):
    """The same weights behind torch.compile."""
    fast = copy.copy(model)  # shares modules and weights
    fast.compile_trunk()
    if isinstance(fast, Transformer):
        fast.compile_decoding()
    return fast


def training_step(model, x, y, autocast):
    """(a function that does one training step through `forward`, its optimizer)."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(forward):
        with autocast:
            loss = forward(x, y).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def step_memory(step, model, optimizer, device) -> dict:
    """Bytes that autograd keeps for the backward pass, and on CUDA the peak of weights, optimizer and step."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(model)
    found = {"activation_bytes": sum(kept.values())}
    if device.type == "cuda":
        held = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # of all variants
        step(model)
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before + sum(t.nbytes for t in held)
    return found


def decoder(model, ids: torch.Tensor, prompt: int, steps: int):
    """Prefills ids[:, :prompt]. Returns a function whose every call decodes the next `steps` ids, given whatever the model
    would have said, and the list that collects the masks of every step.
    """
    said, at = [], iter(range(prompt, ids.size(1)))
    cache = model.new_cache(*ids.shape)
    model(ids[:, :prompt], routing="causal", cache=cache)
    step = compiled_step(model.head_weight.is_cuda) if getattr(model, "decodes_compiled", False) else None
    if step:
        cache = model.static_cache(cache)

    def decode():
        for t in itertools.islice(at, steps):
            if step:
                step(model, ids[:, t : t + 1], cache).argmax(-1)
                continue
            out = model(ids[:, t : t + 1], routing="causal", cache=cache, return_masks=True)
            out.logits.argmax(-1)
            said.append(getattr(out, "masks", None))

    return decode, said


def decode_bytes(model: Transformer, batch: int, context: float, share: dict, ran: dict) -> float:
    """Bytes of weights, keys and values that one decoding step of `batch` rows behind `context` tokens must read.

    share: {routed layer: share of the tokens that it selects}; ran: {routed layer: share of steps in which any row ran}.
    """

    def nbytes(*modules):
        return sum(p.nbytes for module in modules for p in module.parameters())

    cfg = model.config
    kv = 2 * cfg.num_key_value_heads * cfg.head_dim * model.head_weight.element_size()  # of one token in one layer
    total = model.head_weight.nbytes + nbytes(model.model.norm)
    for i, layer in enumerate(model.model.layers):
        block = nbytes(layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
        idle = nbytes(layer.transition) if hasattr(layer, "transition") else 0  # serves training only
        # A prior is read only for the gate of the layer behind it, where that runs.
        if hasattr(layer, "prior") and cfg.causal_decision == "router":
            used = 0 if cfg.gate == "straight_through" else ran[i + 1]
            idle = (1 - used) * nbytes(layer.prior)
        selected = share.get(i, 1.0)
        total += nbytes(layer) - block - idle + ran.get(i, 1.0) * block + batch * selected * (selected * context) * kv
    return total


def variant(shape: ModelConfig, architecture: str, **changes) -> ModelConfig:
    """`shape` as another architecture; what only routed layers have, dense drops."""
    dense = {"capacity": 0.5, "router": "learned"} if architecture == "dense" else {}
    return replace(shape, architecture=architecture, **dense | changes)


def speed_models(cfg: BenchConfig, shape: ModelConfig, names, trained: Transformer | None, device) -> dict:
    """{architecture: model}, dense first: random weights of one shape, but for the trained model where there is one."""
    tokens = cfg.longest_sequence
    if trained and tokens > shape.max_position_embeddings:
        raise ConfigError(
            f"seq_len={cfg.seq_len} and the tokens decoded behind it, {tokens} in all, pass this model's "
            f"max_position_embeddings={shape.max_position_embeddings}: lower seq_len, decode_steps or repeats"
        )
    models = {}
    for name in dict.fromkeys(["dense", *names]):
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


def speed(cfg: BenchConfig, models: dict[str, Transformer], device, autocast, dtype, peak: float | None) -> dict:
    """Times every measure for `models` ("dense" first) and transformers: {"rows": […], "memory": {variant: {…}}}."""
    config, B, T = models["dense"].config, cfg.batch_size, cfg.seq_len
    variants = {"transformers": Peer(models["dense"]).to(device), **models}
    fast = {name: compiled(model) for name, model in variants.items()} if cfg.compile else {}
    rows, memory = [], {name: {"parameters": sum(p.numel() for p in v.parameters())} for name, v in variants.items()}
    torch.manual_seed(1)
    ids = torch.randint(config.vocab_size, (8, cfg.longest_sequence), device=device)
    x, y = (torch.randint(config.vocab_size, (B, T), device=device) for _ in range(2))

    def time_all(run, fast=()):
        """run(model, variant), for every variant and the compiled ones of `fast`: {(variant, compiled): …}."""
        for name, model in dict(fast).items():
            start = time.perf_counter()
            run(model, name)
            memory[name]["compile_seconds"] = memory[name].get("compile_seconds", 0) + time.perf_counter() - start
        runs = {(name, False): lambda n=name, m=m: run(m, n) for name, m in variants.items()}
        runs |= {(name, True): lambda n=name, m=m: run(m, n) for name, m in dict(fast).items()}
        return interleaved(runs, cfg, device)

    def report(measure, times, tokens, promise, steps=1):
        """tokens are of one timed call, which is `steps` steps; promise: {variant: FLOPs or bytes} of one step."""
        for (name, is_fast), seconds in times.items():
            quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
            row = {"measure": measure, "variant": name, "compiled": is_fast, "seconds": quartiles[1] / steps}
            row |= {"quartiles": [quartiles[0] / steps, quartiles[2] / steps], "tokens_per_s": tokens / quartiles[1]}
            row["ratio"] = statistics.median(a / b for a, b in zip(seconds, times["dense", is_fast], strict=True))
            if name in promise:
                row["promised"] = promise[name] / promise["dense"]
                row["efficiency"] = row["promised"] / row["ratio"]
                if measure.startswith("decode"):
                    row["gb_per_s"] = promise[name] / row["seconds"] / 1e9
                elif peak:
                    row["mfu"] = promise[name] / row["seconds"] / peak
            row["vs_hf"] = statistics.median(b / a for a, b in zip(seconds, times["transformers", False], strict=True))
            rows.append(row)
        print_speed(rows[-len(times) :])

    if "train" in cfg.measure or cfg.profile:
        steps = {name: training_step(model, x, y, autocast) for name, model in variants.items()}
        if "train" in cfg.measure:
            flops = {name: model.flops_per_token(T, training=True) * B * T for name, model in models.items()}
            report("train", time_all(lambda model, name: steps[name][0](model), fast), B * T, flops)
            for name, (step, optimizer) in steps.items():
                memory[name] |= step_memory(step, variants[name], optimizer, device)
        if cfg.profile:
            with torch.profiler.profile() as profiler:
                for name, (step, _) in steps.items():
                    with torch.profiler.record_function(f"training step of {name}"):
                        step(variants[name])
            os.makedirs("out", exist_ok=True)
            profiler.export_chrome_trace("out/trace.json")
            print("trace: out/trace.json")
        del steps

    for model in variants.values():
        model.to_dtype(dtype).eval()
    with torch.inference_mode():
        share, text = {}, torch.randint(config.vocab_size, (max(1, 8192 // T), T), device=device)
        for name, model in models.items():
            capacity = np.mean(model.config.capacity)
            calibrate(model, text, capacity)
            cache = model.new_cache(B, T)
            share[name] = {i: float(s) for i, s in shares(model, model(x, routing="causal", cache=cache).stats).items()}
            memory[name]["kv_bytes_per_token"] = cache.bytes_used() / (B * T)
            memory[name]["causal_capacity"] = statistics.mean(share[name].values()) if share[name] else 1.0
        causal = {n: m.flops_per_token(T, capacity=list(share[n].values())) * B * T for n, m in models.items()}

        if "forward" in cfg.measure:  # what a training step does forward: for STT a dense pass more than inference
            router = 4 * config.hidden_size  # a causal router's FLOPs; of a training step, 2 of 3 parts, else 3 of 3
            flops = {
                name: (model.flops_per_token(T, training=True) + router * len(model.routed)) / 3 * B * T
                for name, model in models.items()
            }
            report("forward", time_all(lambda model, _: model(x), fast), B * T, flops)
        if "causal" in cfg.measure:
            report("causal", time_all(lambda model, _: model(x, routing="causal")), B * T, causal)
        if "prefill" in cfg.measure:
            times = time_all(lambda model, _: model(x, routing="causal", cache=model.new_cache(B, T)))
            head = 2 * config.hidden_size * config.vocab_size * B * (T - 1)  # only the last token's logits are computed
            report("prefill", times, B * T, {name: flops - head for name, flops in causal.items()})
        for batch in (1, 8):
            if f"decode{batch}" not in cfg.measure:
                continue
            stepping = {name: model for name, model in fast.items() if name in models}
            decoders = {
                model: decoder(model, ids[:batch], T, cfg.decode_steps)
                for model in (*variants.values(), *stepping.values())
            }
            times = time_all(lambda model, _: decoders[model][0](), stepping)  # noqa: B023 (called before the loop goes on)
            promise, context = {}, T + cfg.decoded_tokens / 2
            for name, model in models.items():
                each = {
                    i: torch.stack([masks[i] for masks in decoders[model][1]]) for i in share[name]
                }  # (steps, B, 1)
                ran = {i: mask.any(1).float().mean().item() for i, mask in each.items()}
                selected = {i: mask.float().mean().item() for i, mask in each.items()}
                promise[name] = decode_bytes(model, batch, context, selected, ran)
            report(f"decode{batch}", times, batch * cfg.decode_steps, promise, steps=cfg.decode_steps)
    columns = ["parameters", "activation_bytes", "peak_bytes", "kv_bytes_per_token", "causal_capacity"]
    columns += ["compile_seconds"] * cfg.compile
    print("\n" + f"{'':22}" + "".join(f"{column:>20}" for column in columns))
    for name, values in memory.items():
        print(f"{name:22}" + "".join(f"{values[column]:20,.9g}" if column in values else f"{'n/a':>20}"
                                     for column in columns))  # fmt: skip
    return {"rows": rows, "memory": memory}


def read_baseline(path: str, cfg: BenchConfig, shape: ModelConfig) -> dict | None:
    """An earlier run of the speed suite at the same sizes; None where there is none yet. Raises ConfigError."""
    if not path or not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            before = json.load(f)
        same = ("seq_len", "batch_size", "decode_steps", "dtype")
        sizes = [before["config"][key] for key in same] + [before["speed"]["model"]]
        {(row["measure"], row["variant"], row["compiled"]): row["ratio"] for row in before["speed"]["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"baseline={path} holds no results of bench.py's speed suite: {e!r}") from None
    if sizes != [getattr(cfg, key) for key in same] + [json.loads(json.dumps(shape.to_dict()))]:
        raise ConfigError(f"baseline={path} is of another size: give the keys it was made with, or another file")
    return before


def regressions(speed: dict, facts: dict, before: dict) -> list[str]:
    """What is slower by more than 5 % than an earlier run: our time over dense's, or over transformers'."""
    then = {(row["measure"], row["variant"], row["compiled"]): row for row in before["speed"]["rows"]}
    if any(before[name] != facts[name] for name in ("device", "threads", "packages")):
        say("note: the baseline was measured on another machine, or with other versions: ratios may differ for that")
    found = []
    for row in speed["rows"]:
        key = row["measure"], row["variant"], row["compiled"]
        for what, sign in (("ratio", 1), ("vs_hf", -1)) if key in then else ():
            now, old = row[what], then[key][what]
            if (now / old) ** sign > 1.05 and row["variant"] != "transformers":
                name = " ".join([*key[:2], *(["compiled"] if key[2] else [])])
                found.append(f"{name}: {what} {old:.3f} → {now:.3f}")
    return found


def print_speed(rows: list[dict]):
    columns = {"mfu": "MFU", "gb_per_s": "GB/s", "ratio": "ratio", "promised": "promised"}
    columns |= {"efficiency": "efficiency", "vs_hf": "vs hf"}
    columns = {key: title for key, title in columns.items() if any(key in row for row in rows)}
    head = f"\n{rows[0]['measure']:22}{'ms':>10}{'(quartiles)':>21}{'tokens/s':>12}"
    print(head + "".join(f"{title:>12}" for title in columns.values()))
    for row in rows:
        low, high = (f"{1e3 * quartile:.2f}" for quartile in row["quartiles"])
        line = f"{row['variant'] + ', compiled' * row['compiled']:22}{1e3 * row['seconds']:10.2f}"
        line += f"{f'({low}–{high})':>21}{row['tokens_per_s']:12,.0f}"
        print(line + "".join(f"{row[key]:12.3f}" if key in row else f"{'':12}" for key in columns), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs


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
        x = torch.zeros(1, seq_len, dtype=torch.int64)
        out = model(x)
        by_module = counter.get_flop_counts()
        (F.cross_entropy(out.logits[0], x[0]) + sum(out.losses.values())).backward()
    parts = dict.fromkeys(("attention, projections", "attention, products", "MLP", "priors", "routers", "head"), 0)
    parts["head"] = sum(by_module["Transformer"].values()) - sum(by_module["Transformer.model"].values())
    for name, by_operation in by_module.items():
        flops, place = sum(by_operation.values()), name.split(".")[3:]  # Transformer.model.layers.{i}.mlp.down_proj
        if place[1:] == ["self_attn"]:
            products = sum(n for operation, n in by_operation.items() if "bmm" in str(operation))
            parts["attention, projections"] += flops - products
            parts["attention, products"] += products
        elif place[1:] in (["mlp"], ["prior"], ["transition"]):
            parts["MLP" if place[1:] == ["mlp"] else "priors"] += flops
        elif len(place) == 1:  # what a layer does itself, outside its parts
            inside = (
                sum(by_module.get(f"{name}.{m}", {}).values()) for m in ("self_attn", "mlp", "prior", "transition")
            )
            parts["routers"] += flops - sum(inside)
    return {name: flops / seq_len for name, flops in parts.items()}, counter.get_total_flops() / seq_len


def flops(cfg: BenchConfig, configs: dict[str, ModelConfig]) -> dict:
    """Prints and returns {architecture: {component: FLOPs per token}}, with the sums of flops_per_token beside it."""
    table = {}
    for name, config in configs.items():
        parts, counted = count_flops(config, cfg.seq_len)
        with torch.device("meta"):
            model = Transformer(config)
        table[name] = parts | {
            "training, forward": sum(parts.values()),
            "training step, counted": counted,
            "training step, flops_per_token": model.flops_per_token(cfg.seq_len, training=True),
            "inference, flops_per_token": model.flops_per_token(cfg.seq_len),
        }
    print(f"\n{f'MFLOPs per token, T={cfg.seq_len}':32}" + "".join(f"{name:>14}" for name in table))
    for row in next(iter(table.values())):
        print(f"{row:32}" + "".join(f"{values[row] / 1e6:14,.4g}" for values in table.values()))
    return table


# ---------------------------------------------------------------------------------------------------------------------
# One rank of torchrun among several, or the only one


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def say(text: str):
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


def gathered(mine: dict) -> dict:
    """The union of what every rank holds."""
    if not dist.is_initialized():
        return mine
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def my_share(order: list) -> list:
    """This rank's part of `order`: every world-th, so that long and short requests are spread evenly."""
    return order[rank() :: dist.get_world_size()] if dist.is_initialized() else order


def progress(total: int, what: str):
    return tqdm(total=total, desc=what, unit="request", disable=rank() > 0 or not sys.stderr.isatty())


# ---------------------------------------------------------------------------------------------------------------------
# Scoring text: perplexity, and what lm-eval builds on


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
    device, head = model.head_weight.device, model.head_weight
    mine, found = my_share(sorted(range(len(requests)), key=lambda n: -len(requests[n][0]))), {}
    bar = progress(len(mine), what)
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
        ids, lengths = padded([requests[n][0] for n in batch], device)
        hidden, _ = model.model(ids, routing, lengths if min(lengths) < max(lengths) else None)  # (B, T, d)
        losses, greedy = [], []
        for row, length, n in zip(hidden, lengths, batch, strict=True):
            targets = torch.as_tensor(requests[n][1], device=device).long()
            size = max(1, (1 << 25) // head.size(0))  # so many rows of logits at a time
            for h, t in zip(row[length - len(targets) : length].split(size), targets.split(size), strict=True):
                logits = F.linear(h, head).float()  # (n, V)
                losses.append(F.cross_entropy(logits, t, reduction="none"))
                greedy.append(logits.argmax(-1) == t)
        counts = [len(requests[n][1]) for n in batch]
        losses, greedy = (torch.cat(values).cpu().split(counts) for values in (losses, greedy))
        for n, nats, likeliest in zip(batch, losses, greedy, strict=True):
            found[n] = -nats.double().sum().item(), likeliest.all().item()
        bar.update(len(batch))
    bar.close()
    found = gathered(found)
    return [found[n] for n in range(len(requests))]


def streams(cfg: BenchConfig, model: Transformer, tokenizer) -> dict[str, tuple[torch.Tensor, int]]:
    """{name: (ids (N), bytes of text)}: the text file, or the validation split of each source of the token folder."""
    if not os.path.isdir(cfg.text) and os.path.exists(cfg.text):
        text = read_text(cfg.text)
        return {cfg.text: (encode(model, tokenizer, text).cpu(), len(text.encode()))}
    manifest = read_manifest(cfg.text)
    if manifest["vocab_size"] > model.config.vocab_size:
        raise DataError(
            f"{cfg.text} has token ids up to {manifest['vocab_size'] - 1}, the model vocab_size="
            f"{model.config.vocab_size}: name text that was prepared with this model's tokenizer"
        )
    own = os.path.join(cfg.text, "tokenizer.json")
    if os.path.exists(own) and vocabulary(own) != tokenizer.get_vocab():
        raise DataError(f"{cfg.text} has another tokenizer than the model: name text, or tokens of the model's own")
    tokens = (tokenizer.id_to_token(i) or "" for i in range(manifest["vocab_size"]))
    width = np.array([len(token) for token in tokens])  # byte-level BPE: a character of the vocabulary is a byte
    width[manifest["eot_token"]] = 0
    found, dtype = {}, np.dtype(manifest["dtype"]).newbyteorder("<")
    for name, source in manifest["sources"].items():
        files = [np.fromfile(os.path.join(cfg.text, file["name"]), dtype) for file in source["val"]["files"]]
        if source["val"]["tokens"]:
            ids = np.concatenate(files).astype(np.int64)
            if ids.max() >= manifest["vocab_size"]:
                raise DataError(f"{cfg.text}: token id {ids.max()} of {name} is beyond vocab_size: prepare it again")
            found[name] = torch.from_numpy(ids), int(width[ids].sum())
    return found


def perplexity(cfg: BenchConfig, model: Transformer, tokenizer) -> list[dict]:
    """Loss of every token given the seq_len − stride tokens before it or more, under both routings.

    Each window sees seq_len tokens and is asked for its last `stride` (the first: for all); the very first token is
    predicted from the end-of-text token. A token of the text counts exactly once.
    """
    L = cfg.seq_len
    if L > model.config.max_position_embeddings:
        raise ConfigError(f"seq_len={L} is longer than max_position_embeddings={model.config.max_position_embeddings}")
    stride, start, rows = cfg.stride or max(1, L // 2), torch.tensor([end_of_text(tokenizer)]), []
    print(f"\n{'perplexity':28}{'routing':>9}{'tokens':>12}{'bytes':>12}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}")
    for name, (ids, n_bytes) in streams(cfg, model, tokenizer).items():
        fed = torch.cat((start, ids))  # fed[t] comes before ids[t]
        ends = [min(L, len(ids)), *range(L + stride, len(ids), stride)]
        ends += [len(ids)] * (ends[-1] < len(ids))
        windows = [(fed[max(0, e - L) : e], ids[b:e]) for b, e in itertools.pairwise([0, *ends])]
        windows = windows[: cfg.limit or None]
        count = sum(len(targets) for _, targets in windows)
        n_bytes = n_bytes if count == len(ids) else None  # of the part that --limit leaves nobody knows the bytes
        for routing in ("causal", "topk") if model.routed else ("causal",):
            total = sum(logprob for logprob, _ in score(model, windows, routing, cfg.batch_size, f"{name}, {routing}"))
            row = {"text": name, "routing": routing, "tokens": count, "loss": -total / count}
            row |= {"perplexity": math.exp(min(700, -total / count)), "window": L, "stride": stride}
            if n_bytes:
                row |= {"bytes": n_bytes, "bits_per_byte": -total / math.log(2) / n_bytes}
            rows.append(row)
            tail = f"{n_bytes:12,}" if n_bytes else f"{'n/a':>12}"
            print(f"{name[-28:]:28}{routing:>9}{count:12,}{tail}{row['loss']:9.4f}{row['perplexity']:12.4f}"
                  + (f"{row['bits_per_byte']:11.4f}" if n_bytes else f"{'n/a':>11}"))  # fmt: skip
    return rows


def end_of_text(tokenizer) -> int:
    if tokenizer.token_to_id(EOT) is None:
        raise ModelError(f"the tokenizer has no {EOT}, which starts and ends a text")
    return tokenizer.token_to_id(EOT)


# ---------------------------------------------------------------------------------------------------------------------
# The trade-off of one model: loss against compute


def capacity_sweep(cfg: BenchConfig, model: Transformer, tokenizer, device) -> list[dict]:
    """Loss, FLOPs per token and decoding speed at every causal capacity, as trained and calibrated. Draws the picture.

    Every second window of the text calibrates the routers, the others are scored.
    """
    if not model.routed:
        raise ConfigError(f"model_path={cfg.model_path} is dense: it has no capacity to sweep")
    L, decoded = cfg.seq_len, cfg.decoded_tokens
    if L + decoded > model.config.max_position_embeddings:
        raise ConfigError(
            f"seq_len={L} + {decoded} decoded tokens pass max_position_embeddings: lower seq_len or repeats"
        )
    ids = torch.cat([stream for stream, _ in streams(cfg, model, tokenizer).values()]).to(device)
    if len(ids) < max(2 * (L + 1), L + decoded):
        raise ConfigError(f"text={cfg.text} has {len(ids):,} tokens, too few for two windows of seq_len={L}: lower it")
    windows = ids[: len(ids) // (L + 1) * (L + 1)].view(-1, L + 1)[: 2 * cfg.limit or None]  # (n, L + 1)
    learn, held_out = windows[::2][:32, :-1], windows[1::2]
    rows, runs, trained = [], {}, None
    with torch.inference_mode():
        for capacity in [None, *sorted(cfg.capacities)]:
            if capacity is not None:
                calibrate(model, learn, capacity)
            total, selected = 0.0, dict.fromkeys(model.config.routed_layers, 0.0)
            for batch in held_out.split(cfg.batch_size):
                out = model(batch[:, :-1], batch[:, 1:], routing="causal")
                total += out.losses["lm"].item() * len(batch) / len(held_out)
                for i, s in shares(model, out.stats).items():
                    selected[i] += s.item() * len(batch)  # divided at the end: 1 stays 1
            selected = {i: s / len(held_out) for i, s in selected.items()}
            state = {
                k: v.clone() for k, v in model.state_dict().items() if k.endswith(("causal_router.bias", "threshold"))
            }
            decode, _ = decoder(model, ids[None, : L + decoded], L, cfg.decode_steps)
            runs[len(rows)] = lambda state=state, decode=decode: (model.load_state_dict(state, strict=False), decode())
            row = {"capacity": capacity, "selected": statistics.mean(selected.values()), "loss": total}
            rows.append(row | {"flops_per_token": model.flops_per_token(L, capacity=list(selected.values()))})
            trained = state if capacity is None else trained
        for row, seconds in zip(rows, interleaved(runs, cfg, device).values(), strict=True):
            row["decode_tokens_per_s"] = cfg.decode_steps / statistics.median(seconds)
        model.load_state_dict(trained, strict=False)
    print(f"\n{'capacity':>10}{'selected':>10}{'loss':>9}{'MFLOPs per token':>18}{'decode tokens/s':>17}")
    for row in rows:
        name = "as trained" if row["capacity"] is None else f"{row['capacity']:g}"
        print(f"{name:>10}{row['selected']:10.3f}{row['loss']:9.4f}{row['flops_per_token'] / 1e6:18,.4g}"
              f"{row['decode_tokens_per_s']:17,.0f}")  # fmt: skip
    return rows


def draw_sweep(rows: list[dict], title: str, path: str):
    """Loss against FLOPs per token, and decoding speed against the share of tokens that runs."""
    import matplotlib
    from matplotlib.figure import Figure

    trained, *swept = rows
    grey = {"textcoords": "offset points", "fontsize": 7.5, "color": "#555555", "ha": "center"}
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(8.4, 3.4), layout="constrained")
        left, right = fig.subplots(1, 2)
        for ax, x, y, unit in ((left, "flops_per_token", "loss", 1e6), (right, "selected", "decode_tokens_per_s", 1)):
            ax.plot([row[x] / unit for row in swept], [row[y] for row in swept], "o-", color=COLOURS[1], markersize=4)
            ax.plot(trained[x] / unit, trained[y], "D", color=COLOURS[2], markersize=6, clip_on=False)
            ax.annotate(
                "as trained", (trained[x] / unit, trained[y]), (-7, -10), **grey | {"color": COLOURS[2], "ha": "right"}
            )
            ax.margins(0.06, 0.14)
        for row in swept:
            left.annotate(f"{row['capacity']:g}", (row["flops_per_token"] / 1e6, row["loss"]), (0, 6), **grey)
        left.set(xlabel="MFLOPs per token", ylabel="loss, nats per token", title=f"{title} at calibrated capacities")
        right.set(
            xlabel="share of tokens that routed blocks take", ylabel="tokens per second, batch 1", title="Decoding"
        )
        right.set_ylim(bottom=0)
        save_figure(fig, path)


# ---------------------------------------------------------------------------------------------------------------------
# lm-eval


def lm_eval_model(model: Transformer, tokenizer, cfg: BenchConfig):
    """Our model as lm-eval sees one.

    Under torchrun every rank gets all requests, works on its share and hears the rest from the others, so that lm-eval
    itself need not know. Scores equal those of its own HFLM on the same weights.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows

    longest, end, device = model.config.max_position_embeddings, end_of_text(tokenizer), model.head_weight.device

    class NanoDTF(TemplateLM):
        eot_token_id = end

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode(string, add_special_tokens=False).ids

        def _loglikelihood_tokens(self, requests, disable_tqdm=False):
            pairs = [((context + targets)[-longest - 1 : -1], targets) for _, context, targets in requests]
            return score(model, pairs, cfg.routing, cfg.batch_size, "log-likelihoods")

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            texts = [self.tok_encode(request.args[0]) for request in requests]
            windows = [list(get_rolling_token_windows(ids, self.prefix_token_id, longest, 1)) for ids in texts]
            scores = iter(score(model, [w for each in windows for w in each], cfg.routing, cfg.batch_size, "texts"))
            return [sum(logprob for logprob, _ in itertools.islice(scores, len(each))) for each in windows]

        def generate_until(self, requests, disable_tqdm=False):
            contexts = [self.tok_encode(request.args[0]) for request in requests]
            settings = [json.dumps(request.args[1], sort_keys=True) for request in requests]
            mine = my_share(sorted(range(len(requests)), key=lambda n: (settings[n], -len(contexts[n]))))
            bar, found = progress(len(mine), "generations"), {}
            for setting in dict.fromkeys(settings[n] for n in mine):
                how, group = normalize_gen_kwargs(json.loads(setting)), [n for n in mine if settings[n] == setting]
                until = handle_stop_sequences(how["until"], eos=EOT)
                room = longest - how["max_gen_toks"]
                if room < 1:
                    raise ModelError(f"max_gen_toks={how['max_gen_toks']} leaves no room in {longest} positions")
                for start in range(0, len(group), cfg.batch_size):
                    batch = group[start : start + cfg.batch_size]
                    prompts = [contexts[n][-room:] for n in batch]
                    draw = {name: how.get(name) for name in ("top_k", "top_p")} | {
                        "temperature": how.get("temperature", 0.0)
                    }
                    for n, ids in zip(batch, continue_until(prompts, how["max_gen_toks"], until, draw), strict=True):
                        found[n] = postprocess_generated_text(tokenizer.decode(ids), until, None)
                    bar.update(len(batch))
            bar.close()
            found = gathered(found)
            return [found[n] for n in range(len(requests))]

    def continue_until(prompts, limit, until, draw):
        """`limit` new ids of every prompt, or fewer from where it meets the end of the text (then repeated) or `until`.

        A string cannot be seen coming, so rows are generated 64 tokens at a time, and those that are done leave.
        """
        new, live = [[] for _ in prompts], list(range(len(prompts)))
        for made in range(0, limit, 64):
            ids, lengths = padded([prompts[r] + new[r] for r in live], device)
            more = min(64, limit - made)
            out = model.generate(ids, more, stop_ids=[end], lengths=lengths, pad_id=end, **draw).tolist()
            for r, row, length in zip(live, out, lengths, strict=True):
                new[r] += row[length : length + more]
            live = [r for r in live if end not in new[r] and not any(s in tokenizer.decode(new[r]) for s in until if s)]
            if not live:
                break
        return new

    return NanoDTF()


def find_tasks(names: list[str]):
    """(lm-eval's TaskManager, {task: few-shot examples or None for the task's own}) of suites, tasks and task folders.

    Raises ConfigError for a task that lm-eval does not know, with the nearest that it does.
    """
    import lm_eval.tasks

    folders = [name for name in names if os.path.isdir(name)]
    known = [name for name in names if name not in folders]
    manager = lm_eval.tasks.TaskManager(include_path=folders or None, include_defaults=bool(known))
    tasks = {}
    for name in names:
        if name in folders:
            inside = lm_eval.tasks.TaskManager(include_path=name, include_defaults=False).all_subtasks
            if not inside:
                raise ConfigError(f"tasks={name}: the folder holds no lm-eval task (*.yaml)")
            tasks |= dict.fromkeys(inside)
        elif name in SUITES:
            tasks |= SUITES[name]
        elif name in manager.all_tasks:
            tasks[name] = None
        else:
            near = difflib.get_close_matches(name, [*OWN, *SUITES, *manager.all_tasks], 1, 0.5)
            hint = (
                f"did you mean {near[0]}?" if near else f"name one of {', '.join([*OWN, *SUITES])}, or an lm-eval task"
            )
            raise ConfigError(f"tasks={name} is unknown; {hint}")
    return manager, tasks


def load_task(manager, name: str, shots: int | None, cfg: BenchConfig) -> dict:
    """The task or group `name` with its data, as lm_eval.evaluate takes it. Raises whatever keeps it from loading."""
    random.seed(0), np.random.seed(1234), torch.manual_seed(1234)  # as simple_evaluate does
    loaded = manager.load([name])
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and not cfg.allow_code_execution:
            raise ConfigError("it runs programs that the model wrote: allow that with --allow_code_execution")
        if task.get_config("num_fewshot") != 0:  # a 0 in its own file is meant
            task.set_config("num_fewshot", shots if shots is not None else task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(1234)
    return loaded


def evaluate(cfg: BenchConfig, model, tokenizer, manager, tasks: dict, path: str, document: dict) -> tuple[dict, list]:
    """Runs lm-eval tasks one by one: (`document` with their results, the tasks that could not be run).

    It is written to `path` after every task. A file of the same weights and settings is continued: what it holds is not
    run again.
    """
    import lm_eval

    os.environ["HF_ALLOW_CODE_EVAL"] = str(int(cfg.allow_code_execution))
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    settings = {"routing": cfg.routing, "limit": cfg.limit, "dtype": str(model.head_weight.dtype), "done": []}
    settings |= {"weights": digest.hexdigest(), "lm_eval": importlib.metadata.version("lm_eval")}
    keys = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "group_subtasks")
    found, missing = {key: {} for key in keys}, []
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)
        if saved["evaluation"] | {"done": []} == settings:
            settings, found = saved["evaluation"], {key: saved[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing to continue
    for name, shots in tasks.items():
        if [name, shots] in settings["done"]:
            say(f"{name}: done before, see {path}")
            continue
        reason = None
        try:
            loaded = load_task(manager, name, shots, cfg)
        except Exception as error:  # noqa: BLE001 (a data set, a metric or a task file: anything can be missing)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        reasons = [why for why in gathered({rank(): reason}).values() if why]  # a task runs on all ranks or on none
        if reasons:
            data = (manager.task_index[name].cfg or {}).get("dataset_path", "of the group")
            say(f"error: task {name} (data set {data}) is left out: {reasons[0]}")
            missing.append(name)
            continue
        new = lm_eval.evaluate(
            lm_eval_model(model, tokenizer, cfg),
            task_dict=loaded,
            limit=cfg.limit or None,
            log_samples=False,
            confirm_run_unsafe_code=cfg.allow_code_execution,
        )
        found = {key: found[key] | new.get(key, {}) for key in keys}
        settings["done"].append([name, shots])
        if rank() == 0:
            write_json(document | {"evaluation": settings} | found, path)
    if found["results"]:
        routing = {"causal": "causal routing", "topk": "top-k routing, which looks at the future (generation: causal)"}
        what = routing[cfg.routing] if model.routed else "dense"
        print(f"\n{cfg.model_path}: {what}" + f", the first {cfg.limit} examples of each task" * (cfg.limit > 0))
        print(lm_eval.utils.make_table(found))
        if found["groups"]:
            print(lm_eval.utils.make_table(found, "groups"))
        print(path)
    return document | {"evaluation": settings} | found, missing


def write_json(document: dict, path: str):
    """Writes a JSON file, whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as f:
        json.dump(document, f, indent=1, default=str)


def log_to_wandb(cfg: BenchConfig, results: dict):
    """Every number of lm-eval's results as eval/TASK/METRIC."""
    import wandb

    run = wandb.init(
        project=cfg.wandb_project, entity=cfg.wandb_entity or None, name=f"eval {cfg.model_path}", config=asdict(cfg)
    )
    values = {f"eval/{task}/{k}": v for task, found in results.items() for k, v in found.items()}
    run.log({key: value for key, value in values.items() if isinstance(value, int | float)})
    run.finish()


# ---------------------------------------------------------------------------------------------------------------------


def about(cfg: BenchConfig, device) -> dict:
    """What a number needs beside it to be compared with another."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    packages = ("torch", "transformers", "lm_eval", "datasets")
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    facts = {"git": git_revision(), "device": name, "threads": torch.get_num_threads()}
    return {"config": asdict(cfg), **facts, "packages": {name: installed.get(name) for name in packages}}


def check(argv):
    """What a command line asks for: (BenchConfig, keys of the model, lm-eval's TaskManager and tasks). Raises ConfigError."""
    bench_set, model_set = configure(__doc__, argv, BenchConfig, ModelConfig)
    cfg = BenchConfig(**bench_set)
    if cfg.model_path and (model_set or "size" in bench_set):
        given = ", ".join([*model_set, *(["size"] if "size" in bench_set else [])])
        raise ConfigError(f"model_path={cfg.model_path} has its own configuration: drop {given}")
    single = [task for task in cfg.tasks if task in OWN and task != "perplexity"]
    if single and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"tasks={','.join(single)} measure one process: run them without torchrun")
    suites = [task for task in cfg.tasks if task not in OWN]
    return (cfg, model_set, *(find_tasks(suites) if suites else (None, {})))


def main(argv):
    cfg, model_set, manager, tasks = check(argv)
    own = [task for task in OWN if task in cfg.tasks]
    world, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device, autocast = pick_device(cfg, local, world)
    dtype = torch.float32 if isinstance(autocast, nullcontext) else torch.bfloat16
    peak = peak_flops(device, dtype == torch.bfloat16)

    model = tokenizer = None
    if cfg.model_path:
        model, tokenizer = open_model(cfg.model_path, str(device))
        shape, names = model.config, [model.config.architecture]
    else:
        shape = ModelConfig.preset(cfg.size, **{"architecture": "mod"} | model_set)
        names = [shape.architecture] if "architecture" in model_set else ARCHITECTURES
    before = read_baseline(cfg.baseline, cfg, shape)
    document, missing, worse = about(cfg, device), [], []
    if "flops" in own:
        document["flops"] = flops(cfg, {name: variant(shape, name) for name in names})
    if "speed" in own:
        models = speed_models(cfg, shape, names, copy.deepcopy(model), device)
        document["speed"] = speed(cfg, models, device, autocast, dtype, peak) | {"model": shape.to_dict()}
        if before:
            worse = regressions(document["speed"], document, before)
        elif cfg.baseline:
            write_json(document, cfg.baseline)
    if model:
        model.to_dtype(dtype)
    if "perplexity" in own:
        document["perplexity"] = perplexity(cfg, model, tokenizer)
    if "capacity" in own:
        document["capacity"] = capacity_sweep(cfg, model, tokenizer, device)
        folder = cfg.model_path if os.path.isdir(cfg.model_path) else "out"
        for ending in ("png", "pdf"):
            draw_sweep(
                document["capacity"], os.path.basename(cfg.model_path.rstrip("/")), f"{folder}/capacity.{ending}"
            )
        print(f"picture: {folder}/capacity.png, .pdf")
    path = cfg.output_path
    if tasks:
        folder = cfg.model_path if os.path.isdir(cfg.model_path) else os.path.join("out", cfg.model_path)
        path = path or os.path.join(folder, f"eval-{cfg.routing}{f'-limit{cfg.limit}' * (cfg.limit > 0)}.json")
        document, missing = evaluate(cfg, model, tokenizer, manager, tasks, path, document)
    print("\n" + json.dumps(document, default=str))
    if path and rank() == 0:
        write_json(document, path)
    if tasks and cfg.wandb_log and rank() == 0:
        log_to_wandb(cfg, document["results"])
    if world > 1:
        dist.destroy_process_group()
    if missing:
        say(f"error: {len(missing)} of {len(tasks)} tasks could not be run: {', '.join(missing)}")
    for line in worse:
        say(f"slower than {cfg.baseline} by more than 5 %: {line}")
    if missing or worse:
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
