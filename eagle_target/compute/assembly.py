"""From ragged supervision to the trainer's batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from eagle_target.compute.projection import RowFacts, project_draft
from eagle_target.contract.batch import Eagle3TargetBatch
from eagle_target.contract.request import answer_spec
from eagle_target.contract.sinks import RowStore, scattered_store
from eagle_target.errors import ContractError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.compute.layout import TrainerRows
    from eagle_target.contract.request import SupervisionRequest, TensorSpec
    from eagle_target.contract.runner import DraftHead
    from eagle_target.contract.sinks import Allocate
    from eagle_target.contract.target import TargetInfo


class BatchAssembler:
    """A sink that scatters ragged supervision into a batch on one device.

    Row s of the distribution goes to position s - 1, so the shift happens here and crosses no sequence end.

    Args:
        rows: the trainer's rows. request: what was asked for. info: the target that was asked.
        draft_head: needed for encoding `hidden`. device: where the batch goes.
        allocate: makes uninitialised memory of a shape and dtype.
    """

    def __init__(
        self,
        rows: TrainerRows,
        request: SupervisionRequest,
        *,
        info: TargetInfo,
        draft_head: DraftHead | None,
        device: torch.device,
        allocate: Allocate,
    ) -> None:
        self._rows = rows
        self._request = request
        self._draft_head = draft_head
        self._device = device
        self._allocate = allocate
        self._stores: dict[str, RowStore] = {}
        self._row_positions = rows.layout.token_positions[request.row_mask] - 1
        self._info = info
        self._spec = answer_spec(request, info)

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return the store that scatters `[rows, ...]` into the batch.

        Raises:
            ProtocolError: a tensor nobody asked for, twice the same, or one of another shape or dtype than asked for.
        """
        expected = self._spec.get(name)
        given = f"supervision has {name} {list(shape)} of {dtype}"
        if expected is None or name in self._stores:
            raise ProtocolError(f"{given} once too often: asked for were {sorted(self._spec)}")
        if not expected.fits(shape, dtype):
            raise ProtocolError(f"{given}, not {expected}")
        if name == "last_hidden_states":
            self._stores[name] = RowStore(self._allocate(tuple(shape), dtype))
        else:
            self._scatter(name, expected, dtype)
        return self._stores[name]

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Scatter a whole tensor `[rows, ...]`."""
        self.allocate(name, rows.shape, rows.dtype).write(0, rows)

    def finish(self) -> Eagle3TargetBatch:
        """Return the batch, once every tensor is in.

        Raises:
            ProtocolError: a tensor of the encoding is missing.
        """
        if self._request.encoding == "hidden":
            self._project_hidden()
        probs = None if self._request.encoding == "logits" else self._take("target_probs")
        top_ids = self._take("target_top_ids")
        loss_mask = self._rows.layout.shift_left(self._rows.loss_mask).to(self._device)
        return Eagle3TargetBatch(
            aux_hidden_states=self._take("aux_hidden_states"),
            input_ids=self._rows.layout.shift_left(self._rows.input_ids).to(self._device),
            attention_mask=self._rows.attention_mask.to(self._device),
            loss_mask=loss_mask,
            logits=self._take("logits") if probs is None else None,
            target_probs=probs,
            position_mask=None if probs is None else self._position_mask(top_ids, loss_mask),
            target_top_ids=top_ids,
            target_logsumexp=self._take("target_logsumexp"),
            position_ids=self._on_device(self._rows.position_ids),
            seq_lens=self._on_device(self._rows.seq_lens),
            doc_remaining=self._on_device(self._rows.doc_remaining),
        )

    def _project_hidden(self) -> None:
        if "last_hidden_states" not in self._stores or self._draft_head is None:
            raise ProtocolError("supervision in encoding 'hidden' came without last_hidden_states or a draft head")
        hidden = self._stores["last_hidden_states"].out
        # The trainer makes here what the server would have sent in encoding `probs`.
        spec = answer_spec(replace(self._request, encoding="probs"), self._info)
        store = self._scatter("target_probs", spec["target_probs"])
        facts: RowFacts | None = None
        if self._request.mapping is not None and not self._request.has_row_facts:
            facts = RowFacts(
                self._scatter("target_top_ids", spec["target_top_ids"]),
                self._scatter("target_logsumexp", spec["target_logsumexp"]),
                self._request.mapping.to(hidden.device).selected_token_ids,
            )
        project_draft(hidden, self._draft_head, store, facts)

    def _scatter(self, name: str, spec: TensorSpec, dtype: torch.dtype | None = None) -> RowStore:
        positions = self._rows.layout.token_positions if spec.axis == "tokens" else self._row_positions
        slots = self._rows.layout.batch * self._rows.layout.seq
        self._stores[name] = scattered_store(slots, spec.shape, dtype or spec.dtype, positions, self._allocate)
        return self._stores[name]

    def _take(self, name: str) -> torch.Tensor:
        if name not in self._stores:
            raise ProtocolError(f"supervision came without {name}, only with {sorted(self._stores)}")
        out = self._stores[name].out
        layout = self._rows.layout
        return out.view(layout.batch, layout.seq, *out.shape[1:])

    def _position_mask(self, top_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        if self._request.mapping is None:
            raise ContractError("position_mask needs a vocabulary mapping: call set_vocab_mapping first")
        mask = self._request.mapping.to(self._device).selected_token_mask
        if bool(((top_ids < 0) | (top_ids >= len(mask))).any()):
            raise ProtocolError(
                f"target_top_ids has ids outside 0 to {len(mask) - 1}: the server's answer is not valid"
            )
        in_draft = mask[top_ids.to(torch.int64)]
        return (in_draft & loss_mask.bool())[..., None]

    def _on_device(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(self._device)


class StagedSink:
    """A sink for an assembler: on the CPU the assembler's own stores, for a device pinned memory that is copied there.

    Args:
        assembler: what makes the batch. device: where the batch goes. allocate: makes pinned memory.
    """

    def __init__(self, assembler: BatchAssembler, device: torch.device, allocate: Allocate) -> None:
        self._assembler = assembler
        self._allocate = allocate
        self._device = device
        self._direct = device.type == "cpu"
        self._staged: dict[str, torch.Tensor] = {}

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        """Return the assembler's store, or a packed one in pinned memory."""
        if self._direct:
            return self._assembler.allocate(name, shape, dtype)
        self._staged[name] = self._allocate(shape, dtype)
        return RowStore(self._staged[name])

    def put(self, name: str, rows: torch.Tensor) -> None:
        """Hand a whole tensor on, wherever it lies."""
        self._assembler.put(name, rows)

    def finish(self) -> Eagle3TargetBatch:
        """Copy what is staged to the device, wait until the pinned memory can be used again, and return the batch."""
        try:
            for name, rows in self._staged.items():
                self._assembler.put(name, rows)
        finally:
            if self._staged and self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        # Not before: others may write to the memory from now on.
        self._staged.clear()
        return self._assembler.finish()
