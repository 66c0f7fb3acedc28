"""Every routing decision: scores, surprise, gates, causal routers, selection and their losses.

Pure tensors in, tensors out; this file knows no model. B sequences, T tokens, d hidden size, k selected tokens.
Everything here runs in float32, under autocast too: a routing decision is a comparison, and bfloat16 makes ties.

Sources: Raposo et al. 2024 (arXiv 2404.02258) for Mixture-of-Depths; Wieser et al. 2025 (arXiv 2511.21408) for the
surprise gate and the causal router; Zakharov et al. 2021 (VPR) for the criteria of expected and unexpected change.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kernels import constant_to_compiler

# Initial values of the surprise gate's raw parameters; softplus(0.5806) = 1.025, the offset of the papers.
SURPRISE_INIT = {"beta_ce": -0.3, "beta_cu": -0.6, "o_ce": 0.5806, "m_cu": 1.1}


def shift(x: torch.Tensor) -> torch.Tensor:
    """The value of the token before, zeros before the first: (B, T, …) → (B, T, …), out[:, t] = x[:, t − 1]."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Surprise: how much a token's update differs from "nothing changes" and from what a cheap network predicted


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """‖x‖² / d of every token: (B, T, d) → (B, T) float32."""
    if x.size(1) == 1:  # a decoding step: fewer operations count, not passes over memory
        return x.float().square().mean(-1)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.square() / x.size(-1)


class _Surprise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, update, predicted):
        error = update - predicted
        ctx.save_for_backward(update, error)
        d_ch = mean_square(error)
        return mean_square(update), d_ch, d_ch.mean()

    @staticmethod
    def backward(ctx, grad_st, grad_ch, grad_loss):
        update, error = ctx.saved_tensors
        of_loss = grad_ch + grad_loss / grad_ch.numel()
        by_st, by_ch, by_loss = (
            (g * 2 / error.size(-1)).to(error.dtype)[..., None] for g in (grad_st, grad_ch, of_loss)
        )
        return torch.addcmul(update * by_st, error, by_ch), error * -by_loss


def surprise(update: torch.Tensor, predicted: torch.Tensor, real: torch.Tensor | None = None):
    """What an update is compared with: itself against "nothing changes", and against its prediction.

    update, predicted: (B, T, d) → D_st = ‖update‖² / d and D_ch = ‖update − predicted‖² / d, (B, T) float32, and the
    predictor's loss, MSE(predicted, stopgrad(update)), a scalar. That is the mean of D_ch with a gradient of its own; one
    difference serves all three, forward and backward. real: (B, T) bool, what is no padding and counts in the loss.
    """
    if real is None:
        return _Surprise.apply(update, predicted)
    d_st, d_ch, loss = _Surprise.apply(update, torch.where(real[..., None], predicted, update.detach()))
    return d_st, d_ch, loss * (real.numel() / real.sum())


def moving_average(d: torch.Tensor, window: int) -> torch.Tensor:
    """Mean of the last `window` values, the current one included, fewer at the start: (B, T) → (B, T).

    Sums each window afresh. A difference of running totals would be cheaper and wrong: after a first value of 1e6, usual
    in real checkpoints, float32 has no digits left for the ordinary values that follow.
    """
    count = torch.arange(1, d.size(-1) + 1, device=d.device).clamp(max=window)
    return F.pad(d, (window - 1, 0)).unfold(-1, window, 1).sum(-1) / count


def last_values(d: torch.Tensor, ends: torch.Tensor, window: int) -> torch.Tensor:
    """The ring for `ring_average`: (B, T) → (B, window), place t % window holding value t of the last ones before ends (B, 1)."""
    slots = torch.arange(window, device=d.device)
    times = ends - 1 - (ends - 1 - slots) % window  # the newest time before `ends` that falls on each place
    return d.gather(1, times.clamp(min=0)) * (times >= 0)


def ring_average(ring: torch.Tensor, positions: torch.Tensor, shortest: int) -> torch.Tensor:
    """`moving_average` of the newest token: ring (B, window) as in `last_values`, positions (B, 1) of it → (B, 1).

    shortest: the least of the positions, as the host knows it.
    """
    window = ring.size(1)
    return ring.sum(1, keepdim=True) / (window if shortest + 1 >= window else (positions + 1).clamp(max=window))


