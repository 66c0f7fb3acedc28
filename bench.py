"""The numbers of a paper: speed against what FLOPs and bytes promise, and how they are counted.

    python bench.py                                              speed of four architectures and transformers' Qwen2
    python bench.py --size=50M --capacity=0.125 --compile        any size, any key of the model
    python bench.py --model_path=out/demo/dtf --seq_len=1024     one trained model against the dense one of its shape

The speed suite prints a table, then the same rows as one line of JSON. Variants are interleaved in one process, and ratios
are medians over rounds of times measured next to each other. ratio: time over our dense model's. promised: the
same ratio in FLOPs, or in bytes read for decoding. efficiency: promised / ratio. hf: time of transformers, eager, over time.
"""

import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace

import torch

import routers
from configurator import ConfigError, cli, configure
from model import SIZES, ModelConfig, ModelError, Transformer

MEASURES = ("train", "forward", "causal", "prefill", "decode1", "decode8")


@dataclass
class BenchConfig:
    tasks: list[str] = field(default_factory=lambda: ["speed"])  # speed
    model_path: str = ""  # a model directory, a run or a hub id; empty: random weights of --size
    size: str = "10M"  # shape without a model_path: demo, 10M, 50M, 0.5B … 72B; single keys override it
    output_path: str = ""  # JSON of the results, besides the terminal
    batch_size: int = 4  # sequences at a time
    seq_len: int = 512  # tokens of a sequence; of the prompt in decoding
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: str = "auto"  # float32, or bfloat16 (training: autocast over float32 weights); auto: bfloat16 on CUDA
    threads: int = 0  # CPU threads (0: torch's choice)
    measure: list[str] = field(default_factory=lambda: list(MEASURES))  # speed: what to time, of these
    repeats: int = 7  # speed: timed rounds
    warmup: int = 2  # speed: rounds before them
    decode_steps: int = 16  # speed: tokens a round of decoding generates
    compile: bool = False  # speed: torch.compile rows for train and forward too
    profile: bool = False  # speed: write a Chrome trace of one training step of every variant to out/trace.json

    def __post_init__(self):
        problems = []
        for name in ("batch_size", "seq_len", "repeats", "decode_steps"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be at least 1")
        for name in self.measure:
            if name not in MEASURES:
                problems.append(f"measure={name!r} is not one of {', '.join(MEASURES)}")
        if problems:
            raise ConfigError("; ".join(problems))


# ---------------------------------------------------------------------------------------------------------------------
# Causal routers at a chosen capacity


@torch.no_grad()
def calibrate(model: Transformer, ids: torch.Tensor, capacity: float):
    """Shifts every causal router so that it selects the share `capacity` of ids (B, T).

    Layer by layer, from below: what a layer selects changes what the next one reads. Works on the bias of a causal
    router, or on the threshold itself where causal_decision="threshold".
    """
    by_score = model.config.causal_decision == "threshold"
    for layer in model.routed:
        seen = model.model(ids, routing="causal")[1][layer.index].tokens
        value = (seen["score"] if by_score else seen["causal_probability"].logit(1e-7)).flatten().sort().values  # (B·T)
        skipped = round((1 - capacity) * len(value))
        below = value[skipped - 1] if skipped else value[0] - 1
        cut = (below + value[min(skipped, len(value) - 1)]) / 2
        if by_score:
            layer.threshold.fill_(cut)
        else:
            layer.causal_router.bias += torch.tensor(model.config.causal_threshold).logit().item() - cut


def shares(model: Transformer, stats: dict) -> dict[int, torch.Tensor]:
    """{routed layer: share of the tokens that ran, a scalar} of one causal forward pass."""
    return {i: stats[f"layer_{i}/causal_capacity"] for i in model.config.routed_layers}


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def interleaved(runs: dict, cfg: BenchConfig, device) -> dict:
    """Seconds of every call in `runs`, a list of one per round each: side by side, in an order that turns around."""
    times = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # modules and weights are not looked through again
    for n in range(cfg.warmup + cfg.repeats):
        for name in list(runs)[:: 1 if n % 2 else -1]:
            gc.collect()
            gc.disable()
            synchronize(device)
            start = time.perf_counter()
            runs[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
            gc.enable()
    gc.unfreeze()
    return {name: seconds[cfg.warmup :] for name, seconds in times.items()}


def transformers_twin(dense: Transformer):
    """transformers' Qwen2 with sdpa attention and the weights of our dense model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = dense.config.to_dict()
    twin = Qwen2ForCausalLM(Qwen2Config(**{k: config[k] for k in config if k != "architecture"}, attn_implementation="sdpa"))
    weights = dense.state_dict() | {"lm_head.weight": dense.head_weight.detach()}
    twin.load_state_dict(weights)
    return twin


def training_step(model, x, y, autocast):
    """A function that does one training step of ours (loss by our targets) or of transformers (by its own labels)."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(forward=model):
        with autocast:
            loss = forward(x, y).loss if isinstance(model, Transformer) else forward(x, labels=x, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def step_memory(step, model, optimizer, device) -> dict:
    """Bytes: what autograd keeps for the backward pass, and on CUDA the peak of weights, optimizer and step."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    result = {"activation_bytes": sum(kept.values())}
    if device.type == "cuda":
        held = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - before + sum(t.nbytes for t in held)
    return result


def compiled(model):
    """The same weights behind torch.compile."""
    if not isinstance(model, Transformer):
        return torch.compile(model)
    fast = copy.copy(model)  # shares modules and weights
    fast.compile_trunk()
    return fast


def decoder(model, ids, prompt: int, steps: int, said: list):
    """Prefills ids[:, :prompt], and returns a function whose every call decodes the next `steps` ids.

    said collects the statistics of our steps.
    """
    at = iter(range(prompt, ids.size(1)))
    if isinstance(model, Transformer):
        cache = model.new_cache(*ids.shape)
        model(ids[:, :prompt], routing="causal", cache=cache)
    else:
        cache = model(ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values

    def decode():
        for _ in range(steps):
            t = next(at)
            if isinstance(model, Transformer):
                out = model(ids[:, t : t + 1], routing="causal", cache=cache)
                said.append(out.stats)
            else:
                out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            out.logits.argmax(-1)

    return decode


def nbytes(*modules) -> int:
    return sum(p.nbytes for module in modules for p in module.parameters())


def decode_bytes(model: Transformer, batch: int, context: float, share: dict, ran: dict) -> float:
    """Bytes of weights and keys and values that a decoding step of `batch` rows after `context` tokens must read.

    share: {routed layer: share of the tokens that it selects}; ran: {routed layer: share of steps in which any row ran}.
    """
    cfg = model.config
    kv = 2 * cfg.num_key_value_heads * cfg.head_dim * model.head_weight.element_size()  # of one token in one layer
    total = model.head_weight.nbytes + nbytes(model.model.norm)
    for i, layer in enumerate(model.model.layers):
        block = nbytes(layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
        idle = nbytes(layer.transition) if hasattr(layer, "transition") else 0  # not used at inference
        s = share.get(i, 1.0)
        total += nbytes(layer) - block - idle + ran.get(i, 1.0) * block + batch * s * (s * context) * kv
    return total


def speed(cfg: BenchConfig, models: dict[str, Transformer], device, autocast, dtype) -> dict:
    """Times every measure for `models` ("dense" among them) and transformers; {"rows": […], "memory": {variant: …}}."""
    config = models["dense"].config
    torch.manual_seed(1)
    B, T = cfg.batch_size, cfg.seq_len
    ids = torch.randint(config.vocab_size, (8, T + (cfg.warmup + cfg.repeats) * cfg.decode_steps + 1), device=device)
    x, y = (torch.randint(config.vocab_size, (B, T), device=device) for _ in range(2))
    variants = {"transformers": transformers_twin(models["dense"]).to(device), **models}
    compiled_variants = {name: compiled(model) for name, model in variants.items()} if cfg.compile else {}
    rows, memory = [], {name: {"parameters": sum(p.numel() for p in v.parameters())} for name, v in variants.items()}

    def report(measure, times, tokens, promise, steps=1):
        """promise: {variant: FLOPs or bytes of one call}."""
        for (name, fast), seconds in times.items():
            dense, hf = times["dense", fast], times["transformers", False]
            median = statistics.median(seconds)
            quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
            row = {"measure": measure, "variant": name, "compiled": fast, "seconds": median / steps}
            row |= {"quartiles": [quartiles[0] / steps, quartiles[2] / steps], "tokens_per_s": tokens / median}
            row["ratio"] = statistics.median(a / b for a, b in zip(seconds, dense, strict=True))
            if name in promise:
                row["promised"] = promise[name] / promise["dense"]
                row["efficiency"] = row["promised"] / row["ratio"]
            row["hf"] = statistics.median(a / b for a, b in zip(hf, seconds, strict=True))
            rows.append(row)
        print_rows(rows[-len(times) :])

    def time_all(run, fast_too=False):
        """run(model, variant) for every variant, and for the compiled ones where they differ."""
        runs = {(name, False): lambda n=name, v=v: run(v, n) for name, v in variants.items()}
        runs |= {(name, True): lambda n=name, v=v: run(v, n) for name, v in compiled_variants.items() if fast_too}
        return interleaved(runs, cfg, device)

    if "train" in cfg.measure or cfg.profile:
        steps = {name: training_step(model, x, y, autocast) for name, model in variants.items()}
        if "train" in cfg.measure:
            times = time_all(lambda model, name: steps[name][0](model), fast_too=True)
            flops = {name: model.flops_per_token(T, training=True) * B * T for name, model in models.items()}
            report("train", times, B * T, flops)
            for name, (step, optimizer) in steps.items():
                memory[name] |= step_memory(step, variants[name], optimizer, device)
        if cfg.profile:
            with torch.profiler.profile() as profiler:
                for name, (step, _) in steps.items():
                    with torch.profiler.record_function(f"training step of {name}"):
                        step()
            os.makedirs("out", exist_ok=True)
            profiler.export_chrome_trace("out/trace.json")
            print("trace: out/trace.json")
        del steps

    for model in variants.values():
        model.to(dtype).eval()
    with torch.inference_mode():
        sample = torch.randint(config.vocab_size, (max(1, 4096 // T), T), device=device)
        for model in models.values():
            capacity = model.config.capacity
            calibrate(model, sample, sum(capacity) / len(capacity) if isinstance(capacity, list | tuple) else capacity)
        share = {}
        for name, model in models.items():
            cache = model.new_cache(B, T)
            found = shares(model, model(x, routing="causal", cache=cache).stats)
            share[name] = {i: float(s) for i, s in found.items()}
            memory[name]["kv_bytes_per_token"] = cache.bytes_used() / (B * T)
            memory[name]["causal_capacity"] = statistics.mean(share[name].values()) if found else 1.0
        causal = {n: m.flops_per_token(T, capacity=list(share[n].values())) * B * T for n, m in models.items()}

        if "forward" in cfg.measure:
            times = time_all(lambda m, _: m(x) if isinstance(m, Transformer) else m(x, use_cache=False), fast_too=True)
            # top-k routing computes what training's forward pass does: for STT, a dense pass more than inference
            flops = {name: forward_flops(model, T) * B * T for name, model in models.items()}
            report("forward", times, B * T, flops)
        if "causal" in cfg.measure:

            def run(m, _):
                return m(x, routing="causal") if isinstance(m, Transformer) else m(x, use_cache=False)

            report("causal", time_all(run), B * T, causal)
        if "prefill" in cfg.measure:

            def run(m, _):
                if isinstance(m, Transformer):
                    return m(x, routing="causal", cache=m.new_cache(B, T))
                return m(x, use_cache=True, logits_to_keep=1)

            head = 2 * config.hidden_size * config.vocab_size * B * (T - 1)  # prefill needs the last token's logits only
            report("prefill", time_all(run), B * T, {name: n - head for name, n in causal.items()})
        for batch in (1, 8):
            if f"decode{batch}" in cfg.measure:
                said = {name: [] for name in variants}
                decoders = {n: decoder(m, ids[:batch], T, cfg.decode_steps, said[n]) for n, m in variants.items()}
                times = time_all(lambda _, name: decoders[name]())  # noqa: B023 (called at once)
                promise, context = {}, T + len(said["dense"]) / 2
                for name, model in models.items():
                    each = [shares(model, stats) for stats in said[name]]
                    ran = {i: statistics.mean(float(s[i] > 0) for s in each) for i in model.config.routed_layers}
                    selected = {i: statistics.mean(float(s[i]) for s in each) for i in ran}
                    promise[name] = decode_bytes(model, batch, context, selected, ran)
                report(f"decode{batch}", times, batch * cfg.decode_steps, promise, steps=cfg.decode_steps)
    print_memory(memory)
    return {"rows": rows, "memory": memory}


def forward_flops(model: Transformer, seq_len: int) -> float:
    """FLOPs per token of the forward pass under top-k routing."""
    flops = model.flops_per_token(seq_len)
    if model.config.architecture == "stt":
        # training = 3 · (forward + dense pass) + 2 · causal routers, whose forward pass is in both
        detached = 4 * model.config.hidden_size * len(model.config.routed_layers)
        flops = (model.flops_per_token(seq_len, training=True) - 2 * detached) / 3 + detached
    return flops


def print_rows(rows):
    header = f"{'':18}{'ms':>10} {'(quartiles)':>19}{'tokens/s':>11}{'ratio':>8}{'promised':>10}{'efficiency':>12}{'hf':>7}"
    print(f"\n{rows[0]['measure']:18}{header[18:]}")
    for row in rows:
        low, high = (1e3 * q for q in row["quartiles"])
        print(
            f"{row['variant'] + ' compiled' * row['compiled']:22}{1e3 * row['seconds']:10.2f} "
            f"{f'({low:.2f}–{high:.2f})':>19}{row['tokens_per_s']:11,.0f}{row['ratio']:8.3f}"
            f"{row.get('promised', float('nan')):10.3f}{row.get('efficiency', float('nan')):12.3f}{row['hf']:7.2f}",
            flush=True,
        )


def print_memory(memory):
    names = list(dict.fromkeys(key for values in memory.values() for key in values))
    print("\n" + f"{'memory':22}" + "".join(f"{name:>20}" for name in names))
    for variant, values in memory.items():
        print(f"{variant:22}" + "".join(f"{values.get(name, float('nan')):20,.6g}" for name in names))


# ---------------------------------------------------------------------------------------------------------------------


def build_models(cfg: BenchConfig, model_set: dict, device) -> dict[str, Transformer]:
    """The models of the speed suite: dense and the routed ones of one shape, with random weights."""
    shape = ModelConfig(**(SIZES.get(cfg.size) or ModelConfig.preset(cfg.size)) | model_set)
    names = ["dense", shape.architecture] if "architecture" in model_set else ["dense", "mod", "dtf", "stt"]
    tokens = cfg.seq_len + (cfg.warmup + cfg.repeats) * cfg.decode_steps + 1
    longest = max(shape.max_position_embeddings, tokens)
    models = {}
    for name in dict.fromkeys(names):
        torch.manual_seed(0)
        capacity = 0.5 if name == "dense" else shape.capacity
        config = replace(shape, architecture=name, capacity=capacity, max_position_embeddings=longest)
        with device:
            models[name] = Transformer(config)
    return models


def main(argv):
    bench_set, model_set = configure(__doc__, argv, BenchConfig, ModelConfig)
    cfg = BenchConfig(**bench_set)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    autocast = torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64  # one graph per architecture and mode, all behind the same code
    models = build_models(cfg, model_set, device)
    results = speed(cfg, models, device, autocast, dtype)
    results["config"] = asdict(cfg) | {"model": models["dense"].config.to_dict()}
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    cli(main, ModelError)
