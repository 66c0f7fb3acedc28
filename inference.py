"""Causal inference as it is measured: routers that are brought to a capacity, and decoding, step by step, of given ids."""

import torch

from generation import compiled_step
from model import Transformer


@torch.inference_mode()
def calibrate(model: Transformer, ids: torch.Tensor, capacity: float):
    """Shifts the causal decision of every routed layer so that it selects the share `capacity` of the tokens of ids (B, T).

    Layer by layer, from below: what a layer selects changes what the next one reads.
    """
    for layer in model.routed:
        unset_is_zero = {name: tensor.nan_to_num() for name, tensor in layer.decision_state().items()}
        layer.load_state_dict(unset_is_zero, strict=False)  # a threshold that no training has set has no margins
        cache = model.new_cache(*ids.shape)  # with one, logits are those of the last token only: little memory
        out = model(ids, routing="causal", cache=cache, return_masks=True)
        layer.shift_decision(cut_above(out.tokens[layer.index]["margin"], capacity))


def cut_above(values: torch.Tensor, share: float) -> float:
    """A value that the share `share` of `values` lies above, half-way between two of them."""
    values = values.flatten().sort().values
    skipped = round((1 - share) * len(values))
    below = values[skipped - 1] if skipped else values[0] - 16  # all, also of other text
    above = values[min(skipped, len(values) - 1)]
    return ((below + above) / 2).item()


class Decoder:
    """Decodes ids (B, T) behind their first `prompt` tokens: each call the next `steps`, whatever the model would say."""

    def __init__(self, model, ids: torch.Tensor, prompt: int, steps: int):
        self.model, self.ids, self.position, self.steps = model, ids, prompt, steps
        self.masks = []  # of every step so far {routed layer: (B, 1) bool}; none where steps are compiled
        self.cache = model.new_cache(*ids.shape)
        model(ids[:, :prompt], routing="causal", cache=self.cache)
        self.compiled_step = None
        if getattr(model, "decodes_compiled", False):
            self.compiled_step = compiled_step(model.head_weight.is_cuda)
            self.cache = model.static_cache(self.cache)

    def __call__(self):
        for _ in range(self.steps):
            ids = self.ids[:, self.position : self.position + 1]  # (B, 1)
            self.position += 1
            if self.compiled_step:
                self.compiled_step(self.model, ids, self.cache).argmax(-1)
                continue
            out = self.model(ids, routing="causal", cache=self.cache, return_masks=True)
            out.logits.argmax(-1)
            self.masks.append(getattr(out, "masks", None))

    def rates(self, layers) -> tuple[dict[int, float], dict[int, float]]:
        """({routed layer: share of the tokens that it selected}, {routed layer: share of steps in which any row ran})."""
        selected, ran = {}, {}
        for layer in layers:
            masks = torch.stack([by_layer[layer] for by_layer in self.masks]).float()  # (steps, B, 1)
            selected[layer] = masks.mean().item()
            ran[layer] = masks.amax(1).mean().item()
        return selected, ran
