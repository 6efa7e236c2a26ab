"""How far a runner is from transformers on the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.testing.adapter_oracle import HFOracle, relative_error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eagle_target.contract.runner import TargetRunner
    from eagle_target.contract.vocab_mapping import VocabMapping

LENGTHS = (1, 2, 33, 700, 5, 128, 257)


@dataclass(frozen=True, slots=True)
class States:
    """All sequences packed: aux `[tokens, 3*hidden]`, last `[tokens, hidden]`, logits `[tokens, vocab]`, float32."""

    aux: torch.Tensor
    last: torch.Tensor
    logits: torch.Tensor

    def worst(self, other: States) -> float:
        """Largest absolute difference of any value."""
        pairs = ((self.aux, other.aux), (self.last, other.last), (self.logits, other.logits))
        return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)


def draw_sequences(vocab_size: int, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    """Random token ids of these lengths."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=draw) for length in lengths]


def run_engine(runner: TargetRunner, sequences: list[torch.Tensor], aux_layer_ids: Sequence[int]) -> States:
    """All sequences in one forward of a runner."""
    runner.set_aux_layers(aux_layer_ids)
    forward = runner.forward_eagle3(torch.cat(sequences), [len(ids) for ids in sequences])
    logits = runner.compute_logits(forward.last_hidden_states)
    return States(forward.aux_hidden_states.float(), forward.last_hidden_states.float(), logits.float())


def run_transformers(
    checkpoint: Path, sequences: list[torch.Tensor], aux_layer_ids: Sequence[int], dtype: torch.dtype
) -> States:
    """Each sequence by itself under transformers, in a dtype."""
    oracle = HFOracle(checkpoint, dtype=str(dtype).removeprefix("torch."))
    states = [oracle.run(ids.tolist()) for ids in sequences]
    return States(
        torch.cat([each.aux(aux_layer_ids) for each in states]),
        torch.cat([each.last for each in states]),
        torch.cat([each.logits for each in states]),
    )


def count_unlike_masks(
    runner: TargetRunner,
    sequences: list[torch.Tensor],
    expected: States,
    mapping: VocabMapping,
    aux_layer_ids: Sequence[int],
    tolerance: float,
) -> int:
    """Positions whose `position_mask` is not that of the expected logits.

    Raises:
        AssertionError: one of them is no tie: the best tokens in and out of the draft vocabulary are further apart.
    """
    backend = RunnerEagle3TargetModel(runner, aux_layer_ids)
    backend.set_vocab_mapping(mapping)
    ids = torch.cat(sequences)[None]
    lengths = torch.tensor([[len(sequence) for sequence in sequences]])
    batch = backend.generate_batch(ids, torch.ones_like(ids), torch.ones_like(ids), seq_lens=lengths)
    mask = batch.tensors()["position_mask"][0, :, 0]
    # Position t carries what was predicted at t + 1 of the same sequence.
    ends = lengths[0].cumsum(0) - 1
    at = torch.ones(ids.shape[1], dtype=torch.bool).index_fill_(0, ends, value=False).nonzero()[:, 0]
    in_draft = torch.zeros(mapping.vocab_size, dtype=torch.bool)
    in_draft[mapping.selected_token_ids] = True
    logits = expected.logits[at + 1]
    best_in, best_out = logits[:, in_draft].max(-1).values, logits[:, ~in_draft].max(-1).values
    unlike = mask[at] != (best_in >= best_out)
    lead = (best_in - best_out).abs()[unlike]
    assert bool((lead <= 2 * tolerance).all()), f"a mask differs where there is no tie: {lead.tolist()}"
    assert not mask[ends].any()
    return int(unlike.sum())


def assert_no_further(given: States, rounded: States, exact: States, *, roundings: int = 1) -> None:
    """A runner's states are no further from the exact ones than those that transformers rounds.

    roundings: of a sum where transformers has one; independent errors add up by their squares.
    """
    for name in ("aux", "last", "logits"):
        ours = relative_error(getattr(given, name), getattr(exact, name))
        theirs = relative_error(getattr(rounded, name), getattr(exact, name))
        print(f"{name}: relative Frobenius {ours:.2e}, of transformers {theirs:.2e}")
        assert ours <= theirs * math.sqrt(roundings)


def mean_kl(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean over rows of KL(expected || given) of the softmax of `[rows, vocab]` logits."""
    return float(
        torch.nn.functional.kl_div(
            torch.log_softmax(given.double(), -1),
            torch.log_softmax(expected.double(), -1),
            log_target=True,
            reduction="batchmean",
        )
    )