def acting(beta_ce, beta_cu, o_ce, m_cu) -> tuple[torch.Tensor, ...]:
    """The raw scalars of a surprise gate as `gate_of_surprise` takes them: softplus of the betas, the log of o_ce's, m_cu."""
    return F.softplus(beta_ce), F.softplus(beta_cu), torch.log(F.softplus(o_ce) + 1e-10), m_cu


def gate_of_surprise(d_st, d_ch, average, beta_ce, beta_cu, log_o_ce, m_cu):
    """`surprise_gate` where the moving average of d_st and the `acting` scalars are known, as in a decoding step."""
    s_ce = torch.sigmoid(beta_ce * (d_st - d_ch + log_o_ce))  # expected change
    s_cu = torch.sigmoid(beta_cu * torch.addcmul(d_st, m_cu, average, value=-1))  # unexpected change
    return torch.addcmul(s_ce + s_cu, s_ce, s_cu, value=-1), s_ce, s_cu


def surprise_gate(d_st, d_ch, beta_ce, beta_cu, o_ce, m_cu, window: int):
    """G, the probabilistic or of expected and unexpected change (Wieser et al. 2025; criteria of Zakharov et al. 2021).

    d_st, d_ch: (B, T) static and change surprise. beta_ce, beta_cu, o_ce, m_cu: raw scalars (softplus keeps the first
    three positive, so that neither the logarithm nor its gradient can die). window: tokens in the moving average.
    Returns (G, S_CE, S_CU), each (B, T) in (0, 1). Causal: token t depends on tokens ≤ t only.
    """
    raw = (torch.as_tensor(p, device=d_st.device) for p in (beta_ce, beta_cu, o_ce, m_cu))
    return gate_of_surprise(d_st, d_ch, moving_average(d_st, window), *acting(*raw))


class SurpriseRouter(nn.Module):
    """The four learnable scalars of one routed layer's surprise gate."""

    initial = SURPRISE_INIT

    def __init__(self):
        super().__init__()
        for name in SURPRISE_INIT:
            self.register_parameter(name, nn.Parameter(torch.empty(())))

    def acting(self) -> tuple[torch.Tensor, ...]:
        return acting(*(getattr(self, name).float() for name in SURPRISE_INIT))

    def stats(self) -> dict[str, torch.Tensor]:
        """The scalars as they act: the betas and o_ce after softplus."""
        raw = {name: getattr(self, name).detach().float() for name in SURPRISE_INIT}
        return {name: value if name == "m_cu" else F.softplus(value) for name, value in raw.items()}


def inverse_softplus(value: float) -> float:
    """The raw parameter whose softplus is `value` > 0."""
    return value + torch.log(-torch.expm1(torch.tensor(-value, dtype=torch.float64, device="cpu"))).item()


# ---------------------------------------------------------------------------------------------------------------------
# Controls: the same tokens whatever they say, by position alone. In whole numbers: every device says the same

GROUP = 64  # positions among which a control selects its share, rounded up


def hashed(layer: int, positions):
    """A fixed hash of (layer, position), tensor or numpy array: int64 → int64 below 2^31."""
    x = positions * 0x9E3779B1 + layer * 0x85EBCA77 + 0x165667B1
    for _ in range(3):
        x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF  # of a product that overflows the low bits are right
    return x


def control_rank(router: str, layer: int, positions, group):
    """0 … GROUP − 1 for each position within its group of 64: those below ⌈64γ⌉ run. (…) int64 → (…) int64.

    "random": by a fixed hash of layer and position. "positional": evenly spaced, by the bits of the position reversed.
    positions, group: tensors or numpy arrays; group counts from 0 to 63.
    """
    within = positions % GROUP
    if router == "positional":
        return sum(((within >> bit) & 1) << (5 - bit) for bit in range(6))
    others = (positions - within)[..., None] + group  # (…, 64)
    return (hashed(layer, others) < hashed(layer, positions)[..., None]).sum(-1)


