"""One end of a group: what it holds on to when a transfer breaks."""

from __future__ import annotations

import time
import weakref
from typing import Any

import pytest
import torch
from eagle_target_nccl.groups import ACKNOWLEDGEMENT, CLIENT, TAGS, TAIL, PairGroup

from eagle_target.errors import ConnectError


class Work:
    """What torch gives for a message that is under way; it holds the connection."""


class BreakingGroup(PairGroup):
    """A connection ends after the data is under way, before the last message of a transfer is waited for."""

    def __init__(self, breaks_at: int) -> None:
        super().__init__(self, CLIENT, torch.device("cpu"))
        self._breaks_at = breaks_at
        self.under_way: list[weakref.ref[Work]] = []

    def send(self, messages: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self._begin(tag)

    def recv(self, messages: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self._begin(tag)

    def _begin(self, tag: int) -> Work:
        if tag % TAGS == self._breaks_at:
            raise RuntimeError("Connection closed by peer")
        work = Work()
        self.under_way.append(weakref.ref(work))
        return work

    def _wait(self, work: Any, deadline: float) -> None:
        raise RuntimeError("Connection closed by peer")

    def _abort(self, group: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("transfer", "breaks_at"), [("pull", TAIL), ("pull", -1), ("push", TAIL), ("push", ACKNOWLEDGEMENT), ("push", -1)]
)
def test_an_error_that_is_kept_keeps_no_connection(transfer: str, breaks_at: int) -> None:
    group = BreakingGroup(breaks_at)
    messages = [torch.empty(4, dtype=torch.uint8) for _ in range(3)]
    with pytest.raises(ConnectError) as kept:
        getattr(group, transfer)(messages, 1, 12, time.monotonic() + 1)
    assert len(group.under_way) >= len(messages)
    assert [work() for work in group.under_way if work() is not None] == []
    assert kept.value.__cause__ is not None
