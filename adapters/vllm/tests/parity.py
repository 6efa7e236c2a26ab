"""How far a runner is from transformers on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eagle_target.runner import TargetRunner

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


@torch.no_grad()
def run_transformers(
    checkpoint: Path, sequences: list[torch.Tensor], aux_layer_ids: Sequence[int], dtype: torch.dtype
) -> States:
    """Each sequence by itself under transformers, in a dtype."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    last_layer: list[torch.Tensor] = []
    # transformers norms the last entry of hidden_states, so the last layer's own output needs a hook.
    hook = model.model.layers[-1].register_forward_hook(
        lambda _module, _args, output: last_layer.append(output[0] if isinstance(output, tuple) else output)
    )
    parts = []
    for ids in sequences:
        output = model(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        layers = [state[0] for state in output.hidden_states[1:-1]] + [last_layer.pop().reshape(len(ids), -1)]
        aux = torch.cat([layers[layer] for layer in sorted(aux_layer_ids)], dim=1)
        parts.append(States(aux.float(), output.hidden_states[-1][0].float(), output.logits[0].float()))
    hook.remove()
    return States(*(torch.cat([getattr(part, name) for part in parts]) for name in ("aux", "last", "logits")))


def relative_frobenius(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm."""
    return float((given - expected).norm() / expected.norm())


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
