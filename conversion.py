"""What a conversion asks of its parent: which blocks can be spared for some of the tokens, and what a line makes of them."""

import torch
from torch import nn
from tqdm import tqdm

import routers
from blocks import Notes, rope_tables
from errors import ConfigError
from model import ModelConfig, Transformer


class Passed(nn.Module):
    """A block that nobody enters."""

    def forward(self, x, ctx, below):
        return x, Notes()


@torch.no_grad()
def removal_costs(parent: Transformer, input_ids: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """By how much the loss of a dense model grows without each of its blocks, in nats: (B, T) each → one per block."""
    layers, losses, device = parent.model.layers, [], parent.head_weight.device
    input_ids, targets = input_ids.to(device), targets.to(device)
    parent.eval()
    for i in [None, *range(len(layers))]:
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
        if len(chosen) < wanted and (alone or not config.kind.below):
            chosen.append(i)
    if len(chosen) < wanted:
        raise ConfigError(
            f"routed_share={share:g} of {len(costs)} blocks is more than {config.architecture} can route, whose routed "
            f"blocks stand apart: at most {len(chosen) / len(costs):.2f} with these costs"
        )
    return sorted(chosen)


RIDGE = 1e-3  # of the mean square of what the lines read, which is 1


@torch.no_grad()
def fit_guesses(parent: Transformer, config: ModelConfig, input_ids: torch.Tensor, batch_size: int = 8):
    """What skip="linear" starts from: for each routed block W and b of the least squares of W · x / rms(x) + b − Δ(x), over
    all tokens of input_ids (B, T) as the dense parent sees them; a ridge keeps directions that are hardly there from it.

    Returns {name in the state dict: tensor}, and {layer: the share of Δ's square that the line explains}.
    """
    d, eps, device = config.hidden_size, config.rms_norm_eps, parent.head_weight.device
    wide = torch.float64 if device.type == "cuda" else torch.float32  # of products: TF32 would round them
    products = {i: [torch.zeros(d + 1, n, dtype=torch.float64) for n in (d + 1, d)] for i in config.routed_layers}
    squares = dict.fromkeys(config.routed_layers, 0.0)
    batches = tqdm(input_ids.split(batch_size), "fitting linear guesses", leave=False, disable=None)
    for ids in batches:
        positions = torch.arange(ids.size(1), device=device)
        rope = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        x = parent.model.embed_tokens(ids.to(device))  # (B, T, d)
        for i, layer in enumerate(parent.model.layers):
            read, update = x, layer.self_attn(layer.input_layernorm(x), rope)  # (B, T, d)
            x = x + update
            mlp = layer.mlp(layer.post_attention_layernorm(x))
            read, update = (x, mlp) if config.routed_part == "mlp" else (read, update + mlp)
            x = x + mlp
            if i in products:
                update = update.flatten(0, 1).to(wide)  # (B·T, d)
                normed = (read * routers.inverse_rms(read, eps)).flatten(0, 1).to(wide)
                normed = torch.cat((normed, torch.ones_like(normed[:, :1])), 1)  # (B·T, d + 1)
                for product, other in zip(products[i], (normed, update), strict=True):
                    product += (normed.T @ other).cpu()
                squares[i] += update.square().sum().item()
    guesses, explained = {}, {}
    ridge = RIDGE * input_ids.numel() * torch.eye(d + 1, dtype=torch.float64)
    for i, (gram, moments) in products.items():
        solution = torch.linalg.solve(gram + ridge, moments)  # (d + 1, d)
        place = f"model.layers.{i}.skip"
        guesses |= {f"{place}.weight": solution[:d].T.float().contiguous(), f"{place}.bias": solution[d].float()}
        error = squares[i] - 2 * (solution * moments).sum() + (solution * (gram @ solution)).sum()
        explained[i] = 1 - (error / squares[i]).item()
    return guesses, explained
