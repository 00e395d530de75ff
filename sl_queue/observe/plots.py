"""Pictures of an evaluation as SVG, which needs no library and opens in any browser."""

from collections.abc import Mapping, Sequence
from typing import Final

Rows = Sequence[Sequence[float]]

_SIDE: Final = 260  # of a square of axes, in pixels
_LEFT, _TOP, _GAP = 60, 40, 80
_INK, _LINE, _AXIS = "#222222", "#33658a", "#9fb3c8"
_COLOURS: Final = {"precision": "#33658a", "recall": "#cc6677", "f1": "#117733", "accuracy": "#999933"}


def evaluation_svg(tables: Mapping[str, Rows]) -> str:
    """Draw how sure the model was against how often it was right, and what each threshold costs."""
    panels = [_calibration(tables["calibration"])] if "calibration" in tables else []
    if "thresholds" in tables:
        panels.append(_thresholds(tables["thresholds"]))
    width = _LEFT + max(1, len(panels)) * (_SIDE + _GAP) + 60
    height = _TOP + _SIDE + 60
    body = [
        f'<g transform="translate({_LEFT + index * (_SIDE + _GAP)} {_TOP})">{panel}</g>'
        for index, panel in enumerate(panels)
    ] or [f'<text x="20" y="{_TOP}">no classes, so nothing to draw</text>']
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="{_INK}">\n<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _calibration(rows: Rows) -> str:
    points = [(mean, right) for _, _, _, mean, right in rows]
    marks = "".join(f'<circle cx="{_x(x)}" cy="{_y(y)}" r="4" fill="{_LINE}"/>' for x, y in points)
    even = f'<line x1="0" y1="{_SIDE}" x2="{_SIDE}" y2="0" stroke="{_AXIS}" stroke-dasharray="4 4"/>'
    return _axes("Calibration", "predicted probability", "share that was right") + even + _path(points, _LINE) + marks


def _thresholds(rows: Rows) -> str:
    found = [_axes("Thresholds", "threshold", "")]
    for place, (name, colour) in enumerate(_COLOURS.items(), start=1):
        points = [(row[0], row[place]) for row in rows]
        label = f'<text x="{_SIDE + 6}" y="{_y(points[-1][1]) + 4 + 12 * (place % 2)}" fill="{colour}">{name}</text>'
        found.append(_path(points, colour) + label)
    return "".join(found)


def _axes(title: str, across: str, up: str) -> str:
    ticks = "".join(
        f'<text x="{_x(t)}" y="{_SIDE + 16}" text-anchor="middle">{t:g}</text>'
        f'<text x="-6" y="{_y(t) + 4}" text-anchor="end">{t:g}</text>'
        for t in (0.0, 0.5, 1.0)
    )
    return (
        f'<rect width="{_SIDE}" height="{_SIDE}" fill="none" stroke="{_AXIS}"/>{ticks}'
        f'<text x="0" y="-14" font-size="15">{title}</text>'
        f'<text x="{_SIDE / 2}" y="{_SIDE + 36}" text-anchor="middle">{across}</text>'
        f'<text x="-40" y="{_SIDE / 2}" text-anchor="middle" transform="rotate(-90 -40 {_SIDE / 2})">{up}</text>'
    )


def _path(points: Sequence[tuple[float, float]], colour: str) -> str:
    steps = " L".join(f"{_x(x)} {_y(y)}" for x, y in points)
    return f'<path d="M{steps}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _x(value: float) -> float:
    return round(_SIDE * value, 1)


def _y(value: float) -> float:
    return round(_SIDE * (1.0 - value), 1)
