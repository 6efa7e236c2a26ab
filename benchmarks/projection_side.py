"""One projection in a fresh process: `python -m benchmarks.projection_side ours|reference TOKENS`.

Both start from the same last hidden states `[tokens, hidden]` and head weight `[vocab, hidden]` in float32 and end
with the same outputs.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from benchmarks.processes import MB, answer_commands, memory

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB = 128_256
DRAFT_VOCAB = 32_000
HIDDEN = 512
WARM_UP_TOKENS = 8
PROBED = 97


def make_inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last hidden states, head weight, and the draft's ids in an order of their own."""
    draw = torch.Generator().manual_seed(0)
    last = torch.empty(tokens, HIDDEN).normal_(generator=draw)
    weight = torch.empty(VOCAB, HIDDEN).normal_(std=4 * HIDDEN**-0.5, generator=draw)
    return last, weight, torch.randperm(VOCAB, generator=draw)[:DRAFT_VOCAB].clone()


def project_ours(
    last: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, loss_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The project's path: what a server runs, then the position mask, as its client makes it."""
    from eagle_target.bench.sizes import Shape
    from eagle_target.compute.projection import project_full
    from eagle_target.contract.request import SupervisionRequest, answer_spec
    from eagle_target.contract.sinks import PackedTensors
    from eagle_target.contract.vocab_mapping import VocabMapping

    mapping = VocabMapping.from_ids(ids, len(weight))
    outputs = PackedTensors()
    rows = len(last) - 1
    request = SupervisionRequest(
        input_ids=torch.zeros(rows, dtype=torch.int64),
        seq_lens=(rows,),
        row_mask=torch.ones(rows, dtype=torch.bool),
        mapping=mapping,
    )
    # Row 0 predicts nothing that is shifted into the sequence: it is not asked for.
    project_full(
        last[1:],
        lambda rows: functional.linear(rows, weight),
        vocab_size=len(weight),
        spec=answer_spec(request, Shape("projection", last.shape[1], len(weight), 1).info),
        mapping=mapping,
        sink=outputs,
    )
    in_draft = mapping.selected_token_mask[outputs["target_top_ids"].long()]
    return {**outputs, "position_mask": in_draft & loss_mask[:-1].bool()}


def project_reference(
    last: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, loss_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The reference's path: all logits, shifted as its `generate_batch` does, then its own function."""
    from nemo_automodel.components.speculative.eagle.core import _compute_target_distribution
    from nemo_automodel.components.speculative.eagle.target import _shift_left_with_zero

    mask = torch.zeros(len(weight), dtype=torch.bool)
    mask[ids] = True

    def shifted_logits() -> torch.Tensor:
        shifted: torch.Tensor = _shift_left_with_zero(functional.linear(last, weight)[None])
        return shifted

    probs, position_mask = _compute_target_distribution(shifted_logits(), ids, mask, loss_mask[None])
    return {"target_probs": probs[0], "position_mask": position_mask[0, :, 0]}


def measure(project: Callable[..., dict[str, torch.Tensor]], tokens: int) -> Callable[[], dict[str, Any]]:
    """A command that runs the projection once and says what it took.

    extra_mb is the peak of resident memory above what was resident before, less the outputs.
    """
    last, weight, ids = make_inputs(tokens)
    # Already shifted, as both sides get it: the last position predicts nothing.
    loss_mask = torch.ones(tokens, dtype=torch.int64)
    loss_mask[-1] = 0
    project(last[:WARM_UP_TOKENS], weight, ids, loss_mask[:WARM_UP_TOKENS])

    def run() -> dict[str, Any]:
        before = memory()
        started, cpu_started = time.perf_counter(), time.process_time()
        outputs = project(last, weight, ids, loss_mask)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        after = memory()
        output_mb = sum(tensor.nbytes for tensor in outputs.values()) / MB
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "extra_mb": after["peak_rss_mb"] - before["rss_mb"] - output_mb,
            "supervised": int(outputs["position_mask"].sum()),
            "probs": outputs["target_probs"][0 : tokens - 1 : PROBED, ::PROBED].flatten().tolist(),
        }

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "reference"))
    parser.add_argument("tokens", type=int)
    arguments = parser.parse_args()
    project = project_ours if arguments.side == "ours" else project_reference
    with torch.no_grad():
        answer_commands({"run": measure(project, arguments.tokens)})


if __name__ == "__main__":
    main()
