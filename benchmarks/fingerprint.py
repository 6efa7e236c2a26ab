"""What it takes to know a checkpoint by its weights: the digest against reading every byte.

    python -m benchmarks.fingerprint      # or: make bench-fingerprint

Two checkpoints in a temporary folder. One holds real bytes, and leaves the page cache before each reading: the digest
against a SHA-256 of the whole file, in turn. The other has the sizes of a 500 GB one, as a sparse file: reading its
holes costs no disk, so its seconds are those of the calls alone, and its megabytes say what a disk would have to give.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from benchmarks.report import describe_machine, print_result, print_table, spread
from eagle_target.checkpoints.digest import BLOCK_BYTES, checkpoint_digest, sampled_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

MB = 1_000_000
# Tensors of a dense model of that size: of each layer nine, the rest large.
SPARSE_TENSORS, SPARSE_TENSOR_BYTES = 2000, 250 * MB
READ_BYTES = 4 << 20


def write_header(path: Path, tensors: int, nbytes: int) -> int:
    """Begin a safetensors file of bfloat16 vectors; returns the bytes written."""
    entries = {
        f"layer.{index}": {
            "dtype": "BF16",
            "shape": [nbytes // 2],
            "data_offsets": [index * nbytes, (index + 1) * nbytes],
        }
        for index in range(tensors)
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return 8 + len(text)


def write_real(path: Path, tensors: int, nbytes: int) -> None:
    """A checkpoint of random bytes."""
    write_header(path, tensors, nbytes)
    random = numpy.random.default_rng(0)
    with path.open("ab") as file:
        for _ in range(tensors):
            file.write(random.bytes(nbytes))
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def hash_whole(path: Path) -> str:
    """SHA-256 of every byte."""
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(READ_BYTES):
            state.update(data)
    return state.hexdigest()


def seconds_of(operation: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    operation()
    return time.perf_counter() - started


def sampled_mb(tensors: int, nbytes: int) -> float:
    """What the digest reads of so many tensors."""
    starts = sampled_blocks(nbytes, tensors * nbytes)
    return tensors * (nbytes if starts is None else len(starts) * BLOCK_BYTES) / MB


def run(rounds: int, gigabytes: int) -> dict[str, float]:
    """Measure both checkpoints and return the figures."""
    print(describe_machine())
    tensors, nbytes = 10 * gigabytes, 100 * MB
    digest_seconds, whole_seconds = [], []
    with tempfile.TemporaryDirectory(prefix="eagle-target-") as folder:
        real = Path(folder) / "real" / "model.safetensors"
        real.parent.mkdir()
        write_real(real, tensors, nbytes)
        for _ in range(rounds):
            forget(real)
            digest_seconds.append(seconds_of(lambda: checkpoint_digest(str(real.parent))))
            forget(real)
            whole_seconds.append(seconds_of(lambda: hash_whole(real)))
        sparse = Path(folder) / "sparse" / "model.safetensors"
        sparse.parent.mkdir()
        size = write_header(sparse, SPARSE_TENSORS, SPARSE_TENSOR_BYTES)
        os.truncate(sparse, size + SPARSE_TENSORS * SPARSE_TENSOR_BYTES)
        sparse_seconds = [seconds_of(lambda: checkpoint_digest(str(sparse.parent))) for _ in range(rounds)]
    print_table(
        "Knowing a checkpoint",
        ("checkpoint", "seconds", "MB read"),
        [
            (f"{gigabytes} GB, digest", spread(digest_seconds), f"{sampled_mb(tensors, nbytes):,.0f}"),
            (f"{gigabytes} GB, SHA-256 of all", spread(whole_seconds), f"{tensors * nbytes / MB:,.0f}"),
            (
                "500 GB, sparse, digest",
                spread(sparse_seconds),
                f"{sampled_mb(SPARSE_TENSORS, SPARSE_TENSOR_BYTES):,.0f}",
            ),
        ],
    )
    return {
        "digest_seconds": statistics.median(digest_seconds),
        "whole_seconds": statistics.median(whole_seconds),
        "vs_whole": statistics.median(digest_seconds) / statistics.median(whole_seconds),
        "seconds_500_gb_sparse": statistics.median(sparse_seconds),
        "mb_500_gb": sampled_mb(SPARSE_TENSORS, SPARSE_TENSOR_BYTES),
    }


def main() -> None:
    """Run it as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=int, default=4, help="size of the checkpoint with real bytes")
    arguments = parser.parse_args()
    print_result(run(arguments.rounds, arguments.gigabytes))


if __name__ == "__main__":
    main()
