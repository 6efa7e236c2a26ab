"""A time series as an SVG that needs nothing else: an area, and marks for what went wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eagle_target.server.status.figures import show_duration
from eagle_target.server.status.markup import Markup, element

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH = 600
HEIGHT = 120
MARK_HEIGHT = 6
# Their halves are read easily as well.
ROUND = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)


def plot(
    title: str, values: Sequence[float], marked: Sequence[bool], *, seconds: float, show: Callable[[float], str]
) -> Markup:
    """A figure of values, oldest first.

    Args:
        title: what they are. values: at least two. marked: those to mark at the foot.
        seconds: between two values. show: a value as text.
    """
    top = nice_ceiling(max(values))
    step = WIDTH / len(values)
    points = [f"{(index + 0.5) * step:.1f},{HEIGHT - HEIGHT * value / top:.1f}" for index, value in enumerate(values)]
    marks = [
        element("rect", x=f"{index * step:.1f}", y=HEIGHT - MARK_HEIGHT, width=f"{step:.1f}", height=MARK_HEIGHT)
        for index, is_marked in enumerate(marked)
        if is_marked
    ]
    ends = f"{WIDTH - 0.5 * step:.1f},{HEIGHT} {0.5 * step:.1f},{HEIGHT}"
    drawing = element(
        "svg",
        *(element("line", x1=0, x2=WIDTH, y1=y, y2=y, class_="grid") for y in (0, HEIGHT // 2, HEIGHT)),
        element("polygon", points=" ".join([*points, ends]), class_="area"),
        element("polyline", points=" ".join(points), class_="line"),
        element("g", *marks, class_="marks"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title}: at most {show(max(values))}, last {show(values[-1])}",
    )
    span = seconds * len(values)
    times = (f"{show_duration(span)} ago", f"{show_duration(span / 2)} ago", "now")
    return element(
        "figure",
        element("figcaption", title, " ", element("b", show(values[-1]))),
        element(
            "div",
            element("div", *(element("span", show(value)) for value in (top, top / 2, 0.0)), class_="y"),
            drawing,
            element("div", *(element("span", text) for text in times), class_="x"),
            class_="plot",
        ),
    )


def nice_ceiling(value: float) -> float:
    """The least round number that is not below a value: one of `ROUND` times a power of ten; 1 for none."""
    if value <= 0:
        return 1.0
    power = 10.0 ** (len(f"{value:.0f}") - 1) if value >= 1 else 1.0
    while power > value:
        power /= 10
    return next(factor * power for factor in ROUND if factor * power >= value)
