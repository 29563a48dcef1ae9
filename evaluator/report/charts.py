"""Charts as SVG without a charting library: colours come from the page's style, so that they follow the reader's theme and print.

Groups of systems differ by shape as well as by colour, lines by dashes and by a name at their end. What stands in a table cell is drawn
in percent of the cell's width and has the number beside it in text; what stands alone has a title and a description to be read aloud.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log10

from markupsafe import Markup, escape

WIDTH, HEIGHT = 320, 158
"""Of a panel, in pixels at its natural size: narrow enough to be legible on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 40, 62, 28, 22
"""Margins of a line chart: the axis stands left, the last values right."""
ROW = 19
"""Height of a system's row in a dot chart."""
NAMES = 128
"""Width of the systems' names in a dot chart."""
LONGEST_NAME = 20
SMOOTH_FROM = 60
"""Points from which on a line gets a running mean over it: below that the eye does it."""


@dataclass(frozen=True)
class Scale:
    """A range of values that several marks share."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1; what is beyond an end stands at it."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def percent(self, value: float) -> str:
        return f"{100 * self.share(value):.2f}%"

    def ticks(self, about: int = 4) -> list[float]:
        """Round values within the range."""
        step = _round_step((self.high - self.low) / about)
        return [n * step for n in range(ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    marked: bool = False
    """A dot at every point, for lines of few; alone such a line goes on from round to round, where others begin anew."""


@dataclass(frozen=True)
class Dot:
    """One row of a dot chart."""

    name: str
    group: str
    value: float
    low: float | None
    high: float | None
    shown: str
    """The value in words."""
    ours: bool = False


@dataclass(frozen=True)
class Lines:
    """A line chart over training steps."""

    title: str
    lines: Sequence[Line]
    rounds: Sequence[tuple[str, float]] = field(default_factory=tuple)
    """Label and first step of each; marked where there are several."""
    points: bool = False
    """Whether values are shown times 100."""


def scale(values: Sequence[float | None], *, zero: bool) -> Scale:
    """A range around values with round ends, from or through 0 if `zero`; of one value alone, some room around it."""
    found = [v for v in values if v is not None and isfinite(v)] or [0.0]
    low, high = min(found), max(found)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low < 1e-12:
        room = abs(high) / 10 or 1.0
        low, high = (low, high + room) if zero else (low - room, high + room)
    step = _round_step((high - low) / 5)
    return Scale(floor(low / step + 1e-9) * step, ceil(high / step - 1e-9) * step)


def mark(group: str) -> Markup:
    """A group's shape, beside a name."""
    return Markup('<svg class="glyph {}" width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">{}</svg>').format(
        f"g-{group}", _shape(group)
    )


def whisker(on: Scale, value: float, low: float | None, high: float | None, *, group: str, zero: bool = False) -> Markup:
    """A value and its interval for a table cell, the number beside it in text; `zero`: with a line at 0."""
    parts = [_axis(on.percent(0.0))] if zero else []
    if low is not None and high is not None:
        a, b = on.percent(low), on.percent(high)
        parts.append(Markup('<line class="range" x1="{}" x2="{}" y1="12" y2="12"/>').format(a, b))
        parts += [Markup('<line class="range" x1="{0}" x2="{0}" y1="8" y2="16"/>').format(end) for end in (a, b)]
    # a nested svg is the one thing that can be placed in percent and hold a shape in pixels
    parts.append(Markup('<svg class="shape" x="{}" y="12" width="1" height="1">{}</svg>').format(on.percent(value), _shape(group)))
    return Markup('<svg class="whisker g-{}" width="100%" height="24" aria-hidden="true">{}</svg>').format(group, Markup("").join(parts))


def bar(share: float, kind: str = "plain") -> Markup:
    """A share of a whole, 0 to 1, for a table cell."""
    return Markup(
        '<svg class="bar {}" width="100%" height="12" aria-hidden="true"><rect class="all" x="0" y="5" width="100%" height="2"/>'
        '<rect class="part" x="0" y="1" width="{}%" height="10"/></svg>'
    ).format(kind, f"{100 * min(1.0, max(0.0, share)):.2f}")


