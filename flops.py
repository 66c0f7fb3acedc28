"""FLOPs of a model by component, as torch counts them in a real training step."""

import torch
import torch.nn.functional as F

from model import ModelConfig, Transformer
from tables import print_table


def count_flops(config: ModelConfig, seq_len: int) -> tuple[dict[str, float], float]:
    """FLOPs per token of one sequence's forward pass by component, and of the training step, as torch counts them.

    Every operation of the real forward and backward pass, on tensors without memory: any size, on any machine. The loss
    is taken from the logits, for the chunked loss is one operation that FlopCounterMode does not know.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = Transformer(config)
        ids = torch.zeros(1, seq_len, dtype=torch.int64)
        out = model(ids)
        by_module = counter.get_flop_counts()
        (F.cross_entropy(out.logits[0], ids[0]) + sum(out.losses.values())).backward()
    components = by_component(model, by_module)
    return {name: flops / seq_len for name, flops in components.items()}, counter.get_total_flops() / seq_len


def by_component(model: Transformer, by_module: dict[str, dict]) -> dict[str, float]:
    """Adds up what FlopCounterMode found in each module, {module: {operation: FLOPs}}."""
    total = {name: sum(operations.values()) for name, operations in by_module.items()}
    names = ("attention, projections", "attention, products", "MLP", "priors", "routers", "head")
    components = dict.fromkeys(names, 0)
    components["head"] = total["Transformer"] - total["Transformer.model"]
    for i, layer in enumerate(model.model.layers):
        path = f"Transformer.model.layers.{i}"
        operations = by_module.get(f"{path}.self_attn", {})
        products = sum(flops for operation, flops in operations.items() if "bmm" in str(operation))
        attention, mlp = sum(operations.values()), total.get(f"{path}.mlp", 0)
        priors = sum(total.get(f"{path}.{part}", 0) for part, group in layer.parts.items() if group == "prior")
        components["attention, projections"] += attention - products
        components["attention, products"] += products
        components["MLP"] += mlp
        components["priors"] += priors
        components["routers"] += total[path] - attention - mlp - priors  # what is left of the layer
    return components


def flops_table(configs: dict[str, ModelConfig], seq_len: int) -> dict:
    """Prints and returns {architecture: {component: FLOPs per token}}, with the sums of flops_per_token beside it."""
    table = {}
    for name, config in configs.items():
        components, counted = count_flops(config, seq_len)
        with torch.device("meta"):
            model = Transformer(config)
        table[name] = components | {
            "training, forward": sum(components.values()),
            "training step, counted": counted,
            "training step, flops_per_token": model.flops_per_token(seq_len, training=True),
            "inference, flops_per_token": model.flops_per_token(seq_len),
        }
    rows = [[f"MFLOPs per token, T={seq_len}", *table]]
    for component in next(iter(table.values())):
        rows.append([component, *(f"{column[component] / 1e6:,.4g}" for column in table.values())])
    print()
    print_table(rows)
    return table
