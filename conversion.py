"""What a conversion asks of its parent: which blocks can be spared, and for which tokens."""

import math
import sys
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

import routers
from blocks import Notes
from errors import ConfigError
from model import ModelConfig, Transformer
from parallel import rank, say


def bar(items, what: str):
    """A progress bar, or where nobody watches one a line that says what is taking its time."""
    watched = sys.stderr.isatty()
    if not watched:
        say(f"{what} …")
    return tqdm(items, what, leave=False, disable=rank() > 0 or not watched)


class Passed(nn.Module):
    """A block that nobody enters."""

    def forward(self, x, ctx, below):
        return x, Notes()


@torch.no_grad()
def removal_costs(parent: Transformer, input_ids: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """By how much the loss of a dense model grows without each of its blocks, in nats: (B, T) each → one per block.

    The ids lie on the device that the model runs on, which may be sharded.
    """
    layers, losses = parent.model.layers, []
    parent.eval()
    for i in bar([None, *range(len(layers))], "leaving out one block after another"):
        kept = layers[i] if i is not None else None
        if i is not None:
            layers[i] = Passed()
        rows = zip(input_ids, targets, strict=True)
        row_losses = [parent(x[None], y[None]).losses["lm"].item() for x, y in rows]
        losses.append(sum(row_losses) / len(row_losses))
        if i is not None:
            layers[i] = kept
    return [loss - losses[0] for loss in losses[1:]]


def choose_layers(costs: list[float], share: float, config: ModelConfig) -> list[int]:
    """The `share` of the blocks whose removal costs least, ascending; config: of the architecture that will route them.

    Where an architecture wants a block that is not routed below each that is, the cheaper of two neighbours is taken.
    Raises ConfigError where there are not so many.
    """
    wanted, chosen = max(1, round(share * len(costs))), []
    for i in sorted(range(len(costs)), key=costs.__getitem__):
        alone = i > 0 and not {i - 1, i + 1} & set(chosen)
        if len(chosen) < wanted and (alone or not config.kind.below or config.router != "learned"):
            chosen.append(i)
    if len(chosen) < wanted:
        raise ConfigError(
            f"routed_share={share:g} of {len(costs)} blocks is more than {config.architecture} can route, whose routed "
            f"blocks stand apart: at most {len(chosen) / len(costs):.2f} with these costs"
        )
    return sorted(chosen)


RIDGE = 0.1  # of the mean square of what the lines read, which is 1: one draw a token hides what is looked for
DRAWN = 1024  # tokens at a time for which the parent's probabilities are whole


def read_and_update(layer, part: str, file) -> list:
    """Has file(what the part reads, its Δ, what the block puts out), (B, T, d) each, called whenever a dense block runs.
    Returns the hooks' handles.
    """
    seen = {}

    def keep(name, what):
        return getattr(layer, name).register_forward_hook(
            lambda _, given, out: seen.update({name: what(given[0], out)})
        )

    kept = [keep("input_layernorm", lambda x, _: x), keep("post_attention_layernorm", lambda x, _: x)]
    kept += [keep("self_attn", lambda _, out: out), keep("mlp", lambda _, out: out)]

    def done(_, given, out):
        if part == "mlp":
            file(seen["post_attention_layernorm"], seen["mlp"], out[0])
        else:
            file(seen["input_layernorm"], seen["self_attn"] + seen["mlp"], out[0])
        seen.clear()

    return [*kept, layer.register_forward_hook(done)]


class Regression:
    """Sums for the least squares of a line from x / rms(x) to a number of each token, and what they come to."""

    def __init__(self, config: ModelConfig):
        d, self.eps = config.hidden_size, config.rms_norm_eps
        self.gram, self.moments = (torch.zeros(d + 1, n, dtype=torch.float64) for n in (d + 1, 1))
        self.rows = 0

    def add(self, x: torch.Tensor, target: torch.Tensor):
        """x: (B, T, d), target: (B, T)."""
        wide = torch.float64 if x.device.type == "cuda" else torch.float32  # of products: TF32 would round them
        normed = (x * routers.inverse_rms(x, self.eps)).flatten(0, 1).to(wide)
        normed = torch.cat((normed, torch.ones_like(normed[:, :1])), 1)  # (B·T, d + 1)
        self.gram += (normed.T @ normed).cpu()
        self.moments += (normed.T @ target.reshape(-1, 1).to(wide)).cpu()
        self.rows += len(normed)

    def solve(self) -> torch.Tensor:
        """The line (d + 1), its bias last; a ridge keeps directions that are hardly there from it."""
        held = RIDGE * self.rows * torch.ones(len(self.gram), dtype=torch.float64)
        held[-1] = 0  # the bias is free
        return torch.linalg.solve(self.gram + held.diag(), self.moments)[:, 0]


def fit_routers(parent: Transformer, config: ModelConfig, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What router="fitted" decides by: for each routed block w and b of the least squares of w · x / rms(x) + b − log(1 + s),
    over the tokens of input_ids (B, T). s = |⟨∇ log p(y), Δ(x)⟩| in nats: how much what the dense parent says of the text
    would change if this token skipped the block, to first order, for a text y that is drawn from what it says (so that
    E s² = Δᵀ F Δ with the Fisher information F of the block's output).

    The ids lie on the device that the parent runs on, which may be sharded. Returns {name in the state dict: tensor}.
    """

    def add(regression, x, update, out):
        def file(gradient):
            s = (gradient.float() * update.detach().float()).sum(-1).abs()  # (B, T)
            regression.add(x.detach(), s.log1p())

        if torch.is_grad_enabled():
            out.register_hook(file)

    parent.requires_grad_(False)
    sums = {i: Regression(config) for i in config.routed_layers}
    layers = ((parent.model.layers[i], partial(add, sums[i])) for i in sums)
    hooks = [hook for layer, file in layers for hook in read_and_update(layer, config.routed_part, file)]
    hooks.append(parent.model.embed_tokens.register_forward_hook(lambda _, given, out: out.requires_grad_()))
    try:
        for ids in bar(input_ids.split(max(1, DRAWN // input_ids.size(1))), "fitting routers"):
            with torch.no_grad():
                said = parent(ids).logits.float().softmax(-1)  # (B, T, V)
            drawn = torch.multinomial(said.flatten(0, 1), 1).view_as(ids)
            (parent(ids, drawn).loss * drawn.numel()).backward()  # the loss is a mean
    finally:
        for hook in hooks:
            hook.remove()
    tensors = {}
    for i, regression in sums.items():
        line = regression.solve().float()
        tensors |= {f"model.layers.{i}.router.weight": line[None, :-1], f"model.layers.{i}.router.bias": line[-1:]}
    return tensors


@torch.no_grad()
def allot(model: Transformer, input_ids: torch.Tensor) -> list[float]:
    """How a capacity γ is shared out among the routed blocks of a model with fitted routers: p of each, which takes γ^p, so that
    one border over the scores of all of them selects these shares of input_ids (B, T), and γ of all.
    """
    layers, scores = model.config.routed_layers, []
    for row in input_ids:
        tokens = model(row[None], row[None], return_masks=True).tokens  # with targets logits are never whole
        scores.append(torch.cat([tokens[i]["score"] for i in layers]))  # (layers, T)
    scores = torch.cat(scores, 1)
    selected = max(1, round(model.config.capacity * scores.numel()))
    border = scores.flatten().topk(selected).values[-1]
    shares = (scores >= border).double().mean(1).clamp(min=1 / scores.size(1))
    return (shares.log() / math.log(model.config.capacity)).tolist()
