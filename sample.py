"""Text from a trained model, and what its router did to each token.

    python sample.py --model_path=out/quickstart --prompt="def main("
    python sample.py --model_path=out/demo/dtf-1 --show_routing
    python sample.py --model_path=out/demo/dtf-1 --text=README.md --html=out/readme.html
    python sample.py --model_path=Qwen/Qwen2.5-0.5B-Instruct --chat --prompt="What is the capital of France?"

Generation and every view use causal routing: what is shown is what inference does. T tokens.
"""

import base64
import hashlib
import html
import json
import math
import os
import re
import string
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from configurator import Amount, Count, NonNegative, Range, Seed, cli, configure, problems
from device import Dtype, pick_device
from errors import ConfigError
from figures import routing_map, save_figure
from files import write_whole
from model import Capacity
from trained import (
    PICTURES,
    Trace,
    chat_prompt,
    continuations,
    encode,
    open_model,
    read_text,
    token_texts,
    trace,
    visible,
)

VIEW_TOKENS = 20_000  # tokens that a browser still scrolls smoothly
PAGE = Path(__file__).with_name("page.html")
COLUMNS = ("margin", "causal_probability", "score", "G", "S_CE", "S_CU")  # of its table of details, where there
# ANSI 256 backgrounds from light to dark in one hue: the order is seen without colour vision too.
SHADES = (231, 195, 153, 117, 75, 33, 26, 19, 17)


@dataclass
class SampleConfig:
    model_path: str = "out/quickstart"  # a model directory or hub id, or a run: its final_model, else its newest step
    prompt: str = "def main("  # text to continue; empty: a new document
    chat: bool = False  # the prompt is a user's message in the model's chat template, and only the reply is printed
    max_new_tokens: Amount = 200  # tokens to generate
    temperature: NonNegative = 0.8  # 0 is greedy
    top_k: Amount = 50  # draw from the k most probable tokens only; 0: from all
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0  # draw from the likeliest that reach it together; 1: all
    num_samples: Count = 1  # continuations, generated as one batch
    seed: Seed = 42  # of the draws; the same seed gives the same text
    capacity: Capacity | None = None  # which, of a model of many capacities (unset: the one that it was saved with)
    show_routing: bool = False  # colour each token by the routed blocks it entered, and save a token × layer map
    png: str = "out/routing.png"  # where that map goes
    text: str = ""  # a UTF-8 text file to look at instead of generating; with --show_routing or --html
    html: str = ""  # write a page here that shows the text shaded by compute, with every token's details
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Dtype = "auto"  # of the weights; auto: the fastest here (device.py)
    compile: bool = False  # torch.compile for the steps of generation: minutes at first, then faster

    def __post_init__(self):
        found = problems(self)
        if os.path.splitext(self.png)[1] not in (".png", ".pdf", ".svg"):
            found.append(f"png={self.png} must end in .png, .pdf or .svg")
        if self.text and not (self.html or self.show_routing):
            found.append(f"text={self.text} is only looked at: add --html=out.html or --show_routing")
        if self.text and self.chat:
            found.append(f"chat=True generates, and text={self.text} is only looked at: drop one of them")
        if found:
            raise ConfigError("; ".join(found))


def paint(texts: list[str], entered: list[int], blocks: int, colour: bool) -> str:
    """The text with the number of routed blocks (0 … blocks) that each token entered, and a legend.

    With colour, as the token's background; without, as a digit (then a, b, … from 10) under its first character.
    """
    if colour:
        body = "".join(shaded(visible(text), n, blocks) for text, n in zip(texts, entered, strict=True))
        scale = "".join(shaded(f" {n} ", n, blocks) for n in range(blocks + 1))
    else:
        body, scale = numbered(texts, entered), f"0 … {blocks}"
    share = sum(entered) / max(blocks * len(entered), 1)
    return f"{body}\n\n{scale}  routed blocks entered, of {blocks}; {share:.0%} of all entries taken"


def shaded(text: str, n: int, blocks: int) -> str:
    """The text on the shade of n out of `blocks`."""
    shade = round(n / max(blocks, 1) * (len(SHADES) - 1))
    start = f"\033[48;5;{SHADES[shade]};38;5;{231 if shade > 4 else 16}m"
    return start + text.replace("\n", f"\033[0m\n{start}") + "\033[0m"


