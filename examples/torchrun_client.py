"""Ranks of one training job, each with its own connections to every target server.

    eagle-target serve --model meta-llama/Llama-3.1-8B-Instruct --transport nccl
    torchrun --nproc-per-node 2 examples/torchrun_client.py --transport nccl http://127.0.0.1:8001

The trainer makes its default process group, as always. The target's groups are others, of two ranks each, beside it.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import distributed

from eagle_target import RemoteEagle3TargetModel

BATCH, SEQ, VOCAB, STEPS = 2, 16, 200, 4


def rows(rank: int, step: int) -> dict[str, torch.Tensor]:
    """This rank's share of a step: random tokens here, `[batch, seq]` each."""
    draw = torch.Generator().manual_seed(1000 * rank + step)
    whole = torch.ones(BATCH, SEQ, dtype=torch.int64)
    ids = torch.randint(0, VOCAB, (BATCH, SEQ), generator=draw)
    return {"input_ids": ids, "attention_mask": whole, "loss_mask": whole}


def train(rank: int, device: str, urls: list[str], transport: str) -> int:
    """Run the steps; returns how many tokens all ranks trained on."""
    trained = torch.zeros(1, dtype=torch.int64, device=device)
    with RemoteEagle3TargetModel.from_urls(urls, device=device, transport=transport, encoding="logits") as target:
        for batch in target.prefetch((rows(rank, step) for step in range(STEPS)), depth=2):
            # Forward, loss and backward of the draft stand here; its gradients are reduced over the default group.
            trained += batch.attention_mask.sum()
            distributed.all_reduce(batch.aux_hidden_states.float().mean())
        used = sorted({server["transport"] for server in target.model_info()["servers"]})
        # One write a line: torchrun's ranks share a pipe, and print() writes the line's end by itself.
        sys.stdout.write(f"rank {rank}: {STEPS} batches over {', '.join(used)}\n")
    distributed.all_reduce(trained)
    return int(trained)


def main() -> None:
    """Join the job, train, and leave it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+", help="target servers, http://host:port each")
    parser.add_argument("--transport", default="auto", help="auto, a name, or names in order of preference")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        rank = distributed.get_rank()
        trained = train(rank, device, arguments.urls, arguments.transport)
        if rank == 0:
            sys.stdout.write(f"{distributed.get_world_size()} ranks trained on {trained} tokens\n")
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
