"""Text from a trained model, and what its router did to each token.

    python sample.py --model_path=out/quickstart --prompt="def main("
    python sample.py --model_path=out/demo/dtf --show_routing
    python sample.py --model_path=out/demo/dtf --text=README.md --html=out/readme.html

Generation and every view use causal routing: what is shown is what inference does. T tokens, V vocabulary.
"""

import base64
import codecs
import hashlib
import html
import json
import math
import os
import re
import string
import sys
import time
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import checkpoint
from configurator import ConfigError, cli, configure
from model import Transformer
from tokenizer import byte_alphabet
from weights import ModelError, find_model, replacing

EOT = "<|endoftext|>"  # ends a document: generation stops there, and an empty prompt starts behind one
WINDOW = 1024  # tokens that a text is read in at a time
VIEW_TOKENS = 20_000  # tokens that a browser still scrolls smoothly
MAP_LINES = 1_000  # height of a routing map, in lines of text, beyond which it is cut


@dataclass
class SampleConfig:
    model_path: str = "out/quickstart"  # a model directory or hub id, or a run: its final_model, else its newest step
    prompt: str = "def main("  # text to continue; empty: a new document
    max_new_tokens: int = 200  # tokens to generate
    temperature: float = 0.8  # 0 is greedy
    top_k: int = 50  # draw from the k most probable tokens only; 0: from all
    top_p: float = 1.0  # draw from the most probable tokens that reach this probability together
    num_samples: int = 1  # continuations, generated as one batch
    seed: int = 42  # of the draws; the same seed gives the same text
    show_routing: bool = False  # colour each token by the routed blocks it entered, and save a token × layer map
    png: str = "out/routing.png"  # where that map goes
    text: str = ""  # a UTF-8 text file to look at instead of generating; with --show_routing or --html
    html: str = ""  # write a page here that shows the text shaded by compute, with every token's details
    device: str = "auto"  # auto, cuda, mps or cpu

    def __post_init__(self):
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} must not be negative; 0 is greedy")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must not be negative; 0 draws from all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must lie in (0, 1]; 1 draws from all tokens")
        if self.num_samples < 1:
            raise ConfigError(f"num_samples={self.num_samples} must be at least 1")
        if os.path.splitext(self.png)[1] not in (".png", ".pdf", ".svg"):
            raise ConfigError(f"png={self.png} must end in .png, .pdf or .svg")
        if self.text and not (self.html or self.show_routing):
            raise ConfigError(f"text={self.text} is only looked at: add --html=out.html or --show_routing")


# ---------------------------------------------------------------------------------------------------------------------
# A model and its tokenizer


def open_model(path: str, device: str = "auto"):
    """The (Transformer, tokenizers.Tokenizer) saved at `path`: a model directory, a hub id, or a run's out_dir, of which
    final_model is taken, else the newest step. Raises ModelError where there is none.
    """
    from tokenizers import Tokenizer

    for directory in (path, os.path.join(path, "final_model"), *reversed(checkpoint.steps(path))):
        if os.path.exists(os.path.join(directory, "config.json")):
            break
    else:
        if os.path.isdir(path) or path.startswith("out/"):  # where runs live: no hub id
            raise ModelError(f"no model in {path}: train one with `python train.py --out_dir={path}`")
        directory = find_model(path)
    model = Transformer.from_pretrained(directory)
    tokenizer_path = os.path.join(directory, "tokenizer.json")
    if not os.path.exists(tokenizer_path):
        raise ModelError(f"{tokenizer_path} is missing: copy it from the data folder that the model was trained on")
    try:
        tokenizer = Tokenizer.from_file(tokenizer_path)
    except Exception as error:  # noqa: BLE001 (tokenizers raises nothing narrower)
        raise ModelError(f"{tokenizer_path} is no tokenizer: {error}") from None
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text, as in training
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from None


