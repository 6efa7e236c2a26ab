"""The reference's side, in its own environment: `python -m benchmarks.wire_sides.reference server|client`.

Its real server and client over its wire path; only `compute_supervision` is replaced, by one that has it ready.
"""

from __future__ import annotations

import argparse
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

# Its other path needs CUDA and SGLang on both sides; without them it takes this one by itself.
os.environ["NEMO_EAGLE_ENABLE_NCCL"] = "0"

import torch
from nemo_automodel.components.speculative.eagle.remote import server as reference_server
from nemo_automodel.components.speculative.eagle.remote import wire
from nemo_automodel.components.speculative.eagle.remote.client import RemoteEagle3TargetModel

from benchmarks.processes import answer_commands
from benchmarks.wire_sides import prepared
from benchmarks.wire_sides.clients import time_batches
from benchmarks.wire_sides.free_port import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping


def run_server() -> None:
    """Serve until there are no more commands."""
    supervision = prepared.make_supervision()

    def compute_prepared(*_: object, input_ids: torch.Tensor, loss_mask: torch.Tensor, **__: object) -> dict[str, Any]:
        return {
            "aux_hidden_states": supervision.aux[None],
            "target_probs": supervision.probs[None],
            "position_mask": torch.ones(1, prepared.TOKENS, 1, dtype=torch.bool),
            "input_ids": input_ids,
            "loss_mask": loss_mask,
        }

    reference_server.compute_supervision = compute_prepared
    logic = reference_server.TargetModelServer(SimpleNamespace(), nccl_port=0, host="127.0.0.1")
    port = free_port()
    threading.Thread(target=reference_server.serve, args=(logic, "127.0.0.1", port), daemon=True).start()
    answer_commands(
        {"port": lambda: {"port": port}, "digest": lambda: {"digest": prepared.supervision_digest(*supervision)}}
    )


def run_client(url: str) -> None:
    """Ask one server for batches until there are no more commands."""
    target = RemoteEagle3TargetModel.from_urls([url], device="cpu")
    ids = prepared.selected_token_ids()
    mask = torch.zeros(prepared.VOCAB, dtype=torch.bool)
    mask[ids] = True
    target.set_vocab_mapping(ids, mask)
    inputs = prepared.make_trainer_inputs()

    def generate() -> Any:
        return target.generate_batch(*inputs)

    def run_batches(count: int, hold: int) -> dict[str, Any]:
        return {"seconds": time_batches(generate, count=count, hold=hold), "bytes": _body_bytes()}

    def run_digest() -> dict[str, Any]:
        batch = generate()
        return {"digest": prepared.supervision_digest(batch.aux_hidden_states, batch.target_probs)}

    answer_commands({"batches": run_batches, "digest": run_digest})
    target.close()


def _body_bytes() -> int:
    """Bytes of one answer: its tensors' and its header's, which an answer of no rows has too."""
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = {
        "aux_hidden_states": ((1, prepared.TOKENS, 3 * prepared.HIDDEN), torch.bfloat16),
        "target_probs": ((1, prepared.TOKENS, prepared.DRAFT_VOCAB), torch.float32),
        "position_mask": ((1, prepared.TOKENS, 1), torch.bool),
        "input_ids": ((1, prepared.TOKENS), torch.int64),
        "loss_mask": ((1, prepared.TOKENS), torch.int64),
    }
    header = len(wire.encode({name: torch.empty((0,) * len(shape)) for name, (shape, _) in shapes.items()}))
    return header + sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("server")
    commands.add_parser("client").add_argument("url")
    arguments = parser.parse_args()
    if arguments.command == "server":
        run_server()
    else:
        run_client(arguments.url)


if __name__ == "__main__":
    main()
