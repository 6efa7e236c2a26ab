"""What bounds a server's memory: its outbox under a client that stops reading, and the projection's tiles."""

from __future__ import annotations

import http.client
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
import urllib3

from benchmarks.processes import MB
from eagle_target.bench.launching import run_server, serve_command
from eagle_target.bench.server_memory import ProcessMemory, read_metric
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.contract.request import SupervisionRequest
from eagle_target.protocol import messages
from eagle_target.verify.workload import Workload

if TYPE_CHECKING:
    from pathlib import Path

    from eagle_target.contract.vocab_mapping import VocabMapping

STALLED_TOKENS = 256
STALLED_REQUESTS = 12
STALLED_SECONDS = 6.0
OUTBOX_BYTES = 160_000_000
CLIENT_OUTBOX_BYTES = 96_000_000
TIMEOUT_SECONDS = 60.0
PROJECTED_TOKENS = (1024, 8192)


def measure_outbox(python: str, model: Path) -> dict[str, Any]:
    """A client asks for more than the outbox holds and reads nothing; another one is answered beside it.

    Returns:
        `outbox_peak_mb`, `outbox_limit_mb` and `outbox_client_limit_mb`; `stalled_rss_mb`, which the server grew by;
        `beside_stalled_seconds`, the other client's batch.
    """
    settings = ["--max-outbox-bytes", str(OUTBOX_BYTES), "--max-client-outbox-bytes", str(CLIENT_OUTBOX_BYTES)]
    workload = Workload(batch=1, seq=STALLED_TOKENS, loss_ratio=1.0)
    with (
        run_server(serve_command(python, "hf", str(model), settings=settings)) as server,
        RemoteEagle3TargetModel.from_urls([server.url], encoding="probs", transport="wire") as beside,
    ):
        vocab_size = int(beside.model_info()["vocab_size"])
        mapping = workload.make_mapping(vocab_size)
        beside.set_vocab_mapping(mapping)
        inputs = workload.make_inputs(vocab_size, seed=1)[0]
        beside.generate_batch(*inputs)
        memory = ProcessMemory(server.process.pid)
        memory.start()
        before = memory.stop()
        stalled = [_ask_and_stop(server.url, mapping, number) for number in range(STALLED_REQUESTS)]
        time.sleep(STALLED_SECONDS)
        started = time.perf_counter()
        beside.generate_batch(*inputs)
        seconds = time.perf_counter() - started
        peak = memory.stop()
        with urllib3.PoolManager(timeout=TIMEOUT_SECONDS, retries=False) as pool:
            held = read_metric(pool, server.url, "eagle_target_outbox_peak_bytes")
        for connection in stalled:
            connection.close()
    return {
        "outbox_peak_mb": None if held is None else held / MB,
        "outbox_limit_mb": OUTBOX_BYTES / MB,
        "outbox_client_limit_mb": CLIENT_OUTBOX_BYTES / MB,
        "stalled_asked_mb": STALLED_REQUESTS * STALLED_TOKENS * mapping.draft_vocab_size * 4 / MB,
        "stalled_rss_mb": None if peak is None or before is None else peak - before,
        "beside_stalled_seconds": seconds,
    }


def measure_projection(python: str, model: Path) -> dict[str, float]:
    """MB by which projecting every row raises a server's peak over projecting hardly any, by tokens.

    In encoding `hidden`, whose answers are small; what they take is left out.
    """
    extra = {}
    for tokens in PROJECTED_TOKENS:
        peaks = [_peak(python, model, tokens, loss_ratio) for loss_ratio in (1.0, 0.01)]
        answers = [nbytes / MB for _, nbytes in peaks]
        extra[str(tokens)] = (peaks[0][0] - answers[0]) - (peaks[1][0] - answers[1])
    return extra


def _peak(python: str, model: Path, tokens: int, loss_ratio: float) -> tuple[float, int]:
    """Peak of a fresh server in MB over two batches, and the bytes of one."""
    workload = Workload(batch=tokens // STALLED_TOKENS, seq=STALLED_TOKENS, loss_ratio=loss_ratio)
    with (
        run_server(serve_command(python, "hf", str(model))) as server,
        RemoteEagle3TargetModel.from_urls([server.url], encoding="hidden", transport="wire") as target,
    ):
        vocab_size = int(target.model_info()["vocab_size"])
        target.set_vocab_mapping(workload.make_mapping(vocab_size))
        inputs = workload.make_inputs(vocab_size, seed=0)
        memory = ProcessMemory(server.process.pid)
        for batch in inputs[:2]:
            target.generate_batch(*batch)
        peak = memory.stop()
        received = int(target.model_info()["traffic"]["bytes_received"]) // 2
    return peak or 0.0, received


def _ask_and_stop(url: str, mapping: VocabMapping, seed: int) -> http.client.HTTPConnection:
    """Send a request whose answer nobody reads."""
    request = SupervisionRequest(
        input_ids=torch.randint(mapping.vocab_size, (STALLED_TOKENS,), generator=torch.Generator().manual_seed(seed)),
        seq_lens=(STALLED_TOKENS,),
        row_mask=torch.ones(STALLED_TOKENS, dtype=torch.bool),
        encoding="probs",
        mapping=mapping,
    )
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_SECONDS)
    body = b"".join(messages.encode_request(request))
    headers = {"Content-Type": messages.CONTENT_TYPE, messages.CLIENT: "stalled"}
    connection.request("POST", messages.SUPERVISION, body, headers)
    return connection
