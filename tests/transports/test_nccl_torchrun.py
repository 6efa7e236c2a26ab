"""A job of several ranks, with a default process group of its own, is a client beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from eagle_target.testing.server import loopback_server

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchrun_client.py"
RANKS = 2
LATE_SECONDS = 120


def test_each_rank_has_its_groups_with_each_server_beside_the_job_s_own() -> None:
    with loopback_server(transports=("nccl",)) as first, loopback_server(transports=("nccl",)) as second:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        result = subprocess.run(
            [*command, str(EXAMPLE), "--transport", "nccl", first.url, second.url],
            capture_output=True,
            text=True,
            check=False,
            timeout=LATE_SECONDS,
        )
    assert result.returncode == 0, result.stderr
    lines = sorted(result.stdout.splitlines())
    ranks = [f"rank {rank}: 4 batches over nccl" for rank in range(RANKS)]
    assert lines == [f"{RANKS} ranks trained on 256 tokens", *ranks]
