"""Numbers as people read them: three digits and a unit."""

from __future__ import annotations

PREFIXES = ("", "k", "M", "G", "T", "P")
NOTHING = "-"


def show_count(value: float) -> str:
    """`0`, `12`, `1.23 k`, `45.6 M`."""
    return _scaled(value, "")


def show_bytes(value: float | None) -> str:
    """`0 B`, `1.23 MB`; a dash for what is not known."""
    return NOTHING if value is None else _scaled(value, "B")


def show_seconds(value: float) -> str:
    """`0.12 ms`, `12.3 ms`, `1.23 s`."""
    return f"{_digits(value * 1000)} ms" if value < 1 else f"{_digits(value)} s"


def show_duration(seconds: float) -> str:
    """`12 s`, `3 min 4 s`, `5 h 6 min`, `7 d 8 h`."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _scaled(value: float, unit: str) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(PREFIXES) - 1:
        value /= 1000
        step += 1
    return f"{_digits(value)} {PREFIXES[step]}{unit}".rstrip()


def _digits(value: float) -> str:
    """Three digits, without zeros at the end of a fraction."""
    places = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
