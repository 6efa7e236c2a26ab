"""The script behind the tables of docs/reliability.md, with one round of a few rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_faults_are_tried_and_told() -> None:
    chosen = "flipped|comes back with|NaN|wrong token"
    command = [sys.executable, "-m", "benchmarks.faults", "--rounds", "1", "--minutes", "0", "--only", chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert result["bad"] == []
    for row in ("server comes back with another model", "a bit of an answer flipped", "401 unauthorized"):
        assert row in done.stdout


def test_the_page_has_places_for_the_tables() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for name in ("faults", "bad-inputs", "load"):
        begin, end = page.index(f"<!-- {name}: begin -->"), page.index(f"<!-- {name}: end -->")
        assert page[begin:end].count("\n| ") > 3, f"make faults fills in {name}"