def numbered(texts: list[str], entered: list[int]) -> str:
    """The lines of the text, below each a line with the tokens' numbers."""
    lines, numbers = [""], [""]
    for text, n in zip(texts, entered, strict=True):
        digit = (string.digits + string.ascii_letters)[min(n, 61)]
        first, *rest = visible(text).split("\n")
        lines[-1] += first
        numbers[-1] += digit + "·" * (len(first) - 1)
        lines += rest
        numbers += ["·" * len(line) for line in rest]
    return "\n".join(f"{line}\n{digits}" for line, digits in zip(lines, numbers, strict=True) if line)


def decisions(traced: Trace) -> str:
    """What decided, and for each routed layer how many tokens entered and how far from the border they were."""
    lines = ["decided by the " + " and the ".join(dict.fromkeys(traced.rules.values()))]
    for layer, mask in traced.masks.items():
        margin = traced.tokens[layer]["margin"].abs().median()
        lines.append(f"layer {layer}: {mask.float().mean():.0%} entered, median |margin| {margin:.3f}")
    return "\n".join(lines)


def page(title: str, config, texts: list[str], ids: list[int], traced: Trace) -> str:
    """One self-contained HTML page, shaded by compute. Nothing in it is fetched, and only its own script can run."""
    template = PAGE.read_text(encoding="utf-8")
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
        capacities = [f"{capacity:.3g}" for capacity in config.capacities]
        asked = capacities[0] if len(set(capacities)) == 1 else " ".join(capacities)
        sentence += f" (capacity {asked}, {sum(traced.entered) / (routed * count):.0%} taken here)"
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


def generate(model, tokenizer, cfg: SampleConfig) -> tuple[int, list[torch.Tensor], str]:
    """The prompt's tokens, the continuations that `cfg` asks for, and a line that says how fast they came."""
    torch.manual_seed(cfg.seed)
    if cfg.chat:
        prompt = chat_prompt(cfg.model_path, cfg.prompt)
    else:
        prompt = encode(model, tokenizer, cfg.prompt, begins=True)
    sampling = {"temperature": cfg.temperature, "top_k": cfg.top_k or None, "top_p": cfg.top_p}
    start = time.perf_counter()
    sequences = continuations(model, prompt, cfg.max_new_tokens, cfg.num_samples, **sampling)
    seconds = time.perf_counter() - start
    new = sum(len(ids) - len(prompt) for ids in sequences)
    return len(prompt), sequences, f"{new} tokens in {seconds:.3f} s, {new / seconds:,.0f} tokens/s"


def main(argv: list[str]):
    (settings,) = configure(__doc__, argv, SampleConfig)
    cfg = SampleConfig(**settings)
    text = read_text(cfg.text) if cfg.text else None
    device, dtype = pick_device(cfg.device, cfg.dtype)
    model, tokenizer = open_model(cfg.model_path, device, dtype, cfg.capacity)
    if cfg.compile:
        model.compile_decoding()
    blocks, terminal = len(model.config.routed_layers), sys.stdout.isatty()
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    if cfg.text:
        ids, given, speed = encode(model, tokenizer, text), 0, None
        if len(ids) > VIEW_TOKENS:
            print(f"looking at the first {VIEW_TOKENS:,} of {len(ids):,} tokens", file=sys.stderr)
        sequences = [ids[:VIEW_TOKENS]]
    else:
        given, sequences, speed = generate(model, tokenizer, cfg)
    texts = [token_texts(tokenizer, ids.tolist()) for ids in sequences]
    show = cfg.show_routing and blocks > 0
    seen = sequences if show else sequences[:1] if cfg.html else []  # a page shows the first
    traces = [trace(model, ids) for ids in seen]

    for n in range(len(sequences)):
        if n:
            print("-" * 80)
        if show:
            coloured = terminal and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
            print(paint(texts[n], traces[n].entered, blocks, coloured))
            print(decisions(traces[n]))
        elif not cfg.text:
            said = texts[n]
            if cfg.chat:  # the reply, without the token that ends it
                said = said[given : len(said) - (sequences[n][-1].item() in model.config.ends)]
            print("".join(said).translate(PICTURES) if terminal else "".join(said))
    if speed:
        print(f"\n{speed}")

    if show:
        title = "Tokens that entered each routed block (filled)"
        save_figure(routing_map(title, texts[0], {model.config.architecture: traces[0].masks}), cfg.png)
        print(f"token × layer map: {cfg.png}")
    elif cfg.show_routing:
        print("a dense model routes nothing: every token enters every block", file=sys.stderr)
    if cfg.html:
        title = cfg.text or f"Continuation of {cfg.prompt!r}"
        write_whole(cfg.html, page(title, model.config, texts[0], sequences[0].tolist(), traces[0]))
        print(f"page: {cfg.html}")


if __name__ == "__main__":
    cli(main)
