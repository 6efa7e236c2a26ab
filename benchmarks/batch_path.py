"""The files, classes and functions of this project that one batch meets, from the trainer's call and back.

    python -m benchmarks.batch_path          # or: make batch-path

Server and client are in this process, so that one profiler sees both; a batch goes over `wire`, over `shm`, and to a
target in the trainer's own process. The first batches are not looked at: they connect, agree and allocate. What the
process does while nobody asks for anything (leases, watches) is left out, and so is the test kit that starts it.
The adapter's own files are counted apart, for a batch meets those of whichever engine there is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.report import print_result, print_table
from eagle_target import RemoteEagle3TargetModel, load_target
from eagle_target.targets import load_runner
from eagle_target.testing import loopback_server, save_tiny_target, shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, FrameType

    from eagle_target import Eagle3TargetBackend

ROOT = Path(__file__).resolve().parents[1]
CORE = (str(ROOT / "eagle_target"), str(ROOT / "transports"))
ADAPTERS = (str(ROOT / "adapters"),)
TEST_KIT = str(ROOT / "eagle_target" / "testing")
WARM_BATCHES = 3


@dataclass
class Trace:
    """Code of this project that ran, in any thread, while it was watched."""

    code: set[CodeType] = field(default_factory=set)
    watching: bool = False

    def profile(self, frame: FrameType, event: str, _: Any) -> None:
        """What `sys.setprofile` calls."""
        if self.watching and event == "call":
            self.code.add(frame.f_code)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keep what runs inside."""
        self.code = set()
        self.watching = True
        try:
            yield
        finally:
            self.watching = False


@dataclass(frozen=True)
class Met:
    """What one batch met."""

    files: list[str]
    adapter_files: list[str]
    classes: list[str]
    functions: list[str]


def met(code: set[CodeType]) -> Met:
    """Sort code by file, class and function."""
    ours = [each for each in code if each.co_filename.startswith(CORE) and not each.co_filename.startswith(TEST_KIT)]
    adapter = {each.co_filename for each in code if each.co_filename.startswith(ADAPTERS)}
    functions = {(each.co_filename, each.co_qualname) for each in ours}
    classes = {
        (file, name.split(".<locals>")[0].rpartition(".")[0])
        for file, name in functions
        if "." in name.split(".<locals>")[0]
    }
    return Met(
        files=sorted({_short(each.co_filename) for each in ours}),
        adapter_files=sorted(_short(name) for name in adapter),
        classes=sorted(f"{_short(file)}: {name}" for file, name in classes),
        functions=sorted(f"{_short(file)}: {name}" for file, name in functions),
    )


def trace_batch(trace: Trace, target: Eagle3TargetBackend, batch: dict[str, torch.Tensor], idle_seconds: float) -> Met:
    """Trace one batch after some that are not looked at."""
    for _ in range(WARM_BATCHES):
        target.generate_batch(**batch)
    with trace.watch():
        time.sleep(idle_seconds)
    idle = trace.code
    with trace.watch():
        target.generate_batch(**batch)
    return met(trace.code - idle)


def make_batch(vocab_size: int) -> dict[str, torch.Tensor]:
    """Two padded rows."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, vocab_size, (2, 24), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 17:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": attention_mask.clone()}


def trace_all(trace: Trace, folder: Path, idle_seconds: float) -> dict[str, Met]:
    """Trace a batch over each way."""
    model = str(save_tiny_target(folder))
    paths = {}
    with ExitStack() as opened:
        server = opened.enter_context(loopback_server(lambda: load_runner("hf", model, {}), transports=("auto",)))
        vocab_size = server.engine.served.info.vocab_size
        mapping, batch = shuffled_mapping(vocab_size, 32), make_batch(vocab_size)
        for name in ("wire", "shm"):
            client = RemoteEagle3TargetModel.from_urls([server.url], transport=name)
            opened.callback(client.close)
            client.set_vocab_mapping(mapping)
            paths[name] = trace_batch(trace, client, batch, idle_seconds)
        colocated = load_target("hf", model)
        opened.callback(colocated.close)
        colocated.set_vocab_mapping(mapping)
        paths["colocated"] = trace_batch(trace, colocated, batch, idle_seconds)
    return paths


def main() -> None:
    """Trace, print what was met, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every file, class and function")
    parser.add_argument("--idle", type=float, default=3.0, help="seconds to look at what runs without a batch")
    arguments = parser.parse_args()
    trace = Trace()
    threading.setprofile(trace.profile)
    sys.setprofile(trace.profile)
    with tempfile.TemporaryDirectory() as folder:
        paths = trace_all(trace, Path(folder) / "target", arguments.idle)
    sys.setprofile(None)
    threading.setprofile(None)
    if arguments.list:
        for name, path in paths.items():
            for what in ("files", "classes", "functions"):
                print(f"\n{name}: {what}")
                print("\n".join(f"  {line}" for line in getattr(path, what)))
    print_table(
        "What one batch meets",
        ("way", "files", "of the adapter", "classes", "functions"),
        [
            (name, *(str(len(found)) for found in (path.files, path.adapter_files, path.classes, path.functions)))
            for name, path in paths.items()
        ],
    )
    print_result(
        {
            **{f"files_{name}": len(path.files) for name, path in paths.items()},
            **{f"classes_{name}": len(path.classes) for name, path in paths.items()},
            **{f"functions_{name}": len(path.functions) for name, path in paths.items()},
        }
    )


def _short(file: str) -> str:
    return str(Path(file).relative_to(ROOT))


if __name__ == "__main__":
    main()
