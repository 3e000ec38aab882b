"""An explanation as one HTML file: tables and plots drawn as SVG, nothing loaded from anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from edgepipe.layer_explain import Explanation, Layer, layers_table, short_name, summary
from edgepipe.table import Table

# Pixels: a row of a plot, its bars, and what is left of them for names.
ROW, BAR, NAMES = 18, 420, 260
# The plot of SQNR ends here; what is better looks alike.
BEST_DB = 60.0
STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse;font-size:12px}"
    "td,th{border:1px solid #ccc;padding:2px 6px;text-align:left}svg text{font:11px sans-serif}"
    "tr.bad td{background:#fde8e8}"
)


def html_report(found: Explanation, *, title: str, tables: Sequence[Table] = ()) -> str:
    """The page. All text is escaped; ``tables`` come after the layers'."""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in summary(found))
    layers = layers_table(found)
    bad = {row for row, layer in enumerate(found.layers) if layer.is_at_fault}
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><ul>{lines}</ul>",
        "<h2>SQNR of each layer's result (bar), and noise it alone puts on the outputs (dot)</h2>",
        _noise_plot(found.layers),
        "<h2>Range seen (dark) within what the scale can say (light)</h2>",
        _range_plot(found.layers),
        _table(layers, bad),
        *(_table(table, set()) for table in tables),
        "</html>\n",
    ]
    return "\n".join(parts)


def _svg(rows: Sequence[str], height: int, label: str) -> str:
    width = NAMES + BAR + 20
    return f'<svg role="img" aria-label="{label}" width="{width}" height="{height}" viewBox="0 0 {width} {height}">{"".join(rows)}</svg>'  # fmt: skip


def _name(layer: Layer, y: int) -> str:
    text = layer.noise.layer
    return f'<text x="{NAMES - 6}" y="{y + 13}" text-anchor="end">{html.escape(short_name(text))}<title>{html.escape(text)}</title></text>'  # fmt: skip


def _noise_plot(layers: Sequence[Layer]) -> str:
    rows = []
    for number, layer in enumerate(layers):
        y = number * ROW
        share = min(max(layer.noise.sqnr_db, 0.0), BEST_DB) / BEST_DB
        colour = "#c0392b" if layer.is_at_fault else "#5b8db8"
        tip = html.escape(f"{layer.noise.operator}: {layer.noise.sqnr_db:.1f} dB")
        rows.append(f'{_name(layer, y)}<rect x="{NAMES}" y="{y + 3}" width="{share * BAR:.1f}" height="{ROW - 6}" fill="{colour}"><title>{tip}</title></rect>')  # fmt: skip
        if layer.noise_alone:
            # -60 dB at the left, 0 dB, a dead model, at the right
            at = 1 + max(10 * math.log10(layer.noise_alone), -BEST_DB) / BEST_DB
            rows.append(f'<circle cx="{NAMES + at * BAR:.1f}" cy="{y + ROW / 2:.1f}" r="4" fill="#222"><title>{layer.noise_alone:.3g} alone</title></circle>')  # fmt: skip
    return _svg(rows, len(layers) * ROW, "SQNR and noise by layer")


def _range_plot(layers: Sequence[Layer]) -> str:
    """Each layer on an axis of its own, from the least to the largest of both ranges."""
    rows = []
    shown = [layer for layer in layers if layer.noise.scale]
    for number, layer in enumerate(shown):
        y, n = number * ROW, layer.noise
        low, high = min(n.low, n.scale_low), max(n.high, n.scale_high)
        width = (high - low) or 1.0

        def bar(start: float, end: float, colour: str, y: int = y, low: float = low, width: float = width) -> str:  # fmt: skip
            x, w = (start - low) / width * BAR, max((end - start) / width * BAR, 1.0)
            return f'<rect x="{NAMES + x:.1f}" y="{y + 3}" width="{w:.1f}" height="{ROW - 6}" fill="{colour}"/>'  # fmt: skip

        tip = html.escape(f"{n.low:.4g} to {n.high:.4g} seen, scale {n.scale_low:.4g} to {n.scale_high:.4g}, {n.clipped:.2%} clipped")  # fmt: skip
        rows.append(f"<g>{_name(layer, y)}{bar(n.scale_low, n.scale_high, '#dbe7f1')}{bar(n.low, n.high, '#34658c')}<title>{tip}</title></g>")  # fmt: skip
    return _svg(rows, len(shown) * ROW, "ranges by layer")


def _table(table: Table, bad: set[int]) -> str:
    def line(cells: Sequence[str], tag: str, mark: str = "") -> str:
        return f"<tr{mark}>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"

    rows = [line(r, "td", ' class="bad"' if i in bad else "") for i, r in enumerate(table.rows)]
    return f"<h2>{html.escape(table.title)}</h2><table>{line(table.header, 'th')}{''.join(rows)}</table>"  # fmt: skip
