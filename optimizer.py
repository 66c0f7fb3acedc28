"""The optimizer: which one, what learns at which rate, a step that a bad gradient does not take, and float16's loss scale.

Another optimizer is another line in `make_optimizer`; checkpoints hold whatever state it keeps.
"""

import math

import torch

from errors import ConfigError

OPTIMIZER_BYTES = 8  # of state for each number that is trained


def make_optimizer(model, cfg) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, cfg), lr=cfg.lr_base, betas=(0.9, 0.95), fused=True)


def param_groups(model, cfg) -> list[dict]:
    """Every trainable parameter in exactly one group: by what its layer says, and decayed if it is a matrix.

    Raises ConfigError for a group that has no rate.
    """
    names, groups = ("base", "prior", "router", "causal_router", "lora"), {}
    rates = {name: getattr(cfg, f"lr_{name}") for name in names}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind, matrix = model.rate_group(name), p.ndim >= 2
        if kind not in rates:
            raise ConfigError(
                f"{name} is in the group {kind!r}: `parts` of its layer must name one of {', '.join(rates)}"
            )
        new = {"name": kind, "peak": rates[kind], "params": [], "weight_decay": cfg.weight_decay if matrix else 0.0}
        groups.setdefault((kind, matrix), new)["params"].append(p)
    return list(groups.values())


def lr_scale(step: int, max_steps: int, warmup_ratio: float, min_lr_ratio: float) -> float:
    """Share of the peak rate at `step` (0-based): linear warm-up, then a cosine down to min_lr_ratio."""
    warmup = int(warmup_ratio * max_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(optimizer, scale: float) -> dict[str, float]:
    """Sets every group to `scale` times its peak; {group: rate} as they are now."""
    for group in optimizer.param_groups:
        group["lr"] = scale * group["peak"]
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def step_unless(bad: torch.Tensor, optimizer):
    """One step, or none where `bad`, a scalar, is not 0: then weights and state stay as they are.

    A fused Adam reads it on the device, so that the host need not wait to know (as torch's GradScaler does). For any other
    optimizer the host reads it: a fused SGD would begin its momentum with whatever lies in memory. So it does on MPS,
    where releases of torch before 2.12 ignore it.
    """
    device = optimizer.param_groups[0]["params"][0].device
    fused = isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["fused"]
    if fused and device.type != "mps":
        optimizer.found_inf = bad.to(device)
        optimizer.step()
    elif not bad.item():
        optimizer.step()


class LossScale:
    """Loss scaling (Micikevicius et al. 2018, section 3.2), where products are in float16: small gradients would vanish.

    The loss is multiplied by `value` before the backward pass, gradients are divided by it afterwards. It halves when they
    overflow and doubles after INTERVAL steps without, as torch's GradScaler does; here `adapt` is told what all ranks have
    agreed on, of sharded gradients too, so that they keep one scale, and nothing is read by the host.
    """

    FIRST, INTERVAL = 2.0**16, 2000

    def __init__(self, dtype: torch.dtype, device, state: dict | None = None):
        """state: of a checkpoint, see `state`; None begins anew. Of another dtype than float16 nothing is scaled."""
        self.on = dtype == torch.float16
        if self.on:
            kept = state or {"loss_scale": self.FIRST, "overflow_steps": 0.0, "good": 0.0}
            self.value, self.overflows, self.good = (torch.tensor(number, device=device) for number in kept.values())

    def up(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.value if self.on else loss

    def down(self, parameters):
        """Divides the gradients; what has overflowed stays infinite."""
        if not self.on:
            return
        inverse = 1 / self.value  # of a power of two: exact
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(inverse.to(p.grad.device))

    def adapt(self, bad: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """What kind of step it was, a scalar: 0 for a good one, 1 for a bad one, 2 for one whose gradients overflowed.

        bad: 1 where the loss or the gradient is not finite, on any rank; loss: the sum over ranks. At a scale of 1 that is no
        overflow of ours.
        """
        overflow = (bad > 0) & torch.isfinite(loss) & (self.value > 1)
        good = torch.where(bad > 0, 0.0, self.good + 1)
        self.value = torch.where(
            overflow, self.value / 2, torch.where(good == self.INTERVAL, self.value * 2, self.value)
        )
        self.overflows, self.good = self.overflows + overflow, torch.where(good == self.INTERVAL, 0.0, good)
        return bad + overflow

    def metrics(self) -> dict[str, float]:
        return {"loss_scale": self.value.item(), "overflow_steps": self.overflows.item()} if self.on else {}

    def state(self) -> dict | None:
        return self.metrics() | {"good": self.good.item()} if self.on else None
