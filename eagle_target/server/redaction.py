"""Keeps training data out of the log, where an engine's message may name it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NUMBER = re.compile(r"\d+")
FRAME = '  File "'
HIDDEN = "#"


def hide_ids(text: str, input_ids: torch.Tensor) -> str:
    """A traceback's text with every number that is one of the ids `[tokens]` hidden, but for numbers of lines."""
    ids = {str(token) for token in input_ids.tolist()}
    return "\n".join(line if line.startswith(FRAME) else _hide(line, ids) for line in text.split("\n"))


def hide_in_error(error: BaseException | None, input_ids: torch.Tensor) -> None:
    """Hide the ids `[tokens]` in what an error says, and in what those say that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.args = tuple(_hide_argument(argument, input_ids) for argument in error.args)
        error = error.__cause__ or error.__context__


def _hide_argument(argument: object, input_ids: torch.Tensor) -> object:
    shown = str(argument)
    hidden = hide_ids(shown, input_ids)
    return argument if hidden == shown else hidden


def _hide(line: str, ids: set[str]) -> str:
    return NUMBER.sub(lambda match: HIDDEN if match[0] in ids else match[0], line)
