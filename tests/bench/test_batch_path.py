"""What one batch meets can be counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_batch_is_traced_over_each_way() -> None:
    command = [sys.executable, "-m", "benchmarks.batch_path", "--idle", "0.2", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240)

    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert 0 < result["files_colocated"] < result["files_wire"] <= result["files_shm"]
    assert "eagle_target/backend.py: RequestingBackend.generate_batch" in done.stdout
    assert "transports/wire/eagle_target_wire/transport.py: WireClientChannel.receive" in done.stdout
    assert "eagle_target/testing" not in done.stdout
