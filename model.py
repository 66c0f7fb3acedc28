"""The Qwen2 block, written out, and four architectures on it: dense, Mixture-of-Depths, DTF and STT.

    model = Transformer(ModelConfig(architecture="dtf", capacity=0.5))
    out = model(input_ids, targets)                 # training: top-k routing, out.loss with every auxiliary term
    out = model(input_ids, routing="causal")        # inference: token t decides from what is known at t
    ids = model.generate(input_ids, max_new_tokens=50)

B sequences, T tokens, d hidden size, H query heads, n_kv key and value heads, hd head size, k selected tokens, V vocabulary.
Sources: Qwen2.5 report for the block; Raposo et al. 2024 (arXiv 2404.02258) for MoD; Wieser et al. 2025
(arXiv 2511.21408) for DTF and STT. The routing decisions themselves are in routers.py.
"""

import functools
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels
import routers
from cache import Cache, StaticCache
from weights import ModelError, find_model, local_rows, replacing, weight_files, write_weights

ALIASES = {"standard": "dense", "sdt": "dtf", "tdtf": "stt"}
ARCHITECTURES = ("dense", "mod", "dtf", "stt")

# The sizes of `--size`: hidden, layers, heads, KV heads, intermediate; the published Qwen2.5 shapes from "0.5B" on.
_SHAPES = {
    "demo": (128, 6, 4, 2, 352),
    "10M": (256, 10, 4, 2, 1024),
    "50M": (512, 14, 8, 2, 1792),
    "0.5B": (896, 24, 14, 2, 4864),
    "1.5B": (1536, 28, 12, 2, 8960),
    "3B": (2048, 36, 16, 2, 11008),
    "7B": (3584, 28, 28, 4, 18944),
    "14B": (5120, 48, 40, 8, 13824),
    "32B": (5120, 64, 40, 8, 27648),
    "72B": (8192, 80, 64, 8, 29568),
}
_SHAPE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SIZES: dict[str, dict] = {name: dict(zip(_SHAPE_FIELDS, shape, strict=True)) for name, shape in _SHAPES.items()}
for _name, _size in SIZES.items():
    if _name.endswith("B"):
        _small = _name in ("0.5B", "1.5B", "3B")
        _size |= {"vocab_size": 151936 if _small else 152064, "tie_word_embeddings": _small}
        _size |= {"max_position_embeddings": 32768, "rope_theta": 1e6}