def split(parts: Sequence[tuple[str, int]]) -> Markup:
    """Counts as parts of one bar, for a table cell: each is classed by its name, and the style gives each its own pattern."""
    total, at, drawn = sum(n for _, n in parts) or 1, 0.0, []
    for name, n in parts:
        width = 100 * n / total
        drawn.append(Markup('<rect class="{}" x="{}%" y="1" width="{}%" height="14"/>').format(f"part-{name}", f"{at:.2f}", f"{width:.2f}"))
        at += width
    return Markup('<svg class="split" width="100%" height="16" aria-hidden="true">{}</svg>').format(Markup("").join(drawn))


def dots(title: str, rows: Sequence[Dot], *, points: bool, explained: str) -> Markup:
    """A panel with a row a system, best placed first by the caller; a line stands at `ours`, to compare by."""
    on = scale([v for row in rows for v in (row.value, row.low, row.high)], zero=True)
    left, right, top = NAMES, WIDTH - 40, 24
    height = top + ROW * len(rows) + 18

    def x(value: float) -> float:
        return left + on.share(value) * (right - left)

    parts = [_text(2, 12, title, "title")]
    for tick in on.ticks():
        parts.append(_vertical(x(tick), top - 4, height - 16, "grid"))
        parts.append(_text(x(tick), height - 4, _tick(tick, points), "tick", anchor="middle"))
    for row in rows:
        if row.ours:
            parts.append(_vertical(x(row.value), top - 4, height - 16, "at-ours"))
    for index, row in enumerate(rows):
        y = top + ROW * (index + 0.5)
        drawn = [_text(left - 12, y + 4, _short(row.name), "name", anchor="end")]
        if row.low is not None and row.high is not None:
            drawn.append(
                Markup('<line class="range" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(x(row.low), x(row.high), y, y)
            )
        drawn.append(Markup('<g transform="translate({:.1f} {:.1f})">{}</g>').format(x(row.value), y, _shape(row.group)))
        drawn.append(_text(WIDTH - 2, y + 4, row.shown, "value", anchor="end"))
        parts.append(Markup('<g class="g-{}{}">{}</g>').format(row.group, " ours" if row.ours else "", Markup("").join(drawn)))
    said = "; ".join(f"{row.name} {row.shown}" for row in rows)
    return _panel(title, f"{explained} {said}.", height, parts)


def lines(chart: Lines) -> Markup:
    """A panel with a line or two over steps, each with its last value and, of two, its name; what is not finite is left out."""
    drawn = [(line, [p for p in line.points if isfinite(p[0]) and isfinite(p[1])]) for line in chart.lines]
    drawn = [(line, found) for line, found in drawn if found]
    steps = [s for _, found in drawn for s, _ in found]
    on = scale([v for _, found in drawn for _, v in found], zero=False)
    over = Scale(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1)
    bottom = HEIGHT - BOTTOM

    def x(step: float) -> float:
        return LEFT + over.share(step) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return bottom - on.share(value) * (bottom - TOP - 6)

    parts = [_text(2, 12, chart.title, "title")]
    for tick in on.ticks(3):
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y(tick), y(tick)))
        parts.append(_text(LEFT - 5, y(tick) + 4, _tick(tick, chart.points), "tick", anchor="end"))
    if len(chart.rounds) > 1:
        for label, first in chart.rounds:
            parts.append(_vertical(x(first), TOP - 4, bottom, "round"))
            parts.append(_text(x(first) + 3, TOP + 1, label if len(chart.rounds) <= 4 else label.split()[-1], "tick"))
    parts.append(_text(LEFT, HEIGHT - 6, f"step {over.low:g}", "tick"))
    if max(steps) > min(steps):
        parts.append(_text(WIDTH - RIGHT, HEIGHT - 6, f"{over.high:g}", "tick", anchor="end"))
    pieces = [_pieces(found, [] if line.marked else [first for _, first in chart.rounds]) for line, found in drawn]
    bold = [[_running_mean(p) for p in of] if len(found) >= SMOOTH_FROM else of for of, (_, found) in zip(pieces, drawn, strict=True)]
    labels = _apart([y(of[-1][-1][1]) for of in bold])
    for number, ((line, found), raw, shown, label_y) in enumerate(zip(drawn, pieces, bold, labels, strict=True)):
        style = f"line line-{number}{' dashed' if line.dashed else ''}"
        if shown is not raw:
            parts.append(Markup('<path class="{} raw" d="{}"/>').format(style, _path(raw, x, y)))
        parts.append(Markup('<path class="{}" d="{}"/>').format(style, _path(shown, x, y)))
        # a path of one point draws nothing
        dotted = found if line.marked else [piece[0] for piece in shown if len(piece) == 1]
        parts += [Markup('<circle class="point line-{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(number, x(s), y(v)) for s, v in dotted]
        parts.append(_text(WIDTH - RIGHT + 6, label_y + 4, _value(shown[-1][-1][1], chart.points), f"end line-{number}"))
        if len(drawn) > 1:
            parts.append(_text(WIDTH - RIGHT + 6, label_y + 16, line.name, "tick"))
    return _panel(chart.title, " ".join(_said(line, found, chart.points) for line, found in drawn), HEIGHT, parts)


def _said(line: Line, found: Sequence[tuple[float, float]], points: bool) -> str:
    values = [v for _, v in found]
    first, last, low, high = (_value(v, points) for v in (values[0], values[-1], min(values), max(values)))
    return f"{line.name}: {first} at step {found[0][0]:g}, {last} at step {found[-1][0]:g}; lowest {low}, highest {high}."


def _panel(title: str, said: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="panel" role="img" viewBox="0 0 {} {}"><title>{}</title><desc>{}</desc>{}</svg>').format(
        WIDTH, f"{height:g}", title, said, Markup("").join(parts)
    )


def _shape(group: str) -> Markup:
    """Around 0, 0; filled for what the run made or was taught by, hollow or thin for what it is measured against."""
    return Markup(
        {
            "distilled": '<path class="solid" d="M0-6 6 0 0 6-6 0Z"/>',
            "teacher": '<rect class="solid" x="-4.5" y="-4.5" width="9" height="9"/>',
            "student": '<circle class="hollow" r="4.5"/>',
            "extra": '<path class="hollow" d="M0-5.5 5.5 4.5H-5.5Z"/>',
            "trivial": '<path class="stroke" d="M-4-4 4 4M4-4-4 4"/>',
        }.get(group, '<path class="stroke" d="M0-6V6"/>')
    )


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(style, f"{x:.1f}", f"{y:.1f}", anchor, escape(text))


def _vertical(x: float, y1: float, y2: float, style: str) -> Markup:
    return Markup('<line class="{0}" x1="{1}" x2="{1}" y1="{2:.1f}" y2="{3:.1f}"/>').format(style, f"{x:.1f}", y1, y2)


def _axis(x: str) -> Markup:
    return Markup('<line class="zero" x1="{0}" x2="{0}" y1="1" y2="23"/>').format(x)


def _pieces(points: Sequence[tuple[float, float]], firsts: Sequence[float]) -> list[list[tuple[float, float]]]:
    """A line's points by round: what training logs jumps where a round begins, and to draw the jump would be to make it up."""
    pieces: dict[int, list[tuple[float, float]]] = {}
    for step, value in points:
        pieces.setdefault(sum(first < step for first in firsts), []).append((step, value))
    return list(pieces.values())


def _path(pieces: Sequence[Sequence[tuple[float, float]]], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    return "".join("M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in piece) for piece in pieces)


def _apart(heights: Sequence[float], room: float = 27.0) -> list[float]:
    """Heights of labels moved apart, so that none is written over another or below the chart."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    lowest = HEIGHT - BOTTOM - 8
    for n, i in enumerate(order):
        placed[i] = max(heights[i], placed[order[n - 1]] + room) if n else max(heights[i], TOP)
    for n, i in enumerate(reversed(order)):
        placed[i] = min(placed[i], lowest - n * room) if len(order) > 1 else placed[i]
    return placed


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    half = max(1, len(points) // 40)
    means = []
    for i, (step, _) in enumerate(points):
        near = [v for _, v in points[max(0, i - half) : i + half + 1]]
        means.append((step, sum(near) / len(near)))
    return means


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not below `rough`."""
    power = 10.0 ** floor(log10(rough))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= rough * (1 - 1e-9))


def _tick(value: float, points: bool) -> str:
    shown = 100 * value if points else value
    # rounding leaves -0 and 0.30000000000000004 behind
    return f"{round(shown, 10) + 0.0:.4g}" if abs(shown) < 1e5 else f"{shown:.0e}"


def _value(value: float, points: bool) -> str:
    """Three digits, also where the last are 0."""
    shown = 100 * value if points else value
    return f"{shown:,.0f}" if abs(shown) >= 100 else f"{shown:#.3g}".rstrip(".")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
