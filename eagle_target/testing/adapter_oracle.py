"""What an adapter must give, from plain Hugging Face transformers and loops: shares no code with what it checks.

Position t of a row carries what was computed at the token after t in the same sequence.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from eagle_target.contract.batch import Eagle3TargetBatch


@dataclass(frozen=True, slots=True)
class OracleStates:
    """One sequence in float32: the output of every decoder layer `[n, hidden]`, the normed last and the logits."""

    layers: tuple[torch.Tensor, ...]
    last: torch.Tensor
    logits: torch.Tensor

    def aux(self, aux_layer_ids: Sequence[int]) -> torch.Tensor:
        """`[n, 3*hidden]`, layers low to high."""
        return torch.cat([self.layers[layer] for layer in sorted(aux_layer_ids)], dim=1)


class HFOracle:
    """A checkpoint under transformers: one full forward for each sequence, nothing padded, packed or cached.

    Args:
        checkpoint: its folder. dtype: as torch spells it; `auto` for the checkpoint's.
        attention: of transformers' implementations; None for its own choice.
    """

    def __init__(self, checkpoint: Path, *, dtype: str = "auto", attention: str | None = None) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation=attention)
        self.model: Any = model.eval()
        self.num_layers = int(self.model.config.num_hidden_layers)
        self.vocab_size = int(self.model.config.vocab_size)
        self.hidden_size = int(self.model.config.hidden_size)
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self._known: dict[tuple[int, ...], OracleStates] = {}
        # The hook below would catch the layers of another thread's forward.
        self._lock = threading.Lock()

    def run(self, ids: Sequence[int]) -> OracleStates:
        """The states of one sequence."""
        key = tuple(ids)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._forward(key)
            return self._known[key]

    def input_embedding(self) -> torch.Tensor:
        """`[vocab, hidden]`."""
        return self.model.get_input_embeddings().weight.detach()  # type: ignore[no-any-return]

    @torch.no_grad()
    def _forward(self, ids: tuple[int, ...]) -> OracleStates:
        raw: list[Any] = []
        # transformers norms the last entry of hidden_states, so the last layer's own output needs a hook.
        with _last_decoder_layer(self.model, self.num_layers).register_forward_hook(
            lambda _module, _args, output: raw.append(output)
        ):
            output = self.model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        last_layer = raw[0][0] if isinstance(raw[0], tuple) else raw[0]
        layers = [*output.hidden_states[1:-1], last_layer]
        return OracleStates(
            tuple(layer.reshape(len(ids), -1).float() for layer in layers),
            output.hidden_states[-1][0].float(),
            output.logits[0].float(),
        )


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm."""
    return float((given.detach().cpu().float() - expected).norm() / expected.norm())


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerInput:
    """A trainer's `[batch, seq]` tensors; seq_lens only for packed rows."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    loss_mask: torch.Tensor
    seq_lens: torch.Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate_batch`."""
        packing = {} if self.seq_lens is None else {"seq_lens": self.seq_lens}
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "loss_mask": self.loss_mask,
            **packing,
        }

    def documents(self) -> list[tuple[int, list[int]]]:
        """Each sequence: its row, and its positions in that row."""
        found = []
        for row in range(len(self.input_ids)):
            real = [position for position, flag in enumerate(self.attention_mask[row].tolist()) if flag]
            lengths = [len(real)] if self.seq_lens is None else self.seq_lens[row].tolist()
            for length in lengths:
                if length:
                    found.append((row, real[:length]))
                real = real[length:]
        return found


def padded_input(lengths: Sequence[int], vocab_size: int, *, left: bool = False, seed: int = 0) -> TrainerInput:
    """Rows of these lengths, padded on one side, with about half of the tokens in the loss mask."""
    draw = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids, attention_mask, loss_mask = torch.zeros(3, len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        span = slice(width - length, width) if left else slice(0, length)
        input_ids[row, span] = torch.randint(0, vocab_size, (length,), generator=draw)
        attention_mask[row, span] = 1
        loss_mask[row, span] = torch.randint(0, 2, (length,), generator=draw)
    return TrainerInput(input_ids=input_ids, attention_mask=attention_mask, loss_mask=loss_mask)


def packed_input(rows: Sequence[Sequence[int]], vocab_size: int, *, seed: int = 0) -> TrainerInput:
    """Rows that hold documents of these lengths one after another, padded on the right."""
    padded = padded_input([sum(row) for row in rows], vocab_size, seed=seed)
    seq_lens = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.int64)
    for index, row in enumerate(rows):
        seq_lens[index, : len(row)] = torch.tensor(row)
    return TrainerInput(
        input_ids=padded.input_ids,
        attention_mask=padded.attention_mask,
        loss_mask=padded.loss_mask,
        seq_lens=seq_lens,
    )