@dataclass
class ModelConfig:
    architecture: str = "dense"  # dense, mod, dtf or stt (also: standard, sdt, tdtf)
    vocab_size: int = 4096  # rows of the embedding
    hidden_size: int = 128  # d, the width of the residual stream
    intermediate_size: int = 352  # width of the MLP
    num_hidden_layers: int = 6  # blocks
    num_attention_heads: int = 4  # query heads
    num_key_value_heads: int = 2  # key and value heads, shared by groups of query heads
    max_position_embeddings: int = 2048  # longest sequence, in tokens
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rms_norm_eps: float = 1e-6  # epsilon of every RMSNorm
    tie_word_embeddings: bool = True  # the head is the embedding
    capacity: float | list[float] = 0.5  # share of the tokens that a routed block takes; a list: one per routed layer
    prior_factor: float = 0.0625  # width of prior and transition networks over hidden_size
    ma_window: int = 100  # tokens in the moving average of the static surprise
    router: str = "learned"  # mod: learned, or random (Gaussian scores: the paper's control)
    mod_gate: str = "sigmoid"  # mod: gate sigmoid(r), or linear (r itself, as in the MoD paper)
    gate: str | None = None  # soft or straight_through; unset: soft, for stt straight_through (no G at inference)
    stt_output: str = "sparse"  # stt in training: sparse (what inference does) or dense
    causal_decision: str = "router"  # at inference: router (trained student) or threshold (average k-th score)
    causal_threshold: float = 0.5  # probability above which the causal router selects
    beta_schedule: str | None = None  # dtf, stt: cosine replaces the learned betas by scheduled ones
    beta_ce_range: tuple[float, float] = (0.55, 0.55)  # start and end of the scheduled beta_ce, after softplus
    beta_cu_range: tuple[float, float] = (0.44, 0.44)  # start and end of the scheduled beta_cu, after softplus
    mod_aux_weight: float = 0.01  # weight of the BCE of r against the selection
    mod_z_weight: float = 1e-4  # weight of mean(r²)
    causal_weight: float = 0.01  # weight of the causal routers' BCE
    prior_weight: float = 0.05  # dtf: weight of the prior's squared error
    tpn_weight: float = 0.05  # stt: weight of the transition network's squared error
    g_reg_weight: float = 0.0  # stt: weight of mean(G)
    distill_weight: float = 1.0  # weight of KL(teacher ‖ model), where train.py's distill_from names a teacher

    def __post_init__(self):
        self.architecture = ALIASES.get(self.architecture, self.architecture)
        self.beta_ce_range, self.beta_cu_range = tuple(self.beta_ce_range), tuple(self.beta_cu_range)
        problems = []

        def one_of(name, *allowed):
            if getattr(self, name) not in allowed:
                problems.append(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, allowed))}")

        one_of("architecture", *ARCHITECTURES)
        one_of("router", "learned", "random")
        one_of("mod_gate", "sigmoid", "linear")
        one_of("gate", None, "soft", "straight_through")
        one_of("stt_output", "sparse", "dense")
        one_of("causal_decision", "router", "threshold")
        one_of("beta_schedule", None, "cosine")
        for name in ("vocab_size", "max_position_embeddings", "ma_window", *_SHAPE_FIELDS):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be at least 1")
        if not problems:
            if self.hidden_size % self.num_attention_heads:
                problems.append(
                    f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}"
                )
            elif self.head_dim % 2:
                problems.append(f"hidden_size / num_attention_heads = {self.head_dim} must be even for RoPE")
            if self.num_attention_heads % self.num_key_value_heads:
                problems.append(
                    f"num_attention_heads={self.num_attention_heads} is not divisible by "
                    f"num_key_value_heads={self.num_key_value_heads}"
                )
            if self.causal_decision == "threshold" and self.architecture == "stt":
                problems.append("causal_decision='threshold' is not available for stt: its score looks at the update")
            if self.router == "random" and self.architecture != "mod":
                problems.append(f"router='random' is a control for mod, not for {self.architecture}")
            capacities = self.capacity if isinstance(self.capacity, list | tuple) else [self.capacity]
            if isinstance(self.capacity, list | tuple) and len(capacities) != len(self.routed_layers):
                problems.append(f"capacity has {len(capacities)} values for {len(self.routed_layers)} routed layers")
            if not all(0 < c <= 1 for c in capacities):
                problems.append(f"capacity={self.capacity} must lie in (0, 1]")
        for name in ("beta_ce_range", "beta_cu_range"):
            if len(getattr(self, name)) != 2 or not all(beta > 0 for beta in getattr(self, name)):
                problems.append(f"{name}={getattr(self, name)} must be two positive numbers, start and end")
        if not 0 < self.causal_threshold < 1:
            problems.append(f"causal_threshold={self.causal_threshold} must lie between 0 and 1")
        if self.prior_factor <= 0:
            problems.append(f"prior_factor={self.prior_factor} must be positive")
        if problems:
            raise ModelError("; ".join(problems))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the layers that skip tokens: every second one, from 1."""
        return [] if self.architecture == "dense" else list(range(1, self.num_hidden_layers, 2))

    @property
    def prior_width(self) -> int:
        """Width of the prior and transition networks: max(2, d·f rounded up to an even number)."""
        width = math.ceil(self.hidden_size * self.prior_factor)
        return max(2, width + width % 2)

    @classmethod
    def preset(cls, size: str, **overrides) -> "ModelConfig":
        """The shape of `--size` ("demo", "10M", "50M", "0.5B" … "72B"), any field overridden. Raises ModelError."""
        if size not in SIZES:
            raise ModelError(f"size={size!r} is not one of {', '.join(SIZES)}")
        return cls(**(SIZES[size] | overrides))

    def to_dict(self) -> dict:
        """The content of config.json: a Qwen2 config plus our fields.

        `architectures` is what programs such as vLLM choose their code by: they refuse a routed model.
        """
        name = "Qwen2" if self.architecture == "dense" else self.architecture.capitalize()
        qwen2 = {"model_type": "qwen2", "architectures": [f"{name}ForCausalLM"], "hidden_act": "silu"}
        return qwen2 | {"use_sliding_window": False} | asdict(self)

    @classmethod
    def from_dict(cls, config: dict, **overrides) -> "ModelConfig":
        """Reads config.json, ours or Qwen2's own. Raises ModelError for what this code would compute wrongly."""
        if config.get("model_type") != "qwen2":
            raise ModelError(f"model_type={config.get('model_type')!r} is not supported, only 'qwen2' is")
        if config.get("use_sliding_window") or set(config.get("layer_types") or ()) - {"full_attention"}:
            raise ModelError("use_sliding_window=true is not supported: attention here always sees the whole sequence")
        if config.get("hidden_act", "silu") != "silu":
            raise ModelError(f"hidden_act={config['hidden_act']!r} is not supported, only 'silu' is")
        rope = config.get("rope_parameters") or {}
        scaling = (config.get("rope_scaling") or rope) or {}
        if scaling.get("rope_type", scaling.get("type", "default")) != "default":
            raise ModelError(f"RoPE scaling {scaling} is not supported, only the default RoPE is")
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        known.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        known.setdefault("num_key_value_heads", known.get("num_attention_heads", cls.num_attention_heads))
        known.setdefault("tie_word_embeddings", False)  # Qwen2Config's own default
        return cls(**(known | overrides))


# ---------------------------------------------------------------------------------------------------------------------
# The block


@dataclass
class Context:
    """What travels beside the hidden states of one forward pass; the layers read it and change only the cache."""

    routing: str  # "topk" or "causal"
    positions: torch.Tensor  # (T), or (B, 1) in a decoding step
    rope: tuple[torch.Tensor, torch.Tensor]  # cos, sin: (T, 1, hd), or (B, 1, 1, hd) in a decoding step
    lengths: list[int] | None  # tokens of each right-padded row, None without padding
    cache: Cache | StaticCache | None
    decoding: bool  # one new token a row, behind a filled cache

    def store(self, layer: int, **what):
        """The function that files a block's new keys and values in the cache and returns those to attend to."""
        if self.cache is None:
            return None
        return functools.partial(getattr(self.cache.layers[layer], "append" if self.decoding else "fill"), **what)

    def last(self, t: torch.Tensor) -> torch.Tensor:
        """The entry of each row's newest token: (B, T, …) → (B, …)."""
        if self.lengths is None or self.decoding:
            return t[:, -1]
        return t[torch.arange(t.size(0), device=t.device), torch.tensor(self.lengths, device=t.device) - 1]


