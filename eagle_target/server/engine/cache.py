"""Supervision of sequences that were asked for before, by content; bounded, the least used goes first."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.server.engine.answer import Answer
    from eagle_target.server.engine.job import Part


class SequenceCache:
    """Keeps one sequence's supervision under a hash of all that decides its values.

    Args:
        max_bytes: of the tensors kept. fingerprint: of the target and its layers.
    """

    def __init__(self, max_bytes: int, fingerprint: str) -> None:
        self._max_bytes = max_bytes
        self._fingerprint = fingerprint
        self._entries: OrderedDict[bytes, dict[str, torch.Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self.held_bytes = 0
        self.hits = 0
        self.misses = 0

    def keys(self, request: SupervisionRequest) -> list[bytes]:
        """The key of each sequence of a request."""
        mapping = request.mapping.sha256 if request.mapping is not None and request.encoding == "probs" else None
        probs_dtype = request.probs_dtype if request.encoding == "probs" else None
        common = repr((self._fingerprint, request.encoding, request.has_row_facts, probs_dtype, mapping)).encode()
        keys = []
        starts = [0, *accumulate(request.seq_lens)]
        ids, wanted = request.input_ids.contiguous().numpy(), request.row_mask.contiguous().numpy()
        for start, end in pairwise(starts):
            digest = hashlib.blake2b(common, digest_size=32)
            digest.update(ids[start:end].data)
            digest.update(wanted[start:end].data)
            keys.append(digest.digest())
        return keys

    def find(self, part: Part) -> int:
        """Have a part hold what is here of it; returns the tokens that are left to compute."""
        with self._lock:
            found = {index: self._entries.get(part.job.keys[index]) for index in part.sequences}
        part.hits = {index: entry for index, entry in found.items() if entry is not None}
        return part.tokens

    def count(self, part: Part) -> None:
        """Count a part that is taken, and what it uses as used."""
        with self._lock:
            self.hits += len(part.hits)
            self.misses += len(part.sequences) - len(part.hits)
            for index in part.hits:
                if part.job.keys[index] in self._entries:
                    self._entries.move_to_end(part.job.keys[index])

    def keep(self, part: Part, answer: Answer) -> None:
        """Keep copies of what was computed for a part."""
        for index in part.missing:
            views = answer.extract(index)
            nbytes = _bytes_of(views)
            with self._lock:
                wanted = nbytes <= self._max_bytes and part.job.keys[index] not in self._entries
            if wanted:
                copies = {name: view.to("cpu", copy=True) for name, view in views.items()}
                self._add(part.job.keys[index], copies, nbytes)

    def _add(self, key: bytes, entry: dict[str, torch.Tensor], nbytes: int) -> None:
        with self._lock:
            while self.held_bytes + nbytes > self._max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.held_bytes -= _bytes_of(oldest)
            self._entries[key] = entry
            self.held_bytes += nbytes


def _bytes_of(entry: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in entry.values())