@constant_to_compiler
def control_count(router: str, layer: int, T: int, cut: int) -> int:
    """How many of the positions below T have a rank below `cut`, found on the host: no shape waits for the device."""
    return int((control_rank(router, layer, np.arange(T), np.arange(GROUP)) < cut).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Learned scores


def float32_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x · weightᵀ in float32, under autocast too: (…, n), (m, n) → (…, m). scale: (…, 1), by which it is multiplied."""
    if torch.is_autocast_enabled(x.device.type):  # entering the context costs more than a decoding step's product
        with torch.autocast(x.device.type, enabled=False):
            return float32_linear(x, weight, scale)
    x, weight = x.float(), weight.float()
    if x.is_cuda:  # a product by a vector is never in TF32
        product = torch.stack([torch.mv(x.flatten(0, -2), row) for row in weight], -1).view(*x.shape[:-1], -1)
    else:
        product = F.linear(x, weight)
    return product if scale is None else product * scale


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / RMS of every token, by which a product with x becomes one with RMS-normalised x: (B, T, d) → (B, T, 1) float32."""
    return torch.rsqrt(mean_square(x) + eps)[..., None]


def linear_score(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """MoD's router r_t = w·x_t (Raposo et al. 2024, section 3.4): (B, T, d), (1, d) → (B, T) float32.

    scale: (B, T, 1) `inverse_rms` of x where the router reads normalised input.
    """
    return float32_linear(x, weight, scale).squeeze(-1)


def causal_logits(x, weight, bias, previous=None, scale=None):
    """Causal router: W [x_t ‖ x_{t−1}] + b, zeros before the first token.

    x: (B, T, d), weight: (1, 2d), bias: (1). The two halves of W are applied apart, so the concatenation is never
    built and a decoding step remembers one number of the token before, not its hidden state.
    previous: (B,) that number, or None at the start of a sequence. scale: as in `linear_score`.
    Returns (logits (B, T) float32, the number of every token (B, T) for the next call).
    """
    of_token, for_next = float32_linear(x, weight.view(2, -1), scale).unbind(-1)  # (B, T) each
    of_previous = shift(for_next) if previous is None else previous[:, None]
    return of_token + of_previous + bias.float(), for_next


def straight_through(gate: torch.Tensor) -> torch.Tensor:
    """Value 1, gradient of `gate`."""
    return 1.0 + (gate - gate.detach())


# ---------------------------------------------------------------------------------------------------------------------
# Selection


def capacity_k(capacity: float, T: int) -> int:
    """Tokens that a routed block takes of T: max(1, int(γ·T))."""
    return max(1, int(capacity * T))


def top_k(score: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exactly k tokens of every sequence: (B, T) → indices (B, k) ascending, mask (B, T) bool.

    Ascending order is what makes an ordinary causal mask right for the packed tokens. The choice looks at the future.
    """
    indices = score.detach().topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values  # (B, k)
    return indices, torch.zeros_like(score, dtype=torch.bool).scatter(1, indices, True)


def top_k_ragged(score: torch.Tensor, capacity: float, lengths: list[int]) -> torch.Tensor:
    """Top-k within the first lengths[r] tokens of row r: (B, T) → mask (B, T) bool. Padding neither competes nor counts."""
    valid = valid_mask(lengths, score.size(1), score.device)
    k = [capacity_k(capacity, n) for n in lengths]
    order = score.detach().masked_fill(~valid, -torch.inf).topk(max(k), dim=-1).indices  # (B, k_max), best first
    return torch.zeros_like(valid).scatter(1, order, valid_mask(k, max(k), score.device))


def valid_mask(lengths: list[int], T: int, device) -> torch.Tensor:
    """(B, T) bool: True on the first lengths[r] places of row r."""
    return torch.arange(T, device=device) < torch.tensor(lengths, device=device)[:, None]


def lowest(score: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The lowest selected score of each row, that of a top-k selection its k-th highest: (B, T) each → (B, 1)."""
    return score.masked_fill(~mask, torch.inf).amin(1, keepdim=True)


def pack(mask: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Ragged selection to the left: mask (B, T) → indices (B, k_max), counts (length B).

    Row r has its counts[r] selected indices in ascending order, then unselected ones as padding, which a causal mask
    hides from every valid query. Reads the counts back to the host: the one synchronisation of a causal forward's layer.
    """
    counts = mask.sum(1).tolist()
    return selected_first(mask)[:, : max(counts)], counts


def selected_first(mask: torch.Tensor) -> torch.Tensor:
    """The places of each row, the selected ones before the others, both ascending: mask (B, T) → (B, T).

    Without a stable sort: MPS has none for long rows.
    """
    T = mask.size(1)
    return (torch.arange(T, device=mask.device) + T * ~mask).sort(1).values % T


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def selection_bce(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of (B, T) logits against the selection (B, T) bool; a scalar, the mean over tokens."""
    return F.binary_cross_entropy_with_logits(logits, mask.float())
