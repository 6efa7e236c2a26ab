"""From a ragged request to ragged supervision: what a server does for a client.

tokens = sum(seq_lens); rows = the rows of the distribution that were asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, get_args

import torch

from eagle_target.errors import ContractError, VocabMappingError
from eagle_target.projection import PROBS_DTYPES, Encoding, project_full
from eagle_target.runner import SupervisingRunner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.info import TargetInfo
    from eagle_target.projection import ComputeLogits
    from eagle_target.rows import Sink
    from eagle_target.runner import TargetForward, TargetRunner
    from eagle_target.vocabulary import VocabMapping


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SupervisionRequest:
    """One ragged request, a pure function's input.

    input_ids: int64 `[tokens]`. seq_lens: tokens of each sequence.
    row_mask: bool `[tokens]`; row s, the prediction made at token s, is projected where it is set.
    mapping: needed for encoding `probs`. probs_dtype: float32, bfloat16 or float16.
    """

    input_ids: torch.Tensor
    seq_lens: tuple[int, ...]
    row_mask: torch.Tensor
    encoding: Encoding = "probs"
    mapping: VocabMapping | None = None
    probs_dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return self.input_ids.numel()

    @property
    def has_row_facts(self) -> bool:
        """Whether `target_top_ids` and `target_logsumexp` are in the answer.

        Not where the trainer projects the whole vocabulary by itself: it has both, and the target projects nothing.
        """
        return self.encoding != "hidden" or self.mapping is None or not self.mapping.is_whole

    def check(self, info: TargetInfo) -> None:
        """Refuse what the target cannot do.

        Raises:
            ContractError: dtypes, shapes, lengths, ids or the encoding are wrong.
            VocabMappingError: the mapping is missing or for another vocabulary.
        """
        _check_packed("input_ids", self.input_ids, torch.int64, self.tokens)
        _check_packed("row_mask", self.row_mask, torch.bool, self.tokens)
        if not self.seq_lens or min(self.seq_lens) < 1 or sum(self.seq_lens) != self.tokens:
            raise ContractError(
                f"seq_lens must be positive and add up to the {self.tokens} tokens of input_ids, "
                f"got {len(self.seq_lens)} lengths that add up to {sum(self.seq_lens)}"
            )
        if info.max_seq_len is not None and max(self.seq_lens) > info.max_seq_len:
            raise ContractError(
                f"a sequence has {max(self.seq_lens)} tokens, the target takes {info.max_seq_len}: truncate it, or "
                "serve the target with a longer context"
            )
        check_token_ids(self.input_ids, info.vocab_size)
        self._check_encoding(info)

    def _check_encoding(self, info: TargetInfo) -> None:
        if self.encoding not in get_args(Encoding):
            raise ContractError(f"encoding must be one of {get_args(Encoding)}, got {self.encoding!r}")
        if self.probs_dtype not in PROBS_DTYPES:
            raise ContractError(f"probs_dtype must be float32, bfloat16 or float16, got {self.probs_dtype}")
        if self.mapping is not None:
            self.mapping.check_target(info.vocab_size)
        elif self.encoding == "probs":
            raise VocabMappingError(
                "encoding 'probs' needs a vocabulary mapping: call set_vocab_mapping first, or use encoding='logits'"
            )


def compute_supervision(runner: TargetRunner, request: SupervisionRequest, sink: Sink) -> None:
    """Run the target on one request and put the supervision into a sink.

    Gives `aux_hidden_states` `[tokens, 3*hidden]`, the distribution in the request's encoding, `target_probs`,
    `last_hidden_states` or `logits`, `[rows, ...]`, and where the request has row facts `target_top_ids` and
    `target_logsumexp` `[rows]`.
    """
    device = torch.device(runner.info.device)
    # A trainer's autocast must not reach the target: the supervision would differ from a server's.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if isinstance(runner, SupervisingRunner):
            runner.supervise([request], [sink])
            return
        forward = runner.forward_eagle3(request.input_ids.to(device), request.seq_lens)
        check_forward(forward, request.tokens, runner.info)
        store_supervision(runner, request, forward, sink)


def store_supervision(runner: TargetRunner, request: SupervisionRequest, forward: TargetForward, sink: Sink) -> None:
    """Project one request's part of a forward and put the supervision into a sink."""
    sink.put("aux_hidden_states", forward.aux_hidden_states)
    rows = request.row_mask.to(forward.last_hidden_states.device).nonzero()[:, 0]
    hidden = forward.last_hidden_states.index_select(0, rows)
    if request.encoding == "hidden":
        sink.put("last_hidden_states", hidden)
        if not request.has_row_facts:
            return
    compute_logits: ComputeLogits = runner.compute_logits
    if forward.logits is not None:
        # The tiles are then tiles of row numbers: the target's own logits are looked up, not computed.
        compute_logits, hidden = partial(_look_up, forward.logits), rows[:, None]
    project_full(
        hidden,
        compute_logits,
        vocab_size=runner.info.vocab_size,
        encoding=request.encoding,
        mapping=None if request.mapping is None else request.mapping.to(hidden.device),
        probs_dtype=request.probs_dtype,
        sink=sink,
    )


def split_forward(forward: TargetForward, token_counts: Sequence[int]) -> list[TargetForward]:
    """Cut one forward over several requests' tokens into a forward each; views, no copies."""
    counts = list(token_counts)
    aux = torch.split(forward.aux_hidden_states, counts)
    last = torch.split(forward.last_hidden_states, counts)
    logits: Sequence[torch.Tensor | None] = (
        [None] * len(aux) if forward.logits is None else torch.split(forward.logits, counts)
    )
    return [
        type(forward)(aux_hidden_states=a, last_hidden_states=h, logits=v)
        for a, h, v in zip(aux, last, logits, strict=True)
    ]


def check_forward(forward: TargetForward, tokens: int, info: TargetInfo) -> None:
    """Refuse a runner's output of the wrong shape, before it is trained on.

    Raises:
        ContractError: names the tensor, its shape and the expected one.
    """
    expected = {
        "aux_hidden_states": (forward.aux_hidden_states, (tokens, 3 * info.hidden_size)),
        "last_hidden_states": (forward.last_hidden_states, (tokens, info.hidden_size)),
        "logits": (forward.logits, (tokens, info.vocab_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ContractError(
                f"engine {info.engine} {info.engine_version} gave {name} {list(tensor.shape)}, expected {list(shape)}"
            )


def check_token_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        ContractError: names the id, its index and the range.
    """
    wrong = ((input_ids < 0) | (input_ids >= vocab_size)).nonzero()
    if len(wrong):
        index = int(wrong[0, 0])
        raise ContractError(
            f"input_ids has {int(input_ids[index])} at token {index}, the target's ids are 0 to {vocab_size - 1}: "
            "use the target's own tokenizer"
        )


def _check_packed(name: str, tensor: torch.Tensor, dtype: torch.dtype, tokens: int) -> None:
    if tensor.dim() != 1 or tensor.dtype != dtype or len(tensor) != tokens or not tokens:
        raise ContractError(
            f"{name} must be a non-empty vector of {dtype} with {tokens} elements, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )


def _look_up(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return logits.index_select(0, rows[:, 0])
