"""A fifth architecture, as README shows it: what a researcher writes, and nothing else."""

from dataclasses import dataclass

from torch import nn

import routers
from architectures import ARCHITECTURES
from blocks import Block, Notes, RoutedBlock, Score


class MeasuredBlock(Block):
    def forward(self, x, ctx, below):
        update = self.delta_of_all(x, ctx)  # (B, T, d)
        change = routers.mean_square(update) / routers.mean_square(x)  # (B, T)
        return x + update, Notes(signal=change.log())


class NormBlock(RoutedBlock):
    description = "Norm routing: a token enters a block where the block below has just changed it a lot."
    below = MeasuredBlock
    parts = RoutedBlock.parts | {"router": "router"}

    @dataclass
    class Settings:
        norm_z_weight: float = 1e-4  # norm: weight of mean(r²)

    def __init__(self, cfg, index):
        super().__init__(cfg, index)
        self.router = nn.Linear(1, 1, bias=False)
        self.router.initial = {"weight": 1.0}

    def score(self, x, ctx, below, notes):
        r = routers.linear_score(below.signal[..., None], self.router.weight)  # (B, T)
        return Score(r, lambda: r.sigmoid())

    def selection_losses(self, score, mask):
        return {"norm_z": score.value.square().mean()}


ARCHITECTURES["norm"] = NormBlock
