"""Fuzz for a while: `python -m tests.fuzz --seconds 300`, or `make fuzz`.

The fuzzing and the property-based tests again and again, with other random inputs each time, until the time is over or
one fails; what is printed then has the input, to be written into the test as an example.
"""

from __future__ import annotations

import argparse
import secrets
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEED_BITS = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long to begin further passes (%(default)s)")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    passes = 0
    while time.monotonic() < end or not passes:
        seed = secrets.randbits(SEED_BITS)
        print(f"pass {passes + 1}, seed {seed}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "tests/fuzz", "tests/properties"]
        status = subprocess.call(
            [*command, "--hypothesis-profile", "long", "--hypothesis-seed", str(seed), "--timeout", "1800"], cwd=ROOT
        )
        if status:
            return status
        passes += 1
    print(f"{passes} passes found nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