@dataclass
class Notes:
    """What one layer says of itself. Tensors only: they are read, if at all, long after the layer has run."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)  # scalars
    stats: dict[str, torch.Tensor] = field(default_factory=dict)  # scalars
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)  # (B, T): mask, score, S_CE, …
    # A decision layer's D_st, D_ch (B, T); in decoding D_ch is a function, for few tokens need it.
    surprise: tuple | None = None


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin of every position's angles, the same for every head: (…) int → two (…, 1, hd) float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None, None].float() * (1.0 / theta**exponents)  # (…, 1, hd / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half-split as in Qwen2: x (B, T, heads, hd); cos, sin (T, 1, hd) or (B, T, 1, hd)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        d, kv = cfg.hidden_size, cfg.num_key_value_heads * cfg.head_dim
        self.head_dim = cfg.head_dim
        self.q_proj = kernels.Linear(d, d, bias=True)
        self.k_proj = kernels.Linear(d, kv, bias=True)
        self.v_proj = kernels.Linear(d, kv, bias=True)
        self.o_proj = kernels.Linear(d, d, bias=False)

    def forward(self, x, rope, store=None):
        B, T, d = x.shape
        q = rotate(self.q_proj(x).view(B, T, -1, self.head_dim), *rope).transpose(1, 2)  # (B, H, T, hd)
        k = rotate(self.k_proj(x).view(B, T, -1, self.head_dim), *rope).transpose(1, 2)  # (B, n_kv, T, hd)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv, T, hd)
        mask = None
        if store is not None:
            k, v, mask = store(k, v)
        if T == 1:  # a decoding step: the queries of a group stand as rows before their keys, which are read once
            y = F.scaled_dot_product_attention(q.view(B, k.size(1), -1, self.head_dim), k, v, attn_mask=mask)
            return self.o_proj(y.reshape(B, 1, d))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, T, hd)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, d))


class MLP(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, d: int, width: int):
        super().__init__()
        self.gate_proj = kernels.Linear(d, width, bias=False)
        self.up_proj = kernels.Linear(d, width, bias=False)
        self.down_proj = kernels.Linear(width, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Predictor(MLP):
    """A small SwiGLU behind its own RMSNorm: DTF's prior and STT's transition network."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg.hidden_size, cfg.prior_width)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def folded(self) -> torch.Tensor:
        """The first two matrices as one, the norm's weight in it: (2 · width, d)."""
        return torch.cat((self.gate_proj.weight, self.up_proj.weight)) * self.norm.weight

    def forward(self, x, folded=None):
        # RMSNorm scales rows and columns, so a product can go first: x is read, never rewritten.
        scale = torch.rsqrt(routers.mean_square(x) + self.norm.eps)[..., None]  # (B, T, 1)
        product = kernels.linear(x, self.folded() if folded is None else folded) * scale
        gate, up = product.to(x.dtype).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """The Qwen2 block; as a layer of its own, the dense one."""

    def __init__(self, cfg: ModelConfig, index: int):
        super().__init__()
        self.index = index
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def delta(self, x, rope, store=None):
        """Δ(x) = Block(x) − x, without the cancellation of that subtraction: (B, T, d) → (B, T, d)."""
        attention = self.self_attn(self.input_layernorm(x), rope, store)
        return attention + self.mlp(self.post_attention_layernorm(x + attention))

    def store_all(self, x, ctx: Context):
        """Where a block that runs on every token files its keys and values."""
        if ctx.decoding:
            return ctx.store(self.index, rows=range(x.size(0)))
        return ctx.store(self.index, counts=ctx.lengths or [x.size(1)] * x.size(0))

    def forward(self, x, ctx: Context, before: Notes) -> tuple[torch.Tensor, Notes]:
        """x: (B, T, d); before: the notes of the layer below. Returns the new x and this layer's notes."""
        x = x + self.self_attn(self.input_layernorm(x), ctx.rope, self.store_all(x, ctx))
        return x + self.mlp(self.post_attention_layernorm(x)), Notes()


class DecisionBlock(Block):
    """DTF's even layers: dense, and a prior guesses their update. Where it fails, the token is surprising.

    In the prior's loss, MSE(x_prior, stopgrad(x_post)), x stands on both sides and falls out. It must not be left in:
    its gradient would make x chase x_post = x + Δ(x), which moves along, and the residual stream explodes (docs/LOG.md).
    """

    def __init__(self, cfg: ModelConfig, index: int):
        super().__init__(cfg, index)
        self.prior = Predictor(cfg)

    def forward(self, x, ctx, before):
        update = self.delta(x, ctx.rope, self.store_all(x, ctx))  # (B, T, d)
        state = ctx.cache.layers[self.index].state if ctx.cache else {}
        if ctx.decoding:

            def d_ch():
                return routers.mean_square(update - self.prior(x, state["folded"]))

            return x + update, Notes(surprise=(routers.mean_square(update), d_ch))
        state["folded"] = folded = self.prior.folded()
        *surprise, loss = routers.surprise(update, self.prior(x, folded))
        return x + update, Notes(losses={"prior": loss} if ctx.routing == "topk" else {}, surprise=surprise)


