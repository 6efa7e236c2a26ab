"""The log's two formats, text and JSON. An event is one line; what belongs to it in text is indented."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from typing import Any, Literal

from eagle_target.server.subjects import current_subject

LogFormat = Literal["text", "json"]
FIELDS = "fields"
CONTINUED = "\n  | "
NO_PROGRESS_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


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
        subject = current_subject()
        about = "" if subject is None else f" [{subject.request} {subject.client}]"
        lines = [f"{_time_of(record)} {record.levelname} {record.name}{about}: {record.getMessage()}"]
        lines += _details(self, record)
        return CONTINUED.join("\n".join(lines).splitlines())


class JsonFormatter(logging.Formatter):
    """An object a line: `time`, `level`, `logger`, `message`, where there are any `request`, `client` and others."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        subject = current_subject()
        event: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if subject is not None:
            event |= {"request": subject.request, "client": subject.client}
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