def encode(model, tokenizer, text: str) -> torch.Tensor:
    """Text → its ids (T), on the CPU; an empty text is the end-of-text token, which starts a document."""
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError:
        raise ConfigError(f"the text {text[:40]!r} is not valid UTF-8") from None
    if not ids:
        if tokenizer.token_to_id(EOT) is None:
            raise ConfigError(f"an empty text needs a tokenizer with {EOT}: give a prompt")
        ids = [tokenizer.token_to_id(EOT)]
    if max(ids) >= model.config.vocab_size:
        raise ModelError(f"the tokenizer gives id {max(ids)}, the model's vocabulary ends at {model.config.vocab_size}")
    return torch.tensor(ids)


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text; joined, they are the text.

    A character whose bytes are spread over several byte-level tokens appears with the last of them, the others add "".
    """
    byte_of = byte_alphabet()
    added = tokenizer.get_added_tokens_decoder()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = []
    for i in ids:
        token = added[i].content if i in added else tokenizer.id_to_token(i)
        if i not in added and token is not None and all(c in byte_of for c in token):
            texts.append(decoder.decode(bytes(byte_of[c] for c in token)))
        else:  # a special token, or an id that pads the vocabulary
            texts.append(decoder.decode(b"", final=True) + (token or "\ufffd"))
            decoder.reset()
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def continuations(model, tokenizer, prompt: torch.Tensor, n: int, count: int = 1, **how) -> list[torch.Tensor]:
    """`count` sequences that begin with `prompt` (T): at most n new ids each, the end-of-text id, if met, the last.

    how: temperature, top_k, top_p of `Transformer.generate`.
    """
    end = tokenizer.token_to_id(EOT)
    end = -1 if end is None else end  # no token has the id −1
    prompts = prompt.to(model.head_weight.device).expand(count, -1)
    ids = model.generate(prompts, n, stop_ids=(end,), **how)  # (count, T + n)
    sequences = []
    for row in ids.cpu():
        ends = (row[len(prompt) :] == end).nonzero()
        sequences.append(row[: len(prompt) + int(ends[0]) + 1] if len(ends) else row)
    return sequences


# ---------------------------------------------------------------------------------------------------------------------
# What the router did


@dataclass
class Trace:
    masks: dict[int, torch.Tensor]  # {routed layer: (T) bool}, whether the token entered its block
    tokens: dict[int, dict[str, torch.Tensor]]  # {routed layer: {S_CE, S_CU, G, score, causal_probability: (T)}}
    loss: torch.Tensor  # (T) cross-entropy of the token after each one, in nats; NaN after the last

    @property
    def entered(self) -> list[int]:
        """Number of routed blocks that each token entered."""
        return sum(mask.int() for mask in self.masks.values()).tolist() if self.masks else [0] * len(self.loss)


@torch.inference_mode()
def trace(model, ids: torch.Tensor) -> Trace:
    """What causal routing does to ids (T); everything returned is on the CPU.

    A text beyond the window is read in windows that overlap by half, and every token is shown as the window saw it that
    gave it the longer past. STT computes no surprise at inference: its S_CE, S_CU and G are those of the
    training pass over the same text.
    """
    size = min(WINDOW, model.config.max_position_embeddings)
    parts, done = [], 0
    while done < len(ids):
        start = 0 if done < size else done - size // 2
        window = ids[start : start + size].to(model.head_weight.device)
        out = model(window[None], routing="causal", return_masks=True)
        if model.config.architecture == "stt":
            for layer, by_name in model(window[None], routing="topk", return_masks=True).tokens.items():
                out.tokens[layer] |= {name: by_name[name] for name in ("S_CE", "S_CU", "G")}
        after = ids[start + 1 : start + size + 1].to(window)
        loss = F.cross_entropy(out.logits[0, : len(after)].float(), after, reduction="none")
        loss = F.pad(loss, (0, len(window) - len(after)), value=torch.nan)
        new = slice(done - start, None)
        tokens = {i: {name: t[0, new].cpu() for name, t in by_name.items()} for i, by_name in out.tokens.items()}
        parts.append(({i: m[0, new].cpu() for i, m in out.masks.items()}, tokens, loss[new].cpu()))
        done = start + len(window)
    layers = parts[0][0]
    return Trace(
        {i: torch.cat([masks[i] for masks, _, _ in parts]) for i in layers},
        {i: {name: torch.cat([t[i][name] for _, t, _ in parts]) for name in parts[0][1][i]} for i in layers},
        torch.cat([loss for _, _, loss in parts]),
    )


# Control characters as pictures: a model's text, printed, must not steer the terminal.
PICTURES = {c: chr(0x2400 + c) for c in range(32)} | {127: "\u2421"} | {c: "\ufffd" for c in range(128, 160)}
PICTURES |= {9: "\t", 10: "\n"}


def visible(text: str) -> str:
    """A token's text with what cannot be seen made visible; "…" for the first bytes of a character."""
    return text.translate(PICTURES | {9: "⇥   ", 10: "⏎\n"}) or "…"


