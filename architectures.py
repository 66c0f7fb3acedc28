"""The architectures: each is one class that says all that is particular to it, and one entry in ARCHITECTURES.

To add one, subclass RoutedBlock with a `score` (README, "change one idea", has an example of 25 lines) and enter it below.
From the class follow its settings and their help, its losses and their weights (fields NAME_weight), the learning rates
of its new parts, its FLOPs and bytes, and its card.

Sources: Raposo et al. 2024 (arXiv 2404.02258) for Mixture-of-Depths; Wieser et al. 2025 (arXiv 2511.21408) for DTF and
STT; Zakharov et al. 2021 for the surprise criteria.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import routers
from blocks import Block, Context, Decision, Notes, Predictor, RoutedBlock, Score, add, linear_flops, nbytes
from configurator import Count, Positive

# ---------------------------------------------------------------------------------------------------------------------
# Mixture-of-Depths


class MoDBlock(RoutedBlock):
    """Mixture-of-Depths: a learned score r picks the tokens and gates their update (Raposo et al. 2024, eq. 1)."""

    description = (
        "Mixture-of-Depths (arXiv 2404.02258): a learned score picks the tokens that enter every other block; the rest "
        "skip it."
    )
    parts = RoutedBlock.parts | {"router": "router"}

    @dataclass
    class Settings:
        mod_gate: Literal["sigmoid", "linear"] = "sigmoid"  # mod: gate sigmoid(r), or linear (r, as in the MoD paper)
        mod_aux_weight: float = 0.01  # mod: weight of the BCE of r against the selection
        mod_z_weight: float = 1e-4  # mod: weight of mean(r²)

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.router = nn.Linear(cfg.hidden_size, 1, bias=False)

    def score(self, x, ctx, below, notes):
        r = routers.linear_score(x, self.router.weight, self.router_scale(x))  # (B, T)
        gate = r.sigmoid() if self.config.mod_gate == "sigmoid" else r
        return Score(r, lambda: gate)

    def selection_losses(self, score, mask):
        return {"mod_aux": routers.selection_bce(score.value, mask), "mod_z": score.value.square().mean()}

    def flops(self, T, capacity, training, input_grad):
        return add([super().flops(T, capacity, training, input_grad), linear_flops(self.router, T)])


# ---------------------------------------------------------------------------------------------------------------------
# Surprise: what DTF and STT share


class SurprisedBlock(RoutedBlock):
    """A routed block whose score is the surprise gate G."""

    parts = RoutedBlock.parts | {"router": "router"}

    @dataclass
    class Settings:
        prior_factor: Positive = 0.0625  # width of prior and transition networks over hidden_size
        ma_window: Count = 100  # tokens in the moving average of the static surprise
        beta_schedule: Literal["cosine"] | None = None  # dtf, stt: cosine replaces the learned betas by scheduled ones
        beta_ce_range: tuple[Positive, Positive] = (
            0.55,
            0.55,
        )  # start and end of the scheduled beta_ce, after softplus
        beta_cu_range: tuple[Positive, Positive] = (
            0.44,
            0.44,
        )  # start and end of the scheduled beta_cu, after softplus

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.router = routers.SurpriseRouter()
        if cfg.beta_schedule:  # they follow the schedule, not the optimizer
            self.router.beta_ce.requires_grad_(False)
            self.router.beta_cu.requires_grad_(False)

    def schedule(self, progress: float):
        """Fixes the inverse temperatures where they are scheduled; progress: 0 at the start of training, 1 at its end."""
        if self.config.beta_schedule != "cosine":
            return
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        for name in ("beta_ce", "beta_cu"):
            start, end = getattr(self.config, f"{name}_range")
            raw = routers.inverse_softplus(end + (start - end) * cosine)
            getattr(self.router, name).data.fill_(raw)

    def surprise_gate(self, d_st, d_ch, ctx: Context, notes: Notes):
        """G of (B, T) surprises in a whole pass, noting how it came about and, for steps, what will be needed again."""
        window, scalars = self.config.ma_window, self.router.acting()
        if ctx.cache:
            whole = torch.full_like(d_st[:, :1], d_st.size(1), dtype=torch.int64)
            ends = ctx.ends[:, None] if ctx.lengths else whole  # (B, 1)
            ring = routers.last_values(d_st, ends, window)  # (B, window)
            ctx.cache.layers[self.index].state |= {"ring": ring, "scalars": torch.stack(scalars)}
        average = routers.moving_average(d_st, window)  # (B, T)
        g, s_ce, s_cu = routers.gate_of_surprise(d_st, d_ch, average, *scalars)
        notes.tokens |= {"G": g, "S_CE": s_ce, "S_CU": s_cu}
        notes.stats |= {"S_CE": ctx.mean(s_ce), "S_CU": ctx.mean(s_cu), "G_cont": ctx.mean(g)} | self.router.stats()
        return g


# ---------------------------------------------------------------------------------------------------------------------
# DTF: the decision layer below measures the surprise


class DecisionBlock(Block):
    """DTF's even layers: dense, and a prior guesses their update. Where it fails, the token is surprising.

    In the prior's loss, MSE(x_prior, stopgrad(x_post)), x stands on both sides and falls out. It must not be left in:
    its gradient would make x chase x_post = x + Δ(x), which moves along, and the residual stream explodes (docs/LOG.md).
    """

    parts = {"prior": "prior"}

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.prior = Predictor(cfg)

    def forward(self, x, ctx, below):
        update = self.delta_of_all(x, ctx)  # (B, T, d)
        state = ctx.cache.layers[self.index].state if ctx.cache else {}
        if ctx.decoding:

            def d_ch():  # few tokens need it
                return routers.mean_square(update - self.prior(x, state["folded"]))

            return x + update, Notes(signal=(routers.mean_square(update), d_ch))
        state["folded"] = folded = self.prior.folded()
        *surprise, loss = routers.surprise(update, self.prior(x, folded), ctx.real)
        return x + update, Notes(losses={"prior": loss} if ctx.routing == "topk" else {}, signal=surprise)

    def flops(self, T, capacity, training, input_grad):
        prior = [linear_flops(self.prior.down_proj, T)]
        prior += [linear_flops(module, T, input_grad) for module in (self.prior.gate_proj, self.prior.up_proj)]
        return add([super().flops(T, capacity, training, input_grad), *prior])

    def decode_bytes(self, ran):
        """The prior is read only for the gate of the layer above, where that runs, or for its threshold."""
        used = 0 if self.config.gate == "straight_through" else ran[self.index + 1]
        if self.config.causal_decision == "threshold":
            used = 1
        return nbytes(self) - (1 - used) * nbytes(self.prior)

    def activations(self, p):
        return super().activations(p) + self.prior.activations(p)


class DynamicBlock(SurprisedBlock):
    """DTF's odd layers: run on the tokens that surprised the decision layer below."""

    description = (
        "DTF, a Dynamic Transformer (arXiv 2511.21408): a decision block and a cheap prior measure each token's "
        "surprise; the next block runs on the most surprising tokens, the rest skip it."
    )
    below = DecisionBlock

    @dataclass
    class Settings(SurprisedBlock.Settings):
        prior_weight: float = 0.05  # dtf: weight of the prior's squared error

    def score(self, x, ctx, below, notes):
        d_st, d_ch = below.signal
        if not ctx.decoding:
            g = self.surprise_gate(d_st, d_ch, ctx, notes)
            return Score(g, lambda: g)
        state = ctx.cache.layers[self.index].state
        state["ring"].scatter_(1, ctx.positions % self.config.ma_window, d_st)

        def gate():
            shortest = 0 if ctx.mode == "static" else min(ctx.cache.lengths)
            average = routers.ring_average(state["ring"], ctx.positions, shortest)
            return routers.gate_of_surprise(d_st, d_ch(), average, *state["scalars"].unbind())[0]

        if self.config.causal_decision == "router":
            return Score(None, gate)
        g = gate()
        return Score(g, lambda: g)


