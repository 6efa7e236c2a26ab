"""This project's side: `python -m benchmarks.wire_sides.ours server|client`.

A real HTTP server on a runner that has its supervision ready, and a real client; only the model is missing.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from benchmarks.processes import answer_commands
from benchmarks.wire_sides import prepared
from benchmarks.wire_sides.clients import time_batches
from benchmarks.wire_sides.target import PreparedRunner
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.config import ServerConfig
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.server.run import HttpServer

if TYPE_CHECKING:
    from eagle_target.contract.batch import Eagle3TargetBatch


def run_server(*, with_head: bool) -> None:
    """Serve until there are no more commands."""
    supervision = prepared.make_supervision()
    config = ServerConfig(model="prepared", port=0, transports=("wire",))
    server = HttpServer(config, load=lambda: PreparedRunner(supervision, with_head=with_head))
    server.start()
    answer_commands(
        {
            "port": lambda: {"port": server.port},
            "digest": lambda: {"digest": prepared.supervision_digest(*supervision)},
        }
    )
    server.close()


def run_client(url: str, encoding: str, *, checksum: bool) -> None:
    """Ask one server for batches until there are no more commands."""
    target = RemoteEagle3TargetModel.from_urls(
        [url],
        transport="wire",
        encoding=encoding,
        checksum=checksum,
    )
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
    client.add_argument("--no-checksum", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "server":
        run_server(with_head=arguments.with_head)
    else:
        run_client(arguments.url, arguments.encoding, checksum=not arguments.no_checksum)


if __name__ == "__main__":
    main()