# ANSI 256 backgrounds from light to dark in one hue: the order is seen without colour vision too.
SHADES = (231, 195, 153, 117, 75, 33, 26, 19, 17)


def paint(texts: list[str], entered: list[int], blocks: int, colour: bool) -> str:
    """The text with the number of routed blocks (0 … blocks) that each token entered, and a legend.

    With colour, as the token's background; without, as a digit (then a, b, … from 10) under its first character.
    """
    if colour:

        def cell(text, n):
            shade = round(n / max(blocks, 1) * (len(SHADES) - 1))
            on = f"\033[48;5;{SHADES[shade]};38;5;{231 if shade > 4 else 16}m"
            return on + text.replace("\n", f"\033[0m\n{on}") + "\033[0m"

        body = "".join(cell(visible(text), n) for text, n in zip(texts, entered, strict=True))
        scale = "".join(cell(f" {n} ", n) for n in range(blocks + 1))
    else:
        lines, rules = [""], [""]
        for text, n in zip(texts, entered, strict=True):
            digit = (string.digits + string.ascii_letters)[min(n, 61)]
            first, *rest = visible(text).split("\n")
            lines[-1] += first
            rules[-1] += digit + "·" * (len(first) - 1)
            lines, rules = lines + rest, rules + ["·" * len(line) for line in rest]
        body = "\n".join(f"{line}\n{rule}" for line, rule in zip(lines, rules, strict=True) if line)
        scale = f"0 … {blocks}"
    share = sum(entered) / max(blocks * len(entered), 1)
    return f"{body}\n\n{scale}  routed blocks entered, of {blocks}; {share:.0%} of all entries taken"


