"""The Qwen2 block, written out; the block that runs on some of the tokens; and what each of them costs.

B sequences, T tokens, d hidden size, H query heads, n_kv key and value heads, hd head size, k selected tokens.
Sources: the Qwen2.5 report for the block; Raposo et al. 2024 (arXiv 2404.02258) for the routed one. What tells one
architecture from another is in architectures.py, the arithmetic of routing in routers.py.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import kernels
import routers
from cache import Cache, StaticCache

# ---------------------------------------------------------------------------------------------------------------------
# What travels beside the hidden states


@dataclass
class Context:
    """One forward pass as its layers see it; they change only the cache."""

    mode: str  # "packed": a whole pass, tokens that run packed to the left; "step" and "static": one new token a row
    routing: str  # "topk" or "causal"
    positions: torch.Tensor  # (T), or (B, 1) in a step
    rope: tuple[torch.Tensor, torch.Tensor]  # cos, sin: (T, 1, hd), or (B, 1, 1, hd) in a step
    lengths: list[int] | None  # tokens of each right-padded row, None without padding
    cache: Cache | StaticCache | None

    @property
    def decoding(self) -> bool:
        return self.mode != "packed"

    def store(self, layer: int, **what):
        """The function that files a block's new keys and values in the cache and returns those to attend to.

        what: counts=, the real tokens of each row of a packed pass; rows=, those that take this step.
        """
        if self.cache is None:
            return None
        return functools.partial(getattr(self.cache.layers[layer], "append" if self.decoding else "fill"), **what)

    def store_all(self, layer: int, B: int, T: int):
        """The same for a block that runs on every token."""
        if self.decoding:
            return self.store(layer, rows=range(B))
        return self.store(layer, counts=self.lengths or [T] * B)

    def last(self, t: torch.Tensor) -> torch.Tensor:
        """The entry of each row's newest token: (B, T, …) → (B, …)."""
        if self.lengths is None or self.decoding:
            return t[:, -1]
        return t[torch.arange(t.size(0), device=t.device), torch.tensor(self.lengths, device=t.device) - 1]


@dataclass
class Decision:
    """Which tokens run in a routed block, and what decided that."""

    mask: torch.Tensor  # (B, T) bool
    rule: str  # "top-k score", "causal router" or "average threshold"
    value: torch.Tensor  # (B, T): a score, or the causal router's logit
    cut: torch.Tensor | float | None  # above which a token runs; None: the k-th highest value of its row
    indices: torch.Tensor | None = None  # (B, k) ascending, where every row selects k tokens

    @property
    def margin(self) -> torch.Tensor:
        """By how much each value lies above what decides, (B, T): above 0 the token runs, of the k best from 0 on."""
        if self.cut is not None:
            return self.value - self.cut
        return self.value - self.value.masked_fill(~self.mask, torch.inf).amin(1, keepdim=True)


@dataclass
class Notes:
    """What one layer says of itself. Tensors only: they are read, if at all, long after the layer has run."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)  # scalars, each weighed by the config's NAME_weight
    stats: dict[str, torch.Tensor] = field(default_factory=dict)  # scalars
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)  # (B, T): score, S_CE, …
    decision: Decision | None = None
    signal: object = None  # what the layer above is told


# ---------------------------------------------------------------------------------------------------------------------
# The block


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
    def __init__(self, cfg):
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
    """A small SwiGLU behind its own RMSNorm: a cheap guess of what a block does."""

    def __init__(self, cfg):
        super().__init__(cfg.hidden_size, self.width(cfg))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    @staticmethod
    def width(cfg) -> int:
        """max(2, d·prior_factor rounded up to an even number)."""
        width = math.ceil(cfg.hidden_size * cfg.prior_factor)
        return max(2, width + width % 2)

    def folded(self) -> torch.Tensor:
        """The first two matrices as one, the norm's weight in it: (2 · width, d)."""
        return torch.cat((self.gate_proj.weight, self.up_proj.weight)) * self.norm.weight

    def forward(self, x, folded=None):
        # RMSNorm scales rows and columns, so a product can go first: x is read, never rewritten.
        scale = torch.rsqrt(routers.mean_square(x) + self.norm.eps)[..., None]  # (B, T, 1)
        product = kernels.linear(x, self.folded() if folded is None else folded) * scale
        gate, up = product.to(x.dtype).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


