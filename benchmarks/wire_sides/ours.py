"""This project's side: `python -m benchmarks.wire_sides.ours server|client`.

A real HTTP server on a runner that has its supervision ready, and a real client; only the model is missing.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from benchmarks.processes import answer_commands
from benchmarks.wire_sides import prepared
from benchmarks.wire_sides.clients import time_batches
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.config import ServerConfig
from eagle_target.info import TargetInfo
from eagle_target.runner import DraftHead, TargetForward
from eagle_target.server import engine
from eagle_target.server.serve import HttpServer
from eagle_target.vocabulary import VocabMapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.batch import Eagle3TargetBatch
    from eagle_target.rows import Sink
    from eagle_target.runner import TargetRunner
    from eagle_target.supervision import SupervisionRequest


class PreparedRunner:
    """A target runner whose answers lie in memory. with_head: whether to have an LM head, for encoding `hidden`."""

    def __init__(self, supervision: prepared.Supervision, *, with_head: bool) -> None:
        self.supervision = supervision
        self.top_ids = prepared.selected_token_ids()[: prepared.TOKENS].to(torch.int32)
        self.logsumexp = torch.zeros(prepared.TOKENS)
        self._last = torch.zeros(prepared.TOKENS, prepared.HIDDEN, dtype=torch.bfloat16)
        self._with_head = with_head

    @property
    def info(self) -> TargetInfo:
        """Llama-3.1-8B's sizes."""
        return TargetInfo(
            model="prepared",
            num_layers=prepared.LAYERS,
            hidden_size=prepared.HIDDEN,
            vocab_size=prepared.VOCAB,
            dtype="bfloat16",
            device="cpu",
            engine="prepared",
            engine_version="1",
        )

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """Whatever they are."""

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:  # noqa: ARG002
        """What was prepared."""
        return TargetForward(aux_hidden_states=self.supervision.aux, last_hidden_states=self._last)

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        """Never asked: the supervision is ready."""
        raise NotImplementedError

    def input_embedding_weight(self) -> torch.Tensor:
        """Never asked."""
        raise NotImplementedError

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        """Zeros, where there is a head at all."""
        if not self._with_head:
            return None
        return DraftHead(weight=torch.zeros(len(token_ids), prepared.HIDDEN, dtype=torch.bfloat16))

    def close(self) -> None:
        """Nothing to release."""


def store_prepared(runner: TargetRunner, request: SupervisionRequest, forward: TargetForward, sink: Sink) -> None:
    """In place of `store_supervision`: no projection, the same tensors."""
    if not isinstance(runner, PreparedRunner):
        raise TypeError(f"{type(runner).__name__} is not the prepared runner")
    rows = int(request.row_mask.sum())
    sink.put("aux_hidden_states", forward.aux_hidden_states)
    if request.encoding == "hidden":
        sink.put("last_hidden_states", forward.last_hidden_states[:rows])
    else:
        sink.put("target_probs", runner.supervision.probs[:rows])
    sink.put("target_top_ids", runner.top_ids[:rows])
    sink.put("target_logsumexp", runner.logsumexp[:rows])


def run_server(*, with_head: bool) -> None:
    """Serve until there are no more commands."""
    supervision = prepared.make_supervision()
    config = ServerConfig(model="prepared", port=0, transports=("wire",))
    server = HttpServer(config, load=lambda: PreparedRunner(supervision, with_head=with_head))
    with patch.object(engine, "store_supervision", store_prepared):
        server.start()
        answer_commands(
            {
                "port": lambda: {"port": server.port},
                "digest": lambda: {"digest": prepared.supervision_digest(*supervision)},
            }
        )
        server.close()


def run_client(url: str, encoding: str) -> None:
    """Ask one server for batches until there are no more commands."""
    target = RemoteEagle3TargetModel.from_urls([url], transport="wire", encoding=encoding)  # type: ignore[arg-type]
    target.set_vocab_mapping(VocabMapping.from_ids(prepared.selected_token_ids(), prepared.VOCAB))
    inputs = prepared.make_trainer_inputs()

    def generate() -> Eagle3TargetBatch:
        return target.generate_batch(*inputs)

    def run_batches(count: int, hold: int) -> dict[str, Any]:
        before = target.model_info()["traffic"]["bytes_received"]
        seconds = time_batches(generate, count=count, hold=hold)
        received = target.model_info()["traffic"]["bytes_received"] - before
        return {"seconds": seconds, "bytes": received // count}

    def run_digest() -> dict[str, Any]:
        batch = generate()
        if batch.target_probs is None:
            raise TypeError("the batch has no target_probs")
        return {"digest": prepared.supervision_digest(batch.aux_hidden_states, batch.target_probs)}

    answer_commands({"batches": run_batches, "digest": run_digest})
    target.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    server = commands.add_parser("server")
    server.add_argument("--with-head", action="store_true")
    client = commands.add_parser("client")
    client.add_argument("url")
    client.add_argument("--encoding", default="probs")
    arguments = parser.parse_args()
    if arguments.command == "server":
        run_server(with_head=arguments.with_head)
    else:
        run_client(arguments.url, arguments.encoding)


if __name__ == "__main__":
    main()
