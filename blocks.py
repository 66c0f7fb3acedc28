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
    # {routed layer: its average k-th score as the pass found it}: what a backward pass recomputes must select the same
    thresholds: dict[int, torch.Tensor]

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
            return self.store(layer, rows=range(B), places=self.positions[:, 0])
        return self.store(layer, counts=self.lengths or [T] * B)

    @functools.cached_property
    def ends(self) -> torch.Tensor:
        """`lengths` on the device, copied there once for all layers: (B)."""
        return torch.tensor(self.lengths, device=self.positions.device)

    @functools.cached_property  # takes a lock that torch.compile does not know: for padded passes, which are eager
    def _real(self) -> torch.Tensor:
        return self.positions < self.ends[:, None]

    @property
    def real(self) -> torch.Tensor | None:
        """What is no padding: (B, T) bool, made once for all layers; None where nothing is padded."""
        return None if self.lengths is None else self._real

    def of_real(self, t: torch.Tensor) -> torch.Tensor:
        """The entries of what is no padding: (B, T) → (N), or as they are where nothing is padded."""
        return t if self.real is None else t[self.real]

    def mean(self, t: torch.Tensor) -> torch.Tensor:
        """The mean of these entries, of which nobody asks how many they are: (B, T) → a scalar."""
        return t.float().mean() if self.real is None else (t * self.real).sum() / self.real.sum()

    def last(self, t: torch.Tensor) -> torch.Tensor:
        """The entry of each row's newest token: (B, T, …) → (B, …)."""
        if self.lengths is None or self.decoding:
            return t[:, -1]
        return t[torch.arange(t.size(0), device=t.device), self.ends - 1]


