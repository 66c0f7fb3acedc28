"""What a model's router did to each token of a text, under causal routing: what inference does. T tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

WINDOW = 1024  # tokens that a text is read in at a time


@dataclass
class Trace:
    masks: dict[int, torch.Tensor]  # {routed layer: (T) bool}, whether the token entered its block
    tokens: dict[
        int, dict[str, torch.Tensor]
    ]  # {routed layer: {margin, causal_probability, score, G, S_CE, S_CU: (T)}}
    rules: dict[int, str]  # {routed layer: what decided, "causal router" for instance}
    loss: torch.Tensor  # (T) cross-entropy of the token after each one, in nats; NaN after the last

    @property
    def entered(self) -> list[int]:
        """Number of routed blocks that each token entered."""
        return sum(mask.int() for mask in self.masks.values()).tolist() if self.masks else [0] * len(self.loss)


def trace(model, ids: torch.Tensor) -> Trace:
    """What causal routing does to ids (T); everything returned is on the CPU.

    A text beyond the window is read in windows that overlap by half, and every token is shown as the window saw it that
    gave it the longer past.
    """
    size = min(WINDOW, model.config.max_position_embeddings)
    windows, done = [], 0
    while done < len(ids):
        start = 0 if done < size else done - size // 2
        windows.append(trace_window(model, ids[start : start + size + 1], size, new=done - start))
        done = min(start + size, len(ids))
    return joined(windows)


@torch.inference_mode()
def trace_window(model, ids: torch.Tensor, size: int, new: int) -> Trace:
    """The trace of the first `size` ids (at most one more, the last one's target), without the first `new` of them.

    An architecture that does not score causally computes no surprise at inference: its S_CE, S_CU and G are those of the
    training pass over the same text.
    """
    ids = ids.to(model.head_weight.device)
    window, targets = ids[None, :size], ids[1:]
    out = model(window, routing="causal", return_masks=True)
    if not model.config.kind.scores_causally:
        training = model(window, routing="topk", return_masks=True)
        for layer, values in training.tokens.items():
            out.tokens[layer] = values | out.tokens[layer]
    loss = F.cross_entropy(out.logits[0, : len(targets)].float(), targets, reduction="none")
    loss = F.pad(loss, (0, window.size(1) - len(targets)), value=torch.nan)
    masks = {layer: mask[0, new:].cpu() for layer, mask in out.masks.items()}
    tokens = {}
    for layer, values in out.tokens.items():
        tokens[layer] = {name: value[0, new:].cpu() for name, value in values.items()}
    return Trace(masks, tokens, out.rules, loss[new:].cpu())


def joined(windows: list[Trace]) -> Trace:
    """One trace of consecutive pieces of a text."""
    first = windows[0]
    masks = {layer: torch.cat([window.masks[layer] for window in windows]) for layer in first.masks}
    tokens = {}
    for layer in first.masks:
        names = first.tokens[layer]
        tokens[layer] = {name: torch.cat([window.tokens[layer][name] for window in windows]) for name in names}
    return Trace(masks, tokens, first.rules, torch.cat([window.loss for window in windows]))