class RoutedBlock(Block):
    """A block that runs on some of the tokens. Which ones, and how its update is gated, is the subclass's idea."""

    default_gate = "soft"

    def __init__(self, cfg: ModelConfig, index: int):
        super().__init__(cfg, index)
        self.config = cfg
        self.gate = cfg.gate or self.default_gate
        number = cfg.routed_layers.index(index)
        self.capacity = cfg.capacity[number] if isinstance(cfg.capacity, list | tuple) else cfg.capacity
        self.causal_router = nn.Linear(2 * cfg.hidden_size, 1)
        if cfg.causal_decision == "threshold":
            self.register_buffer("threshold", torch.full((), torch.nan))  # average k-th highest score of training

    def select(self, x, score, ctx: Context, notes: Notes):
        """The tokens that run: (indices (B, k) ascending, counts of the real ones per row or None for all k).

        A decoding step gets (None, None): its rows are those of the mask. score: (B, T), unused by causal routers.
        """
        cfg = self.config
        state = ctx.cache.layers[self.index].state if ctx.cache else {}
        weight, bias = self.causal_router.weight, self.causal_router.bias
        logits, carried = routers.causal_logits(x.detach(), weight, bias, state.get("carried"))
        if ctx.cache and ctx.cache.static:
            state["carried"].copy_(carried[:, 0])
        elif ctx.cache:
            state["carried"] = ctx.last(carried)
        probability = logits.sigmoid()  # (B, T)
        chosen = probability > cfg.causal_threshold
        notes.tokens["causal_probability"] = probability
        counts = None
        if ctx.routing == "topk":
            if ctx.lengths is None:
                indices, mask = routers.top_k(score, routers.capacity_k(self.capacity, x.size(1)))
            else:
                mask = routers.top_k_ragged(score, self.capacity, ctx.lengths)
                indices, counts = routers.pack(mask)
            notes.losses["causal"] = routers.selection_bce(logits, mask)
            notes.stats["causal_accuracy"] = (chosen == mask).float().mean()
            if cfg.causal_decision == "threshold":
                chosen = score > self.threshold
                notes.stats["kth_score"] = score.detach().masked_fill(~mask, torch.inf).amin(1).mean()
            notes.stats["causal_capacity"] = chosen.float().mean()
        else:
            mask = chosen if cfg.causal_decision == "router" else score > self.threshold
            if ctx.decoding:
                if ctx.cache.finished is not None:
                    mask = mask & ~ctx.cache.finished[:, None]
                indices = None
            else:
                if ctx.lengths is not None:
                    mask = mask & routers.valid_mask(ctx.lengths, x.size(1), x.device)
                indices, counts = routers.pack(mask)
                notes.stats["causal_capacity"] = mask.float().mean()
        notes.tokens["mask"] = mask
        return indices, counts

    def route(self, x, ctx: Context, notes: Notes, score=None, gate=None):
        """y_i = x_i + gate_i · Δ(x_S)_i on the selected tokens, y_i = x_i on the others: (B, T, d) → (B, T, d).

        Selected indices ascend and are packed to the left, so one plain causal mask serves top-k, the causal forward and
        prefill: a valid query never reaches the padding of a short row, and the padding's results are dropped.
        gate: (B, T), or in a decoding step a function that gives it, called only where a row runs.
        """
        indices, counts = self.select(x, score, ctx, notes)
        if self.gate == "straight_through":
            gate = routers.straight_through(gate) if torch.is_tensor(gate) and gate.requires_grad else None
        if ctx.decoding:
            return (self.step_static if ctx.cache.static else self.step)(x, notes.tokens["mask"], gate, ctx)
        if indices.size(1) == 0:
            return x
        B, T, d = x.shape
        flat, places = x.flatten(0, 1), (indices + T * torch.arange(B, device=x.device)[:, None]).flatten()  # (B·k)
        rope = tuple(t[indices] for t in ctx.rope)  # (B, k, 1, hd): positions keep their original index
        packed = flat.index_select(0, places).view(B, -1, d)  # (B, k, d); whole rows move: twenty times gather's speed
        update = self.delta(packed, rope, ctx.store(self.index, counts=counts))
        if gate is not None:
            update = update * gate.gather(1, indices)[..., None]
        if counts is not None:
            update = update.masked_fill(~routers.valid_mask(counts, update.size(1), x.device)[..., None], 0)
        return flat.index_add(0, places, update.flatten(0, 1).to(x.dtype)).view(B, T, d)

    def step(self, x, mask, gate, ctx: Context):
        """A decoding step of the rows that run: mask (B, 1), read back, the one synchronisation of a step's layer."""
        rows = [r for r, (selected,) in enumerate(mask.tolist()) if selected]
        if not rows:
            return x
        gate = gate() if callable(gate) else gate
        some = torch.tensor(rows, device=x.device) if len(rows) < x.size(0) else None
        here, rope = (x, ctx.rope) if some is None else (x[some], tuple(t[some] for t in ctx.rope))
        update = self.delta(here, rope, ctx.store(self.index, rows=rows))  # (rows, 1, d)
        if gate is not None:
            update = update * (gate if some is None else gate[some])[..., None]
        update = update.to(x.dtype)
        return x + update if some is None else x.index_add(0, some, update)

    def step_static(self, x, mask, gate, ctx: Context):
        """The same in shapes that do not depend on the selection, for the compiler: all rows run, or none.

        Where often none is selected, that is asked, for one synchronisation, and the weights are left alone. In a large
        batch some row nearly always runs, and nothing is asked.
        """

        def run(x):
            update = self.delta(x, ctx.rope, ctx.store(self.index, rows=mask[:, 0]))  # (B, 1, d)
            if gate is not None:
                update = update * (gate() if callable(gate) else gate)[..., None]
            return torch.where(mask[..., None], x + update.to(x.dtype), x)

        none_runs = (1 - self.capacity) ** x.size(0)  # its probability, were the rows independent
        ask = none_runs > 1 / 16 and torch.compiler.is_compiling()
        ask = ask and torch.__version__ >= "2.13"  # from which on torch.cond may write into a cache
        return torch.cond(mask.any(), run, torch.clone, (x,)) if ask else run(x)


class MoDBlock(RoutedBlock):
    """Mixture-of-Depths: a learned score r picks the tokens and gates their update (Raposo et al. 2024, eq. 1)."""

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.router = nn.Linear(cfg.hidden_size, 1, bias=False)

    def forward(self, x, ctx, before):
        notes = Notes()
        if self.config.router == "random":  # the control: noise selects, and gates nothing
            return self.route(x, ctx, notes, score=torch.randn(x.shape[:2], device=x.device)), notes
        r = routers.linear_score(x, self.router.weight)  # (B, T)
        y = self.route(x, ctx, notes, score=r, gate=r.sigmoid() if self.config.mod_gate == "sigmoid" else r)
        notes.tokens["score"] = r
        if ctx.routing == "topk":
            notes.losses["mod_aux"] = routers.selection_bce(r, notes.tokens["mask"])
            notes.losses["mod_z"] = r.square().mean()
        return y, notes


class SurprisedBlock(RoutedBlock):
    """A routed block whose score is the surprise gate G: what DTF's dynamic layers and STT's share."""

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.router = routers.SurpriseRouter()

    def surprise_gate(self, d_st, d_ch, ctx: Context, notes: Notes):
        """G of (B, T) surprises, noting how it came about."""
        window, scalars = self.config.ma_window, self.router.acting()
        if ctx.cache:
            ends = torch.tensor(ctx.lengths or [d_st.size(1)] * d_st.size(0), device=d_st.device)[:, None]
            ring = routers.last_values(d_st, ends, window)  # (B, window)
            ctx.cache.layers[self.index].state |= {"ring": ring, "scalars": torch.stack(scalars)}
        average = routers.moving_average(d_st, window)  # (B, T)
        g, s_ce, s_cu = routers.gate_of_surprise(d_st, d_ch, average, *scalars)
        notes.tokens |= {"score": g, "G": g, "S_CE": s_ce, "S_CU": s_cu}
        notes.stats |= {"S_CE": s_ce.mean(), "S_CU": s_cu.mean(), "G_cont": g.mean()} | self.router.stats()
        return g


