"""The vocabulary mapping: which target tokens the draft can emit, and in what order.

vocab = the target's vocabulary; draft_vocab = the draft's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from eagle_target.errors import VocabMappingError
from eagle_target.vocab.mapping_files import WANTED, read_mapping_tensors, write_mapping_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable


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
        """From a `.safetensors`, `.pt`, `.bin` or `.pth` file, on the CPU.

        The file has `selected_token_ids` `[draft_vocab]` and `selected_token_mask` `[vocab]`, or the offsets `d2t`
        and the mask `t2d`; it may be a whole draft checkpoint, whose other weights are not read.

        Args:
            path: the file.
            vocab_size: size of the target's vocabulary; needed where the file has no mask, checked where it has one.

        Raises:
            VocabMappingError: the file cannot be read, is unsafe, or does not have a valid mapping.
        """
        tensors, names, sha256 = read_mapping_tensors(Path(path))
        try:
            mapping = _assemble(tensors, names, vocab_size)
            _check_sha256(mapping, sha256)
            if vocab_size is not None:
                mapping.check_target(vocab_size)
        except VocabMappingError as error:
            raise VocabMappingError(f"{path}: {error}") from error
        return mapping

    def save(self, path: str | Path) -> None:
        """To a file in both forms, ids with mask and `d2t` with `t2d`; a failure leaves no half-written file.

        The same mapping gives the same `.safetensors` bytes.

        Raises:
            VocabMappingError: the file cannot be written.
        """
        mapping = self.to("cpu")
        tensors = {
            "selected_token_ids": mapping.selected_token_ids.contiguous(),
            "selected_token_mask": mapping.selected_token_mask.contiguous(),
            "d2t": mapping.d2t,
            "t2d": mapping.t2d.clone(),
        }
        write_mapping_tensors(tensors, Path(path), mapping.sha256)

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


def _assemble(tensors: dict[str, torch.Tensor], names: Iterable[str], vocab_size: int | None) -> VocabMapping:
    mappings = []
    any_mask = tensors.get("selected_token_mask", tensors.get("t2d"))
    for ids_key, mask_key in (("selected_token_ids", "selected_token_mask"), ("d2t", "t2d")):
        if ids_key not in tensors:
            continue
        ids, mask = _integers(ids_key, tensors[ids_key]), tensors.get(mask_key, any_mask)
        if ids_key == "d2t":
            ids = ids + torch.arange(len(ids))
        if mask is not None:
            mappings.append(VocabMapping(ids, mask.to(torch.bool)))
        elif vocab_size is not None:
            mappings.append(VocabMapping.from_ids(ids, vocab_size))
        else:
            raise VocabMappingError(
                f"it has {ids_key} but no {mask_key}, so the size of the target's vocabulary is not known: "
                "pass vocab_size (the target's config.json has it)"
            )
    if not mappings:
        raise VocabMappingError(f"it has {_abridged(names)}: expected {WANTED}")
    if len(set(mappings)) > 1:
        raise VocabMappingError("its selected_token_ids and its d2t are two different mappings: remove one of them")
    return mappings[0]


def _check_sha256(mapping: VocabMapping, sha256: str | None) -> None:
    if sha256 and sha256 != mapping.sha256:
        raise VocabMappingError(
            f"its content has sha256 {mapping.sha256}, its metadata says {sha256}: it was changed; build it again"
        )


def _integers(key: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise VocabMappingError(
            f"{key} must be a vector of integers, got {tensor.dtype} {list(tensor.shape)}: save it as int64"
        )
    return tensor.to(torch.int64)


def _abridged(names: Iterable[str], limit: int = 8) -> str:
    known = sorted(names)
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return ", ".join(known[:limit]) + more if known else "nothing"