# ---------------------------------------------------------------------------------------------------------------------
# STT: in training a dense pass measures the surprise


class STTBlock(SurprisedBlock):
    """STT's odd layers: in training a dense pass shows each token's update, and a transition network guesses it from the
    token before. Inference runs neither: the causal router has learnt which tokens these two disagree on.
    """

    description = (
        "STT, a Subjective Timescale Transformer (arXiv 2511.21408): a transition network predicts each token's update "
        'from the token before; blocks run where it and "no change" disagree, other tokens skip them.'
    )
    parts = SurprisedBlock.parts | {"transition": "prior"}
    default_gate = "straight_through"  # there is no G at inference
    scores_causally = False

    @dataclass
    class Settings(SurprisedBlock.Settings):
        stt_output: Literal["sparse", "dense"] = "sparse"  # stt in training: sparse (what inference does) or dense
        tpn_weight: float = 0.05  # stt: weight of the transition network's squared error
        g_reg_weight: float = 0.0  # stt: weight of mean(G)

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.transition = Predictor(cfg)

    def score(self, x, ctx, below, notes):
        if ctx.routing == "causal":
            return Score(None)
        update = self.part_delta(x, lambda hidden: self.self_attn(hidden, ctx.rope))  # (B, T, d)
        out = x + update
        predicted = routers.shift(self.transition(out))  # (B, T, d)
        d_st, d_ch, loss = routers.surprise(update, predicted, ctx.real)
        g = self.surprise_gate(d_st, d_ch, ctx, notes)
        notes.losses |= {"tpn": loss, "g_reg": ctx.mean(g)}
        return Score(g, lambda: g, out if self.config.stt_output == "dense" else None)

    def flops(self, T, capacity, training, input_grad):
        sparse = super().flops(T, capacity, training, input_grad)
        if not training:
            return sparse
        if self.config.stt_output == "dense":
            sparse = linear_flops(self.causal_router, T, input_grad=False)
        return add([self.dense_pass_flops(T, input_grad), linear_flops(self.transition, T), sparse])

    def dense_pass_flops(self, T: int, input_grad: bool) -> tuple[float, float]:
        if self.config.routed_part == "mlp" and self.config.stt_output == "sparse":  # where attention is counted anyway
            return linear_flops(self.mlp, T)
        return self.block_flops(T, input_grad)

    def decode_bytes(self, ran):
        return super().decode_bytes(ran) - nbytes(self.transition)  # which serves training only

    def activations(self, p):
        sparse = super().activations(p) if self.config.stt_output == "sparse" else 0
        once = sparse and self.config.routed_part == "mlp"  # attention is in both, and runs once
        dense = self.mlp_activations(p) if once else self.block_activations(p)
        return dense + p.residual * self.config.hidden_size + self.transition.activations(p) + sparse


