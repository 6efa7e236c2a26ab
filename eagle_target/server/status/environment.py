"""What pages for a browser are made with: templates that escape, and numbers as people read them."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, PrefixLoader, StrictUndefined

PREFIXES = ("", "k", "M", "G", "T", "P")
# Their halves are read easily as well.
ROUND = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
NOTHING = "-"


@cache
def asset(name: str) -> str:
    """A style or a script, as it stands in a page."""
    return files("eagle_target.server.status").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """Templates by `status/NAME` and `bench/NAME`."""
    made = Environment(
        loader=PrefixLoader(
            {"status": PackageLoader("eagle_target.server.status"), "bench": PackageLoader("eagle_target.bench")}
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "si": si,
        "seconds": seconds,
        "duration": duration,
        "ceiling": ceiling,
        "grouped": grouped,
        "utc": utc,
    }
    made.globals["style"] = asset("style.css")
    return made


def si(value: float | None, unit: str = "") -> str:
    """Three digits and a unit: `0`, `1.23 k`, `45.6 MB`; a dash for what is not known."""
    if value is None:
        return NOTHING
    step = 0
    while abs(value) >= 999.5 and step < len(PREFIXES) - 1:
        value /= 1000
        step += 1
    return f"{_digits(value)} {PREFIXES[step]}{unit}".rstrip()


def seconds(value: float) -> str:
    """`0.12 ms`, `12.3 ms`, `1.23 s`."""
    return f"{_digits(value * 1000)} ms" if value < 1 else f"{_digits(value)} s"


def duration(value: float) -> str:
    """Of seconds: `12 s`, `3 min 4 s`, `5 h 6 min`, `7 d 8 h`."""
    left = max(0, int(value))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def grouped(value: float | None) -> str:
    """`1,234,567`; nothing for what is not known."""
    return "" if value is None else f"{value:,.0f}"


def utc(moment: float) -> str:
    """Of seconds since the epoch: `2026-01-31 12:34:56 UTC`."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def ceiling(value: float) -> float:
    """Where an axis ends: the least of `ROUND` times a power of ten that is not below a value; 1 for none."""
    if value <= 0:
        return 1.0
    power = 10.0 ** (len(f"{value:.0f}") - 1) if value >= 1 else 1.0
    while power > value:
        power /= 10
    return next(factor * power for factor in ROUND if factor * power >= value)


def _digits(value: float) -> str:
    """Three digits, without zeros at the end of a fraction."""
    places = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
