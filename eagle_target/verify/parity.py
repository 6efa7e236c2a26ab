"""Two targets' supervision of the same tokens, compared. [tokens, ...]: positions that have a prediction, packed."""

from __future__ import annotations

import heapq
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from eagle_target.contract.batch import Eagle3TargetBatch
    from eagle_target.contract.vocab_mapping import VocabMapping

LAYERS = 3
TINY = 1e-38
ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class Tolerances:
    """How far two targets may be apart.

    hidden: relative Frobenius norm of a layer's difference. kl: mean, nats. argmax, mask: share of the positions that
    differ, true ties left out. tie: nats between two logits that are as good as equal.
    """

    hidden: float
    kl: float
    argmax: float
    mask: float
    tie: float

    def changed(self, given: dict[str, float | None]) -> Tolerances:
        """With those that are given instead."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


# float32: what the order of sums does; half precision: what rounding does over the layers of a deep target.
DEFAULTS = {
    "float32": Tolerances(hidden=1e-4, kl=1e-6, argmax=0.001, mask=0.001, tie=1e-4),
    "float16": Tolerances(hidden=1e-2, kl=1e-4, argmax=0.01, mask=0.01, tie=0.02),
    "bfloat16": Tolerances(hidden=5e-2, kl=5e-3, argmax=0.05, mask=0.05, tie=0.13),
}


def default_tolerances(dtype: str, reference_dtype: str) -> Tolerances:
    """Those of the coarser of two dtypes; what has no row of its own counts as bfloat16."""
    coarse = DEFAULTS["bfloat16"]
    pair = (DEFAULTS.get(dtype, coarse), DEFAULTS.get(reference_dtype, coarse))
    return Tolerances(*(max(getattr(one, field.name) for one in pair) for field in fields(Tolerances)))


class Position(NamedTuple):
    """A token, and what the two targets predict after it.

    kl: KL(reference, ours) of the draft's distributions, nats. sequence, position: from 0. token: the id there.
    top_id, reference_top_id: of the next token. argmax: `same`, `tie`, `differs`, or `unknown` where the draft
    vocabulary lacks one of the two. hidden: largest difference of a hidden state at the token.
    """

    kl: float
    sequence: int
    position: int
    token: int
    top_id: int
    reference_top_id: int
    argmax: str
    hidden: float


class Verdict(NamedTuple):
    """One figure against its tolerance."""

    name: str
    value: float
    tolerance: float

    @property
    def is_kept(self) -> bool:
        """Whether the figure is a number within its tolerance."""
        return self.value <= self.tolerance


class Comparison:
    """Adds batch after batch.

    Args:
        mapping: of both. tie: nats, see `Tolerances`. worst: positions to keep.
    """

    def __init__(self, mapping: VocabMapping, *, tie: float, worst: int = 8) -> None:
        self._mapping = mapping
        self._draft_ids = torch.full((mapping.vocab_size,), -1)
        self._draft_ids[mapping.selected_token_ids] = torch.arange(mapping.draft_vocab_size)
        self._tie = tie
        self._kept = worst
        self._squares = torch.zeros(2, LAYERS, dtype=torch.float64)
        self.hidden_max = [0.0] * LAYERS
        self.tokens = 0
        self.positions = 0
        self.argmax_differs = self.mask_differs = self.ties = self.ties_unknown = self.mask_ties = 0
        self.kl_sum = self.kl_max = 0.0
        self.logsumexp_max = 0.0
        self.worst: list[Position] = []

    def add(self, batch: Eagle3TargetBatch, reference: Eagle3TargetBatch, *, first_sequence: int) -> None:
        """Compare one batch, a sequence a row, every row of the distribution asked for.

        Args:
            first_sequence: number of the batch's first row.

        Raises:
            ContractError: a batch without probabilities, or the two are of other sizes.
        """
        ours, theirs = _tensors(batch), _tensors(reference)
        for name, tensor in ours.items():
            if tensor.shape != theirs[name].shape:
                raise ContractError(f"{name} is {list(tensor.shape)} and {list(theirs[name].shape)}: not one target's")
        real = batch.attention_mask.bool()
        # Position t of the batch has what was predicted at token t + 1, so the last token's place is empty.
        predicted = real & torch.nn.functional.pad(real[:, 1:], (0, 1))
        places = predicted.nonzero()
        hidden = self._add_hidden(ours["aux_hidden_states"], theirs["aux_hidden_states"], real)
        kl = self._add_kl(ours["target_probs"][predicted], theirs["target_probs"][predicted])
        argmax = self._add_argmax(ours, theirs, places)
        mask_differs = (ours["position_mask"] != theirs["position_mask"])[predicted][:, 0]
        self.mask_differs += int(mask_differs.sum())
        self.mask_ties += sum(argmax[row] == "tie" for row in mask_differs.nonzero()[:, 0].tolist())
        difference = (ours["target_logsumexp"] - theirs["target_logsumexp"])[predicted].abs()
        self.logsumexp_max = _larger(self.logsumexp_max, difference)
        self.tokens += int(real.sum())
        self.positions += len(places)
        moved = hidden[places[:, 0], places[:, 1] + 1]
        differing = [row for row, name in enumerate(argmax) if name != "same" or bool(kl[row] != 0 or moved[row] != 0)]
        differing.sort(key=lambda row: (_rank(float(kl[row])), argmax[row] != "same", float(moved[row])), reverse=True)
        found = [
            Position(
                kl=float(kl[row]),
                sequence=first_sequence + int(places[row, 0]),
                position=int(places[row, 1]) + 1,
                token=int(batch.input_ids[tuple(places[row])]),
                top_id=int(ours["target_top_ids"][tuple(places[row])]),
                reference_top_id=int(theirs["target_top_ids"][tuple(places[row])]),
                argmax=argmax[row],
                hidden=float(moved[row]),
            )
            for row in differing[: self._kept]
        ]
        self.worst = heapq.nlargest(self._kept, [*self.worst, *found], key=_badness)

    def verdicts(self, tolerances: Tolerances) -> list[Verdict]:
        """Each figure that has a tolerance."""
        count = max(1, self.positions)
        return [
            *(
                Verdict(f"hidden states, layer {number + 1} of {LAYERS}, relative Frobenius", value, tolerances.hidden)
                for number, value in enumerate(self.hidden_relative)
            ),
            Verdict(
                "argmax differs, ties left out, share", (self.argmax_differs - self.ties) / count, tolerances.argmax
            ),
            Verdict("KL of the draft's distribution, mean nats", self.kl_sum / count, tolerances.kl),
            Verdict(
                "mask differs, ties left out, share", (self.mask_differs - self.mask_ties) / count, tolerances.mask
            ),
        ]

    @property
    def hidden_relative(self) -> list[float]:
        """Frobenius norm of each layer's difference over that of the reference."""
        difference, reference = self._squares.sqrt().tolist()
        return [
            one / other if other else (0.0 if one == 0 else math.inf)
            for one, other in zip(difference, reference, strict=True)
        ]

    def to_json(self, tolerances: Tolerances) -> dict[str, Any]:
        """Everything, as plain data."""
        verdicts = self.verdicts(tolerances)
        return {
            "tokens": self.tokens,
            "positions": self.positions,
            "hidden_relative": self.hidden_relative,
            "hidden_max": self.hidden_max,
            "argmax_differs": self.argmax_differs,
            "argmax_ties": self.ties,
            "argmax_unknown": self.ties_unknown,
            "kl_mean": self.kl_sum / max(1, self.positions),
            "kl_max": self.kl_max,
            "mask_differs": self.mask_differs,
            "mask_ties": self.mask_ties,
            "logsumexp_max": self.logsumexp_max,
            "worst": [position._asdict() for position in self.worst],
            "tolerances": asdict(tolerances),
            "within": all(verdict.is_kept for verdict in verdicts),
        }

    def _add_hidden(self, ours: torch.Tensor, theirs: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Add `[batch, seq, 3*hidden]`; the largest difference of each token, `[batch, seq]`."""
        layers = theirs[real].double().view(int(real.sum()), LAYERS, -1)
        difference = ours[real].double().view_as(layers) - layers
        self._squares[0] += difference.square().sum(dim=(0, 2))
        self._squares[1] += layers.square().sum(dim=(0, 2))
        by_token = difference.abs().amax(dim=2)
        self.hidden_max = [_larger(old, by_token[:, layer]) for layer, old in enumerate(self.hidden_max)]
        at = torch.zeros(real.shape, dtype=torch.float64)
        at[real] = by_token.amax(dim=1)
        return at

    def _add_kl(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """Add `[positions, draft_vocab]`; KL(reference, ours) of each, `[positions]`."""
        parts = [
            _kl(p.double(), q.double())
            for q, p in zip(torch.split(ours, ROWS_AT_A_TIME), torch.split(theirs, ROWS_AT_A_TIME), strict=True)
        ]
        # Two roundings of one distribution may come out a hair below zero.
        kl = torch.cat(parts).clamp_min(0.0) if parts else torch.zeros(0, dtype=torch.float64)
        self.kl_sum += float(kl.sum())
        self.kl_max = _larger(self.kl_max, kl)
        return kl

    def _add_argmax(
        self, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], places: torch.Tensor
    ) -> list[str]:
        """Count argmaxes that differ; `same`, `tie`, `differs` or `unknown` for each of the places."""
        rows, columns = places.unbind(dim=1)
        pair = torch.stack([side["target_top_ids"][rows, columns].long() for side in (ours, theirs)], dim=1)
        draft = self._draft_ids[pair]
        # Of two ids of the draft the reference's probabilities tell how far apart their logits are.
        chances = theirs["target_probs"][rows[:, None], columns[:, None], draft.clamp_min(0)].double()
        gaps = chances.clamp_min(TINY).log().diff(dim=1)[:, 0].abs()
        known = (draft >= 0).all(dim=1)
        names = []
        for row in range(len(places)):
            if bool(pair[row, 0] == pair[row, 1]):
                names.append("same")
            elif not bool(known[row]):
                names.append("unknown")
            else:
                names.append("tie" if float(gaps[row]) <= self._tie else "differs")
        self.argmax_differs += len(names) - names.count("same")
        self.ties += names.count("tie")
        self.ties_unknown += names.count("unknown")
        return names


def _tensors(batch: Eagle3TargetBatch) -> dict[str, torch.Tensor]:
    """What is compared, on the CPU."""
    compared = ("aux_hidden_states", "target_probs", "position_mask", "target_top_ids", "target_logsumexp")
    tensors = batch.tensors()
    missing = [name for name in compared if name not in tensors]
    if missing:
        raise ContractError(f"a batch to compare lacks {missing}: ask for probabilities")
    return {name: tensors[name].cpu() for name in compared}


def _kl(reference: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    return (reference * (reference.clamp_min(TINY).log() - ours.clamp_min(TINY).log())).sum(dim=-1)


def _larger(old: float, values: torch.Tensor) -> float:
    """The larger; a value that is no number stays."""
    return old if not len(values) or math.isnan(old) else max(old, float(values.max()), key=_rank)


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _badness(position: Position) -> tuple[float, bool, float]:
    return _rank(position.kl), position.argmax != "same", position.hidden