@dataclass(frozen=True)
class Precision:
    """Bytes of the numbers that a training step keeps."""

    product: int  # of what goes into and comes out of matrix products
    residual: int  # of the residual stream
    casts: int  # copies that autocast makes of a product's input, beside the input itself


class Block(nn.Module):
    """The Qwen2 block; as a layer of its own, the dense one. What a subclass may say of itself:"""

    description = "Qwen2: every token runs through every block."  # of the architecture, for people
    parts: dict[str, str] = {}  # names that it adds to a dense checkpoint: the group whose learning rate each has
    initial: dict[str, float] = {}  # tensors that start as a constant of their own
    below: type["Block"] | None = None  # the kind of block that must stand below it
    scores_causally = True  # whether its score at t is known at t
    controls: tuple[str, ...] = ()  # what `router` may be instead of learned

    class Settings:
        """Fields of ModelConfig that only this architecture has: a dataclass, whose comments are the help."""

    def __init__(self, cfg, index: int):
        super().__init__()
        self.config, self.index = cfg, index
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def delta(self, x, rope, store=None):
        """Δ(x) = Block(x) − x, without the cancellation of that subtraction: (B, T, d) → (B, T, d)."""
        attention = self.self_attn(self.input_layernorm(x), rope, store)
        return attention + self.mlp(self.post_attention_layernorm(x + attention))

    def delta_of_all(self, x, ctx: Context):
        """Δ of every token, keys and values filed."""
        return self.delta(x, ctx.rope, ctx.store_all(self.index, x.size(0), x.size(1)))

    def forward(self, x, ctx: Context, below: Notes) -> tuple[torch.Tensor, Notes]:
        """x: (B, T, d); below: the notes of the layer below. Returns the new x and this layer's notes."""
        store = ctx.store_all(self.index, x.size(0), x.size(1))
        x = x + self.self_attn(self.input_layernorm(x), ctx.rope, store)
        return x + self.mlp(self.post_attention_layernorm(x)), Notes()

    # -- what it costs ------------------------------------------------------------------------------------------------

    def block_flops(self, n: int, input_grad: bool = True) -> tuple[float, float]:
        """FLOPs of the Qwen2 block on n packed tokens of a sequence: forward, backward. Attention as the full square."""
        attention = 4 * n * n * self.config.hidden_size
        inner = [self.self_attn.o_proj, self.mlp]
        outer = [self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj]
        costs = [(attention, 2 * attention)]
        costs += [linear_flops(module, n) for module in inner]
        costs += [linear_flops(module, n, input_grad) for module in outer]
        return add(costs)

    def flops(self, T: int, capacity: float, training: bool, input_grad: bool) -> tuple[float, float]:
        """FLOPs of a sequence of T tokens in this layer: (forward, backward).

        capacity: share of the tokens that run where the layer is routed. training: with what only training computes.
        input_grad: whether x has a gradient; the first layer's has none where the embedding is frozen.
        """
        return self.block_flops(T, input_grad)

    def block_bytes(self) -> int:
        """Bytes of the Qwen2 block's own weights."""
        return nbytes(self.self_attn, self.mlp, self.input_layernorm, self.post_attention_layernorm)

    def decode_bytes(self, ran: dict[int, float]) -> float:
        """Bytes of weights that one decoding step reads here. ran: {routed layer: share of steps in which a row runs}."""
        return nbytes(self)

    def block_activations(self, p: Precision) -> float:
        """Bytes that autograd keeps of one token in the Qwen2 block.

        Autocast casts a product's input anew for each of q, k, v and of gate and up. CUDA's fused RMSNorm keeps a little
        less than is counted here.
        """
        d, f = self.config.hidden_size, self.config.intermediate_size
        kv = self.config.num_key_value_heads * self.config.head_dim
        normalised = (1.5 * p.casts - 0.5) * d + p.casts * d  # into q k v, into gate up
        return 4 * p.residual * d + p.product * (normalised + 2 * d + 2 * kv + 4 * f)

    def activations(self, p: Precision) -> float:
        """Bytes that autograd keeps of one token of a training step in this layer."""
        return self.block_activations(p)


