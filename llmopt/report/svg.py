"""Line and bar plots as SVG text, without any library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 260
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 40
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df")
ROW = 16  # height of a bar
LABELS = 300  # width of the bars' labels


def lines(xs: Sequence[float], series: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> str:
    """Named series over common positions; the y axis starts at 0 unless all values lie well above it."""
    values = [v for ys in series.values() for v in ys]
    top, bottom = max(values), min(values)
    bottom = 0.0 if bottom >= 0 and bottom < 0.5 * top else bottom
    x_span, y_span = (max(xs) - min(xs)) or 1.0, (top - bottom) or 1.0

    def at(x: float, y: float) -> str:
        across = LEFT + (x - min(xs)) / x_span * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - bottom) / y_span * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = bottom + share * y_span
        y = at(min(xs), value).split(",")[1]
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#ddd"/>')
        parts.append(text(LEFT - 6, float(y) + 4, f"{value:.3g}", "end"))
    for i, (name, ys) in enumerate(series.items()):
        colour, points = COLOURS[i % len(COLOURS)], " ".join(at(x, y) for x, y in zip(xs, ys))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>')
        parts.append(text(WIDTH - RIGHT, TOP + 14 * i, name, "end", colour))
    for x in (min(xs), max(xs)):
        parts.append(text(float(at(x, bottom).split(",")[0]), HEIGHT - BOTTOM + 16, f"{x:g}", "middle"))
    parts.append(text((LEFT + WIDTH) / 2, HEIGHT - 6, x_label, "middle"))
    parts.append(text(4, TOP - 6, y_label, "start"))
    return picture(WIDTH, HEIGHT, parts)


def bars(names: Sequence[str], values: Sequence[float], unit: str) -> str:
    """One horizontal bar a name."""
    largest = max(values, default=0.0) or 1.0
    room = WIDTH - LABELS - 80
    parts = []
    for i, (name, value) in enumerate(zip(names, values)):
        y = TOP + i * ROW
        parts.append(text(LABELS - 6, y + 11, name, "end"))
        width = value / largest * room
        shape = f'x="{LABELS}" y="{y + 2}" width="{width:.1f}" height="{ROW - 4}"'
        parts.append(f'<rect {shape} fill="{COLOURS[0]}"/>')
        parts.append(text(LABELS + width + 5, y + 11, f"{value:.2e}", "start"))
    parts.append(text(LABELS, TOP - 6, unit, "start"))
    return picture(WIDTH, TOP + len(names) * ROW + 10, parts)


def text(x: float, y: float, content: str, anchor: str, colour: str = "#444") -> str:
    """A label."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="{anchor}" fill="{colour}">{escape(content)}</text>'
    )


def picture(width: int, height: int, parts: Sequence[str]) -> str:
    """The SVG element."""
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">' + "".join(parts) + "</svg>"
