"""Whom a line of the log is about: the request that is worked on, and its client."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_LETTERS = 64


@dataclass(frozen=True, slots=True)
class Subject:
    """A request's id and its client's, as the log shows them."""

    request: str
    client: str


_subject: ContextVar[Subject | None] = ContextVar("eagle_target_subject", default=None)


def current_subject() -> Subject | None:
    """What is worked on here; None outside of a request."""
    return _subject.get()


def set_subject(subject: Subject) -> None:
    """Work on a request until the end of the task."""
    _subject.set(subject)


@contextlib.contextmanager
def about(subject: Subject | None) -> Iterator[None]:
    """Work on a request, or on none, until the end of the block."""
    before = _subject.set(subject)
    try:
        yield
    finally:
        _subject.reset(before)


def printable(text: str) -> str:
    """What a stranger sent, fit for one line of a log: cut, and of visible ASCII characters."""
    return "".join(letter if "!" <= letter <= "~" else "?" for letter in text[:MAX_LETTERS])