# ---------------------------------------------------------------------------------------------------------------------
# Routers that nobody trains, in any architecture's place


class FittedBlock(RoutedBlock):
    """Runs on the tokens from whose skipping a line in x / rms(x) foretells the most.

    It is fitted to how much that would change what the parent says (conversion.fit_routers), and stays as it is.
    """

    parts = RoutedBlock.parts | {"router": "router"}

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.router = nn.Linear(cfg.hidden_size, 1).requires_grad_(False)

    def score(self, x, ctx, below, notes):
        scale = routers.inverse_rms(x, self.config.rms_norm_eps)
        return Score(routers.linear_score(x.detach(), self.router.weight, scale.detach()) + self.router.bias)  # (B, T)

    def flops(self, T, capacity, training, input_grad):
        forward, _ = linear_flops(self.router, T)
        return add([super().flops(T, capacity, training, input_grad), (forward, 0)])


class ControlBlock(RoutedBlock):
    """Runs on the same positions of every text, whatever it says: at random, by a fixed hash, or evenly. No router to train."""

    def choose(self, x, ctx, below, notes):
        router, (B, T, _) = self.config.router, x.shape
        group = torch.arange(routers.GROUP, device=x.device)
        rank = routers.control_rank(router, self.index, ctx.positions, group).expand(
            B, T
        )  # of (T), or (B, 1) in a step
        if self.calibrating is not None:
            self.move_border(self.capacity * routers.GROUP - self.offset - rank)
        # Whole, as ranks are: host and device, which compare in other formats, must find the same ones below it.
        cut, indices = math.ceil(round(self.capacity * routers.GROUP - self.offset, 3)), None
        if ctx.mode == "packed" and ctx.lengths is None:
            count = routers.control_count(router, self.index, T, cut)
            indices = routers.selected_first(rank[:1] < cut)[:, :count].expand(B, -1)  # ascending
        notes.decision = Decision(rank < cut, f"{router} control", -rank.float(), -cut, indices)
        self.real(notes.decision, ctx, notes)
        return Score(None)


ARCHITECTURES: dict[str, type[Block]] = {"dense": Block, "mod": MoDBlock, "dtf": DynamicBlock, "stt": STTBlock}
ALIASES = {"standard": "dense", "sdt": "dtf", "tdtf": "stt"}
ROUTERS = {"fitted": FittedBlock, "random": ControlBlock, "positional": ControlBlock}


def layer_class(cfg, index: int) -> type[Block]:
    """Which kind of layer stands at `index`."""
    if cfg.router != "learned":
        return ROUTERS[cfg.router] if index in cfg.routed_layers else Block
    if index in cfg.routed_layers:
        return cfg.kind
    return (cfg.kind.below or Block) if index + 1 in cfg.routed_layers else Block
