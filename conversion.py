"""What a conversion asks of its parent: which blocks can be spared for some of the tokens, and what a line makes of them."""

import torch
from torch import nn
from tqdm import tqdm

import routers
from blocks import Notes
from errors import ConfigError
from model import ModelConfig, Transformer
from parallel import rank


def bar(items, what: str):
    return tqdm(items, what, leave=False, disable=None if rank() == 0 else True)


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


RIDGE = 1e-3  # of the mean square of what the lines read, which is 1


def read_and_update(layer, part: str, file) -> list:
    """Has file(what the part reads, its Δ), (B, T, d) each, called whenever a dense block runs. Returns the hooks' handles."""
    seen = {}

    def keep(name, what):
        return getattr(layer, name).register_forward_hook(
            lambda _, given, out: seen.update({name: what(given[0], out)})
        )

    kept = [keep("input_layernorm", lambda x, _: x), keep("post_attention_layernorm", lambda x, _: x)]
    kept += [keep("self_attn", lambda _, out: out), keep("mlp", lambda _, out: out)]

    def done(*_):
        if part == "mlp":
            file(seen["post_attention_layernorm"], seen["mlp"])
        else:
            file(seen["input_layernorm"], seen["self_attn"] + seen["mlp"])
        seen.clear()

    return [*kept, layer.register_forward_hook(done)]


class Regression:
    """Sums for the least squares of a line from x / rms(x) to Δ(x), and what they come to."""

    def __init__(self, config: ModelConfig):
        d, self.eps = config.hidden_size, config.rms_norm_eps
        self.gram, self.moments = (torch.zeros(d + 1, n, dtype=torch.float64) for n in (d + 1, d))
        self.square, self.rows = 0.0, 0

    def add(self, x: torch.Tensor, update: torch.Tensor):
        """x, update: (B, T, d)."""
        wide = torch.float64 if x.device.type == "cuda" else torch.float32  # of products: TF32 would round them
        update = update.flatten(0, 1).to(wide)  # (B·T, d)
        normed = (x * routers.inverse_rms(x, self.eps)).flatten(0, 1).to(wide)
        normed = torch.cat((normed, torch.ones_like(normed[:, :1])), 1)  # (B·T, d + 1)
        self.gram += (normed.T @ normed).cpu()
        self.moments += (normed.T @ update).cpu()
        self.square, self.rows = self.square + update.square().sum().item(), self.rows + len(update)

    def solve(self) -> tuple[torch.Tensor, float]:
        """The line (d + 1, d), its bias last, and the share of Δ's square that it explains."""
        ridge = RIDGE * self.rows * torch.eye(len(self.gram), dtype=torch.float64)
        line = torch.linalg.solve(self.gram + ridge, self.moments)
        error = self.square - 2 * (line * self.moments).sum() + (line * (self.gram @ line)).sum()
        return line, 1 - (error / self.square).item()


@torch.no_grad()
def fit_guesses(parent: Transformer, config: ModelConfig, input_ids: torch.Tensor, batch_size: int = 8):
    """What skip="linear" starts from: for each routed block W and b of the least squares of W · x / rms(x) + b − Δ(x), over
    all tokens of input_ids (B, T) as the dense parent sees them; a ridge keeps directions that are hardly there from it.

    The ids lie on the device that the parent runs on, which may be sharded. Returns {name in the state dict: tensor}, and
    {layer: the share of Δ's square that the line explains}.
    """
    sums = {i: Regression(config) for i in config.routed_layers}
    layers = ((parent.model.layers[i], sums[i]) for i in sums)
    hooks = [hook for layer, own in layers for hook in read_and_update(layer, config.routed_part, own.add)]
    try:
        for ids in bar(input_ids.split(batch_size), "fitting linear guesses"):
            parent(ids, ids)  # with targets logits are never whole
    finally:
        for hook in hooks:
            hook.remove()
    guesses, explained = {}, {}
    for i, own in sums.items():
        line, explained[i] = own.solve()
        place = f"model.layers.{i}.skip"
        guesses |= {f"{place}.weight": line[:-1].T.float().contiguous(), f"{place}.bias": line[-1].float()}
    return guesses, explained
