"""The common look of all pictures and tables, and how they are written."""

import math
import os
import warnings

import torch

from files import replacing
from trained import visible

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

MAP_LINES = 1_000  # height of a routing map, in lines of text, beyond which it is cut
MAP_COLUMNS = 100  # its width, in characters


def colours(names) -> list[str]:
    """A colour for each name, by its place."""
    return [COLOURS[n % len(COLOURS)] for n in range(len(names))]


def save_figure(fig, *paths: str):
    """Writes a figure in the format of each path's ending, whole or not at all."""
    import matplotlib

    for path in paths:
        with replacing(path) as temporary, matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as a box
            fig.savefig(temporary, format=os.path.splitext(path)[1][1:])


def label_ends(ax, ends: list[tuple[float, str, str]], gap: float):
    """Writes (y, label, colour) behind the right end of the curves: as near to y as can be (least squares), but at least
    `gap` of the axis apart and inside it.
    """
    low, high = ax.get_ylim()
    ends = sorted(((y - low) / (high - low), label, colour) for y, label, colour in ends if math.isfinite(y))
    stacks = []  # [mean of y − i·gap, labels]: isotonic regression, by pooling neighbours that are out of order
    for i, (y, _, _) in enumerate(ends):
        stacks.append((y - i * gap, 1))
        while len(stacks) > 1 and stacks[-2][0] > stacks[-1][0]:
            (a, n), (b, m) = stacks[-2:]
            stacks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    heights = [mean for mean, n in stacks for _ in range(n)]
    for i, (height, (_, label, colour)) in enumerate(zip(heights, ends, strict=True)):
        y = min(max(height, 0), 1 - (len(ends) - 1) * gap) + i * gap
        ax.text(1.02, y, label, color=colour, transform=ax.transAxes, va="center", fontsize=8.5)


def text_rows(labels: list[str]) -> list[list[tuple[int, int, int]]]:
    """Rows of running text, at most MAP_COLUMNS wide: in each the (token, x, width) of its labels, in characters."""
    rows, x = [[]], 0
    for t, label in enumerate(labels):
        if x + len(label) > MAP_COLUMNS:
            rows.append([])
            x = 0
        rows[-1].append((t, x, len(label)))
        x += len(label)
    return rows


def routing_map(title: str, texts: list[str], groups: dict[str, dict[int, torch.Tensor]], colours=COLOURS[1:]):
    """A figure of the running text with a strip under it for every routed layer, filled where the token entered.

    groups: {name: {layer: (T) bool}}, for instance one per architecture, over the same T tokens.
    """
    import matplotlib
    from matplotlib.figure import Figure

    labels = [visible(text).replace("\n", "") for text in texts]
    labels = [label if len(label) <= 14 else label[:13] + "…" for label in labels]
    rows, strips = text_rows(labels), []  # a strip: (name, mask, colour, y)
    for g, (name, masks) in enumerate(groups.items()):
        for layer, mask in masks.items():
            y = 1.0 + 0.62 * len(strips) + 0.25 * g
            strips.append((f"{name} {layer}", mask, colours[g % len(colours)], y))
    margin = max(len(name) for name, *_ in strips) + 1
    pitch = 1.9 + 0.62 * len(strips) + 0.25 * (len(groups) - 1)  # of the rows, in lines of text
    if pitch * len(rows) > MAP_LINES:
        rows = rows[: max(1, int(MAP_LINES / pitch))]
        title += f", the first {rows[-1][-1][0] + 1:,} of {len(texts):,} tokens"
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(0.1 * (MAP_COLUMNS + margin), 0.19 * (pitch * len(rows) + 1.6)))
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(-margin, MAP_COLUMNS), ylim=(pitch * len(rows) - 0.4, -2))
        ax.set_axis_off()
        ax.text(-margin, -1.3, title, fontsize=10, va="center")
        for n, row in enumerate(rows):
            top = n * pitch
            for t, x, width in row:
                ax.text(x + width / 2, top + 0.4, labels[t], family="monospace", ha="center", va="center", fontsize=11)
            spans = [(x + 0.06, width - 0.12) for _, x, width in row]
            for name, mask, colour, y in strips:
                faces = [colour if mask[t] else SKIPPED for t, _, _ in row]
                ax.broken_barh(spans, (top + y, 0.52), facecolors=faces, linewidth=0)
                ax.text(-0.6, top + y + 0.27, name, fontsize=7, ha="right", va="center", color=colour)
    return fig


def print_table(rows: list[list[str]]):
    """Prints rows of cells, the header first, in columns as wide as their content: the first to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print(name.ljust(widths[0]), *cells, sep="  ", flush=True)


def markdown_table(rows: list[list[str]]) -> list[str]:
    """The same as lines of Markdown."""
    header, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [header, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body]


def si(value: float) -> str:
    """Three digits and a unit prefix: 1234567 → 1.23 M."""
    value = float(f"{value:.3g}")  # first, or 999,700 would be 1e+03 k
    power = min(int(math.log10(max(value, 1)) / 3), 5)
    return f"{value / 1000**power:.3g} {' kMGTP'[power]}".rstrip()