@dataclass
class Decision:
    """Which tokens run in a routed block, and what decided that."""

    mask: torch.Tensor  # (B, T) bool
    rule: str  # "top-k score", "causal router", "average threshold", or a control's name
    value: torch.Tensor  # (B, T): a score, or the causal router's logit
    cut: torch.Tensor | float | None  # above which a token runs; None: the k-th highest value of its row
    indices: torch.Tensor | None = None  # (B, k) the selected ones ascending, then others; None: to be packed
    valid: torch.Tensor | None = None  # (B, k) bool, which of those are selected; None: all

    @property
    def margin(self) -> torch.Tensor:
        """By how much each value lies above what decides, (B, T): above 0 the token runs, of the k best from 0 on; padding, and
        what an average threshold has no room for, does not.
        """
        if self.cut is not None:
            return self.value - self.cut
        return self.value - routers.lowest(self.value, self.mask)


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
        y = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        kind = x.device.type  # under autocast each product behind it would cast it anew, and keep what it cast
        return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float, scaling: dict | None = None):
    """cos and signed sin of every position's angles, the same for every head: (…) int → two (…, 1, hd) float32.

    scaling: Llama 3's, which slows frequencies whose waves are longer than the context that it was first trained on
    (The Llama 3 Herd of Models, 2024; the ramp between the two bounds as in its released code).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents  # (hd / 2)
    if scaling:
        low, high, slower = scaling["low_freq_factor"], scaling["high_freq_factor"], frequencies / scaling["factor"]
        waves = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in that context
        frequencies = torch.lerp(slower, frequencies, ((waves - low) / (high - low)).clamp(0, 1))
    angles = positions[..., None, None].float() * frequencies  # (…, 1, hd / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half-split as in Qwen2: x (B, T, heads, hd); cos, sin (T, 1, hd) or (B, T, 1, hd)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d, q, kv = cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
        self.head_dim, bias = cfg.head_dim, cfg.model_type == "qwen2"
        self.q_proj = kernels.Linear(d, q, bias=bias)
        self.k_proj = kernels.Linear(d, kv, bias=bias)
        self.v_proj = kernels.Linear(d, kv, bias=bias)
        self.o_proj = kernels.Linear(q, d, bias=False)
        self.q_norm = self.k_norm = nn.Identity()
        if cfg.model_type == "qwen3":
            self.q_norm, self.k_norm = (RMSNorm(cfg.head_dim, cfg.rms_norm_eps) for _ in range(2))

    def keys_values(self, x, rope, store=None, runs=None):
        """x (B, T, d) → its keys and values (B, n_kv, T, hd), or those to attend to where `store` files them; and a mask.

        runs: see kernels.Linear.
        """
        B, T, _ = x.shape
        k = self.k_norm(self.k_proj(x, runs).view(B, T, -1, self.head_dim))
        k = rotate(k, *rope).transpose(1, 2)  # (B, n_kv, T, hd)
        v = self.v_proj(x, runs).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv, T, hd)
        return (k, v, None) if store is None else store(k, v)

    def attend(self, x, rope, k, v, mask=None, runs=None):
        """Queries of x (B, Q, d) over k, v (B, n_kv, S, hd): (B, Q, d). mask None: causal, Q = S, or one query over all.

        In a decoding step k and v may be lists, of each row's own.
        """
        B, Q, _ = x.shape
        q = self.q_norm(self.q_proj(x, runs).view(B, Q, -1, self.head_dim))
        q = rotate(q, *rope).transpose(1, 2)  # (B, H, Q, hd)
        if Q == 1:  # a decoding step: the queries of a group stand as rows before their keys, which are read once
            q = q.view(B, k[0].size(-3), -1, self.head_dim)  # (B, n_kv, group, hd)
            if isinstance(k, list):
                y = torch.cat([F.scaled_dot_product_attention(*row) for row in zip(q.split(1), k, v, strict=True)])
            else:
                y = F.scaled_dot_product_attention(*kernels.dense_on_mps(q, k, v), attn_mask=mask)
            return self.o_proj(y.reshape(B, 1, -1), runs)
        y = kernels.attention(q, k, v, mask)  # (B, H, Q, hd)
        return self.o_proj(y.transpose(1, 2).reshape(B, Q, -1))

    def forward(self, x, rope, store=None, runs=None):
        return self.attend(x, rope, *self.keys_values(x, rope, store, runs), runs)


class MLP(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, d: int, width: int):
        super().__init__()
        self.gate_proj = kernels.Linear(d, width, bias=False)
        self.up_proj = kernels.Linear(d, width, bias=False)
        self.down_proj = kernels.Linear(width, d, bias=False)

    def forward(self, x, runs=None):
        return self.down_proj(F.silu(self.gate_proj(x, runs)) * self.up_proj(x, runs), runs)


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

    def activations(self, p) -> float:
        """Bytes that autograd keeps of one token, the distance to what is guessed among them: float32."""
        d = self.norm.weight.numel()
        return p.product * (d + 5 * self.gate_proj.out_features) + 4 * d

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
class Kept:
    """What decides how much a training step keeps: the numbers' formats, the length of the sequences, the device's type."""

    dtype: torch.dtype  # of what goes into and comes out of matrix products
    residual: int  # bytes of a number of the residual stream
    seq_len: int
    device: str

    @property
    def product(self) -> int:
        """Bytes of what goes into and comes out of a matrix product."""
        return self.dtype.itemsize


class Block(nn.Module):
    """The Qwen2 block; as a layer of its own, the dense one. What a subclass may say of itself:"""

    description = "Qwen2: every token runs through every block."  # of the architecture, for people
    parts: dict[str, str] = {}  # names that it adds to a dense checkpoint: the group whose learning rate each has
    initial: dict[str, float] = {}  # tensors that start as a constant of their own
    below: type["Block"] | None = None  # the kind of block that must stand below it
    scores_causally = True  # whether its score at t is known at t

    class Settings:
        """Fields of ModelConfig that only this architecture has: a dataclass, whose comments are the help."""

    def __init__(self, cfg, index: int):
        super().__init__()
        self.config, self.index = cfg, index
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def delta(self, x, attention: Callable, runs=None):
        """Δ(x) = Block(x) − x, without the cancellation of that subtraction: (B, T, d) → (B, T, d).

        attention: that of normalised hidden states. runs: see kernels.Linear.
        """
        update = attention(self.input_layernorm(x))
        return update + self.mlp(self.post_attention_layernorm(x + update), runs)

    def delta_of_all(self, x, ctx: Context):
        """Δ of every token, keys and values filed."""
        store = ctx.store_all(self.index, x.size(0), x.size(1))
        return self.delta(x, lambda hidden: self.self_attn(hidden, ctx.rope, store))

    def forward(self, x, ctx: Context, below: Notes) -> tuple[torch.Tensor, Notes]:
        """x: (B, T, d); below: the notes of the layer below. Returns the new x and this layer's notes."""
        store = ctx.store_all(self.index, x.size(0), x.size(1))
        x = x + self.self_attn(self.input_layernorm(x), ctx.rope, store)
        return x + self.mlp(self.post_attention_layernorm(x)), Notes()

    # -- what it costs ------------------------------------------------------------------------------------------------

    def block_flops(self, n: int, input_grad: bool = True, attending: int | None = None, seen: int | None = None):
        """FLOPs of the Qwen2 block on n packed tokens of a sequence: (forward, backward). Attention as the full square.

        attending, seen: tokens that have queries, and keys and values, where these are not the n of the MLP.
        """
        attending, seen = n if attending is None else attending, n if seen is None else seen
        attention, products = self.self_attn, 4 * attending * seen * self.attention_width
        costs = [(products, 2 * products), linear_flops(self.mlp, n), linear_flops(attention.o_proj, attending)]
        costs.append(linear_flops(attention.q_proj, attending, input_grad))
        costs += [linear_flops(module, seen, input_grad) for module in (attention.k_proj, attention.v_proj)]
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

    def attention_activations(self, p: Kept, attending: int) -> float:
        """Bytes that autograd keeps of one token in attention and its norm. attending: the tokens that do so without a mask.

        CUDA's fused RMSNorm keeps a little less than is counted here.
        """
        d, keys = self.config.hidden_size, self.keys_width(p)
        probabilities = self.config.num_attention_heads * kernels.keys_kept(attending, p.device)
        return 2 * p.residual * d + p.product * (d + 2 * self.attention_width + keys + probabilities)

    def keys_width(self, p: Kept, masked: bool = False) -> int:
        """Numbers of one token's keys and values: on CUDA repeated for each query where flash attention does not run."""
        repeated = p.device == "cuda" and not kernels.flash_runs(p.dtype, masked)
        return 2 * (self.attention_width if repeated else self.config.num_key_value_heads * self.config.head_dim)

    def mlp_activations(self, p: Kept) -> float:
        """The same of the MLP and its norm."""
        d = self.config.hidden_size
        return 2 * p.residual * d + p.product * (d + 4 * self.config.intermediate_size)

    def block_activations(self, p: Kept) -> float:
        """The same of the Qwen2 block."""
        return self.attention_activations(p, p.seq_len) + self.mlp_activations(p)

    @property
    def attention_width(self) -> int:
        """Numbers of one token's queries."""
        return self.config.num_attention_heads * self.config.head_dim

    def activations(self, p: Kept) -> float:
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
    """What an architecture says of (B, T) tokens before some of them are chosen; its losses see those that are no padding."""

    value: torch.Tensor | None  # (B, T): the highest run; None where only the causal router decides
    gate: Callable[[], torch.Tensor] | None = None  # gives (B, T) factors of the update, asked only if a token runs
    output: torch.Tensor | None = None  # (B, T, d): the layer's result, which the selection then does not change