# ---------------------------------------------------------------------------------------------------------------------
# The token × layer map

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#666666",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "text.parse_math": False,  # a "$" in a text or a name is a dollar
    "pdf.fonttype": 42,  # text stays text in a PDF
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
}
COLOURS = ("#333333", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's palette
SKIPPED = "#E6E6E6"


def save_figure(fig, *paths: str):
    """Writes a figure in the format of each path's ending, whole or not at all."""
    import matplotlib

    for path in paths:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with replacing(path) as temporary, matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as a box
            fig.savefig(temporary, format=os.path.splitext(path)[1][1:] or "png")


def routing_map(title: str, texts: list[str], groups: dict[str, dict[int, torch.Tensor]], colours=COLOURS[1:]):
    """A figure of the running text with a strip under it for every routed layer, filled where the token entered.

    groups: {name: {layer: (T) bool}}, for instance one per architecture, over the same T tokens.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = 100  # characters of a row
    rows, x = [[]], 0  # a row: (token, x, width), in characters
    labels = [visible(text).replace("\n", "") for text in texts]
    labels = [label if len(label) <= 14 else label[:13] + "…" for label in labels]
    for t, label in enumerate(labels):
        if x + len(label) > columns:
            rows.append([])
            x = 0
        rows[-1].append((t, x, len(label)))
        x += len(label)
    strips = [(name, layer, mask, g) for g, (name, masks) in enumerate(groups.items()) for layer, mask in masks.items()]
    margin = max(len(f"{name} {layer}") for name, layer, _, _ in strips) + 1
    pitch = 1.9 + 0.62 * len(strips) + 0.25 * (len(groups) - 1)  # of the rows, in lines of text
    if pitch * len(rows) > MAP_LINES:
        rows = rows[: max(1, int(MAP_LINES / pitch))]
        title += f", the first {rows[-1][-1][0] + 1:,} of {len(texts):,} tokens"
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(0.1 * (columns + margin), 0.19 * (pitch * len(rows) + 1.6)))
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(-margin, columns), ylim=(pitch * len(rows) - 0.4, -2))
        ax.set_axis_off()
        ax.text(-margin, -1.3, title, fontsize=10, va="center")
        for n, row in enumerate(rows):
            top = n * pitch
            for t, x, width in row:
                ax.text(x + width / 2, top + 0.4, labels[t], family="monospace", ha="center", va="center", fontsize=11)
            for s, (name, layer, mask, g) in enumerate(strips):
                y = top + 1.0 + 0.62 * s + 0.25 * g
                colour = colours[g % len(colours)]
                faces = [colour if mask[t] else SKIPPED for t, _, _ in row]
                spans = [(x + 0.06, width - 0.12) for _, x, width in row]
                ax.broken_barh(spans, (y, 0.52), facecolors=faces, linewidth=0)
                ax.text(-0.6, y + 0.27, f"{name} {layer}", fontsize=7, ha="right", va="center", color=colour)
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# The page


def page(title: str, config, texts: list[str], ids: list[int], seen: Trace) -> str:
    """One self-contained HTML page, shaded by compute. Nothing in it is fetched, and only its own script can run."""

    def numbers(t):
        return [round(v, 4) if math.isfinite(v) else None for v in t.tolist()]  # JSON knows no NaN

    layers = []
    for i, mask in seen.masks.items():
        names = (
            ("causal_probability", "G", "S_CE", "S_CU") if "G" in seen.tokens[i] else ("causal_probability", "score")
        )
        details = {name: numbers(seen.tokens[i][name]) for name in names if name in seen.tokens[i]}
        layers.append({"index": i, "mask": "".join(map(str, mask.int().tolist()))} | details)
    capacity = config.capacity if isinstance(config.capacity, list | tuple) else [config.capacity]
    facts = f"{config.architecture}, {config.num_hidden_layers} blocks, {len(layers)} of them routed"
    if layers:
        taken = sum(seen.entered) / (len(layers) * len(texts))
        facts += f" (trained at capacity {' '.join(f'{c:g}' for c in capacity)}, {taken:.0%} taken here)"
    loss = seen.loss[~seen.loss.isnan()]
    facts += f"; {len(texts):,} tokens" + (f", mean loss {loss.mean():.3f} nats" if len(loss) else "")
    if config.architecture == "stt":
        facts += ". S_CE, S_CU and G are the training pass's: inference computes none"
    data = {"texts": [visible(text) for text in texts], "ids": ids, "loss": numbers(seen.loss), "layers": layers}
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    parts = {
        "TITLE": html.escape(title),
        "FACTS": html.escape(facts),
        "DIGEST": digest,
        "STYLE": STYLESHEET,
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # no tag can close the data
        "SCRIPT": SCRIPT,
    }
    return re.sub(r"@(\w+)@", lambda match: parts[match[1]], PAGE)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-@DIGEST@'">
<title>@TITLE@</title>
<style>@STYLE@</style>
</head>
<body>
<header>
<h1>@TITLE@</h1>
<p>@FACTS@</p>
<fieldset id="layers"><legend>Count the blocks of layer</legend></fieldset>
<div id="legend"></div>
</header>
<main id="text"></main>
<aside id="details"><p>Point at a token, or walk with the arrow keys.</p></aside>
<script type="application/json" id="data">@DATA@</script>
<script>@SCRIPT@</script>
</body>
</html>
"""

STYLESHEET = """
body { margin: 0 auto; max-width: 1240px; padding: 0 20px 40px; color: #1a1a1a; background: #fff;
  font: 14px/1.45 system-ui, sans-serif; display: grid; grid-template-columns: minmax(0, 1fr) 330px; gap: 0 28px; }
header { grid-column: 1 / -1; position: sticky; top: 0; background: #fff; padding: 12px 0 10px; z-index: 1;
  border-bottom: 1px solid #ccc; margin-bottom: 14px; }
h1 { font-size: 17px; margin: 0; overflow-wrap: anywhere; }
header p { margin: 2px 0 8px; color: #555; }
fieldset { border: 0; padding: 0; margin: 0 0 6px; display: flex; flex-wrap: wrap; gap: 2px 14px; }
fieldset legend { float: left; padding: 0; margin-right: 14px; }
fieldset legend + * { clear: none; }
#legend { display: flex; flex-wrap: wrap; gap: 4px 0; }
#legend span { padding: 1px 9px; border: 1px solid #bbb; margin-right: -1px; }
#legend em { font-style: normal; margin-left: 12px; color: #555; padding: 2px 0; }
main { font: 13.5px/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
main span { padding: 2px 0; box-shadow: inset -1px 0 #fff; }
main span.at { outline: 2px solid #c00; outline-offset: 1px; }
aside { border-left: 1px solid #ccc; padding-left: 18px; position: sticky; top: calc(var(--header) + 14px);
  align-self: start; max-height: calc(100vh - var(--header) - 28px); overflow-y: auto; }
aside b { font: 600 15px ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; background: #eee;
  padding: 2px 5px; overflow-wrap: anywhere; }
aside table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
aside td, aside th { text-align: right; padding: 2px 7px; border-bottom: 1px solid #e4e4e4; font-weight: 400; }
aside th { color: #555; }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const NAMES = {causal_probability: "p(enter)"};
const text = document.getElementById("text"), details = document.getElementById("details");
const make = (tag, content, parent) => {
  const e = document.createElement(tag);
  e.textContent = content;
  if (parent) parent.append(e);
  return e;
};
const fixed = v => v === null || v === undefined ? "–" : v.toFixed(2);
const spans = data.texts.map((t, i) => { const s = make("span", t, text); s.dataset.i = i; return s; });
const boxes = data.layers.map(layer => {
  const label = make("label", "", document.getElementById("layers"));
  const box = make("input", "", label);
  box.type = "checkbox";
  box.checked = true;
  box.onchange = shade;
  const share = [...layer.mask].filter(c => c === "1").length / data.texts.length;
  label.append(` ${layer.index} (${Math.round(100 * share)} %)`);
  return box;
});
for (const [name, checked] of data.layers.length > 1 ? [["all", true], ["none", false]] : []) {
  make("button", name, document.getElementById("layers")).onclick = () => {
    for (const box of boxes) box.checked = checked;
    shade();
  };
}
function paint(e, share) {
  const light = 98 - 68 * share;
  e.style.background = `hsl(212 ${share ? 75 : 0}% ${light}%)`;
  e.style.color = light < 62 ? "#fff" : "#111";
}
function shade() {
  const counted = data.layers.filter((_, l) => boxes[l].checked), n = counted.length;
  const tally = new Array(n + 1).fill(0);
  spans.forEach((s, i) => {
    let entered = 0;
    for (const layer of counted) entered += layer.mask[i] === "1";
    tally[entered]++;
    paint(s, n ? entered / n : 0);
  });
  const legend = document.getElementById("legend");
  legend.replaceChildren();
  tally.forEach((count, k) => {
    const e = make("span", `${k} (${Math.round(100 * count / spans.length)} %)`, legend);
    paint(e, n ? k / n : 0);
  });
  make("em", `blocks entered, of ${n} counted (share of the tokens)`, legend);
  resize();
}
function resize() {  // the details stay below the header, which stays in sight
  const height = document.querySelector("header").offsetHeight;
  document.documentElement.style.setProperty("--header", `${height}px`);
}
let at = null;
function show(i) {
  if (at !== null) spans[at].classList.remove("at");
  at = i;
  spans[i].classList.add("at");
  details.replaceChildren();
  make("b", data.texts[i].replace("\\n", ""), details);
  const entered = data.layers.filter(layer => layer.mask[i] === "1").length;
  make("p", `token ${i}, id ${data.ids[i]}`, details);
  make("p", `entered ${entered} of ${data.layers.length} routed blocks`, details);
  make("p", `loss of the next token: ${fixed(data.loss[i])} nats`, details);
  if (!data.layers.length) return;
  const columns = Object.keys(data.layers[0]).filter(name => name !== "index" && name !== "mask");
  const table = make("table", "", details), head = make("tr", "", table);
  for (const name of ["layer", "entered", ...columns]) make("th", NAMES[name] || name, head);
  for (const layer of data.layers) {
    const row = make("tr", "", table);
    make("td", layer.index, row);
    make("td", layer.mask[i] === "1" ? "●" : "○", row);
    for (const name of columns) make("td", fixed(layer[name][i]), row);
  }
}
text.onmouseover = event => { if (event.target.dataset.i) show(+event.target.dataset.i); };
document.onkeydown = event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step || event.target.tagName === "INPUT") return;
  show(Math.min(spans.length - 1, Math.max(0, (at === null ? -1 : at) + step)));
  spans[at].scrollIntoView({block: "nearest"});
};
window.onresize = resize;
shade();
"""


# ---------------------------------------------------------------------------------------------------------------------


def read_text(path: str) -> str:
    """A UTF-8 text file as it is, its line ends included."""
    with open(path, "rb") as f:
        raw = f.read()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"text={path} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}") from None