class DynamicBlock(SurprisedBlock):
    """DTF's odd layers: run on the tokens that surprised the decision layer below."""

    def forward(self, x, ctx, before):
        notes = Notes()
        if not ctx.decoding:
            g = self.surprise_gate(*before.surprise, ctx, notes)
            return self.route(x, ctx, notes, score=g, gate=g), notes
        (d_st, d_ch), state = before.surprise, ctx.cache.layers[self.index].state
        ring = state["ring"]
        ring.scatter_(1, ctx.positions % self.config.ma_window, d_st)

        def gate():
            average = routers.ring_average(ring, ctx.positions, 0 if ctx.cache.static else min(ctx.cache.lengths))
            return routers.gate_of_surprise(d_st, d_ch(), average, *state["scalars"].unbind())[0]

        if self.config.causal_decision == "threshold":
            g = gate()
            return self.route(x, ctx, notes, score=g, gate=g), notes
        return self.route(x, ctx, notes, gate=gate), notes


class STTBlock(SurprisedBlock):
    """STT's odd layers: in training a dense pass shows each token's update, and a transition network guesses it from the
    token before. Inference runs neither: the causal router has learnt which tokens these two disagree on.
    """

    default_gate = "straight_through"

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.transition = Predictor(cfg)

    def forward(self, x, ctx, before):
        notes = Notes()
        if ctx.routing == "causal":
            return self.route(x, ctx, notes), notes
        update = self.delta(x, ctx.rope)  # (B, T, d)
        out = x + update
        predicted = routers.shift(self.transition(out))  # (B, T, d)
        d_st, d_ch, loss = routers.surprise(update, predicted)
        g = self.surprise_gate(d_st, d_ch, ctx, notes)
        notes.losses |= {"tpn": loss, "g_reg": g.mean()}
        if self.config.stt_output == "dense":
            self.select(x, g, ctx, notes)  # the causal router's lesson
            return out, notes
        return self.route(x, ctx, notes, score=g, gate=g), notes


