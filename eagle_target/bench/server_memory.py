"""The most memory a server takes while it is measured: of its processes on this machine, or as it tells itself."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

import urllib3

from eagle_target.auth import Access, open_access
from eagle_target.bench.processes import CLEAR_PEAK, MB, read_status
from eagle_target.config import ClientConfig
from eagle_target.protocol import messages

SAMPLE_SECONDS = 0.2
METRIC = "process_resident_memory_bytes"


class ServerMemory(Protocol):
    """Peak resident memory of one server. source: where it is known from."""

    source: str

    def start(self) -> None:
        """Count from now on."""
        ...

    def stop(self) -> float | None:
        """The most since `start` in MB; None where the server does not tell."""
        ...


class ProcessMemory:
    """Of a process on this machine and of those it started, from /proc: exact."""

    source = "/proc"

    def __init__(self, process: int) -> None:
        self._process = process

    def start(self) -> None:
        """Have each process's peak begin anew."""
        for process in process_tree(self._process):
            clear = Path(f"/proc/{process}/clear_refs")
            if clear.exists():
                clear.write_text(CLEAR_PEAK, encoding="ascii")

    def stop(self) -> float | None:
        """The sum of the processes' peaks."""
        peaks = [read_status(process, "VmHWM") for process in process_tree(self._process)]
        known = [peak for peak in peaks if peak is not None]
        return sum(known) / MB if known else None


class MetricsMemory:
    """As the server's /metrics tell, looked at again and again: a peak between two looks is missed."""

    source = messages.METRICS

    def __init__(self, url: str, access: Access | None = None) -> None:
        self._url = url
        self._access = access
        self._peak: float | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look."""
        self._peak = None
        self._ended.clear()
        self._thread = threading.Thread(target=self._watch, name="eagle-target-bench-memory", daemon=True)
        self._thread.start()

    def stop(self) -> float | None:
        """End, and return the most that was seen."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        return self._peak

    def _watch(self) -> None:
        access = self._access or open_access(ClientConfig())
        with urllib3.PoolManager(timeout=2.0, retries=False, headers=access.headers(), ssl_context=access.tls) as http:
            while True:
                seen = read_metric(http, self._url, METRIC)
                if seen is not None:
                    self._peak = max(self._peak or 0.0, seen / MB)
                if self._ended.wait(SAMPLE_SECONDS):
                    return


def read_metric(http: urllib3.PoolManager, url: str, name: str) -> float | None:
    """One figure of a server's /metrics, without labels; None where it cannot be had."""
    try:
        text = http.request("GET", url + messages.METRICS).data.decode("utf-8", "replace")
    except urllib3.exceptions.HTTPError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return float(value)
    return None


def process_tree(process: int) -> list[int]:
    """A process and those it started, and they did; without /proc itself alone."""
    found = [process]
    for parent in found:
        for children in Path("/proc").glob(f"{parent}/task/*/children"):
            try:
                found += [int(child) for child in children.read_text(encoding="ascii").split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found
