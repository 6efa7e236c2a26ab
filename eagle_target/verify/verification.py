"""Has two targets supervise the same tokens, and compares what they give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from eagle_target.errors import ConfigError, ContractError
from eagle_target.verify.parity import Comparison
from eagle_target.verify.workload import random_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from eagle_target.auth import AccessFiles
    from eagle_target.backend import Eagle3TargetBackend
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.verify.parity import Tolerances

    Rows = tuple[torch.Tensor, torch.Tensor]

# Of target_probs, on each side.
CHUNK_BYTES = 256 << 20


def compare_targets(
    target: Eagle3TargetBackend,
    reference: Eagle3TargetBackend,
    rows: Rows,
    mapping: VocabMapping,
    *,
    tie: float,
    worst: int = 8,
) -> Comparison:
    """Compare two targets on rows, some at a time.

    Args:
        target, reference: in encoding `probs`, `rows="all"`.
        rows: input_ids and attention_mask `[batch, seq]`, right-padded. mapping, tie, worst: see `Comparison`.

    Raises:
        ContractError: they differ in size or in layers.
    """
    check_comparable(target.model_info(), reference.model_info())
    comparison = Comparison(mapping, tie=tie, worst=worst)
    for side in (target, reference):
        side.set_vocab_mapping(mapping)
    for first, input_ids, attention in _chunks(rows, mapping.draft_vocab_size):
        batches = [side.generate_batch(input_ids, attention, attention) for side in (target, reference)]
        comparison.add(batches[0], batches[1], first_sequence=first)
    return comparison


def check_comparable(facts: Mapping[str, object], reference_facts: Mapping[str, object]) -> None:
    """Refuse two targets that cannot have the same supervision.

    Raises:
        ContractError: names what differs.
    """
    names = ("num_layers", "hidden_size", "vocab_size", "aux_layer_ids")
    differs = [
        f"{name}: {facts[name]} and {reference_facts[name]}" for name in names if facts[name] != reference_facts[name]
    ]
    if differs:
        raise ContractError(f"the two targets are not of one kind: {'; '.join(differs)}")


def random_rows(vocab_size: int, sequences: int, longest: int, seed: int = 0) -> Rows:
    """Random tokens of several lengths, right-padded: input_ids and attention_mask int64 `[sequences, longest]`.

    Raises:
        ConfigError: no row of two tokens.
    """
    if sequences < 1 or longest < 2:
        raise ConfigError(f"at least one sequence of two tokens is needed, got {sequences} of {longest}")
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(longest, max(2, longest // 4), sequences).round().long()
    attention = (torch.arange(longest)[None] < lengths[:, None]).long()
    return torch.randint(vocab_size, (sequences, longest), generator=draw) * attention, attention


def verdict_table(comparison: Comparison, tolerances: Tolerances) -> Table:
    """Each figure against its tolerance."""
    table = Table(
        title=f"{comparison.tokens} tokens, {comparison.positions} predictions", title_justify="left", box=None
    )
    table.add_column("figure")
    for name in ("value", "tolerance", ""):
        table.add_column(name, justify="right")
    for verdict in comparison.verdicts(tolerances):
        kept = "ok" if verdict.is_kept else "TOO FAR"
        table.add_row(verdict.name, f"{verdict.value:.3g}", f"{verdict.tolerance:.3g}", kept)
    return table


def facts_lines(comparison: Comparison) -> list[str]:
    """What has no tolerance of its own."""
    largest = ", ".join(f"{value:.3g}" for value in comparison.hidden_max)
    agree = comparison.positions - comparison.argmax_differs
    return [
        f"hidden states, largest difference by layer: {largest}",
        f"argmax agrees at {agree} of {comparison.positions}; of the others {comparison.ties} are true ties, "
        f"{comparison.ties_unknown} cannot be told, as the draft vocabulary lacks one of the two ids",
        f"mask agrees at {comparison.positions - comparison.mask_differs} of {comparison.positions}; of the others "
        f"{comparison.mask_ties} are ties",
        f"KL at most {comparison.kl_max:.3g} nats; logsumexp differs by {comparison.logsumexp_max:.3g} at most",
    ]


def worst_table(comparison: Comparison) -> Table:
    """The positions that differ most."""
    table = Table(title="The positions with the largest KL", title_justify="left", box=None)
    for name in ("sequence", "position", "token", "KL", "top id", "reference's", "argmax", "hidden differs by"):
        table.add_column(name, justify="right")
    for place in comparison.worst:
        ids = (str(place.sequence), str(place.position), str(place.token))
        tops = (str(place.top_id), str(place.reference_top_id))
        table.add_row(*ids, f"{place.kl:.3g}", *tops, place.argmax, f"{place.hidden:.3g}")
    return table


def _chunks(rows: Rows, draft_vocab: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Rows of alike lengths together as far as they follow each other, no more than fit CHUNK_BYTES."""
    input_ids, attention = rows
    many = max(1, CHUNK_BYTES // (4 * draft_vocab * input_ids.shape[1]))
    for first in range(0, len(input_ids), many):
        part = slice(first, first + many)
        width = int(attention[part].sum(dim=1).max())
        yield first, input_ids[part, :width], attention[part, :width]


def compare_servers(
    urls: Sequence[str], *, transport: str, draft_vocab: int | None, access: AccessFiles | None = None
) -> list[dict[str, Any]]:
    """Compare each further server with the first; what could not be compared has `error`."""
    from eagle_target.client.remote import RemoteEagle3TargetModel
    from eagle_target.errors import EagleTargetError
    from eagle_target.verify.parity import default_tolerances

    def connect(url: str) -> RemoteEagle3TargetModel:
        return RemoteEagle3TargetModel.from_urls(
            [url], encoding="probs", rows="all", transport=transport, **(access or {})
        )

    results: list[dict[str, Any]] = []
    for url in urls[1:]:
        pair = {"url": url, "reference": urls[0]}
        try:
            with connect(url) as target, connect(urls[0]) as other:
                facts, other_facts = target.model_info(), other.model_info()
                tolerances = default_tolerances(facts["dtype"], other_facts["dtype"])
                vocab_size = int(facts["vocab_size"])
                compared = compare_targets(
                    target,
                    other,
                    random_rows(vocab_size, sequences=4, longest=128),
                    random_mapping(vocab_size, draft_vocab),
                    tie=tolerances.tie,
                )
        except EagleTargetError as error:
            results.append({**pair, "error": str(error)})
        else:
            results.append({**pair, **compared.to_json(tolerances)})
    return results
