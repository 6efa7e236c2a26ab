"""HTML and SVG built of elements, so that nothing gets into a page unescaped."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: object) -> Markup:
    """One element. Children that are no `Markup` are escaped, and so are attributes.

    Args:
        name: of the element. attributes: `class_` for `class`, `_` for `-`; those that are None are left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def void(name: str, /, **attributes: object) -> Markup:
    """One element that has no end and no children."""
    return Markup(element(name, **attributes).removesuffix(f"</{name}>"))


def join(*children: str) -> Markup:
    """Children one after another, escaped where they are no `Markup`."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))
