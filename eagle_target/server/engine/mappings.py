"""The vocabulary mappings a server was given, by content."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from eagle_target.errors import VocabMappingError

if TYPE_CHECKING:
    from eagle_target.contract.vocab_mapping import VocabMapping


class MappingStore:
    """Keeps the `max_mappings` used last."""

    def __init__(self, max_mappings: int) -> None:
        self._max_mappings = max_mappings
        self._mappings: OrderedDict[str, VocabMapping] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, mapping: VocabMapping) -> None:
        """Keep a mapping under its hash."""
        with self._lock:
            self._mappings[mapping.sha256] = mapping
            self._mappings.move_to_end(mapping.sha256)
            while len(self._mappings) > self._max_mappings:
                self._mappings.popitem(last=False)

    def find(self, sha256: str) -> VocabMapping:
        """Return the mapping of a hash.

        Raises:
            VocabMappingError: it is not here; upload it.
        """
        with self._lock:
            if sha256 not in self._mappings:
                raise VocabMappingError(
                    f"this server has no vocabulary mapping {sha256[:64]!r}: PUT it to /v1/vocab-mappings/{{sha256}}"
                )
            self._mappings.move_to_end(sha256)
            return self._mappings[sha256]
