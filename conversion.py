"""What a conversion asks of its parent: which blocks can be spared for some of the tokens."""

import torch
from torch import nn

from blocks import Notes
from errors import ConfigError
from model import ModelConfig, Transformer


class Passed(nn.Module):
    """A block that nobody enters."""

    def forward(self, x, ctx, below):
        return x, Notes()


@torch.no_grad()
def removal_costs(parent: Transformer, input_ids: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """By how much the loss of a dense model grows without each of its blocks, in nats: (B, T) each → one per block."""
    layers, losses = parent.model.layers, []
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
