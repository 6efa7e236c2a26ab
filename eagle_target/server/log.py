"""The server's log: whom a line is about, how it is written, and what is kept out of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

LogFormat = Literal["text", "json"]
FIELDS = "fields"
CONTINUED = "\n  | "
NO_PROGRESS_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
# Of what a stranger sent, in a line.
MAX_LETTERS = 64

NUMBER = re.compile(r"\d+")
FRAME = '  File "'
HIDDEN = "#"
_log_context: ContextVar[LogContext | None] = ContextVar("eagle_target_log_context", default=None)


@dataclass(frozen=True, slots=True)
class LogContext:
    """A request's id and its client's, as the log shows them."""

    request: str
    client: str


def current_log_context() -> LogContext | None:
    """What is worked on here; None outside of a request."""
    return _log_context.get()


def set_log_context(context: LogContext) -> None:
    """Work on a request until the end of the task."""
    _log_context.set(context)


@contextlib.contextmanager
def log_context(context: LogContext | None) -> Iterator[None]:
    """Work on a request, or on none, until the end of the block."""
    before = _log_context.set(context)
    try:
        yield
    finally:
        _log_context.reset(before)


def printable(text: str) -> str:
    """What a stranger sent, fit for one line of a log: cut, and of visible ASCII characters."""
    return "".join(letter if "!" <= letter <= "~" else "?" for letter in text[:MAX_LETTERS])


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


def configure_logging(log_format: LogFormat, level: str) -> None:
    """Send every logger's lines to stderr in one format, uvicorn's and Python's warnings too.

    Args:
        log_format: `text` or `json`. level: the least that is logged.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # It tells of every connection at `info`, and this server of every request itself.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.captureWarnings(capture=True)
    if log_format == "json":
        # Progress bars of engines, in processes of their own too, are no objects.
        for variable in NO_PROGRESS_BARS:
            os.environ.setdefault(variable, "1")
    threading.excepthook = _log_thread_end


class TextFormatter(logging.Formatter):
    """`time LEVEL logger [request client]: message`, times in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and indented ones for what has several."""
        context = current_log_context()
        about = "" if context is None else f" [{context.request} {context.client}]"
        lines = [f"{_time_of(record)} {record.levelname} {record.name}{about}: {record.getMessage()}"]
        lines += _details(self, record)
        return CONTINUED.join("\n".join(lines).splitlines())


class JsonFormatter(logging.Formatter):
    """An object a line: `time`, `level`, `logger`, `message`, where there are any `request`, `client` and others."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        context = current_log_context()
        event: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if context is not None:
            event |= {"request": context.request, "client": context.client}
        event |= getattr(record, FIELDS, {})
        details = _details(self, record)
        return json.dumps(event | ({"exception": "\n".join(details)} if details else {}), default=str)


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _details(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    details = [] if record.exc_info is None else [formatter.formatException(record.exc_info)]
    return details + ([formatter.formatStack(record.stack_info)] if record.stack_info else [])


def _log_thread_end(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_type is SystemExit:
        return
    name = ended.thread.name if ended.thread is not None else "unknown"
    exc_info = (ended.exc_type, ended.exc_value, ended.exc_traceback)
    logging.getLogger("eagle_target").error("thread %s ended", name, exc_info=exc_info)  # type: ignore[arg-type]