class RoutedBlock(Block):
    """A block that runs on some of the tokens: y_i = x_i + gate_i · Δ(x_S)_i for i in S, y_i = x_i otherwise.

    An architecture is a subclass with a `score`. Only what is selected makes keys and values (Raposo et al. 2024), unless
    the configuration says otherwise; with routed_part="mlp", Δ is that of the MLP, and x what attention has made of it.
    """

    parts = {"causal_router": "causal_router", "threshold": "router", "skip": "prior"}
    initial = {"threshold": math.nan}
    default_gate = "soft"

    def __init__(self, cfg, index: int):
        super().__init__(cfg, index)
        self.gate = cfg.gate or self.default_gate
        self.capacity = cfg.capacities[cfg.routed_layers.index(index)]
        self.offset = cfg.offsets[cfg.routed_layers.index(index)]  # what the causal decision's border is moved by
        self.calibrating: float | None = None  # the share of the tokens to which the next causal pass moves it
        if not cfg.by_position:
            self.causal_router = nn.Linear(2 * cfg.hidden_size, 1)
        self.causal_cut = math.log(cfg.causal_threshold / (1 - cfg.causal_threshold))  # the threshold as a logit
        if cfg.causal_decision == "threshold":
            self.register_buffer("threshold", torch.full((), torch.nan))  # average k-th highest score of training
        if cfg.skip != "identity":
            self.skip = Predictor(cfg)

    def score(self, x, ctx: Context, below: Notes, notes: Notes) -> Score:
        """The architecture's idea: x (B, T, d), the notes of the layer below, and this layer's, to add to."""
        raise NotImplementedError

    def selection_losses(self, score: Score, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses of the score against the selection in training (B, T); the causal router's is not among them."""
        return {}

    def schedule(self, progress: float):
        """What changes with the progress of training, 0 at its start and 1 at its end."""

    def forward(self, x, ctx, below):
        notes = Notes()
        if self.config.routed_part == "mlp":
            store = ctx.store_all(self.index, x.size(0), x.size(1))
            x = x + self.self_attn(self.input_layernorm(x), ctx.rope, store)
        score = self.choose(x, ctx, below, notes)
        if score.output is not None:
            return score.output, notes
        run = {"packed": self.run_packed, "step": self.run_step, "static": self.run_static}[ctx.mode]
        return run(x, notes, score.gate, ctx), notes

    # -- choosing -----------------------------------------------------------------------------------------------------

    def choose(self, x, ctx: Context, below: Notes, notes: Notes) -> Score:
        """Files the decision, and in training its losses, in this layer's notes."""
        score = self.score(x, ctx, below, notes)
        if score.value is not None:
            notes.tokens["score"] = score.value
        if ctx.routing == "topk":
            notes.decision = self.choose_in_training(x, score.value, ctx, notes)
            real = Score(ctx.of_real(score.value), score.gate, score.output)
            notes.losses |= self.selection_losses(real, ctx.of_real(notes.decision.mask))
        else:
            notes.decision = self.choose_causal(x, score.value, ctx, notes)
        return score

    def router_scale(self, x):
        """What a product of a router with x (B, T, d) is multiplied by: None, or one number a token (B, T, 1)."""
        return None if self.config.router_input == "raw" else routers.inverse_rms(x, self.config.rms_norm_eps)

    def causal_logits(self, x, ctx: Context, notes: Notes) -> torch.Tensor:
        """The causal router's logits (B, T), on a detached input: it never moves the trunk."""
        cache = ctx.cache.layers[self.index] if ctx.cache else None
        previous = cache.state.get("carried") if cache else None
        weight, bias, x = self.causal_router.weight, self.causal_router.bias, x.detach()
        logits, carried = routers.causal_logits(x, weight, bias, previous, self.router_scale(x))
        if cache:
            cache.remember("carried", ctx.last(carried))
        notes.tokens["causal_probability"] = logits.sigmoid()
        return logits

    def choose_in_training(self, x, score, ctx: Context, notes: Notes) -> Decision:
        """The k best of each sequence, which looks at the future, or those above the average k-th score, which does not.

        The causal router is taught to say the same.
        """
        by_threshold = self.config.causal_decision == "threshold"
        if ctx.lengths is None:
            indices, mask = routers.top_k(score, routers.capacity_k(self.capacity, x.size(1)))
        else:
            indices, mask = None, routers.top_k_ragged(score, self.capacity, ctx.lengths)
        decision = Decision(mask, "top-k score", score, None, indices)
        kth_score = routers.lowest(score.detach(), mask).mean() if by_threshold else None
        if self.config.selection == "threshold":
            decision = self.choose_above_average(score, kth_score, ctx)
        logits, mask = self.causal_logits(x, ctx, notes), decision.mask
        chosen = logits > self.causal_cut
        notes.losses["causal"] = routers.selection_bce(ctx.of_real(logits), ctx.of_real(mask))
        notes.stats["causal_accuracy"] = ctx.mean(chosen == mask)
        if by_threshold:
            chosen = score > self.threshold
            notes.stats["kth_score"] = kth_score
        notes.stats["causal_capacity"] = ctx.mean(chosen)
        return decision

    def choose_above_average(self, score, kth_score, ctx: Context) -> Decision:
        """The first tokens whose score passes the average k-th highest one, this batch's before there is any: a quarter
        more than the capacity at most.
        """
        threshold = ctx.thresholds[self.index]
        cut = torch.where(threshold.isnan(), kth_score, threshold)
        room = [self.room(n, self.capacity) for n in ctx.lengths or [score.size(1)]]
        passing, indices, valid = score > cut, None, None
        if ctx.lengths is None:  # all of one width, which the host knows: nothing is read back
            mask = passing & (passing.cumsum(1) <= room[0])
            indices = routers.selected_first(mask)[:, : room[0]]  # (B, room)
            valid = mask.gather(1, indices)
        else:
            passing = passing & ctx.real
            mask = passing & (passing.cumsum(1) <= torch.tensor(room, device=score.device)[:, None])
        return Decision(mask, "average threshold", score, cut, indices, valid)

    def choose_causal(self, x, score, ctx: Context, notes: Notes) -> Decision:
        """What each token decides from the tokens before it: by the causal router, or by its score alone."""
        if self.config.causal_decision == "threshold":
            rule, value, cut = "average threshold", score, self.threshold
        else:
            rule, value, cut = "causal router", self.causal_logits(x, ctx, notes), self.causal_cut
        if self.calibrating is not None:
            self.move_border(value - cut - self.offset)
        cut = cut + self.offset
        decision = Decision(value > cut, rule, value, cut)
        return self.real(decision, ctx, notes)

    def real(self, decision: Decision, ctx: Context, notes: Notes) -> Decision:
        """Without what is padding, or finished."""
        if ctx.decoding:
            if ctx.cache.finished is not None:
                decision.mask = decision.mask & ~ctx.cache.finished[:, None]
            return decision
        if ctx.real is not None:
            decision.mask = decision.mask & ctx.real
        notes.stats["causal_capacity"] = ctx.mean(decision.mask)
        return decision

    # -- running ------------------------------------------------------------------------------------------------------

    def part_delta(self, x, attention, runs=None):
        """Δ of what is routed, on some tokens (B, k, d).

        attention, runs: as in `delta`.
        """
        if self.config.routed_part == "mlp":
            return self.mlp(self.post_attention_layernorm(x), runs)
        return self.delta(x, attention, runs)

    def keys_of_all(self, x, ctx: Context):
        """Keys, values and mask of every token where skipped ones give them too, else None."""
        if self.config.compact_cache or self.config.routed_part == "mlp":
            return None
        store = ctx.store_all(self.index, x.size(0), x.size(1))
        return self.self_attn.keys_values(self.input_layernorm(x), ctx.rope, store)

    def gate_values(self, gate: Callable | None) -> torch.Tensor | None:
        """(B, T) factors of the update, or None where they are 1. Straight-through: 1, with the gradient of the gate."""
        if gate is None or self.gate == "soft":
            return gate and gate()
        return routers.straight_through(gate()) if torch.is_grad_enabled() else None

    def skipped(self, x, mask, guess=None):
        """What becomes of the tokens that do not run: themselves, or with a guess of their update. Others stay x."""
        if self.config.skip == "identity":
            return x
        return x + (self.skip(x) if guess is None else guess).masked_fill(mask[..., None], 0).to(x.dtype)

    def run_packed(self, x, notes: Notes, gate, ctx: Context):
        """A whole pass: (B, T, d) → (B, T, d).

        Selected indices ascend and are packed to the left, so one plain causal mask serves top-k, the causal forward and
        prefill: a valid query never reaches the padding of a short row, and the padding's results are dropped.
        """
        decision = notes.decision
        indices, valid = decision.indices, decision.valid
        if indices is None:
            indices, counts = routers.pack(decision.mask)  # (B, k), tokens of each row
            valid = decision.mask.gather(1, indices)
        else:
            counts = [indices.size(1)] * x.size(0)
        keys = self.keys_of_all(x, ctx)
        guess = self.skip(x) if self.config.skip == "predict" else None
        base = self.skipped(x, decision.mask, guess)
        if indices.size(1) == 0:
            return base
        B, T, d = x.shape
        flat_indices = (indices + T * torch.arange(B, device=x.device)[:, None]).flatten()  # (B·k)
        rope = tuple(t[indices] for t in ctx.rope)  # (B, k, 1, hd): positions keep their original index

        def packed(t):  # (B, T, d) → (B, k, d); whole rows move: twenty times gather's speed
            return t.flatten(0, 1).index_select(0, flat_indices).view(B, -1, d)

        def attention(hidden):
            if keys is None:
                return self.self_attn(hidden, rope, ctx.store(self.index, counts=counts))
            seen = torch.arange(T, device=x.device) <= indices[:, None, :, None]  # (B, 1, k, T)
            return self.self_attn.attend(hidden, rope, *keys[:2], seen)

        update = self.part_delta(packed(x), attention)
        if guess is not None and ctx.routing == "topk":
            notes.losses["skip"] = self.skip_loss(packed(guess), update, valid)
        update = self.gated(update, self.gate_values(gate), indices)
        if valid is not None:
            update = update.masked_fill(~valid[..., None], 0)
        return base.flatten(0, 1).index_add(0, flat_indices, update.flatten(0, 1).to(x.dtype)).view(B, T, d)

    def run_step(self, x, notes: Notes, gate, ctx: Context):
        """A decoding step of the rows that run; the mask is read back, the one synchronisation of a step's layer."""
        mask, keys = notes.decision.mask, self.keys_of_all(x, ctx)
        rows, base = [r for r, (selected,) in enumerate(mask.tolist()) if selected], self.skipped(x, mask)
        if not rows:
            return base
        layer, factors = ctx.cache.layers[self.index], self.gate_values(gate)
        rope, every, row_index, places = ctx.rope, len(rows) == x.size(0), None, None
        if not every:
            row_index, places = torch.tensor([rows, [layer.lengths[r] for r in rows]], device=x.device)
            x, rope = x[row_index], tuple(t[row_index] for t in rope)
            keys = keys and layer.of_rows(rows, row_index, places - 1)  # which hold this step's already
            factors = None if factors is None else factors[row_index]

        def attention(hidden):
            if keys:
                return self.self_attn.attend(hidden, rope, *keys)
            return self.self_attn(hidden, rope, ctx.store(self.index, rows=rows, row_index=row_index, places=places))

        update = self.gated(self.part_delta(x, attention), factors).to(x.dtype)  # (rows, 1, d)
        return base + update if every else base.index_add(0, row_index, update)

    def run_static(self, x, notes: Notes, gate, ctx: Context):
        """The same in shapes that do not depend on the selection, for the compiler: all rows run, or none.

        Where often none is selected, that is asked, and the weights are left alone. In a large batch some row nearly always
        runs, and nothing is asked; nor on a GPU, where the answer, read by the host, costs more than it may save: on CUDA the
        products of a small batch look for themselves.
        """
        mask, keys = notes.decision.mask, self.keys_of_all(x, ctx)
        base, selected = self.skipped(x, mask), mask[:, 0]
        runs = selected if kernels.skips_idle(x) else None

        def attention(hidden):
            if keys:
                return self.self_attn.attend(hidden, ctx.rope, *keys, runs)
            return self.self_attn(hidden, ctx.rope, ctx.store(self.index, rows=selected), runs)

        def run(x):
            update = self.gated(self.part_delta(x, attention, runs), self.gate_values(gate))  # (B, 1, d)
            return torch.where(mask[..., None], x + update.to(x.dtype), base)

        def rest(x):
            return base.clone()

        none_runs = (1 - self.capacity) ** x.size(0)  # its probability, were the rows independent
        ask = none_runs > 1 / 16 and torch.compiler.is_compiling() and x.device.type == "cpu"
        ask = ask and torch.__version__ >= "2.13"  # from which on torch.cond may write into a cache
        return torch.cond(mask.any(), run, rest, (x,)) if ask else run(x)

    @staticmethod
    def gated(update, factors, indices=None):
        """update (B, k, d) times factors (B, T), those of its tokens where indices (B, k) say which they are."""
        if factors is None:
            return update
        return update * (factors if indices is None else factors.gather(1, indices))[..., None]

    @staticmethod
    def skip_loss(guess, update, valid):
        """MSE(guess, stopgrad(update)) of the tokens that ran, (B, k, d) each; valid (B, k): which of them, None for all."""
        error = (guess.float() - update.detach().float()).square().mean(-1)  # (B, k)
        return error.mean() if valid is None else (error * valid).sum() / valid.sum().clamp(min=1)

    # -- learning the threshold, and where the causal decision's border lies -------------------------------------------

    @torch.no_grad()
    def update_threshold(self, kth_score: torch.Tensor):
        """Exponential moving average (0.99) of the k-th highest score, from the first value seen.

        In a tensor of its own: the backward pass may compute anew from the one before.
        """
        average = torch.lerp(kth_score, self.threshold, 0.99)
        self.threshold = torch.where(self.threshold.isnan(), kth_score, average)

    @torch.no_grad()
    def move_border(self, margin: torch.Tensor):
        """Moves `offset` so that the share `calibrating` of these tokens is selected: margin (B, T), of each above the border."""
        margins = margin.flatten().sort().values
        skipped = round((1 - self.calibrating) * len(margins))
        below = margins[skipped - 1] if skipped else margins[0] - 16  # all, also of other text
        above = margins[min(skipped, len(margins) - 1)]
        self.offset += ((below + above) / 2).item()

    # -- what it costs ------------------------------------------------------------------------------------------------

    def room(self, T: int, capacity: float) -> int:
        """How many of T tokens a training step runs."""
        if self.config.selection == "threshold":
            return math.ceil(min(T, 1.25 * capacity * T))
        return routers.capacity_k(capacity, T)

    def flops(self, T, capacity, training, input_grad):
        k = (self.room if training else routers.capacity_k)(T, capacity) if capacity > 0 else 0
        attending = k if self.config.routed_part == "block" else T
        costs = [self.block_flops(k, input_grad, attending, k if self.config.compact_cache else T)]
        if not self.config.by_position and (training or self.config.causal_decision == "router"):
            costs.append(linear_flops(self.causal_router, T, input_grad=False))
        if self.config.skip != "identity":
            costs.append(linear_flops(self.skip, T))
        return add(costs)

    def decode_bytes(self, ran):
        """What every token needs always, the routed part where a row runs; the causal router where it decides."""
        routed = self.block_bytes()
        if self.config.routed_part == "mlp":
            routed = nbytes(self.mlp, self.post_attention_layernorm)
        elif not self.config.compact_cache:
            routed -= nbytes(self.self_attn.k_proj, self.self_attn.v_proj, self.input_layernorm)
        unread = nbytes(self.causal_router) if self.config.causal_decision == "threshold" else 0
        return nbytes(self) - routed * (1 - ran[self.index]) - unread

    def activations(self, p):
        cfg, d, k = self.config, self.config.hidden_size, self.room(p.seq_len, self.capacity)
        of_all = p.residual * d  # what routers read
        routed = self.mlp_activations(p) + p.residual * d + 8 * d  # the gated update; the indices
        if cfg.routed_part == "mlp":
            of_all += self.attention_activations(p, p.seq_len)
        else:
            routed += self.attention_activations(p, k if cfg.compact_cache else 0)
            if not cfg.compact_cache:  # keys and values
                of_all += p.residual * d + p.product * (d + self.keys_width(p, masked=True))
        if cfg.skip != "identity":
            of_all += self.skip.activations(p)
        return of_all + k / p.seq_len * routed
