"""A page that shows a text shaded by compute, with every token's details: page.html, filled."""

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path

import torch

from tracing import Trace
from trained import visible

TEMPLATE = Path(__file__).with_name("page.html")
COLUMNS = ("margin", "causal_probability", "score", "G", "S_CE", "S_CU")  # of the table of details, where there


def page(title: str, config, texts: list[str], ids: list[int], traced: Trace) -> str:
    """One self-contained HTML page, shaded by compute. Nothing in it is fetched, and only its own script can run."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", template, re.DOTALL)[1]
    layers = [layer_data(traced, layer) for layer in traced.masks]
    data = {"texts": [visible(text) for text in texts], "ids": ids, "loss": numbers(traced.loss), "layers": layers}
    parts = {
        "TITLE": html.escape(title),
        "FACTS": html.escape(facts(config, traced)),
        "DIGEST": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # no tag can close the data
    }
    return re.sub(r"@(\w+)@", lambda match: parts[match[1]], template)


def layer_data(traced: Trace, layer: int) -> dict:
    """What the page knows of a routed layer: which tokens entered it, what decided, and the columns of numbers."""
    values = traced.tokens[layer]
    mask = "".join(map(str, traced.masks[layer].int().tolist()))
    columns = {name: numbers(values[name]) for name in COLUMNS if name in values}
    if "G" in columns:
        columns.pop("score", None)  # it is G
    return {"index": layer, "mask": mask, "rule": traced.rules[layer]} | columns


def facts(config, traced: Trace) -> str:
    """The sentence below the page's title."""
    count, routed = len(traced.loss), len(traced.masks)
    sentence = f"{config.architecture}, {config.num_hidden_layers} blocks, {routed} of them routed"
    if routed:
        capacities = [f"{capacity:g}" for capacity in config.capacities]
        trained = capacities[0] if len(set(capacities)) == 1 else " ".join(capacities)
        sentence += f" (trained at capacity {trained}, {sum(traced.entered) / (routed * count):.0%} taken here)"
    sentence += f"; {count:,} tokens"
    loss = traced.loss[~traced.loss.isnan()]
    if len(loss):
        sentence += f", mean loss {loss.mean():.3f} nats"
    if not config.kind.scores_causally:
        sentence += ". S_CE, S_CU and G are the training pass's: inference computes none"
    return sentence


def numbers(values: torch.Tensor) -> list[float | None]:
    """(T) as JSON has it, which knows no NaN."""
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]
