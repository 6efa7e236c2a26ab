"""Proofs at load, on a few tokens: that what is computed in parts is what the model computes as a whole."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from eagle_target.errors import AdapterError
from eagle_target_hf.architecture import module_at
from eagle_target_hf.batching import plan_batches
from eagle_target_hf.execution import Execution, run_batches
from eagle_target_hf.head import HeadForm, OwnHead, candidate_forms
from eagle_target_hf.layer_proof import find_obstacles
from eagle_target_hf.tolerance import is_close, is_same_direction

if TYPE_CHECKING:
    from eagle_target_hf.architecture import Architecture
    from eagle_target_hf.batching import Layout

_logger = logging.getLogger(__name__)

_PROBE_TOKENS = 8
_SHORT_TOKENS = 3
_PROBE_COLUMNS = 64
# A soft-cap of 30 or 50 shows at logits as large as this, and not at those of eight odd tokens.
_LARGE_LOGIT = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Proven:
    """What was found out about a model.

    execution: how to run it. head: replays its head; None where only its own forward gives its logits.
    draft_form: what its head does to the rows of a plain weight, if it is as simple as that.
    obstacles: why a layer cannot be captured, by the ids of those that cannot.
    """

    execution: Execution
    head: OwnHead | None
    draft_form: HeadForm | None
    obstacles: dict[int, str]


def prove(architecture: Architecture) -> Proven:
    """Find the decoder, replay the head and choose how sequences share a batch; call without gradients.

    Raises:
        AdapterError: no module gives last hidden states of the config's width, none of the layers can be captured, or
            the numbers are not finite.
    """
    device = architecture.device()
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=device) * max(1, architecture.vocab_size // (_PROBE_TOKENS + 1))
    ids = ids % architecture.vocab_size
    output = architecture.causal_lm(input_ids=ids[None], use_cache=False, return_dict=True)
    own = output.logits[0]
    if own.shape[-1] < architecture.vocab_size:
        raise AdapterError(
            f"{architecture.name} gives {own.shape[-1]} logits, its config says vocab_size {architecture.vocab_size}"
        )
    own = own[:, : architecture.vocab_size]
    path, hidden, head = _find_decoder(architecture, ids, own)
    execution = Execution(
        architecture=architecture,
        decoder=module_at(architecture.causal_lm, path),
        own_logits=head is None,
        layout="equal",
        dtype=hidden.dtype,
        logits_dtype=own.dtype,
        device=device,
    )
    if not bool(hidden.isfinite().all()):
        raise AdapterError(
            f"{architecture.name} gives last hidden states that are not finite in {execution.dtype}: use dtype "
            "bfloat16 or float32, or look at the checkpoint"
        )
    obstacles = find_obstacles(execution, ids)
    if len(obstacles) == len(architecture.layers):
        raise AdapterError(f"{architecture.name}: {obstacles[0]}")
    captured = [layer for layer in range(len(architecture.layers)) if layer not in obstacles]
    execution = replace(execution, layout=_choose_layout(execution, ids, captured))
    form = None if head is None else _find_draft_form(architecture, head, hidden, own)
    return Proven(execution=execution, head=head, draft_form=form, obstacles=obstacles)


def _find_decoder(
    architecture: Architecture, ids: torch.Tensor, own: torch.Tensor
) -> tuple[tuple[str, ...], torch.Tensor, OwnHead | None]:
    usable: list[tuple[tuple[str, ...], torch.Tensor]] = []
    problems: list[str] = []
    for path in architecture.decoder_paths():
        where = ".".join(path)
        try:
            output = module_at(architecture.causal_lm, path)(input_ids=ids[None], use_cache=False, return_dict=True)
            if tuple(output[0].shape) != (1, len(ids), architecture.hidden_size):
                problems.append(f"{where} gives {list(output[0].shape)}")
                continue
            hidden = output[0][0]
            usable.append((path, hidden))
            head = OwnHead(architecture, path, tuple if isinstance(output, tuple) else type(output))
            if is_close(head(hidden), own):
                return path, hidden, head
            problems.append(f"{where} leads to other logits")
        except Exception as error:  # noqa: BLE001 - another module may do, and the message is kept
            problems.append(f"{where}: {type(error).__name__}: {error}")
    problem = "; ".join(problems) or "it has no decoder below its head"
    if not usable:
        raise AdapterError(
            f"{architecture.name} gives no last hidden states of width {architecture.hidden_size} ({problem}): "
            "this architecture is not supported"
        )
    warnings.warn(
        f"the head of {architecture.name} cannot be replayed on its last hidden states ({problem}): full logits come "
        "from its own forward, which takes more memory, and encoding 'hidden' is not available",
        stacklevel=2,
    )
    return *usable[0], None


def _choose_layout(execution: Execution, ids: torch.Tensor, layers: list[int]) -> Layout:
    """Return the cheapest layout in which a short sequence beside a long one gives what it gives alone."""
    lengths = (_SHORT_TOKENS, len(ids))
    request = torch.cat([ids[:_SHORT_TOKENS], ids])
    alone = _states(execution, request, lengths, layers)
    layouts: list[Layout] = ["packed"] if execution.architecture.is_flash else []
    layouts += ["padded", "masked"]
    for layout in layouts:
        try:
            shared = _states(replace(execution, layout=layout), request, lengths, layers)
        except Exception as error:  # noqa: BLE001 - a layout that the model refuses is one it does not support
            _logger.info("%s does not run with layout %s: %s", execution.architecture.name, layout, error)
            continue
        if all(is_same_direction(given, expected) for given, expected in zip(shared, alone, strict=True)):
            return layout
        _logger.info("%s gives other hidden states with layout %s", execution.architecture.name, layout)
    _logger.warning(
        "%s gives other hidden states when sequences of different lengths share a batch: only equal lengths will, "
        "which is slower",
        execution.architecture.name,
    )
    return "equal"


def _states(
    execution: Execution, ids: torch.Tensor, lengths: tuple[int, ...], layers: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the layers, and the last ones."""
    batches = plan_batches(lengths, layout=execution.layout, max_batch_tokens=2 * len(ids))
    forward = run_batches(execution, ids, batches, aux_layer_ids=layers)
    return forward.aux_hidden_states, forward.last_hidden_states


def _find_draft_form(
    architecture: Architecture, head: OwnHead, hidden: torch.Tensor, own: torch.Tensor
) -> HeadForm | None:
    columns = torch.arange(0, architecture.vocab_size, max(1, architecture.vocab_size // _PROBE_COLUMNS))
    large = hidden * (_LARGE_LOGIT / own.float().abs().max().clamp(min=1e-3)).to(hidden.dtype)
    tests = [(rows, head(rows)[:, columns.to(rows.device)]) for rows in (hidden, large)]
    for form in candidate_forms(architecture.config):
        draft = form.rows(architecture, columns)
        if draft is None or draft.weight.dtype != hidden.dtype:
            return None
        draft = draft.to(hidden.device)
        if all(is_close(draft.compute_logits(rows), expected) for rows, expected in tests):
            return form
    return None