def linear_flops(module: nn.Module, n: int, input_grad: bool = True) -> tuple[float, float]:
    """FLOPs of n tokens through the linear layers of a module, adapters included: (forward, backward).

    The backward pass makes one product of the same size for the input's gradient and one for a weight's, unless frozen.
    """
    forward = backward = 0
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            product = 2 * n * layer.in_features * layer.out_features
            forward += product
            backward += product * (input_grad + layer.weight.requires_grad)
    return forward, backward


def add(costs: list[tuple[float, float]]) -> tuple[float, float]:
    forward, backward = zip(*costs, strict=True)
    return sum(forward), sum(backward)


def nbytes(*modules: nn.Module) -> int:
    return sum(p.nbytes for module in modules for p in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The routed block


@dataclass
class Score:
    """What an architecture says of (B, T) tokens before some of them are chosen."""

    value: torch.Tensor | None  # (B, T): the highest run; None where only the causal router decides
    gate: Callable[[], torch.Tensor] | None = None  # gives (B, T) factors of the update, asked only if a token runs
    output: torch.Tensor | None = None  # (B, T, d): the layer's result, which the selection then does not change


class RoutedBlock(Block):
    """A block that runs on some of the tokens: y_i = x_i + gate_i · Δ(x_S)_i for i in S, y_i = x_i otherwise.

    An architecture is a subclass with a `score`. Only what is selected makes keys and values (Raposo et al. 2024).
    """

    parts = {"causal_router": "causal_router", "threshold": "router"}
    initial = {"threshold": math.nan}
    default_gate = "soft"

    def __init__(self, cfg, index: int):
        super().__init__(cfg, index)
        self.gate = cfg.gate or self.default_gate
        self.capacity = cfg.capacities[cfg.routed_layers.index(index)]
        self.causal_router = nn.Linear(2 * cfg.hidden_size, 1)
        self.causal_cut = math.log(cfg.causal_threshold / (1 - cfg.causal_threshold))  # the threshold as a logit
        if cfg.causal_decision == "threshold":
            self.register_buffer("threshold", torch.full((), torch.nan))  # average k-th highest score of training

    def score(self, x, ctx: Context, below: Notes, notes: Notes) -> Score:
        """The architecture's idea: x (B, T, d), the notes of the layer below, and this layer's, to add to."""
        raise NotImplementedError

    def selection_losses(self, score: Score, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of the score against the top-k selection (B, T); the causal router's is not among them."""
        return {}

    def forward(self, x, ctx, below):
        notes = Notes()
        score = self.score(x, ctx, below, notes)
        if score.value is not None:
            notes.tokens["score"] = score.value
        if ctx.routing == "topk":
            notes.decision = self.choose_topk(x, score.value, ctx, notes)
            notes.losses |= self.selection_losses(score, notes.decision.mask)
        else:
            notes.decision = self.choose_causal(x, score.value, ctx, notes)
        if score.output is not None:
            return score.output, notes
        run = {"packed": self.run_packed, "step": self.run_step, "static": self.run_static}[ctx.mode]
        return run(x, notes.decision, score.gate, ctx), notes

    def schedule(self, progress: float):
        """What changes with the progress of training, 0 at its start and 1 at its end."""

    # -- choosing -----------------------------------------------------------------------------------------------------

    def causal_logits(self, x, ctx: Context, notes: Notes) -> torch.Tensor:
        """The causal router's logits (B, T), on a detached input: it never moves the trunk."""
        cache = ctx.cache.layers[self.index] if ctx.cache else None
        previous = cache.state.get("carried") if cache else None
        weight, bias = self.causal_router.weight, self.causal_router.bias
        logits, carried = routers.causal_logits(x.detach(), weight, bias, previous)
        if cache:
            cache.remember("carried", ctx.last(carried))
        notes.tokens["causal_probability"] = logits.sigmoid()
        return logits

    def choose_topk(self, x, score, ctx: Context, notes: Notes) -> Decision:
        """The k best of each sequence, which looks at the future; the causal router is taught to say the same."""
        if ctx.lengths is None:
            indices, mask = routers.top_k(score, routers.capacity_k(self.capacity, x.size(1)))
        else:
            indices, mask = None, routers.top_k_ragged(score, self.capacity, ctx.lengths)
        logits = self.causal_logits(x, ctx, notes)
        chosen = logits > self.causal_cut
        notes.losses["causal"] = routers.selection_bce(logits, mask)
        notes.stats["causal_accuracy"] = (chosen == mask).float().mean()
        if self.config.causal_decision == "threshold":
            chosen = score > self.threshold
            notes.stats["kth_score"] = score.detach().masked_fill(~mask, torch.inf).amin(1).mean()
        notes.stats["causal_capacity"] = chosen.float().mean()
        return Decision(mask, "top-k score", score, None, indices)

    def choose_causal(self, x, score, ctx: Context, notes: Notes) -> Decision:
        """What each token decides from the tokens before it: by the causal router, or by its score alone."""
        logits = self.causal_logits(x, ctx, notes)
        if self.config.causal_decision == "threshold":
            decision = Decision(score > self.threshold, "average threshold", score, self.threshold)
        else:
            decision = Decision(logits > self.causal_cut, "causal router", logits, self.causal_cut)
        if ctx.decoding:
            if ctx.cache.finished is not None:
                decision.mask = decision.mask & ~ctx.cache.finished[:, None]
            return decision
        if ctx.lengths is not None:
            decision.mask = decision.mask & routers.valid_mask(ctx.lengths, x.size(1), x.device)
        notes.stats["causal_capacity"] = decision.mask.float().mean()
        return decision

    # -- running ------------------------------------------------------------------------------------------------------

    def gate_values(self, gate: Callable | None) -> torch.Tensor | None:
        """(B, T) factors of the update, or None where they are 1. Straight-through: 1, with the gradient of the gate."""
        if gate is None or self.gate == "soft":
            return gate and gate()
        return routers.straight_through(gate()) if torch.is_grad_enabled() else None

    def run_packed(self, x, decision: Decision, gate, ctx: Context):
        """A whole pass: (B, T, d) → (B, T, d).

        Selected indices ascend and are packed to the left, so one plain causal mask serves top-k, the causal forward and
        prefill: a valid query never reaches the padding of a short row, and the padding's results are dropped.
        """
        indices, counts = decision.indices, None
        if indices is None:
            indices, counts = routers.pack(decision.mask)  # (B, k), tokens of each row
        if indices.size(1) == 0:
            return x
        B, T, d = x.shape
        flat = x.flatten(0, 1)  # (B·T, d)
        flat_indices = (indices + T * torch.arange(B, device=x.device)[:, None]).flatten()  # (B·k)
        rope = tuple(t[indices] for t in ctx.rope)  # (B, k, 1, hd): positions keep their original index
        packed = flat.index_select(0, flat_indices).view(
            B, -1, d
        )  # (B, k, d); rows move whole: 20 times gather's speed
        update = self.delta(packed, rope, ctx.store(self.index, counts=counts))
        factors = self.gate_values(gate)
        if factors is not None:
            update = update * factors.gather(1, indices)[..., None]
        if counts is not None:
            update = update.masked_fill(~routers.valid_mask(counts, update.size(1), x.device)[..., None], 0)
        return flat.index_add(0, flat_indices, update.flatten(0, 1).to(x.dtype)).view(B, T, d)

    def run_step(self, x, decision: Decision, gate, ctx: Context):
        """A decoding step of the rows that run; the mask is read back, the one synchronisation of a step's layer."""
        rows = [r for r, (selected,) in enumerate(decision.mask.tolist()) if selected]
        if not rows:
            return x
        store, factors = ctx.store(self.index, rows=rows), self.gate_values(gate)
        if len(rows) == x.size(0):
            update = self.delta(x, ctx.rope, store)  # (B, 1, d)
            return x + self.gated(update, factors).to(x.dtype)
        row_index = torch.tensor(rows, device=x.device)
        x_rows, rope = x[row_index], tuple(t[row_index] for t in ctx.rope)
        update = self.delta(x_rows, rope, store)  # (rows, 1, d)
        factors = None if factors is None else factors[row_index]
        return x.index_add(0, row_index, self.gated(update, factors).to(x.dtype))

    def run_static(self, x, decision: Decision, gate, ctx: Context):
        """The same in shapes that do not depend on the selection, for the compiler: all rows run, or none.

        Where often none is selected, that is asked, for one synchronisation, and the weights are left alone. In a large
        batch some row nearly always runs, and nothing is asked.
        """
        mask = decision.mask

        def run(x):
            update = self.delta(x, ctx.rope, ctx.store(self.index, rows=mask[:, 0]))  # (B, 1, d)
            update = self.gated(update, self.gate_values(gate))
            return torch.where(mask[..., None], x + update.to(x.dtype), x)

        none_runs = (1 - self.capacity) ** x.size(0)  # its probability, were the rows independent
        ask = none_runs > 1 / 16 and torch.compiler.is_compiling()
        ask = ask and torch.__version__ >= "2.13"  # from which on torch.cond may write into a cache
        return torch.cond(mask.any(), run, torch.clone, (x,)) if ask else run(x)

    @staticmethod
    def gated(update, factors):
        return update if factors is None else update * factors[..., None]

    # -- moving the decision ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def shift_decision(self, margin: float):
        """From now on a token runs under causal routing where its `Decision.margin` was above `margin`."""
        if self.config.causal_decision == "threshold":
            self.threshold += margin
        else:
            self.causal_router.bias -= margin

    def decision_state(self) -> dict[str, torch.Tensor]:
        """What `shift_decision` moves, by its name in the layer; copies, for `load_state_dict(…, strict=False)`."""
        names = ("causal_router.bias", "threshold")
        return {name: tensor.clone() for name, tensor in self.state_dict().items() if name in names}

    @torch.no_grad()
    def update_threshold(self, kth_score: torch.Tensor):
        """Exponential moving average (0.99) of the k-th highest score, from the first value seen."""
        average = torch.lerp(kth_score, self.threshold, 0.99)
        self.threshold.copy_(torch.where(self.threshold.isnan(), kth_score, average))

    # -- what it costs ------------------------------------------------------------------------------------------------

    def flops(self, T, capacity, training, input_grad):
        k = routers.capacity_k(capacity, T) if capacity > 0 else 0
        return add([self.block_flops(k, input_grad), linear_flops(self.causal_router, T, input_grad=False)])

    def decode_bytes(self, ran):
        """The routers always, the block where a row runs."""
        return nbytes(self) - self.block_bytes() * (1 - ran[self.index])

    def activations(self, p):
        d = self.config.hidden_size
        routed = p.residual * d + 8 * d  # the gated update; the indices
        return p.residual * d + self.capacity * (self.block_activations(p) + routed)  # first what routers read