def layer_class(cfg: ModelConfig, index: int) -> type[Block]:
    """Which kind of layer stands at `index`."""
    if index in cfg.routed_layers:
        return {"mod": MoDBlock, "dtf": DynamicBlock, "stt": STTBlock}[cfg.architecture]
    return DecisionBlock if cfg.architecture == "dtf" and index + 1 in cfg.routed_layers else Block


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Trunk(nn.Module):
    """Everything between token ids and logits; what --compile compiles."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.config = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(layer_class(cfg, i)(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, input_ids, routing="topk", lengths=None, cache=None):
        """(B, T) ids → hidden states (B, T, d) behind the last norm, and the notes of every layer."""
        decoding = cache is not None and (cache.static or max(cache.lengths) > 0)
        if decoding:
            seen = cache.lengths if cache.static else torch.tensor(cache.lengths, device=input_ids.device)
            positions = seen[:, None]  # (B, 1)
        else:
            positions = torch.arange(input_ids.size(1), device=input_ids.device)  # (T)
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        ctx = Context(routing, positions, rope, lengths, cache, decoding)
        x, notes = self.embed_tokens(input_ids), [Notes()]  # (B, T, d)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, said = checkpoint(layer, x, ctx, notes[-1], use_reentrant=False)
            else:
                x, said = layer(x, ctx, notes[-1])
            notes.append(said)
        return self.norm(x), notes[1:]


@dataclass
class Output:
    logits: torch.Tensor | None  # (B, T, V); (B, 1, V) of each row's newest token with a cache; None with targets
    loss: torch.Tensor | None  # lm + Σ weight · mean over layers
    losses: dict[str, torch.Tensor]  # every term unweighted: lm, causal, mod_aux, mod_z, prior, tpn, g_reg, distill
    stats: dict[str, torch.Tensor]  # means over routed layers, and layer_{i}/… of each
    masks: dict[int, torch.Tensor] | None  # {layer: (B, T) bool}, the tokens that ran
    # {layer: {score, G, S_CE, S_CU, causal_probability}}, each (B, T)
    tokens: dict[int, dict[str, torch.Tensor]] | None


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compiled = None
        self.decodes_compiled, self.static = False, None
        self.init_weights(self.state_dict())

    @torch.no_grad()
    def init_weights(self, names):
        """New values for the named tensors, drawn on the CPU one after another: the same however they are sharded."""
        for name, tensor in self.state_dict().items():
            if name in names:
                mine, rows = local_rows(tensor)
                there = mine is tensor and tensor.device.type in ("cpu", "meta")
                whole = tensor if there else torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                init_parameter(name, whole, self.config.num_hidden_layers)
                if not there:
                    mine.copy_(whole[rows] if rows else whole)

    @property
    def gradient_checkpointing(self) -> bool:
        """Keep only each layer's input for the backward pass and run the layer again there."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool):
        self.model.gradient_checkpointing = on

    def compile_trunk(self):
        """torch.compile for top-k routing. The module itself stays as it is: no prefix in names, causal routing eager."""
        need_compiler()
        self.__dict__["compiled"] = torch.compile(self.model, dynamic=False)

    def compile_decoding(self):
        """torch.compile, on CUDA with its graphs, for the steps of `generate`: for every batch size anew."""
        need_compiler()
        limit = torch._dynamo.config.recompile_limit  # of variants of one code: every model, batch size and width
        torch._dynamo.config.recompile_limit = max(64, limit)  # beyond it, steps run uncompiled
        self.decodes_compiled = True

    @property
    def routed(self) -> list[RoutedBlock]:
        return [layer for layer in self.model.layers if isinstance(layer, RoutedBlock)]

    @property
    def lora_rank(self) -> int:
        """r of the LoRA adapters that lora.py has put in, 0 without."""
        return self.peft_config["default"].r if hasattr(self, "peft_config") else 0

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, d): the head's own matrix, or the embedding where the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def to_dtype(self, dtype: torch.dtype) -> "Transformer":
        """The weights in dtype, but routers and thresholds in float32: routing is a comparison, and bfloat16 makes ties."""
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if not is_router(name):
                tensor.data = tensor.data.to(dtype)
        return self

    def set_capacity(self, capacity: float | list[float]):
        """Share of the tokens that every routed layer takes from now on, also what is saved; a list: one per layer."""
        self.config = replace(self.config, capacity=capacity)
        for layer, value in zip(self.routed, broadcast(capacity, len(self.routed)), strict=True):
            layer.capacity = value

    def set_betas(self, beta_ce: float, beta_cu: float):
        """Fixes the inverse temperatures of every surprise gate (values after softplus)."""
        with torch.no_grad():
            for layer in self.routed:
                layer.router.beta_ce.fill_(routers.inverse_softplus(beta_ce))
                layer.router.beta_cu.fill_(routers.inverse_softplus(beta_cu))

    def forward(
        self, input_ids, targets=None, routing="topk", lengths=None, cache=None, return_masks=False, teacher=None
    ) -> Output:
        """input_ids: (B, T) int64; targets: (B, T), targets[t] the token after input_ids[t], −100 where there is none.

        routing: "topk" (training: the k best of each sequence, looks ahead) or "causal" (inference).
        lengths: tokens of each row, where rows are padded on the right. cache: see `new_cache`; with one, the first call
        takes the prompts and every further call one token a row, and logits are those of each row's newest token.
        teacher: (hidden states (B, T, d') behind the last norm, head (V, d')) of a model to distil from, beside targets.
        Raises ModelError for a sequence beyond max_position_embeddings, an empty one, or an unknown routing.
        """
        if routing not in ("topk", "causal"):
            raise ModelError(f"routing={routing!r} is not one of topk, causal")
        B, T = input_ids.shape
        if T == 0 or B == 0:
            raise ModelError("an empty sequence has nothing to predict from: give at least one token")
        seen = max(cache.lengths) if cache is not None else 0
        if seen + T > self.config.max_position_embeddings:
            raise ModelError(
                f"a sequence of {seen + T} tokens is longer than max_position_embeddings="
                f"{self.config.max_position_embeddings}"
            )
        if cache is not None and (routing != "causal" or (seen and T != 1)):
            raise ModelError("a KV cache takes routing='causal': the prompts first, then one token a row")
        if lengths is not None:
            lengths = [int(n) for n in lengths]
            if len(lengths) != B or not all(1 <= n <= T for n in lengths):
                raise ModelError(f"lengths={lengths} must give 1 to {T} tokens for each of {B} rows")
            lengths = None if min(lengths) == T else lengths
        plain = routing == "causal" or lengths is not None
        trunk = self.model if self.compiled is None or plain else self.compiled
        hidden, notes = trunk(input_ids, routing, lengths, cache)
        if cache is not None:
            new = [1] * B if seen else lengths or [T] * B
            if not seen and lengths:
                hidden = hidden[torch.arange(B), torch.tensor(lengths, device=hidden.device) - 1][:, None]
            cache.lengths = [n + m for n, m in zip(cache.lengths, new, strict=True)]
            hidden = hidden[:, -1:]
        if self.training and torch.is_grad_enabled() and self.config.causal_decision == "threshold":
            self.update_thresholds(notes)

        losses, stats = self.collect(notes)
        logits = loss = None
        if targets is None:
            logits = kernels.linear(hidden, self.head_weight)  # (B, T, V)
        else:
            losses = {"lm": head_loss(hidden, self.head_weight, targets)} | losses
            if teacher is not None:
                losses["distill"] = head_loss(hidden, self.head_weight, targets, teacher)
            weighted = [getattr(self.config, f"{name}_weight") * losses[name] for name in losses if name != "lm"]
            loss = losses["lm"] + sum(weighted)
        masks = tokens = None
        if return_masks:
            tokens = {i: said.tokens for i, said in enumerate(notes) if said.tokens}
            masks = {i: by_name.pop("mask") for i, by_name in tokens.items()}
        return Output(logits, loss, losses, stats, masks, tokens)

    def collect(self, notes: list[Notes]) -> tuple[dict, dict]:
        """Losses as means over layers; statistics likewise, and of each layer under layer_{i}/…"""
        losses, stats, each = {}, {}, {}
        for i, said in enumerate(notes):
            for name, value in said.losses.items():
                losses.setdefault(name, []).append(value)
            for name, value in said.stats.items():
                stats.setdefault(name, []).append(value.detach())
                each[f"layer_{i}/{name}"] = value.detach()
        losses = {name: torch.stack(values).mean() for name, values in losses.items()}
        return losses, {name: torch.stack(values).mean() for name, values in stats.items()} | each

    @torch.no_grad()
    def update_thresholds(self, notes: list[Notes]):
        """Exponential moving average (0.99) of each routed layer's k-th highest score, from the first value seen."""
        for layer in self.routed:
            new = notes[layer.index].stats["kth_score"]
            layer.threshold.copy_(torch.where(layer.threshold.isnan(), new, torch.lerp(new, layer.threshold, 0.99)))

    # -- inference ----------------------------------------------------------------------------------------------------

    def new_cache(self, batch: int, limit: int) -> Cache:
        """An empty KV cache for `batch` rows of at most `limit` tokens."""
        return Cache(self.config, batch, limit)

    def static_cache(self, filled: Cache) -> StaticCache:
        """What a prefill has left behind, as a compiled step takes it: in the tensors of the last time, if they fit."""
        if self.static is None or self.static.key != StaticCache.key_for(filled):
            self.static = None  # its memory first
            self.static = StaticCache(filled)
        self.static.load(filled)
        return self.static

    def step(self, input_ids, cache: StaticCache) -> torch.Tensor:
        """One decoding step in static shapes, to be compiled: (B, 1) ids → (B, V) logits."""
        hidden, _ = self.model(input_ids, "causal", None, cache)
        cache.lengths.add_(1)
        return kernels.linear(hidden, self.head_weight)[:, -1]

    @torch.no_grad()
    def generate(
        self, input_ids, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop_ids=(), lengths=None, pad_id=0
    ) -> torch.Tensor:
        """Continues each row under causal routing: (B, T) → (B, T + max_new_tokens).

        Row r of the result is its prompt (lengths[r] ids of the right-padded input), its new ids right behind, then
        pad_id; a row that meets a stop id ends there, the id included. temperature 0 is greedy; top_k and top_p cut the
        distribution before sampling. Raises ModelError where T + max_new_tokens passes max_position_embeddings.
        """
        B, T = input_ids.shape
        if max_new_tokens < 0:
            raise ModelError(f"max_new_tokens={max_new_tokens} must not be negative")
        if T + max_new_tokens > self.config.max_position_embeddings:
            raise ModelError(
                f"a prompt of {T} and {max_new_tokens} new tokens pass max_position_embeddings="
                f"{self.config.max_position_embeddings}"
            )
        ends = [T] * B if lengths is None else [int(n) for n in lengths]
        result = input_ids.new_full((B, T + max_new_tokens), pad_id)
        kept = routers.valid_mask(ends, T, input_ids.device)
        result[:, :T] = torch.where(kept, input_ids, pad_id)
        stops = torch.tensor(list(stop_ids), device=input_ids.device, dtype=input_ids.dtype)
        cache = self.new_cache(B, T + max_new_tokens)
        finished = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
        cache.finished = finished if len(stops) else None
        rows, place = torch.arange(B, device=input_ids.device), torch.tensor(ends, device=input_ids.device)
        new, at_prompt = input_ids, ends
        for step in range(max_new_tokens):
            if cache.static:
                logits = compiled_step(self.head_weight.is_cuda)(self, new, cache)  # (B, V)
            else:
                logits = self(new, routing="causal", lengths=at_prompt, cache=cache).logits[:, -1]  # (B, V)
            new = sample(logits, temperature, top_k, top_p)  # (B)
            new, at_prompt = torch.where(finished, pad_id, new), None
            result[rows, place + step] = new
            if len(stops):
                finished |= torch.isin(new, stops)
                if finished.all():
                    break
            new = new[:, None]
            if self.decodes_compiled and step == 0 and max_new_tokens > 1:
                cache = self.static_cache(cache)
                finished = cache.finished
        return result

    # -- what it costs ------------------------------------------------------------------------------------------------

    def flops_per_token(
        self, seq_len: int, training: bool = False, capacity: float | list[float] | None = None
    ) -> float:
        """Floating point operations of a sequence of seq_len tokens, divided by seq_len.

        A multiplication and an addition count as two. Counted are all matrix products: projections, attention (queries
        by keys and weights by values over the full square of the packed length, as FlopCounterMode counts it), routers,
        priors and the head. training adds the backward pass (twice the forward pass) and STT's dense pass; with LoRA it makes
        no gradients of the base's weights.
        capacity: other than the configured one, a float or one float per routed layer.
        """
        cfg = self.config
        d, T = cfg.hidden_size, seq_len
        kv = cfg.num_key_value_heads * cfg.head_dim
        predictor, r = 6 * d * cfg.prior_width, self.lora_rank
        linear = 4 * d * d + 4 * d * kv + 6 * d * cfg.intermediate_size  # of one token
        adapters = 2 * r * (9 * d + 2 * kv + 3 * cfg.intermediate_size)
        frozen = 2.0 * T * d * cfg.vocab_size if r else 0.0  # products with a weight that gets no gradient

        def block(n):  # of n packed tokens
            nonlocal frozen
            frozen += n * linear if r else 0
            return n * (linear + adapters) + 4 * n * n * d

        total, detached = 2.0 * T * d * cfg.vocab_size, 0.0
        shares = iter(broadcast(cfg.capacity if capacity is None else capacity, len(cfg.routed_layers)))
        for i in range(cfg.num_hidden_layers):
            kind = layer_class(cfg, i)
            if not issubclass(kind, RoutedBlock):
                total += block(T) + (T * predictor if kind is DecisionBlock else 0)
                continue
            share = next(shares)
            k = routers.capacity_k(share, T) if share > 0 else 0
            detached += 4 * T * d  # causal router
            total += 2 * T * d if kind is MoDBlock else 0
            if kind is STTBlock and training:
                total += block(T) + T * predictor
            total += 0 if kind is STTBlock and training and cfg.stt_output == "dense" else block(k)
        if r:  # the frozen embedding takes no gradient: none is made through the first layer's q, k, v, nor a prior's input
            frozen += T * (2 * d * d + 4 * d * kv + 6 * r * d)
            frozen += 4 * T * d * cfg.prior_width if layer_class(cfg, 0) is DecisionBlock else 0
        # A causal router's backward pass has no input gradient: its input is detached.
        return ((3 * total + 2 * detached - frozen) if training else (total + detached)) / T

    # -- weights in and out -------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, torch.Tensor]:
        """The tensors that `save_pretrained` writes: all, or with LoRA those that are not of the frozen base."""
        if not self.lora_rank:
            return self.state_dict()
        import lora

        return lora.own_state(self)

    def save_pretrained(self, directory: str, state_dict: dict | None = None, shard_size: int = 5 * 10**9):
        """Writes config.json and model.safetensors, or several files and their index where it would pass shard_size bytes.

        Each is written to a temporary name first; weights that an earlier call left there go. state_dict: instead of its
        own. Of a model with LoRA only what was trained is written: see lora.py.
        """
        os.makedirs(directory, exist_ok=True)
        state_dict = state_dict or self.own_state()
        if self.lora_rank:
            import lora

            lora.save(self, directory, state_dict)
            return self.save_config(directory)
        tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
        write_weights(directory, tensors, shard_size)
        self.save_config(directory)

    def save_config(self, directory: str):
        """Writes config.json."""
        dtype = str(self.head_weight.dtype).removeprefix("torch.")
        with replacing(os.path.join(directory, "config.json")) as temporary, open(temporary, "w") as f:
            json.dump(self.config.to_dict() | {"dtype": dtype}, f, indent=2)

    @classmethod
    def from_pretrained(
        cls, directory_or_hub_id: str, dtype=torch.float32, shard=None, **config_overrides
    ) -> "Transformer":
        """Opens a Qwen2 checkpoint or one of ours; `architecture=` converts a dense one, whose routed parts start new.

        shard: a function that shards the model, still without memory, and gives it memory: only this rank's rows are read.
        `loaded` and `initialized` on the result name the tensors of either kind. Beside the model itself, 16 MB of the
        files are in memory at a time. Raises ModelError for a model of another type or shape, unknown or missing tensors,
        and pickled weights.
        """
        directory = find_model(str(directory_or_hub_id))
        config_path = os.path.join(directory, "config.json")
        try:
            with open(config_path, encoding="utf-8") as f:
                stored = json.load(f)
            saved = ModelConfig.from_dict(stored)
        except ModelError as error:
            raise ModelError(f"{config_path}: {error}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
            raise ModelError(f"{config_path} is not a model configuration: {error}") from None
        config = ModelConfig.from_dict(stored, **config_overrides)
        if os.path.exists(os.path.join(directory, "adapter_config.json")):
            if shard is not None:
                raise ModelError(f"{directory} is a LoRA adapter, which cannot be sharded: leave parallel=fsdp out")
            import lora

            return lora.load(directory, asdict(config), dtype)
        with torch.device("meta"):
            model = cls(config).to_dtype(dtype)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        readers = {}  # of the tensors that the model has a place for
        for name, shape, read in weight_files(directory):
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue  # some files hold the tied head twice
            if name not in expected:
                raise ModelError(f"{directory}: unknown tensor {name} for architecture={config.architecture}")
            if shape != expected[name]:
                raise ModelError(f"{directory}: {name} has shape {shape}, {expected[name]} is expected")
            if name in readers:
                raise ModelError(f"{directory}: tensor {name} is in two files")
            readers[name] = read
        model.loaded, model.initialized = sorted(readers), sorted(expected.keys() - readers.keys())
        new_parts = model.initialized if saved.architecture == "dense" != config.architecture else []
        lost = [name for name in model.initialized if name not in new_parts or not is_routed_part(name)]
        if lost:
            raise ModelError(f"{directory}: missing tensors {', '.join(lost[:5])}" + " …" * (len(lost) > 5))
        if shard is None:  # all is as it should be: only now memory is taken
            model.to_empty(device="cpu")
        else:
            shard(model)
        places = model.state_dict()
        for name, read in readers.items():
            mine, rows = local_rows(places[name])
            if mine.ndim == 0:
                mine.copy_(read(None))
                continue
            first, piece = rows.start if rows else 0, max(1, 2**22 // math.prod(mine.shape[1:]))
            for at in range(0, mine.size(0), piece):
                part = mine[at : at + piece]
                part.copy_(read(slice(first + at, first + at + part.size(0))))
        model.init_weights(model.initialized)
        return model.eval()


def need_compiler():
    """Raises ModelError where torch.compile would find no C++ compiler: it looks for one on GPUs too."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if sys.platform != "win32" and not shutil.which(name.split()[0]):
        raise ModelError(f"torch.compile needs a C++ compiler, and {name} is not there: install it, or name one in CXX")


@functools.cache
def compiled_step(cuda: bool):
    """`Transformer.step` compiled, for any model: a copy of one decodes with its own weights."""
    return torch.compile(Transformer.step, mode="reduce-overhead" if cuda else None)


def broadcast(capacity: float | list[float], n: int) -> list[float]:
    return list(capacity) if isinstance(capacity, list | tuple) else [capacity] * n


def is_router(name: str) -> bool:
    """Whether a tensor decides which tokens run."""
    return any(f".{part}" in name for part in ("router.", "causal_router.", "threshold"))


def is_routed_part(name: str) -> bool:
    """Whether a tensor is one that a conversion from a dense checkpoint starts anew."""
    return is_router(name) or any(f".{part}" in name for part in ("prior.", "transition."))


@torch.no_grad()
def init_parameter(name: str, parameter: torch.Tensor, layers: int):
    """N(0, 0.02²) for matrices, ones for norms, zeros for biases, the surprise gates' own scalars.

    What a block adds to the residual stream starts smaller by √(2 · layers), as in GPT-2 (Radford et al. 2019, section
    2.3): without it, the first blocks drown the embedding (docs/LOG.md).
    """
    last = name.rsplit(".", 1)[-1]
    if last in routers.SURPRISE_INIT:
        parameter.fill_(routers.SURPRISE_INIT[last])
    elif last == "threshold":
        parameter.fill_(torch.nan)
    elif last == "bias":
        parameter.zero_()
    elif parameter.ndim == 1:
        parameter.fill_(1.0)
    else:
        residual = name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))
        parameter.normal_(0.0, 0.02 / math.sqrt(2 * layers) if residual else 0.02)


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, teacher=None) -> torch.Tensor:
    """Mean over the targets that are not −100 of the cross-entropy, or the KL divergence from a teacher: see kernels.py.

    hidden (B, T, d), weight (V, d), targets (B, T), teacher (hidden states (B, T, d'), weight (V, d')).
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        teacher = teacher and tuple(t.to(dtype) for t in teacher)
    teacher = teacher and (teacher[0].flatten(0, 1), teacher[1])
    return kernels.head_loss(hidden.flatten(0, 1), weight, targets.flatten(), teacher)


def sample(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """(B, V) → (B) ids. Draws by comparing probabilities with exponential noise, which needs no synchronisation."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # the most probable one always stays
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    noise = torch.empty_like(logits).exponential_()
    return (logits.softmax(-1) / noise).argmax(-1)
