"""The soak, short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_short_soak_loses_nothing_and_grows_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "0.3", "--slice", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert result["batches"] > 0
    assert (result["wrong"], result["lost"], result["grown"]) == (0, 0, [])
    assert len(result["figures"]) == 1 + result["clients"]
