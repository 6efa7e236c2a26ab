"""How the adapter suites make their targets, and what they compare them with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.plugins.options import build_model
from eagle_target.testing.adapter_oracle import HFOracle, assert_near, check_batch
from eagle_target.testing.tiny import save_tiny_target, shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from eagle_target.contract.runner import TargetForward, TargetRunner
    from eagle_target.plugins.adapter import Adapter
    from eagle_target.testing.adapter_oracle import TrainerInput

AUX = (0, 3, 5)
DRAFT_VOCAB = 48
RAGGED = (1, 2, 3, 5, 8, 13, 21, 34, 1, 7)
# Enough that a mean over them says how well a computation rounds.
MANY_TOKENS = (257, 33, 1, 400, 128, 205)


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """A checkpoint under the adapter and under transformers."""

    checkpoint: Path
    runner: TargetRunner
    oracle: HFOracle

    def forward(self, sequences: Sequence[Sequence[int]], aux_layer_ids: Sequence[int] = AUX) -> TargetForward:
        """One ragged forward."""
        self.runner.set_aux_layers(aux_layer_ids)
        ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
        lengths = [len(sequence) for sequence in sequences]
        with torch.no_grad():
            return self.runner.forward_eagle3(ids.to(self.runner.info.device), lengths)

    def sequences(self, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
        """Random sequences of these lengths."""
        draw = torch.Generator().manual_seed(seed)
        return [torch.randint(0, self.oracle.vocab_size, (n,), generator=draw).tolist() for n in lengths]

    def logits(self, forward: TargetForward, rows: slice = slice(None)) -> torch.Tensor:
        """Logits of rows of a forward, by the engine's own head."""
        if forward.logits is not None:
            return forward.logits[rows]
        with torch.no_grad():
            return self.runner.compute_logits(forward.last_hidden_states[rows])


class AdapterSuite:
    """What the suites share: the adapter under test and how its targets are made.

    adapter: the class under test. options: the adapter's, as a user would give them.
    dtype: of the checkpoints. tolerance: error of a hidden state or logit row, relative to its norm.
    """

    adapter: ClassVar[type[Adapter]]
    options: ClassVar[Mapping[str, Any]] = {}
    dtype: ClassVar[str] = "float32"
    tolerance: ClassVar[float] = 1e-4

    @classmethod
    def make_checkpoint(cls, folder: Path, **sizes: Any) -> Path:
        """Write a checkpoint; sizes are those of `save_tiny_target`. Override for an engine with demands."""
        return save_tiny_target(folder, **{"dtype": cls.dtype, **sizes})

    @classmethod
    def load(cls, checkpoint: Path, *, aux_layer_ids: Sequence[int] | None = None, **more_options: Any) -> TargetRunner:
        """Load a checkpoint as `eagle-target serve` does."""
        options = build_model(cls.adapter.options_model, {**cls.options, **more_options}, "options")
        return cls.adapter.load(str(checkpoint), options, aux_layer_ids)

    @classmethod
    def load_both(cls, checkpoint: Path, aux_layer_ids: Sequence[int] | None = None) -> LoadedTarget:
        """Load a checkpoint under the adapter and under transformers."""
        return LoadedTarget(checkpoint, cls.load(checkpoint, aux_layer_ids=aux_layer_ids), HFOracle(checkpoint))

    @pytest.fixture(scope="class")
    @classmethod
    def target(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedTarget]:
        """A target with an LM head of its own, loaded once a class."""
        loaded = cls.load_both(cls.make_checkpoint(tmp_path_factory.mktemp("untied")))
        yield loaded
        loaded.runner.close()

    def check_states(self, loaded: LoadedTarget, lengths: Sequence[int], aux_layer_ids: Sequence[int] = AUX) -> None:
        """Compare one ragged forward and its logits with transformers."""
        sequences = loaded.sequences(lengths)
        forward = loaded.forward(sequences, aux_layer_ids)
        states = [loaded.oracle.run(sequence) for sequence in sequences]
        aux = torch.cat([state.aux(aux_layer_ids) for state in states])
        width = loaded.oracle.hidden_size
        for index, layer in enumerate(sorted(aux_layer_ids)):
            part = slice(index * width, (index + 1) * width)
            assert_near(forward.aux_hidden_states[:, part], aux[:, part], self.tolerance, f"layer {layer}")
        last = torch.cat([state.last for state in states])
        assert_near(forward.last_hidden_states, last, self.tolerance, "last_hidden_states")
        logits = torch.cat([state.logits for state in states])
        assert_near(loaded.logits(forward), logits, self.tolerance, "logits")

    def check_rows(self, loaded: LoadedTarget, given: TrainerInput, *, encoding: Any = "probs") -> None:
        """Compare a co-located batch with transformers."""
        backend = RunnerEagle3TargetModel(loaded.runner, AUX, encoding=encoding)
        mapping = shuffled_mapping(loaded.oracle.vocab_size, DRAFT_VOCAB)
        backend.set_vocab_mapping(mapping)
        check_batch(
            backend.generate_batch(**given.arguments()).tensors(),
            given,
            loaded.oracle,
            aux_layer_ids=AUX,
            selected_token_ids=mapping.selected_token_ids.tolist(),
            tolerance=self.tolerance,
        )