def check_batch(
    tensors: Mapping[str, torch.Tensor],
    given: TrainerInput,
    oracle: HFOracle,
    *,
    aux_layer_ids: Sequence[int],
    selected_token_ids: Sequence[int],
    tolerance: float,
) -> None:
    """Compare a batch of encoding `probs` or `logits` and rows `supervised` with the oracle, position by position."""
    expected = _expected_ids(given)
    for name, wanted in expected.items():
        assert torch.equal(tensors[name].cpu().to(wanted.dtype), wanted), f"{name} is not shifted as expected"
    supervised = torch.zeros_like(given.attention_mask, dtype=torch.bool)
    for row, positions in given.documents():
        states = oracle.run(given.input_ids[row, positions].tolist())
        aux = tensors["aux_hidden_states"][row, positions]
        assert_near(aux, states.aux(aux_layer_ids), tolerance, f"aux_hidden_states of row {row}")
        for index, position in enumerate(positions[:-1]):
            if given.loss_mask[row, positions[index + 1]]:
                supervised[row, position] = True
                _check_position(
                    {name: tensor[row, position] for name, tensor in tensors.items() if name in _DISTRIBUTION},
                    states.logits[index + 1],
                    selected_token_ids,
                    tolerance,
                )
    for name in _DISTRIBUTION & {*tensors}:
        others = tensors[name].cpu()[~supervised]
        assert not others.any(), f"{name} is not zero at positions that bear no loss"
    assert not tensors["aux_hidden_states"].cpu()[given.attention_mask == 0].any(), "aux_hidden_states at pads"


def check_batches(
    batches: Iterable[Eagle3TargetBatch],
    inputs: Sequence[TrainerInput],
    oracle: HFOracle,
    *,
    aux_layer_ids: Sequence[int],
    selected_token_ids: Sequence[int],
    tolerance: float,
    after_first: Callable[[], object] = lambda: None,
) -> None:
    """`check_batch` for every batch of a prefetch, as they come; something happens after the first."""
    for number, (given, batch) in enumerate(zip(inputs, batches, strict=True)):
        check_batch(
            batch.tensors(),
            given,
            oracle,
            aux_layer_ids=aux_layer_ids,
            selected_token_ids=selected_token_ids,
            tolerance=tolerance,
        )
        if number == 0:
            after_first()


def assert_near(given: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Whether each row of `[n, width]` is within `tolerance`, relative to the row's norm."""
    assert given.shape == expected.shape, f"{what}: {list(given.shape)}, expected {list(expected.shape)}"
    difference = (given.detach().cpu().float() - expected).norm(dim=-1)
    error = (difference / expected.norm(dim=-1).clamp_min(1e-6)).nan_to_num(nan=torch.inf)
    if error.numel():
        worst = int(error.argmax())
        assert float(error.max()) <= tolerance, (
            f"{what} is off by {float(error.max()):.2e} of its norm at index {worst}, {tolerance:.0e} is allowed"
        )


_DISTRIBUTION = frozenset({"target_probs", "position_mask", "target_top_ids", "target_logsumexp", "logits"})


def _check_position(
    made: Mapping[str, torch.Tensor], logits: torch.Tensor, selected_token_ids: Sequence[int], tolerance: float
) -> None:
    slack = tolerance * float(logits.norm())
    top_id = int(made["target_top_ids"])
    assert float(logits[top_id]) >= float(logits.max()) - 2 * slack, f"{top_id} is not the most probable token"
    logsumexp = float(torch.logsumexp(logits.double(), 0))
    assert abs(float(made["target_logsumexp"]) - logsumexp) <= slack + 1e-5, "target_logsumexp"
    if "logits" in made:
        assert_near(made["logits"][None], logits[None], tolerance, "logits")
        return
    probs = torch.softmax(logits[list(selected_token_ids)], 0)
    assert_near(made["target_probs"][None], probs[None], 4 * slack + 1e-5, "target_probs")
    assert bool(made["position_mask"]) == (top_id in selected_token_ids), "position_mask"


def _expected_ids(given: TrainerInput) -> dict[str, torch.Tensor]:
    expected = {
        "input_ids": torch.zeros_like(given.input_ids),
        "loss_mask": torch.zeros_like(given.loss_mask),
        "attention_mask": given.attention_mask,
    }
    if given.seq_lens is not None:
        expected["position_ids"] = torch.zeros_like(given.input_ids)
        expected["doc_remaining"] = torch.zeros_like(given.input_ids)
        expected["seq_lens"] = given.seq_lens
    for row, positions in given.documents():
        for index, position in enumerate(positions):
            if index + 1 < len(positions):
                expected["input_ids"][row, position] = given.input_ids[row, positions[index + 1]]
                expected["loss_mask"][row, position] = given.loss_mask[row, positions[index + 1]]
            if given.seq_lens is not None:
                expected["position_ids"][row, position] = index
                expected["doc_remaining"][row, position] = len(positions) - 1 - index
    return expected


def _last_decoder_layer(model: Any, num_layers: int) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return module[-1]
    raise AssertionError(f"{type(model).__name__} has no list of {num_layers} decoder layers")
