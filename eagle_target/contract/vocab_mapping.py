"""The vocabulary mapping: which target tokens the draft can emit, and in what order.

vocab = the target's vocabulary; draft_vocab = the draft's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from eagle_target.errors import VocabMappingError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True, eq=False)
class VocabMapping:
    """Draft id -> target id, and which target ids the draft has.

    selected_token_ids: int64 `[draft_vocab]`, in the trainer's order, which need not be ascending.
    selected_token_mask: bool `[vocab]`.

    Raises:
        VocabMappingError: wrong dtype, shape or device; an id out of range or twice; mask and ids disagree.
    """

    selected_token_ids: torch.Tensor
    selected_token_mask: torch.Tensor
    _copies: dict[torch.device, VocabMapping] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_tensors(self.selected_token_ids, self.selected_token_mask)
        _check_ids(self.selected_token_ids, self.vocab_size)
        expected = torch.zeros_like(self.selected_token_mask)
        expected[self.selected_token_ids] = True
        wrong = (expected != self.selected_token_mask).nonzero().flatten()
        if len(wrong):
            raise VocabMappingError(
                f"selected_token_mask disagrees with selected_token_ids on {len(wrong)} target ids, first "
                f"{int(wrong[0])}: build the mask from the ids (VocabMapping.from_ids)"
            )
        # Copies: a draft's buffers change in place when a checkpoint is loaded, and the hash would not.
        object.__setattr__(self, "selected_token_ids", self.selected_token_ids.clone())
        object.__setattr__(self, "selected_token_mask", self.selected_token_mask.clone())

    @property
    def vocab_size(self) -> int:
        """Size of the target's vocabulary."""
        return len(self.selected_token_mask)

    @property
    def draft_vocab_size(self) -> int:
        """Size of the draft's vocabulary."""
        return len(self.selected_token_ids)

    @property
    def d2t(self) -> torch.Tensor:
        """int64 `[draft_vocab]` offsets, `selected_token_ids[i] - i` (the EAGLE repository's file format)."""
        return self.selected_token_ids - torch.arange(self.draft_vocab_size, device=self.selected_token_ids.device)

    @property
    def t2d(self) -> torch.Tensor:
        """Bool `[vocab]`, a copy of `selected_token_mask` (the EAGLE repository's file format)."""
        return self.selected_token_mask.clone()

    @property
    def is_whole(self) -> bool:
        """Whether the draft has every target id, in any order."""
        return self.draft_vocab_size == self.vocab_size

    @cached_property
    def is_identity(self) -> bool:
        """Whether the draft has every target id, in the target's order."""
        return self.is_whole and not bool(self.d2t.any())

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the content: `eagle-target/vocab-mapping/1`, vocab and the ids as little-endian int64."""
        digest = hashlib.sha256(b"eagle-target/vocab-mapping/1")
        digest.update(self.vocab_size.to_bytes(8, "little"))
        digest.update(self.selected_token_ids.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VocabMapping) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"VocabMapping(draft {self.draft_vocab_size} of {self.vocab_size}, sha256 {self.sha256[:12]})"

    def to(self, device: torch.device | str) -> VocabMapping:
        """The same mapping on another device, kept for the next call."""
        device = torch.device(device)
        if self.selected_token_ids.device == device:
            return self
        if device not in self._copies:
            self._copies[device] = VocabMapping(self.selected_token_ids.to(device), self.selected_token_mask.to(device))
        return self._copies[device]

    def check_target(self, vocab_size: int) -> None:
        """Refuse a target of another vocabulary.

        Raises:
            VocabMappingError: the sizes differ.
        """
        if self.vocab_size != vocab_size:
            raise VocabMappingError(
                f"the mapping is for a vocabulary of {self.vocab_size}, the target's has {vocab_size}: build it with "
                f"vocab_size={vocab_size}"
            )

    @classmethod
    def from_ids(cls, selected_token_ids: torch.Tensor, vocab_size: int) -> VocabMapping:
        """From `[draft_vocab]` int64 ids in the trainer's order; the mask is derived."""
        mask = torch.zeros(vocab_size, dtype=torch.bool, device=selected_token_ids.device)
        _check_tensors(selected_token_ids, mask)
        _check_ids(selected_token_ids, vocab_size)
        mask[selected_token_ids] = True
        return cls(selected_token_ids, mask)

    @classmethod
    def from_d2t_t2d(cls, d2t: torch.Tensor, t2d: torch.Tensor) -> VocabMapping:
        """From offsets `[draft_vocab]` and mask `[vocab]`, in any order of ids."""
        if d2t.dim() != 1 or d2t.is_floating_point() or d2t.dtype == torch.bool:
            raise VocabMappingError(
                f"d2t must be a vector of integers, got {d2t.dtype} {list(d2t.shape)}: "
                "d2t[i] is selected_token_ids[i] - i"
            )
        ids = d2t.to(torch.int64) + torch.arange(len(d2t), device=d2t.device)
        return cls(ids, t2d.to(torch.bool))

    @classmethod
    def identity(cls, vocab_size: int) -> VocabMapping:
        """Every target id, in the target's order."""
        return cls.from_ids(torch.arange(vocab_size), vocab_size)

    @classmethod
    def from_counts(
        cls,
        counts: torch.Tensor,
        draft_vocab_size: int,
        *,
        special_ids: Iterable[int] = (),
        ascending: bool = False,
    ) -> VocabMapping:
        """From how often each target id occurs, most frequent first.

        Args:
            counts: `[vocab]` integers.
            draft_vocab_size: how many ids to take.
            special_ids: ids that are always in, however rare.
            ascending: order the chosen ids by target id, as SpecForge and the EAGLE repository do.

        Ties go to the lower id.

        Raises:
            VocabMappingError: sizes that do not fit, or a special id out of range.
        """
        vocab_size = len(counts)
        special = sorted(set(special_ids))
        if not 0 < draft_vocab_size <= vocab_size:
            raise VocabMappingError(f"draft_vocab_size must be 1 to {vocab_size}, got {draft_vocab_size}")
        if special and not 0 <= special[0] <= special[-1] < vocab_size:
            raise VocabMappingError(f"special ids must be 0 to {vocab_size - 1}, got {special}")
        if len(special) > draft_vocab_size:
            raise VocabMappingError(
                f"{len(special)} special ids do not fit a draft vocabulary of {draft_vocab_size}: make it larger"
            )
        ranked = torch.sort(counts.to(torch.int64), descending=True, stable=True).indices
        is_special = torch.zeros(vocab_size, dtype=torch.bool)
        is_special[special] = True
        others = ranked[~is_special[ranked]][: draft_vocab_size - len(special)]
        chosen = is_special.clone()
        chosen[others] = True
        ids = chosen.nonzero().flatten() if ascending else ranked[chosen[ranked]]
        return cls(ids, chosen)

    @classmethod
    def from_file(cls, path: str | Path, vocab_size: int | None = None) -> VocabMapping:
        """From a `.safetensors` or torch file, see `vocabulary_files.load_vocab_mapping`."""
        from eagle_target.vocab.mapping_files import load_vocab_mapping  # it imports this module

        return load_vocab_mapping(path, vocab_size=vocab_size)

    def save(self, path: str | Path) -> None:
        """To a `.safetensors` or torch file, see `vocabulary_files.save_vocab_mapping`."""
        from eagle_target.vocab.mapping_files import save_vocab_mapping  # it imports this module

        save_vocab_mapping(self, path)

    def coverage(self, counts: torch.Tensor) -> float:
        """Share of the counted tokens that the draft vocabulary has; 0 when nothing was counted."""
        total = int(counts.sum())
        return int(counts[self.selected_token_mask.to(counts.device)].sum()) / total if total else 0.0


def _check_tensors(ids: torch.Tensor, mask: torch.Tensor) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1 or not len(ids):
        raise VocabMappingError(
            f"selected_token_ids must be a non-empty int64 vector, got {ids.dtype} {list(ids.shape)}"
        )
    if mask.dtype != torch.bool or mask.dim() != 1:
        raise VocabMappingError(f"selected_token_mask must be a bool vector, got {mask.dtype} {list(mask.shape)}")
    if ids.device != mask.device:
        raise VocabMappingError(
            f"selected_token_ids is on {ids.device} and selected_token_mask on {mask.device}: put both on one device"
        )


def _check_ids(ids: torch.Tensor, vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise VocabMappingError(
            f"selected_token_ids has {low if low < 0 else high}, but the target's ids are 0 to {vocab_size - 1}"
        )
    unique, counts = torch.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise VocabMappingError(f"selected_token_ids has {int(unique[counts > 1][0])} more than once")