def main(argv: list[str]):
    (settings,) = configure(__doc__, argv, SampleConfig)
    cfg = SampleConfig(**settings)
    text = read_text(cfg.text) if cfg.text else None
    model, tokenizer = open_model(cfg.model_path, cfg.device)
    routed, terminal = model.config.routed_layers, sys.stdout.isatty()
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    if cfg.text:
        ids = encode(model, tokenizer, text)
        if len(ids) > VIEW_TOKENS:
            print(f"looking at the first {VIEW_TOKENS:,} of {len(ids):,} tokens", file=sys.stderr)
        sequences = [ids[:VIEW_TOKENS]]
    else:
        torch.manual_seed(cfg.seed)
        prompt = encode(model, tokenizer, cfg.prompt)
        how = {"temperature": cfg.temperature, "top_k": cfg.top_k or None, "top_p": cfg.top_p}
        start = time.perf_counter()
        sequences = continuations(model, tokenizer, prompt, cfg.max_new_tokens, cfg.num_samples, **how)
        seconds = time.perf_counter() - start

    for n, ids in enumerate(sequences):
        texts = token_texts(tokenizer, ids.tolist())
        if n:
            print("-" * 80)
        if cfg.show_routing and routed:
            print(paint(texts, trace(model, ids).entered, len(routed), terminal))
        elif not cfg.text:
            print("".join(texts).translate(PICTURES) if terminal else "".join(texts))
    if not cfg.text:
        new = sum(len(ids) - len(prompt) for ids in sequences)
        print(f"\n{new} tokens in {seconds:.3f} s, {new / seconds:,.0f} tokens/s")

    first = sequences[0]
    texts = token_texts(tokenizer, first.tolist())
    if cfg.show_routing and routed:
        title = "Tokens that entered each routed block (filled)"
        save_figure(routing_map(title, texts, {model.config.architecture: trace(model, first).masks}), cfg.png)
        print(f"token × layer map: {cfg.png}")
    elif cfg.show_routing:
        print("a dense model routes nothing: every token enters every block", file=sys.stderr)
    if cfg.html:
        title = cfg.text or f"Continuation of {cfg.prompt!r}"
        os.makedirs(os.path.dirname(cfg.html) or ".", exist_ok=True)
        with replacing(cfg.html) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as f:
            f.write(page(title, model.config, texts, first.tolist(), trace(model, first)))
        print(f"page: {cfg.html}")


if __name__ == "__main__":
    cli(main)
