"""Text from a trained model, and what its router did to each token.

    python sample.py --model_path=out/quickstart --prompt="def main("
    python sample.py --model_path=out/demo/dtf --show_routing
    python sample.py --model_path=out/demo/dtf --text=README.md --html=out/readme.html

Generation and every view use causal routing: what is shown is what inference does. T tokens.
"""

import os
import string
import sys
import time
from dataclasses import dataclass
from typing import Annotated

import torch

from configurator import Amount, Count, NonNegative, Range, cli, configure, problems
from errors import ConfigError
from figures import routing_map, save_figure
from files import write_whole
from page import page
from tracing import Trace, trace
from trained import PICTURES, continuations, encode, open_model, read_text, token_texts, visible

VIEW_TOKENS = 20_000  # tokens that a browser still scrolls smoothly


@dataclass
class SampleConfig:
    model_path: str = "out/quickstart"  # a model directory or hub id, or a run: its final_model, else its newest step
    prompt: str = "def main("  # text to continue; empty: a new document
    max_new_tokens: Amount = 200  # tokens to generate
    temperature: NonNegative = 0.8  # 0 is greedy
    top_k: Amount = 50  # draw from the k most probable tokens only; 0: from all
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0  # draw from the likeliest that reach it together; 1: all
    num_samples: Count = 1  # continuations, generated as one batch
    seed: int = 42  # of the draws; the same seed gives the same text
    show_routing: bool = False  # colour each token by the routed blocks it entered, and save a token × layer map
    png: str = "out/routing.png"  # where that map goes
    text: str = ""  # a UTF-8 text file to look at instead of generating; with --show_routing or --html
    html: str = ""  # write a page here that shows the text shaded by compute, with every token's details
    device: str = "auto"  # auto, cuda, mps or cpu

    def __post_init__(self):
        found = problems(self)
        if os.path.splitext(self.png)[1] not in (".png", ".pdf", ".svg"):
            found.append(f"png={self.png} must end in .png, .pdf or .svg")
        if self.text and not (self.html or self.show_routing):
            found.append(f"text={self.text} is only looked at: add --html=out.html or --show_routing")
        if found:
            raise ConfigError("; ".join(found))


# ---------------------------------------------------------------------------------------------------------------------
# What the router did, in a terminal

# ANSI 256 backgrounds from light to dark in one hue: the order is seen without colour vision too.
SHADES = (231, 195, 153, 117, 75, 33, 26, 19, 17)


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


# ---------------------------------------------------------------------------------------------------------------------


def ids_of_text(model, tokenizer, text: str) -> torch.Tensor:
    """The ids (T) of a text to look at, cut where a browser would not follow."""
    ids = encode(model, tokenizer, text)
    if len(ids) > VIEW_TOKENS:
        print(f"looking at the first {VIEW_TOKENS:,} of {len(ids):,} tokens", file=sys.stderr)
    return ids[:VIEW_TOKENS]


def generate(model, tokenizer, cfg: SampleConfig) -> tuple[list[torch.Tensor], str]:
    """The continuations of the prompt that `cfg` asks for, and a line that says how fast they came."""
    torch.manual_seed(cfg.seed)
    prompt = encode(model, tokenizer, cfg.prompt)
    sampling = {"temperature": cfg.temperature, "top_k": cfg.top_k or None, "top_p": cfg.top_p}
    start = time.perf_counter()
    sequences = continuations(model, tokenizer, prompt, cfg.max_new_tokens, cfg.num_samples, **sampling)
    seconds = time.perf_counter() - start
    new = sum(len(ids) - len(prompt) for ids in sequences)
    return sequences, f"{new} tokens in {seconds:.3f} s, {new / seconds:,.0f} tokens/s"


def main(argv: list[str]):
    (settings,) = configure(__doc__, argv, SampleConfig)
    cfg = SampleConfig(**settings)
    text = read_text(cfg.text) if cfg.text else None
    model, tokenizer = open_model(cfg.model_path, cfg.device)
    blocks, terminal = len(model.config.routed_layers), sys.stdout.isatty()
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    if cfg.text:
        sequences, speed = [ids_of_text(model, tokenizer, text)], ""
    else:
        sequences, speed = generate(model, tokenizer, cfg)
    texts = [token_texts(tokenizer, ids.tolist()) for ids in sequences]
    traces = [trace(model, ids) for ids in sequences] if cfg.show_routing or cfg.html else []

    for n in range(len(sequences)):
        if n:
            print("-" * 80)
        if cfg.show_routing and blocks:
            print(paint(texts[n], traces[n].entered, blocks, terminal))
            print(decisions(traces[n]))
        elif not cfg.text:
            print("".join(texts[n]).translate(PICTURES) if terminal else "".join(texts[n]))
    if speed:
        print(f"\n{speed}")

    if cfg.show_routing and blocks:
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
