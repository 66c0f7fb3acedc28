"""Tables of text cells, for the terminal and for Markdown: a list of rows, the header first, all of one length."""

import math


def print_table(rows: list[list[str]]):
    """Prints rows in columns as wide as their widest cell, the first to the left and the others to the right."""
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
    power = min(int(math.log10(max(value, 1)) / 3), 5)
    return f"{value / 1000**power:.3g} {' kMGTP'[power]}".rstrip()
